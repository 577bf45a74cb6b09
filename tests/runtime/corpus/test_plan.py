import json

import pyarrow as pa
import pytest
from stand_in import embed_with_stand_in, facts

from flashvec.runtime.corpus.cuts import Piece, Shard
from flashvec.runtime.corpus.plan import Plan, PlanError, read_plan
from flashvec.runtime.corpus.settings import JobSettings
from flashvec.runtime.corpus.sources import Source
from flashvec.runtime.corpus.storage import Storage

PLAN = Plan(
    settings=JobSettings(text_columns=("text",), precision="int8", columns=("when",)),
    sources=(Source("/a.parquet", "parquet", None, 10, 20),),
    shards=(Shard([Piece(0, 0, 5)], 5), Shard([Piece(0, 5, 7)], 2)),
    columns=pa.schema([("id", pa.int64()), ("when", pa.timestamp("us", "UTC"))]),
    model=facts({"model": "m"}),
    int8_ranges=((0.0, -1.5), (1.0, 2.5)),
)


def test_back_from_json(tmp_path):
    storage = Storage(tmp_path)
    storage.write("plan.json", PLAN.to_json())
    assert read_plan(storage) == PLAN and PLAN.num_rows == 7
    assert read_plan(Storage(tmp_path / "elsewhere")) is None


@pytest.mark.parametrize("old_new", [(b'"version": 1', b'"version": 2'), (b'"pieces"', b'"peaces"'), (b"{", b"[")])
def test_damaged(tmp_path, old_new):
    storage = Storage(tmp_path)
    storage.write("plan.json", PLAN.to_json().replace(*old_new))
    with pytest.raises(PlanError, match=r"plan\.json: not a plan"):
        read_plan(storage)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("int8_ranges",), None),
        (("int8_ranges",), ""),
        (("int8_ranges", 0, 0), 10**400),
        (("int8_ranges", 0, 0), float("nan")),
        (("model", "dim"), None),
        (("model", "dim"), 2**40),
        (("model", "load"), []),
        (("settings", "columns"), [[]]),
        (("settings", "id_column"), []),
        (("sources",), []),
        (("sources", 0, "uri"), None),
        (("sources", 0, "compression"), True),
        (("sources", 0, "format"), "pickle"),
        (("shards", 0, "pieces", 0, 0), 1),
        (("shards", 0, "pieces", 0, 1), -1),
        (("shards", 0, "rows"), "5"),
        (("reuse",), {}),
    ],
)
def test_what_no_plan_states_is_an_error_that_names_it(tmp_path, place, value):
    values = json.loads(PLAN.to_json())
    *above, last = place
    inner = values
    for key in above:
        inner = inner[key]
    inner[last] = value
    storage = Storage(tmp_path)
    storage.write("plan.json", json.dumps(values).encode())
    with pytest.raises(PlanError, match=r"plan\.json: not a plan"):
        read_plan(storage)


def test_a_plan_nested_too_deeply_is_an_error_that_names_it(tmp_path):
    Storage(tmp_path).write("plan.json", b"[" * 100_000)
    with pytest.raises(PlanError, match=r"plan\.json: not a plan"):
        read_plan(Storage(tmp_path))


def test_the_same_job_has_the_same_plan(tmp_path):
    (tmp_path / "a.txt").write_text("a\nb\n")
    for name in ("one", "two"):
        embed_with_stand_in(tmp_path / "a.txt", tmp_path / name, precision="int8")
    assert (tmp_path / "one" / "plan.json").read_bytes() == (tmp_path / "two" / "plan.json").read_bytes()
