"""A job from files to vectors: complete, in order, resumed, refused."""

import json
import os
import sys

import duckdb
import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from stand_in import DIM, NOT_FINITE, StandIn, embed_with_stand_in, facts, tree
from stand_in_job import InProcess

from flashvec.runtime.corpus.job import embed_corpus
from flashvec.runtime.corpus.local import WorkerError
from flashvec.runtime.corpus.manifest import check_job
from flashvec.runtime.corpus.plan import PlanError
from flashvec.runtime.corpus.settings import JobSettings
from flashvec.runtime.corpus.shard import TooManyErrors
from flashvec.runtime.corpus.storage import Storage
from flashvec.runtime.corpus.worker import ShardRunner


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"id": f"r{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    return path


TEXTS = [f"text number {i % 90}" for i in range(100)]


@pytest.fixture
def texts_file(tmp_path):
    return write_jsonl(tmp_path / "in.jsonl", TEXTS)


def rows_of(folder):
    return pa.concat_tables([pq.read_table(p) for p in sorted(folder.glob("part-*.parquet"))])


def test_every_row_has_its_vector_in_order(texts_file, tmp_path):
    result = embed_with_stand_in(texts_file, tmp_path / "out", id_column="id", shard_size=30)
    table = rows_of(tmp_path / "out")
    assert result.rows == 100 and result.shards == 4 and result.errors == 0
    assert table["id"].to_pylist() == [f"r{i}" for i in range(100)]
    np.testing.assert_array_equal(np.array(table["vector"].to_pylist(), np.float32), StandIn().embed(TEXTS))
    assert check_job(Storage(tmp_path / "out")).problems == []
    assert table.schema.field("vector").type == pa.list_(pa.float32(), DIM)


def test_read_by_others(texts_file, tmp_path):
    """numpy, DuckDB and FAISS read the output without this package."""
    embed_with_stand_in(texts_file, tmp_path / "p", id_column="id", shard_size=30)
    embed_with_stand_in(texts_file, tmp_path / "n", id_column="id", shard_size=30, format="npy")
    expected = StandIn().embed(TEXTS)
    parts = sorted((tmp_path / "n").glob("*.npy"))
    vectors = np.concatenate([np.load(part, mmap_mode="r") for part in parts])
    np.testing.assert_array_equal(vectors, expected)
    ids = pa.concat_tables([pq.read_table(p) for p in sorted((tmp_path / "n").glob("*.ids.parquet"))])
    assert ids["id"].to_pylist() == [f"r{i}" for i in range(100)]
    found = duckdb.sql(
        f"select id, list_cosine_similarity(vector::float[], {expected[7].tolist()}::float[]) as s "
        f"from '{tmp_path}/p/part-*.parquet' order by s desc, id limit 2"
    ).fetchall()
    assert {row[0] for row in found} == {"r7", "r97"}
    index = faiss.IndexFlatIP(DIM)
    index.add(vectors)
    assert index.search(expected[50:51], 1)[1][0, 0] == 50


def test_a_finished_job_is_left_alone(texts_file, tmp_path):
    embed_with_stand_in(texts_file, tmp_path / "out", shard_size=30)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    result = embed_with_stand_in(texts_file, tmp_path / "out", shard_size=30)
    assert result.rows == 100
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}


def test_a_job_goes_on_whatever_its_arguments_came_in(texts_file, tmp_path):
    """As Python has them: a plan is JSON, where a tuple is a list and a torch.dtype its name."""
    given = {"columns": ["text"], "load": {"pooling": ("mean", "max"), "dtype": torch.float32}}
    embed_with_stand_in(texts_file, tmp_path / "out", **given)
    assert embed_with_stand_in(texts_file, tmp_path / "out", **given).rows == 100
    same = {"columns": ("text",), "load": {"pooling": ["mean", "max"], "dtype": "float32"}}
    assert embed_with_stand_in(texts_file, tmp_path / "out", **same).rows == 100
    with pytest.raises(TypeError, match=r"load holds \{'mean'\}, which cannot be written into a plan"):
        embed_with_stand_in(texts_file, tmp_path / "other", load={"pooling": {"mean"}})


def fail_at_done(event):
    if event["event"] == "done":
        raise WorkerError("stopped by the test")


@pytest.mark.parametrize("lost", ["part-00001.parquet", "_manifest/00001.json", "_SUCCESS"])
def test_what_is_missing_is_made_again(texts_file, tmp_path, lost):
    embed_with_stand_in(texts_file, tmp_path / "out", shard_size=30)
    before = tree(tmp_path / "out")
    (tmp_path / "out" / lost).unlink()
    assert check_job(Storage(tmp_path / "out")).problems
    if lost != "_SUCCESS":  # a job that is not whole does not say that it is, while it is being mended
        with pytest.raises(WorkerError):
            embed_with_stand_in(texts_file, tmp_path / "out", shard_size=30, on_event=fail_at_done)
        assert not (tmp_path / "out" / "_SUCCESS").exists()
    embed_with_stand_in(texts_file, tmp_path / "out", shard_size=30)
    assert tree(tmp_path / "out") == before


def test_workers_do_not_change_a_byte(texts_file, tmp_path):
    embed_with_stand_in(texts_file, tmp_path / "one", shard_size=7)
    embed_with_stand_in(texts_file, tmp_path / "three", shard_size=7, num_workers=3)
    assert tree(tmp_path / "one") == tree(tmp_path / "three")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"instruction": "Query: "}, "instruction was None and is 'Query: '"),
        ({"shard_size": 31}, "shard_size was 30 and is 31"),
        ({"precision": "float16"}, "precision"),
        ({"mixed_machines": True}, "mixed_machines was False and is True"),
        ({"load": {"dtype": "float16"}}, "dtype was None and is 'float16'"),
    ],
)
def test_another_job_is_refused(texts_file, tmp_path, change, named):
    embed_with_stand_in(texts_file, tmp_path / "out", shard_size=30)
    with pytest.raises(PlanError, match=named):
        embed_with_stand_in(texts_file, tmp_path / "out", **{"shard_size": 30, **change})


@pytest.mark.parametrize("name", ["weights", "tokenizer"])
def test_another_model_is_refused(texts_file, tmp_path, name):
    """Under the same name: what was loaded decides."""
    embed_with_stand_in(texts_file, tmp_path / "out", shard_size=30)
    (tmp_path / "out" / "_manifest" / "00000.json").unlink()
    plan = tmp_path / "out" / "plan.json"
    plan.write_text(plan.read_text().replace(f'"{name}": "{name[0]}"', f'"{name}": "other"'))
    with pytest.raises(PlanError, match=f"the model's {name} was other and is {name[0]}"):
        embed_with_stand_in(texts_file, tmp_path / "out", shard_size=30)


def test_another_machine_is_refused_unless_allowed(texts_file, tmp_path):
    for mixed in (False, True):
        out = tmp_path / f"out{mixed}"
        embed_with_stand_in(texts_file, out, shard_size=30, mixed_machines=mixed)
        plan = out / "plan.json"
        plan.write_text(plan.read_text().replace('"device": "none"', '"device": "cuda"'))
        (out / "_manifest" / "00000.json").unlink()
        if mixed:
            embed_with_stand_in(texts_file, out, shard_size=30, mixed_machines=mixed)
            entry = json.loads((out / "_manifest" / "00000.json").read_text())
            assert entry["machine"] == {"device": "none"}
        else:
            with pytest.raises(PlanError, match="the machine's device was cuda and is none"):
                embed_with_stand_in(texts_file, out, shard_size=30)


def test_changed_inputs_are_refused(texts_file, tmp_path):
    embed_with_stand_in(texts_file, tmp_path / "out", shard_size=30)
    os.utime(texts_file, ns=(1, 1))
    with pytest.raises(PlanError, match="has changed"):
        embed_with_stand_in(texts_file, tmp_path / "out", shard_size=30)
    more = write_jsonl(tmp_path / "more.jsonl", ["x"])
    with pytest.raises(PlanError, match=r"more\.jsonl is new"):
        embed_with_stand_in([texts_file, more], tmp_path / "out", shard_size=30)


def test_too_many_errors_stay_too_many_when_all_shards_are_done(tmp_path):
    """Two workers may both finish within what was left; called again, nothing is left to do."""
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"text": ""}\n' * 20)
    embed_with_stand_in(tmp_path / "in.jsonl", tmp_path / "out", shard_size=20, max_errors=30)
    (tmp_path / "out" / "_SUCCESS").unlink()
    for limit in (10, 19):
        with pytest.raises(TooManyErrors, match="20"):
            embed_with_stand_in(tmp_path / "in.jsonl", tmp_path / "out", shard_size=20, max_errors=limit)
        assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_a_text_column_that_was_guessed_is_said(texts_file, tmp_path):
    """A CSV file without a header loses its first row to it."""
    said: list[str] = []

    def note(event):
        if event["event"] == "note":
            said.append(event["text"])

    (tmp_path / "in.csv").write_text("first row\nsecond row\n")
    result = embed_with_stand_in(tmp_path / "in.csv", tmp_path / "guessed", on_event=note)
    assert result.rows == 1
    assert said == ["the text is the column 'first row', the only one of text; --text-column names another"]
    said.clear()
    embed_with_stand_in(tmp_path / "in.csv", tmp_path / "named", on_event=note, text_columns=("first row",))
    embed_with_stand_in(texts_file, tmp_path / "text", on_event=note)
    assert said == []


def test_ids_are_looked_at_again_where_a_plan_is_there(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a", "id": 1}\n{"text": "b", "id": 1}\n')
    embed_with_stand_in(tmp_path / "in.jsonl", tmp_path / "out", id_column="id", plan_only=True)
    with pytest.raises(ValueError, match="1 of 2 ids are repetitions"):
        embed_with_stand_in(tmp_path / "in.jsonl", tmp_path / "out", id_column="id", unique_ids=True)


def test_ranges_are_those_of_finite_vectors(tmp_path):
    (tmp_path / "in.txt").write_text(f"one\n{NOT_FINITE}\ntwo\nthree\n")
    result = embed_with_stand_in(tmp_path / "in.txt", tmp_path / "out", precision="int8")
    assert (result.rows, result.errors) == (3, 1)
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert np.isfinite(plan["int8_ranges"]).all()
    group = pq.ParquetFile(tmp_path / "out" / "part-00000.parquet").metadata.row_group(0)
    stored = {group.column(i).path_in_schema: group.column(i).encodings for i in range(group.num_columns)}
    assert "RLE_DICTIONARY" in stored["vector.list.element"]  # a byte each: as they are Parquet gives them four
    (tmp_path / "bad.txt").write_text(f"one\n{NOT_FINITE}\n")
    with pytest.raises(Exception, match="fewer than two vectors are finite"):
        embed_with_stand_in(tmp_path / "bad.txt", tmp_path / "bad", precision="int8")


def test_planned_here_and_run_elsewhere(texts_file, tmp_path):
    planned = embed_with_stand_in(texts_file, tmp_path / "out", shard_size=30, plan_only=True)
    assert (planned.planned, planned.shards) == (4, 0) and set(tree(tmp_path / "out")) == {"_lock", "plan.json"}
    runner = ShardRunner(StandIn(), facts({}))
    for shard in (2, 0, 3, 1):
        runner.run(str(tmp_path / "out"), shard, None)
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    assert embed_with_stand_in(texts_file, tmp_path / "out", shard_size=30).rows == 100
    embed_with_stand_in(texts_file, tmp_path / "one", shard_size=30)
    assert tree(tmp_path / "out") == tree(tmp_path / "one")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"engine": "spark"}, "engine is 'spark', known are local and ray"),
        ({"address": "somewhere"}, "address is for engine='ray'"),
        ({"engine": "ray"}, r"pip install 'flashvec\[ray\]'"),
    ],
)
def test_engines(texts_file, tmp_path, monkeypatch, values, named):
    monkeypatch.setitem(sys.modules, "ray", None)  # as where it is not installed
    with pytest.raises(ValueError, match=named):
        embed_corpus(texts_file, tmp_path / "out", model="stand-in", **values)
    assert not (tmp_path / "out").exists()


def test_what_the_model_refuses_is_told_before_there_is_a_plan(texts_file, tmp_path, monkeypatch):
    def refuse(self, texts, settings):
        raise ValueError("prompt_name is 'qurey'; this model's prompts are: query")

    monkeypatch.setattr(ShardRunner, "speed", refuse)
    settings = JobSettings(prompt_name="qurey")
    with pytest.raises(ValueError, match="prompt_name is 'qurey'"):
        embed_corpus(texts_file, tmp_path / "out", model="stand-in", settings=settings, fleet=InProcess)
    assert not (tmp_path / "out" / "plan.json").exists()
    monkeypatch.undo()
    settings = JobSettings(prompt_name="query")  # the same folder, the typing error mended
    assert embed_corpus(texts_file, tmp_path / "out", model="stand-in", settings=settings, fleet=InProcess).rows
