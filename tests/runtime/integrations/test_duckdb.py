import json

import duckdb
import numpy as np
import pytest
from stand_in import DIM, StandIn, embed_with_stand_in

from flashvec.runtime.corpus.plan import PlanError
from flashvec.runtime.integrations.duckdb import view_job

TEXTS = [f"row {i}" for i in range(100)]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "it's.jsonl"
    path.write_text("".join(json.dumps({"id": f"r{i}", "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    return path


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_nearest_by_sql(source, tmp_path, precision):
    embed_with_stand_in(source, tmp_path / "out", id_column="id", shard_size=30, precision=precision)
    connection = duckdb.connect()
    view_job(connection, tmp_path / "out", 'my "vectors"')
    view_job(connection, tmp_path / "out", 'my "vectors"')  # again
    query = StandIn().embed(["row 17"])[0]
    found = connection.execute(
        f'select id, source, array_cosine_similarity(vector, ?::float[{DIM}]) as score from "my ""vectors""" '
        "order by score desc limit 3",
        [query.tolist()],
    ).fetchall()
    scores = np.sort(StandIn().embed(TEXTS) @ query)[::-1][:3]
    assert found[0][:2] == ("r17", str(source))
    np.testing.assert_allclose([score for _, _, score in found], scores, atol=1e-3)


def test_finished_parts_only(source, tmp_path, caplog):
    embed_with_stand_in(source, tmp_path / "out", id_column="id", shard_size=30)
    (tmp_path / "out" / "_manifest" / "00001.json").unlink()
    connection = duckdb.connect()
    view_job(connection, tmp_path / "out")
    assert "shards are not finished: their rows are not looked at" in caplog.text
    ids = {id for (id,) in connection.execute("select id from vectors").fetchall()}
    assert 50 < len(ids) < 80 and {"r0", "r99"} < ids


def test_a_column_that_is_named_source_is_the_jobs(tmp_path):
    """The view's own was `source_1` then, which nothing said, and `source` not the input."""
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"text": "words", "source": "web", "Vector": "up"}) + "\n")
    embed_with_stand_in(path, tmp_path / "out", columns=("source",))
    connection = duckdb.connect()
    view_job(connection, tmp_path / "out")
    assert connection.execute("select source, source_uri from vectors").fetchall() == [("web", str(path))]
    path.write_text(json.dumps({"text": "words", "source": "web", "source_uri": "own", "Vector": "up"}) + "\n")
    embed_with_stand_in(path, tmp_path / "both", columns=("source", "source_uri"))
    view_job(connection, tmp_path / "both", "two")
    found = connection.execute("select source, source_uri, source_uri_uri from two").fetchall()
    assert found == [("web", "own", str(path))]
    embed_with_stand_in(path, tmp_path / "other", columns=("Vector",))
    with pytest.raises(ValueError, match="is named as `vector` but for its case"):
        view_job(connection, tmp_path / "other")


def test_what_is_refused(source, tmp_path):
    with pytest.raises(PlanError, match="no job to search"):
        view_job(duckdb.connect(), tmp_path)
    embed_with_stand_in(source, tmp_path / "out", precision="binary")
    with pytest.raises(ValueError, match="this job has binary in parquet"):
        view_job(duckdb.connect(), tmp_path / "out")
    embed_with_stand_in(source, tmp_path / "planned", plan_only=True)
    with pytest.raises(ValueError, match="no part of this job is finished"):
        view_job(duckdb.connect(), tmp_path / "planned")
