import re

import numpy as np
import pytest
from stand_in import NOT_FINITE, StandIn, embed_with_stand_in

from flashvec.runtime.corpus import search
from flashvec.runtime.corpus.plan import PlanError
from flashvec.runtime.corpus.search import describe_hits, search_job
from flashvec.runtime.corpus.storage import Storage
from flashvec.runtime.whitening import fit_whitening

TEXTS = [f"row {i}" for i in range(60)]


@pytest.fixture
def texts_file(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    return tmp_path / "a.txt"


@pytest.mark.parametrize("format", ["parquet", "npy"])
@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "binary"])
def test_as_by_hand(texts_file, tmp_path, format, precision):
    embed_with_stand_in(texts_file, tmp_path / "out", shard_size=13, format=format, precision=precision)
    vectors, queries = StandIn().embed(TEXTS), StandIn().embed(["row 17", "something else"])
    signs = ((vectors > 0)[None] == (queries > 0)[:, None]).mean(-1)
    scores = signs if precision == "binary" else queries @ vectors.T
    found = search_job(Storage(tmp_path / "out"), queries * 3, 5)
    for hits, expected in zip(found, scores, strict=True):
        assert len(hits) == 5 and [score for score, _, _ in hits] == sorted((s for s, _, _ in hits), reverse=True)
        tolerance = {"float32": 1e-6, "float16": 1e-3, "int8": 0.02, "binary": 1e-6}[precision]
        np.testing.assert_allclose([s for s, _, _ in hits], np.sort(expected)[::-1][:5], atol=tolerance)
    (best, *_) = describe_hits(Storage(tmp_path / "out"), found[0])
    assert best.text == "row 17" and best.file == str(texts_file) and best.row == sum(len(t) + 1 for t in TEXTS[:17])


@pytest.mark.parametrize("format", ["parquet", "npy"])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_whitened_by_the_jobs_own_vectors(texts_file, tmp_path, format, precision, monkeypatch):
    embed_with_stand_in(texts_file, tmp_path / "out", shard_size=13, format=format, precision=precision)
    vectors, queries = StandIn().embed(TEXTS), StandIn().embed(["row 17", "something else"])
    weight, bias = fit_whitening(vectors, 0.3)
    left, right = (x @ weight.T + bias for x in (queries, vectors))
    cosines = (left / np.linalg.norm(left, axis=1)[:, None]) @ (right / np.linalg.norm(right, axis=1)[:, None]).T
    found = search_job(Storage(tmp_path / "out"), queries * 3, 5, 0.3)
    tolerance = {"float32": 1e-4, "int8": 0.1}[precision]
    for hits, expected in zip(found, cosines, strict=True):
        np.testing.assert_allclose([s for s, _, _ in hits], np.sort(expected)[::-1][:5], atol=tolerance)
    assert describe_hits(Storage(tmp_path / "out"), found[0])[0].text == "row 17"
    monkeypatch.setattr(search, "FITTED_ROWS", 12)  # some of each shard's
    assert search_job(Storage(tmp_path / "out"), queries, 1, 0.3)[0][0][0] > 0.9


@pytest.mark.parametrize("whitening", [None, 0.25])
@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_rows_of_one_text_come_in_order_wherever_they_lie(texts_file, tmp_path, precision, whitening):
    texts_file.write_text("".join(f"row {i % 37}\n" for i in range(1003)))
    embed_with_stand_in(texts_file, tmp_path / "out", shard_size=99, precision=precision, dedupe=False)
    queries = StandIn().embed([f"query {i}" for i in range(40)])
    for queries_now in (queries, queries[:1]):
        for hits in search_job(Storage(tmp_path / "out"), queries_now, 60, whitening):
            assert hits == sorted(hits, key=lambda hit: (-hit[0], *hit[1:]))
            assert len({score for score, _, _ in hits[:27]}) == 1 and len({score for score, _, _ in hits}) == 3


@pytest.mark.parametrize("format", ["parquet", "npy"])
def test_a_shard_without_a_vector_fits_nothing(texts_file, tmp_path, format):
    texts_file.write_text("".join(f"{text}\n" for text in [NOT_FINITE] * 26 + TEXTS))
    embed_with_stand_in(texts_file, tmp_path / "out", shard_size=13, format=format)
    (hits,) = search_job(Storage(tmp_path / "out"), StandIn().embed(["row 17"]), 1, 0.25)
    assert describe_hits(Storage(tmp_path / "out"), hits)[0].text == "row 17"


def test_an_unfinished_job_is_said_to_be_one(texts_file, tmp_path, caplog):
    embed_with_stand_in(texts_file, tmp_path / "out", shard_size=20)
    query = StandIn().embed(["x"])
    search_job(Storage(tmp_path / "out"), query, 3)
    assert not caplog.text
    (tmp_path / "out" / "_manifest" / "00000.json").unlink()
    (hits,) = search_job(Storage(tmp_path / "out"), query, 100)
    assert hits and 0 not in {shard for _, shard, _ in hits}
    assert re.search(r"1 of \d+ shards are not finished: their rows are not looked at", caplog.text)


def test_text_only_while_the_input_is_there(texts_file, tmp_path):
    embed_with_stand_in(texts_file, tmp_path / "out")
    found = search_job(Storage(tmp_path / "out"), StandIn().embed(["row 3"]), 100)[0]
    assert len(found) == 60
    texts_file.write_text("another\n")
    (best,) = describe_hits(Storage(tmp_path / "out"), found[:1])
    assert best.text is None


def test_refused(texts_file, tmp_path):
    with pytest.raises(PlanError, match="no job to search"):
        search_job(Storage(tmp_path), StandIn().embed(["x"]), 1)
    embed_with_stand_in(texts_file, tmp_path / "signs", precision="binary")
    with pytest.raises(ValueError, match="are binary: they have no axes to fit"):
        search_job(Storage(tmp_path / "signs"), StandIn().embed(["x"]), 1, 0.25)
    embed_with_stand_in(texts_file, tmp_path / "out", dims=8)
    with pytest.raises(ValueError, match="has 16 dimensions, the job's vectors have 8"):
        search_job(Storage(tmp_path / "out"), StandIn().embed(["x"]), 1)
