import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from stand_in import StandIn, embed_with_stand_in

from flashvec.runtime.corpus.plan import PlanError
from flashvec.runtime.corpus.reuse import EarlierVectors


def write(path, rows):
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in rows))
    return path


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_only_new_texts_are_encoded(tmp_path, format):
    rows = [(i, f"text {i}") for i in range(100)]
    old = write(tmp_path / "old.jsonl", rows)
    embed_with_stand_in(old, tmp_path / "a", id_column="id", shard_size=40, format=format)
    changed = [(i, "edited" if i in (3, 50) else text) for i, text in rows if i != 7] + [(200, "text 9"), (201, "new")]
    new = write(tmp_path / "new.jsonl", changed)
    result = embed_with_stand_in(
        new, tmp_path / "b", id_column="id", shard_size=30, reuse=tmp_path / "a", format="parquet"
    )
    assert result.changes == (2, 2, 1) and result.rows == 101
    entries = [json.loads(p.read_text()) for p in sorted((tmp_path / "b" / "_manifest").iterdir())]
    assert sum(entry["reused"] for entry in entries) == 98
    vectors = [v for p in sorted((tmp_path / "b").glob("part*")) for v in pq.read_table(p)["vector"].to_pylist()]
    np.testing.assert_array_equal(np.array(vectors, np.float32), StandIn().embed([text for _, text in changed]))


def test_without_ids_text_is_identity(tmp_path):
    (tmp_path / "a.txt").write_text("a\nb\nc\n")
    embed_with_stand_in(tmp_path / "a.txt", tmp_path / "a")
    (tmp_path / "b.txt").write_text("c\nd\n")
    result = embed_with_stand_in(tmp_path / "b.txt", tmp_path / "b", reuse=tmp_path / "a")
    assert result.changes == (1, 0, 2) and result.reused == 1
    (tmp_path / "c.txt").write_text("c\nd\nc\nc\n")
    assert embed_with_stand_in(tmp_path / "c.txt", tmp_path / "c", reuse=tmp_path / "b").changes == (2, 0, 0)
    assert embed_with_stand_in(tmp_path / "b.txt", tmp_path / "d", reuse=tmp_path / "c").changes == (0, 0, 2)


def test_other_vectors_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a\nb\n")
    embed_with_stand_in(tmp_path / "a.txt", tmp_path / "a", instruction="Passage: ")
    with pytest.raises(PlanError, match="instruction was 'Passage: ' and is None"):
        embed_with_stand_in(tmp_path / "a.txt", tmp_path / "b", reuse=tmp_path / "a")
    with pytest.raises(PlanError, match="the machine's device was none and is cuda"):
        load = {"facts": {"machine": {"device": "cuda"}}}
        embed_with_stand_in(
            tmp_path / "a.txt", tmp_path / "c", instruction="Passage: ", load=load, reuse=tmp_path / "a"
        )
    (tmp_path / "a" / "_SUCCESS").unlink()
    with pytest.raises(PlanError, match="holds no finished job"):
        embed_with_stand_in(tmp_path / "a.txt", tmp_path / "d", reuse=tmp_path / "a")


def test_an_earlier_job_that_was_made_anew_or_is_damaged_is_not_taken_from(tmp_path):
    (tmp_path / "a.txt").write_text("a\nb\n")
    embed_with_stand_in(tmp_path / "a.txt", tmp_path / "old")
    embed_with_stand_in(tmp_path / "a.txt", tmp_path / "new", reuse=tmp_path / "old", plan_only=True)
    shutil.rmtree(tmp_path / "old")
    embed_with_stand_in(tmp_path / "a.txt", tmp_path / "old", instruction="Passage: ")  # meanwhile
    with pytest.raises(Exception, match="holds other vectors: instruction was 'Passage: ' and is None"):
        embed_with_stand_in(tmp_path / "a.txt", tmp_path / "new", reuse=tmp_path / "old")
    shutil.rmtree(tmp_path / "old")
    embed_with_stand_in(tmp_path / "a.txt", tmp_path / "old", format="npy")
    (part,) = (tmp_path / "old").glob("part*.npy")
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(Exception, match=r"part-00000\.npy is not as its job wrote it: make it again"):
        embed_with_stand_in(tmp_path / "a.txt", tmp_path / "new", reuse=tmp_path / "old")


def test_ranges_of_an_earlier_job_that_was_made_anew_are_not_mixed(tmp_path):
    (tmp_path / "a.txt").write_text("a\nb\n")
    (tmp_path / "b.txt").write_text("c\nd\na\nb\n")
    embed_with_stand_in(tmp_path / "a.txt", tmp_path / "old", precision="int8")
    embed_with_stand_in(tmp_path / "a.txt", tmp_path / "new", precision="int8", reuse=tmp_path / "old", plan_only=True)
    shutil.rmtree(tmp_path / "old")
    embed_with_stand_in(tmp_path / "b.txt", tmp_path / "old", precision="int8")
    with pytest.raises(Exception, match="was made anew, under other int8 ranges: begin this job anew"):
        embed_with_stand_in(tmp_path / "a.txt", tmp_path / "new", precision="int8", reuse=tmp_path / "old")


def test_parts_that_are_written_anew_while_vectors_are_taken_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a\nb\n")
    (tmp_path / "b.txt").write_text("b\na\n")
    embed_with_stand_in(tmp_path / "a.txt", tmp_path / "old")
    known = EarlierVectors(str(tmp_path / "old"))
    hashes = pq.read_table(tmp_path / "old" / "part-00000.parquet")["hash"].to_pylist()
    shutil.rmtree(tmp_path / "old")
    embed_with_stand_in(tmp_path / "b.txt", tmp_path / "old")  # whole, by its own manifest
    with pytest.raises(PlanError, match="is not as its job wrote it"):
        known.find(hashes)


def test_changes_are_by_text_where_one_job_has_no_ids_and_none_where_parts_are_gone(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "id": 1}\n{"text": "b", "id": 2}\n')
    embed_with_stand_in(tmp_path / "a.jsonl", tmp_path / "old")
    settings = {"id_column": "id", "reuse": tmp_path / "old"}
    assert embed_with_stand_in(tmp_path / "a.jsonl", tmp_path / "new", **settings).changes == (0, 0, 0)
    (tmp_path / "old" / "part-00000.parquet").unlink()
    again = embed_with_stand_in(tmp_path / "a.jsonl", tmp_path / "new", **settings)
    assert again.changes is None and again.rows == 2


def test_a_finished_job_is_left_alone_where_the_earlier_one_is_gone(tmp_path):
    (tmp_path / "a.txt").write_text("a\nb\n")
    embed_with_stand_in(tmp_path / "a.txt", tmp_path / "old")
    assert embed_with_stand_in(tmp_path / "a.txt", tmp_path / "new", reuse=tmp_path / "old").changes == (0, 0, 0)
    shutil.rmtree(tmp_path / "old")
    again = embed_with_stand_in(tmp_path / "a.txt", tmp_path / "new", reuse=tmp_path / "old")
    assert again.changes is None and again.rows == 2


def test_find(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{i}\n" for i in range(50)))
    embed_with_stand_in(tmp_path / "a.txt", tmp_path / "a", shard_size=8)
    table = pq.read_table(tmp_path / "a" / "part-00002.parquet")
    hashes = [b"\0" * 16, *table["hash"].to_pylist()[::-1], b"\xff" * 16]
    known, vectors = EarlierVectors(str(tmp_path / "a")).find(hashes)
    assert known.tolist() == [False, *[True] * len(table), False]
    np.testing.assert_array_equal(vectors, np.array(table["vector"].to_pylist(), np.float32)[::-1])


def test_an_id_of_several_rows_is_edited_where_any_of_them_is(tmp_path):
    """Chunks of a document have its id."""
    before = [("a", "one"), ("a", "two"), ("b", "three"), ("c", "four")]
    after = [("a", "one"), ("a", "changed"), ("b", "three"), ("c", "four"), ("c", "five")]
    embed_with_stand_in(write(tmp_path / "old.jsonl", before), tmp_path / "a", id_column="id")
    new = write(tmp_path / "new.jsonl", after)
    result = embed_with_stand_in(new, tmp_path / "b", id_column="id", reuse=tmp_path / "a")
    assert result.changes == (0, 2, 0)
