"""Files are there whole or not at all, and what could not be written is named, whoever met the full disk."""

from dataclasses import replace
from pathlib import Path

import pytest
from full_disk import full_disk
from training_runs import config_for
from typer.testing import CliRunner

from flashvec.runtime.checkpoint.placing import naming
from flashvec.runtime.cli import app
from flashvec.training.files import whole
from flashvec.training.model import load_model
from flashvec.training.run import run_training
from flashvec.training.sentences import write_lines
from flashvec.training.settings import ConfigError, to_yaml


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


def test_a_file_takes_no_folders_place(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "own").write_text("kept")
    for path in (tmp_path / "runs", Path(".")):
        with pytest.raises(OSError, match="name a file to write"):
            write_lines(path, ["a line"])
    assert (tmp_path / "runs" / "own").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize("command", ["mine model {} {}", "sentences {} --out {}", "pairs {} --out {}"])
def test_commands_write_over_no_folder_and_no_input(command, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "in.jsonl").write_text("{}\n")
    for out, error in ((tmp_path / "runs", IsADirectoryError), (tmp_path / "in.jsonl", ValueError)):
        result = CliRunner().invoke(app, command.format(tmp_path / "in.jsonl", out).split())
        assert isinstance(result.exception, error) and "to write" in str(result.exception)
    assert (tmp_path / "in.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize("command", ["mine model {} {}", "sentences {} --out {}", "pairs {} --out {}"])
def test_commands_write_over_no_file_of_a_folder_that_is_read(command, tmp_path):
    (tmp_path / "in.jsonl").write_text("{}\n")
    result = CliRunner().invoke(app, command.format(tmp_path, tmp_path / "in.jsonl").split())
    assert isinstance(result.exception, ValueError) and "is also read from" in str(result.exception)
    assert (tmp_path / "in.jsonl").read_text() == "{}\n"


def test_commands_name_files_by_what_is_in_them(tmp_path):
    (tmp_path / "in.txt").write_text("It is a short line.\n")
    for command, out in (("sentences {} --out {}", "a.jsonl"), ("pairs {} --out {}", "a.txt"), ("mine m {} {}", "a")):
        result = CliRunner().invoke(app, command.format(tmp_path / "in.txt", tmp_path / out).split())
        assert "what is written are" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_a_run_is_not_written_over_its_model(tmp_path):
    config = config_for("mntp", tmp_path)
    model = sorted(path.name for path in Path(config.model).iterdir())
    with pytest.raises(ConfigError, match="which model names too"):
        run_training(replace(config, output=config.model))
    with pytest.raises(ConfigError, match="which adapters names too"):
        run_training(replace(config, adapters=(config.output,)))
    with pytest.raises(ConfigError, match=r"which lora\.start names too"):
        run_training(replace(config, lora=replace(config.lora, start=config.output)))
    distilled = config_for("distill", tmp_path, teachers=[config.output], prompts=[])
    with pytest.raises(ConfigError, match="which teachers names too"):
        run_training(distilled)
    body = config_for("mntp", tmp_path, train="body", model=str(tmp_path / "out" / "encoder"))
    with pytest.raises(ConfigError, match="which model names too"):
        run_training(body)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"a folder that holds a model \(config\.json\): name a new one"):
        run_training(replace(config, output=str(tmp_path / "other")))
    with pytest.raises(ConfigError, match="a file: name a folder to write"):
        run_training(replace(config, output=str(tmp_path / "other" / "config.json")))
    assert sorted(path.name for path in Path(config.model).iterdir()) == model
    assert (tmp_path / "other" / "config.json").read_text() == "{}"


def test_a_run_writes_over_no_file_of_ones_own(tmp_path):
    """`output: .` beside the settings that the run was started by, with notes in them, and a log of something else."""
    config = config_for("mntp", tmp_path)
    output = Path(config.output)
    output.mkdir(parents=True)
    notes = "# what we found\n" + to_yaml(config)
    for name, text in (("train.yaml", notes), ("log.jsonl", '{"mine": 1}\n'), ("seen.npy", "mine")):
        (output / name).write_text(text)
        with pytest.raises(ConfigError, match=f"a folder that holds {name}, which a run would write over"):
            run_training(config)
        assert [(path.name, path.read_text()) for path in output.iterdir()] == [(name, text)]
        (output / name).unlink()
    (output / "train.yaml").write_text(to_yaml(config))  # a run that was killed before its first checkpoint
    (output / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert run_training(config)["step"] == config.loop.steps


def test_a_trained_body_is_written_over_no_folder_of_ones_own(tmp_path):
    config = config_for("mntp", tmp_path, train="body")
    own = Path(config.output) / "encoder"
    own.mkdir(parents=True)
    (own / "config.json").write_text('{"model_type": "mine"}')
    with pytest.raises(ConfigError, match="a folder that holds encoder, which a run would write over"):
        run_training(config)
    assert [path.name for path in own.iterdir()] == ["config.json"]


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
