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


def test_done_means_manifest_and_files(job):
    storage = Storage(job)
    assert is_done(storage, 0) is not None
    (job / "part-00000.parquet").write_bytes(b"short")
    assert is_done(storage, 0) is None


def test_no_job(tmp_path):
    with pytest.raises(ValueError, match="no job to check"):
        check_job(Storage(tmp_path))
