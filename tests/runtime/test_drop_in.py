"""sentence-transformers' names: the same parameters, and scores by the model's own similarity."""

import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import pandas
import pyarrow
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings

from flashvec.runtime.drop_in import SentenceTransformerNames
from flashvec.runtime.encoder import Encoder
from flashvec.runtime.integrations.two_sides import TwoSides


class Fixed(SentenceTransformerNames):
    """Vectors by table, so that only the naming is under test."""

    def __init__(self, similarity: str = "cosine") -> None:
        self.spec: Any = type("Spec", (), {"similarity": similarity, "prompts": {"query": "Q: ", "corpus": "C: "}})
        self.asked: list[dict] = []

    def embed(self, texts, **settings):
        self.asked.append(settings)
        return np.ones((len(texts), 3) if isinstance(texts, list) else 3, np.float32)


def test_parameters_are_that_librarys():
    theirs = inspect.signature(SentenceTransformer.encode).parameters
    ours = inspect.signature(SentenceTransformerNames.encode).parameters
    assert list(ours) == [*(name for name in theirs if name in ours), "sentences"]  # same names in the same order
    missing = set(theirs) - set(ours) - {"pool", "chunk_size", "kwargs"}
    assert not missing, missing


def test_queries_and_documents_take_their_prompts():
    enc = Fixed()
    enc.encode_query(["a"])
    enc.encode_document(["a"])
    enc.encode_query(["a"], prompt="mine: ")
    assert [a["prompt_name"] for a in enc.asked] == ["query", "corpus", None]
    assert enc.asked[2]["instruction"] == "mine: "


def test_texts_may_be_called_sentences_as_before_version_6():
    for method in ("encode", "encode_query", "encode_document"):
        assert getattr(Fixed(), method)(sentences=["a", "b"]).shape == (2, 3)
        for given in ({}, {"inputs": ["a"], "sentences": ["a"]}):
            with pytest.raises(TypeError, match="give texts as inputs, or as sentences"):
                getattr(Fixed(), method)(**given)


@pytest.mark.parametrize("side", ["query", "document"])
def test_a_side_without_a_prompt_does_not_take_the_default_which_is_the_others(side, folder):
    other = "document" if side == "query" else "query"
    enc = Encoder.load(folder)
    enc.spec = replace(enc.spec, prompts={other: "Prompt: "}, default_prompt_name=other)
    plain = enc.embed(["a river"], instruction="")
    assert not np.array_equal(enc.embed(["a river"]), plain)
    assert np.array_equal(getattr(enc, f"encode_{side}")(["a river"]), plain)
    assert np.array_equal(getattr(enc, f"encode_{other}")(["a river"]), enc.embed(["a river"]))
    sides = TwoSides(enc)
    assert np.array_equal(sides.documents(["a river"]) if side == "document" else [sides.query("a river")], plain)


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity_is_that_librarys(name):
    from sentence_transformers.util import cos_sim, dot_score, euclidean_sim, manhattan_sim

    theirs = {"cosine": cos_sim, "dot": dot_score, "euclidean": euclidean_sim, "manhattan": manhattan_sim}[name]
    a, b = torch.randn(3, 5), torch.randn(2, 5)
    torch.testing.assert_close(Fixed(name).similarity(a.numpy(), b), theirs(a, b))


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity_of_pairs_is_that_librarys(name):
    from sentence_transformers import util

    theirs = {"cosine": "cos_sim", "dot": "dot_score", "euclidean": "euclidean_sim", "manhattan": "manhattan_sim"}
    a, b = torch.randn(3, 5), torch.randn(3, 5)
    expected = getattr(util, f"pairwise_{theirs[name]}")(a, b)
    torch.testing.assert_close(Fixed(name).similarity_pairwise(a.numpy(), b), expected)


def test_similarity_refuses_what_are_no_vectors_of_the_model(folder):
    enc = Encoder.load(folder, dtype="float32")
    vectors = enc.embed(["a river", "a boat", "bread"])
    packed = enc.embed(["a river", "a boat"], precision="ubinary")
    for method in (enc.similarity, enc.similarity_pairwise):
        for bad in (packed, torch.from_numpy(packed), enc.embed(["a river"], precision="binary")):
            with pytest.raises(ValueError, match="embeddings2 holds packed signs"):
                method(packed[:0].astype(np.float32), bad)
        with pytest.raises(ValueError, match="embeddings1 has 32 dimensions, embeddings2 8"):
            method(vectors, vectors[:, :8])
        with pytest.raises(TypeError, match=r"embeddings1 is NoneType: give vectors \[n, d\]"):
            method(None, vectors)
        with pytest.raises(ValueError, match="embeddings2 has 3 dimensions"):
            method(vectors, vectors[None])
        columns = (pandas.Series(list(vectors)), pyarrow.array(vectors.tolist()))
        for column in (*columns, np.stack(list(columns[1])), [[1.0], [1.0, 2.0]], iter(vectors)):
            with pytest.raises(TypeError, match=rf"embeddings2 is {type(column).__name__}: .* np.stack\(list\(column"):
                method(vectors, column)
    with pytest.raises(ValueError, match="embeddings1 has 3 vectors, embeddings2 2: give one for each"):
        enc.similarity_pairwise(vectors, vectors[:2])
    assert enc.similarity_pairwise(vectors, vectors[0]).shape == (3,)
    for column in columns:
        read = np.stack(list(column)).astype("float32")  # as the message says
        assert torch.equal(enc.similarity(read, vectors), enc.similarity(vectors, vectors))


def test_similarity_of_steps_is_that_of_the_values_they_stand_for(folder):
    enc, texts = Encoder.load(folder, dtype="float32"), ["a river", "a boat", "bread"]
    enc.calibrate([f"{text} {i}" for text in texts for i in range(50)])
    vectors, packed = enc.embed(texts), enc.embed(texts, precision="binary")
    exact, pairs = enc.similarity(vectors, vectors), enc.similarity_pairwise(vectors, vectors)
    for precision in ("int8", "uint8"):
        steps = enc.embed(texts, precision=precision)
        for other in (steps, vectors, list(steps), torch.from_numpy(steps)):
            torch.testing.assert_close(enc.similarity(steps, other), exact, rtol=0, atol=0.05)
            torch.testing.assert_close(enc.similarity_pairwise(other, steps), pairs, rtol=0, atol=0.05)
        for widened in (steps.tolist(), steps.astype(np.int32), torch.from_numpy(steps).long()):
            with pytest.raises(TypeError, match=r"embeddings2 is of int.*give floats, or steps .* int8 or uint8"):
                enc.similarity(vectors, widened)
        with pytest.raises(ValueError, match=r"embeddings2 holds steps .* no value ranges of 32 dimensions"):
            Encoder.load(folder, dtype="float32").similarity(vectors, steps)
    with pytest.raises(ValueError, match="embeddings1 holds packed signs"):
        enc.similarity(packed, packed)  # as wide as steps could be, were they cut


def test_similarity_is_fp32_under_autocast_and_of_rows_in_reverse(enc):
    vectors = enc.embed(["a river", "a boat", "bread"])
    want = enc.similarity(vectors, vectors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = enc.similarity(vectors, vectors)
    assert found.dtype == torch.float32 and torch.equal(found, want)
    torch.testing.assert_close(enc.similarity(vectors[::-1], vectors), want.flip(0))


def test_similarity_of_vectors_that_are_only_read_warns_of_nothing(enc, tmp_path, recwarn):
    vectors = enc.embed(["a river", "a boat", "bread"])
    np.save(tmp_path / "vectors.npy", vectors)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    assert torch.equal(enc.similarity(mapped, mapped), enc.similarity(vectors, vectors))
    assert not recwarn.list


def test_without_conversion_a_list_of_tensors_or_for_a_str_one():
    listed, single = (Fixed().encode(texts, convert_to_numpy=False) for texts in (["a", "b"], "a"))
    assert [row.shape for row in listed] == [(3,), (3,)] and isinstance(single, torch.Tensor) and single.shape == (3,)


def test_tensors_of_every_precision_are_that_librarys(enc):
    texts = ["a river", "a boat"]
    for precision in ("binary", "ubinary"):
        numpy = enc.encode(texts, precision=precision)
        tensor = enc.encode(texts, precision=precision, convert_to_tensor=True)
        expected = quantize_embeddings(enc.encode(texts), precision)
        assert torch.equal(tensor, torch.from_numpy(numpy)) and np.array_equal(numpy, expected)
        assert torch.equal(enc.encode("a river", precision=precision, convert_to_tensor=True), tensor[0])
    with pytest.raises(ValueError, match="precision is 'int4', known are float32"):
        enc.encode(texts, precision="int4", convert_to_tensor=True)


def test_what_is_refused():
    with pytest.raises(ValueError, match="output_value is 'logits'"):
        Fixed().encode(["a"], output_value="logits")
    with pytest.raises(ValueError, match="prompt_name is 'title'; this model's prompts are: query, corpus"):
        Fixed().encode(["a"], output_value="token_embeddings", prompt_name="title")
    for output in ("token_embeddings", "sentence_embedding"):
        with pytest.raises(ValueError, match="give prompt or prompt_name, not both"):
            Fixed().encode(["a"], output_value=output, prompt_name="query", prompt="Q: ")
    with pytest.raises(ValueError, match="precision is 'int8'; token_embeddings are float32"):
        Fixed().encode(["a"], output_value="token_embeddings", precision="int8")
