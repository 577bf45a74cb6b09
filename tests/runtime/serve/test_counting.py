"""Texts are counted before they are embedded: no further than need be, and within the time for an answer."""

import time

import httpx
import numpy as np
import pytest
from running_server import Server, refused
from tiny_models import tiny_checkpoint

from flashvec import Encoder
from flashvec.runtime.engine import default_budget
from flashvec.runtime.serve import app as app_module
from flashvec.runtime.serve.app import create_app
from flashvec.runtime.serve.body import Limits


@pytest.fixture(scope="module")
def enc(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_checkpoint(folder, "llama")
    return Encoder.load(folder, dtype="float32", max_length=64)


class Watched:
    """A tokenizer's backend that notes the longest text it was given."""

    def __init__(self, backend):
        self.backend, self.longest, self.chars = backend, 0, 0

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def encode_batch_fast(self, texts, **settings):
        self.longest = max(self.longest, *map(len, texts))
        self.chars += sum(map(len, texts))
        return self.backend.encode_batch_fast(texts, **settings)


@pytest.mark.filterwarnings("ignore::flashvec.runtime.texts.TruncationWarning")
@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("words", [2_000, 200_000])
def test_a_long_text_is_read_no_further_than_its_end_in_tokens(enc, monkeypatch, truncate, words):
    watched = Watched(enc.tokenizer.backend)
    monkeypatch.setattr(enc.tokenizer, "backend", watched)
    with Server(create_app(enc, name="tiny", truncate=truncate)) as server:
        answer = httpx.post(f"{server.url}/v1/embeddings", json={"model": "tiny", "input": ["x", "word " * words]})
    if truncate:
        assert answer.json()["usage"]["prompt_tokens"] == 64 + enc.count_tokens("x")
    else:
        assert "input[1] has too many tokens, at most 64 fit" in refused(answer, 400)
    assert watched.longest < 2_000


def test_what_is_refused_is_read_up_to_its_first_long_text(enc, monkeypatch):
    watched = Watched(enc.tokenizer.backend)
    monkeypatch.setattr(enc.tokenizer, "backend", watched)
    texts = ["fits"] * 3 + ["!" * 16_000] * 200  # none with a place to cut it, or too long for its characters alone
    with Server(create_app(enc, name="tiny")) as server:
        answer = httpx.post(f"{server.url}/v1/embeddings", json={"model": "tiny", "input": texts})
    assert "input[3] has too many tokens" in refused(answer, 400)
    assert watched.chars < 100_000


def test_a_round_is_one_pack_on_a_cpu(enc):
    assert create_app(enc, name="tiny").state.batcher.batch_tokens == default_budget(enc.device) == 2048
    assert create_app(enc, name="tiny", batch_tokens=100).state.batcher.batch_tokens == 100


def test_counts_of_many_slices_are_put_together(enc, monkeypatch):
    monkeypatch.setattr(app_module, "COUNTED_CHARS", 10)
    texts = ["a b c", "", "one two three", "d", "e f", "g"]
    with Server(create_app(enc, name="tiny")) as server:
        answer = httpx.post(f"{server.url}/v1/embeddings", json={"model": "tiny", "input": texts}).json()
    assert answer["usage"]["prompt_tokens"] == enc.count_tokens(texts).sum()
    assert np.array_equal(np.float32([item["embedding"] for item in answer["data"]]), enc.embed(texts))


def test_counting_is_part_of_the_time_for_an_answer(enc, monkeypatch):
    monkeypatch.setattr(app_module, "_count", lambda *arguments: time.sleep(1.0))
    with Server(create_app(enc, name="tiny", limits=Limits(answer_s=0.2))) as server:
        answer = httpx.post(f"{server.url}/v1/embeddings", json={"model": "tiny", "input": "x"})
    assert "no answer within 0.2 s" in refused(answer, 503)
