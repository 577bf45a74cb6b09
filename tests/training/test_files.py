"""Files are there whole or not at all, and what could not be written is named, whoever met the full disk."""

import pytest
from full_disk import full_disk
from training_runs import config_for

from flashvec.runtime.checkpoint.placing import naming
from flashvec.training.files import whole
from flashvec.training.model import load_model
from flashvec.training.sentences import write_lines


def test_a_file_or_folder_is_replaced_whole(tmp_path):
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "own").write_text(name)
    with whole(tmp_path / "old") as partial:
        partial.mkdir()
        (partial / "other").write_text("x")
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["other"]
    with pytest.raises(KeyError), whole(tmp_path / "new") as partial:
        partial.mkdir()
        raise KeyError
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["own"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


def test_the_folder_of_a_file_is_made(tmp_path):
    write_lines(tmp_path / "new" / "deep" / "lines.txt", ["a line"])
    assert (tmp_path / "new" / "deep" / "lines.txt").read_text() == "a line\n"
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"file/lines\.txt could not be written .*: see that it may be written"):
        write_lines(tmp_path / "file" / "lines.txt", ["a line"])


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    write_lines(tmp_path / "lines.txt", ["as it was"])
    with full_disk(), pytest.raises(OSError, match=r"lines\.txt could not be written .*: make room there"):
        write_lines(tmp_path / "lines.txt", ["another one"] * 99)
    assert [path.name for path in tmp_path.iterdir()] == ["lines.txt"]
    assert (tmp_path / "lines.txt").read_text() == "as it was\n"


@pytest.mark.parametrize(("train", "left"), [("lora", "adapter_model.safetensors"), ("body", "encoder")])
def test_what_was_trained_stays_as_it_was_where_the_disk_is_full(train, left, tmp_path):
    model = load_model(config_for("mntp", tmp_path, train=train))
    model.save(tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with full_disk(), pytest.raises(OSError, match=rf"out/{left} could not be written \(Error while serializing"):
        model.save(tmp_path / "out")
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    if train == "lora":  # tokenizers have an error of their own
        with full_disk(), pytest.raises(OSError, match=r"out could not be written"), naming(tmp_path / "out"):
            model.tokenizer.save(tmp_path / "out")
