import faiss
import numpy as np
import pytest
from stand_in import StandIn, embed_with_stand_in

from flashvec.runtime.corpus.plan import PlanError
from flashvec.runtime.corpus.search import describe_hits, search_job
from flashvec.runtime.corpus.storage import Storage
from flashvec.runtime.integrations.faiss import index_job

TEXTS = [f"row {i}" for i in range(300)]


@pytest.fixture
def texts_file(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    return tmp_path / "a.txt"


@pytest.mark.parametrize(
    ("format", "precision"),
    [("parquet", "float32"), ("npy", "float32"), ("parquet", "float16"), ("npy", "int8"), ("parquet", "binary")],
)
def test_exact_as_the_search_of_the_job(texts_file, tmp_path, format, precision):
    embed_with_stand_in(texts_file, tmp_path / "out", shard_size=70, format=format, precision=precision)
    queries, storage = StandIn().embed(["row 17", "row 299", "another"]), Storage(tmp_path / "out")
    index = index_job(tmp_path / "out")
    assert index.index.ntotal == 300
    for hits, expected in zip(index.search(queries * 3, 4), search_job(storage, queries, 4), strict=True):
        np.testing.assert_allclose([hit.score for hit in hits], [score for score, _, _ in expected], atol=1e-5)
        if precision != "binary":  # many of its scores are equal
            assert [hit.text for hit in hits] == [hit.text for hit in describe_hits(storage, expected)]
    assert index.search(queries[1], 1)[0][0].text == "row 299"


@pytest.mark.parametrize("factory", ["HNSW8", "IVF4,Flat"])
def test_approximate_and_trained(texts_file, tmp_path, factory):
    embed_with_stand_in(texts_file, tmp_path / "out", shard_size=70)
    index = index_job(tmp_path / "out", factory=factory, train_rows=200)
    found = index.search(StandIn().embed(TEXTS), 1)
    assert np.mean([hits[0].text == text for hits, text in zip(found, TEXTS, strict=True)]) > 0.95
    faiss.write_index(index.index, str(tmp_path / "index"))
    assert faiss.read_index(str(tmp_path / "index")).ntotal == 300


def test_finished_shards_only(texts_file, tmp_path, caplog):
    embed_with_stand_in(texts_file, tmp_path / "out", shard_size=70)
    for name in ("_SUCCESS", "_manifest/00001.json", "part-00001.parquet"):
        (tmp_path / "out" / name).unlink()
    index = index_job(tmp_path / "out")
    assert index.index.ntotal == 230
    assert "1 of 5 shards are not finished" in caplog.text
    for row in (0, 77, 148, 299):  # shards of a text file are ranges of bytes: 78 rows, 70, ...
        assert index.search(StandIn().embed([TEXTS[row]]), 1)[0][0].text == TEXTS[row]
    assert len(index.search(StandIn().embed(["x"]), 1000)[0]) == 230


def test_what_is_refused(texts_file, tmp_path):
    with pytest.raises(PlanError, match="no job to search"):
        index_job(tmp_path)
    embed_with_stand_in(texts_file, tmp_path / "out")
    with pytest.raises(ValueError, match=r"queries have shape \[1, 3\], the job's vectors 16 dimensions"):
        index_job(tmp_path / "out").search(np.zeros(3), 1)
    with pytest.raises(ValueError, match="train_rows is 0"):
        index_job(tmp_path / "out", train_rows=0)
    with pytest.raises(RuntimeError):
        index_job(tmp_path / "out", factory="Tree")
