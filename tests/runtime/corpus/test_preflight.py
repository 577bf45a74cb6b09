"""Bad jobs stop before work, and leave nothing behind."""

import fcntl
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stand_in import embed_with_stand_in

from flashvec.runtime.corpus import preflight
from flashvec.runtime.corpus.storage import Storage


@pytest.fixture
def texts_file(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("a\nb\n")
    return folder / "a.txt"


def test_output_among_inputs(texts_file, tmp_path):
    with pytest.raises(ValueError, match="lies in it"):
        embed_with_stand_in(texts_file, tmp_path / "in")
    for given in (tmp_path / "in", f"{tmp_path}/in/**/*.txt", f"{tmp_path}/**", f"{tmp_path}/in/*/*.parquet"):
        if "parquet" in str(given):
            (tmp_path / "in" / "older").mkdir()
            pq.write_table(pa.table({"text": ["a"]}), tmp_path / "in" / "older" / "a.parquet")
        with pytest.raises(ValueError, match="its parts would become inputs"):
            embed_with_stand_in(given, tmp_path / "in" / "out")
    assert not (tmp_path / "in" / "out").exists()


@pytest.mark.parametrize("out", ["mock:///bucket/my data/out", "mock:///bucket/my%20data/out"])
@pytest.mark.parametrize("given", ["mock:///bucket/my data", "mock:///bucket/my%20data/**"])
def test_output_among_inputs_behind_a_uri_however_it_is_escaped(given, out):
    with pytest.raises(ValueError, match="its parts would become inputs"):
        preflight.check_apart([given], [], Storage(out))


def test_output_beside_inputs_that_a_glob_names(texts_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "in")
    for given in ("*.txt", f"{tmp_path}/in/*.txt"):
        assert embed_with_stand_in(given, tmp_path / "in" / "out").rows == 2


def test_a_folder_with_other_things(texts_file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds other things \(thesis.tex\)"):
        embed_with_stand_in(texts_file, tmp_path / "out")


def test_a_folder_in_use(texts_file, tmp_path):
    (tmp_path / "out").mkdir()
    handle = os.open(tmp_path / "out" / "_lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another job is running there"):
        embed_with_stand_in(texts_file, tmp_path / "out")
    os.close(handle)
    assert embed_with_stand_in(texts_file, tmp_path / "out").rows == 2


def test_no_space(texts_file, tmp_path, monkeypatch):
    class Full:
        f_bavail, f_frsize = 1, 64

    monkeypatch.setattr(preflight.os, "statvfs", lambda path: Full)
    with pytest.raises(ValueError, match="and the disk has 64 free"):
        embed_with_stand_in(texts_file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"dims": 17}, "dims is 17, the model's vectors have 16"),
        ({"precision": "binary", "dims": 9}, "9 is no multiple of 8"),
        ({"unique_ids": True}, r"unique_ids \(--unique-ids\) needs id_column"),
        ({"max_errors": -2}, "max_errors is -2"),
    ],
)
def test_arguments(texts_file, tmp_path, values, named):
    with pytest.raises(ValueError, match=named):
        embed_with_stand_in(texts_file, tmp_path / "out", **values)
    assert not (tmp_path / "out").exists()
