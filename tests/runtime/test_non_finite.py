"""Texts that overflow: found without waiting, run again in fp32, and named."""

import logging
import warnings

import numpy as np
import pytest
import torch
from fake_accelerator import FakeAccelerator
from tiny_models import TEXTS, tiny_checkpoint

from flashvec import Encoder
from flashvec.runtime.decoder import Decoder
from flashvec.runtime.engine import Engine
from flashvec.runtime.non_finite import NonFiniteWarning
from flashvec.runtime.wide import widened

BAD = 5  # the text that overflows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_checkpoint(folder, "llama")
    return folder


@pytest.fixture
def enc(folder, monkeypatch):
    """An encoder in half precision, in which one text overflows."""
    return overflowing(folder, monkeypatch, {torch.float16})


def overflowing(folder, monkeypatch, dtypes):
    enc = Encoder.load(folder, dtype="float16", attention="bidirectional", pooling="mean")
    enc.engine, enc.retry_non_finite = Engine(enc.decoder, FakeAccelerator(), graphs=False), True
    ids = [set(enc.tokenizer.encode([text], 64).ids.tolist()) for text in TEXTS]
    token = min(ids[BAD].difference(*ids[:BAD], *ids[BAD + 1 :]))
    run = Decoder.run

    def overflow(self, ids_T, schedule, *rest, **selected):
        stream = run(self, ids_T, schedule, *rest, **selected)
        if self.dtype in dtypes:
            stream.hidden_TD[: len(ids_T)][ids_T == token] = float("inf")
        return stream

    monkeypatch.setattr(Decoder, "run", overflow)
    return enc


@pytest.fixture
def wide(folder):
    """The same weights, rounded to half precision, computing in fp32."""
    enc = Encoder.load(folder, dtype="float16", attention="bidirectional", pooling="mean")
    enc.engine.decoder = widened(enc.decoder)
    return enc


@pytest.mark.parametrize("output", ["numpy", "torch"])
def test_only_the_text_that_overflowed_is_run_again(enc, wide, output, caplog, monkeypatch):
    enc.retry_non_finite = False
    before = np.asarray(enc.embed(list(TEXTS), output=output))
    assert np.flatnonzero(~np.isfinite(before).all(1)).tolist() == [BAD]
    enc.retry_non_finite = True
    with caplog.at_level(logging.WARNING, "flashvec"):
        got = np.asarray(enc.embed(list(TEXTS), output=output))
    others = np.arange(len(TEXTS)) != BAD
    np.testing.assert_array_equal(got[others], before[others])
    np.testing.assert_array_equal(got[BAD], wide.embed(TEXTS[BAD]))
    assert f"1 of 8 texts overflowed in float16 and were run again in float32: rows {BAD}" in caplog.text


def test_parts_of_a_text_too(enc, wide):
    got = enc.embed_tokens(list(TEXTS), instruction="Query: ")
    want = wide.embed_tokens(list(TEXTS), instruction="Query: ")
    np.testing.assert_array_equal(got[BAD].vectors, want[BAD].vectors)
    spans = [[(0, 1)]] * len(TEXTS)
    one, other = enc.embed_spans(list(TEXTS), spans), wide.embed_spans(list(TEXTS), spans)
    np.testing.assert_array_equal(one.documents[BAD], other.documents[BAD])
    np.testing.assert_array_equal(one.spans[BAD], other.spans[BAD])
    assert all(np.isfinite(x).all() for x in one.spans)


def test_nothing_is_waited_for_on_its_account(enc):
    events, asked = enc.engine.accelerator.events, []
    for enc.retry_non_finite in (False, True):
        events.clear()
        enc.embed(list(TEXTS), batch_tokens=30)
        asked.append([event for event in events if event != "follow"])  # waits on the device alone
    without, checked = asked
    assert checked[: len(without)] == without
    assert checked[len(without) :] == ["send", "fetch", "mark", "wait"]  # of the text that was run again


def test_what_is_not_finite_even_in_fp32_is_named(folder, monkeypatch):
    enc = overflowing(folder, monkeypatch, {torch.float16, torch.float32})
    with pytest.warns(
        NonFiniteWarning, match=f"1 of 8 texts hold NaN or infinity even in float32: rows {BAD}"
    ) as caught:
        vectors = enc.embed(list(TEXTS))
    assert caught[0].message.rows == (BAD,) and caught[0].filename == __file__
    assert np.flatnonzero(~np.isfinite(vectors).all(1)).tolist() == [BAD]


def test_a_text_that_does_not_fit_in_fp32_costs_no_other_ones_vector(enc, monkeypatch):
    room = []
    monkeypatch.setattr(enc.engine, "make_room", lambda: room.append(1))

    def full(*arguments, **more):
        raise torch.OutOfMemoryError("no room")

    wide = widened(enc.decoder)
    monkeypatch.setattr(wide, "run", full)
    monkeypatch.setattr("flashvec.runtime.text_runner.widened", lambda decoder: wide)
    with pytest.warns(NonFiniteWarning, match=f"1 of 8 texts hold NaN or infinity even in float32: rows {BAD}"):
        vectors = enc.embed(list(TEXTS))
    assert np.flatnonzero(~np.isfinite(vectors).all(1)).tolist() == [BAD] and room


def test_a_stream_numbers_them_from_its_first(folder, monkeypatch, caplog):
    enc = overflowing(folder, monkeypatch, {torch.float16, torch.float32})
    with pytest.warns(NonFiniteWarning, match=f"rows {BAD};") as caught, caplog.at_level(logging.WARNING, "flashvec"):
        vectors = np.stack(list(enc.embed_iter(TEXTS, window=3)))
    assert [w.message.rows for w in caught] == [(BAD,)] and caught[0].filename == __file__
    assert f"run again in float32: rows {BAD}" in caplog.text
    assert np.flatnonzero(~np.isfinite(vectors).all(1)).tolist() == [BAD]


def test_truncation_is_counted_once(enc):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        enc.embed([TEXTS[3], TEXTS[BAD] * 9, "x"], max_length=12)
    assert [str(w.message)[:50] for w in caught if "were cut" in str(w.message)] == [
        "2 of 3 texts were longer than max_length=12 tokens"
    ]


def test_off_where_it_is_not_needed(folder):
    for dtype in ("float32", "bfloat16"):
        assert not Encoder.load(folder, dtype=dtype).retry_non_finite
    assert Encoder.load(folder, dtype="float16").retry_non_finite
