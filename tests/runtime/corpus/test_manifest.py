import json

import pytest
from stand_in import embed_with_stand_in

from flashvec.runtime.corpus.manifest import check_job, is_done
from flashvec.runtime.corpus.storage import Storage


@pytest.fixture
def job(tmp_path):
    (tmp_path / "a.txt").write_text("a\n\nb\nc\n")
    embed_with_stand_in(tmp_path / "a.txt", tmp_path / "out", shard_size=2)
    return tmp_path / "out"


def test_whole(job):
    check = check_job(Storage(job))
    assert (check.num_shards, check.num_done, check.rows, check.errors, check.problems) == (2, 2, 3, 1, [])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda job: flip(job / "part-00001.parquet"), "part-00001.parquet is not what was written"),
        (lambda job: (job / "part-00001.parquet").unlink(), "part-00001.parquet is missing"),
        (lambda job: (job / "_errors" / "00000.jsonl").write_text("x"), "_errors/00000.jsonl has 1 bytes"),
        (lambda job: (job / "_manifest" / "00001.json").unlink(), "shard 1 is not done"),
        (lambda job: (job / "_manifest" / "00001.json").write_text("{}"), "00001.json: cannot be read"),
        (lambda job: (job / "_SUCCESS").unlink(), "_SUCCESS is missing"),
        (lambda job: (job / "_SUCCESS").write_text("{}"), "_SUCCESS does not agree"),
    ],
)
def test_damage_is_named(job, damage, named):
    damage(job)
    problems = check_job(Storage(job)).problems
    assert len(problems) == 1 and named in problems[0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"files": [{"name": "../other.parquet", "bytes": 3, "xxh3": "0"}]}, "no file of this shard"),
        ({"files": [{"name": "/etc/hostname", "bytes": 3, "xxh3": "0"}]}, "no file of this shard"),
        ({"files": [{"name": "part-00001.parquet", "bytes": 3, "xxh3": "0"}]}, "no file of this shard"),
        ({"files": []}, "names no part"),
        ({"errors": None}, "errors is None"),
        ({"rows": -1}, "rows is -1"),
        ({"shard": 1}, "it is that of shard 1"),
    ],
)
def test_a_manifest_speaks_of_its_shards_files_alone(job, change, named):
    path = job / "_manifest" / "00000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    problems = check_job(Storage(job)).problems
    assert len(problems) == 1 and "00000.json: cannot be read" in problems[0] and named in problems[0]
    with pytest.raises(ValueError, match=named):
        is_done(Storage(job), 0)


def test_done_means_manifest_and_files(job):
    storage = Storage(job)
    assert is_done(storage, 0) is not None
    (job / "part-00000.parquet").write_bytes(b"short")
    assert is_done(storage, 0) is None


def test_no_job(tmp_path):
    with pytest.raises(ValueError, match="no job to check"):
        check_job(Storage(tmp_path))
