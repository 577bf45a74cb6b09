"""sentence-transformers' names: the same parameters, and scores by the model's own similarity."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from flashvec.runtime.drop_in import SentenceTransformerNames


class Fixed(SentenceTransformerNames):
    """Vectors by table, so that only the naming is under test."""

    def __init__(self, similarity: str = "cosine") -> None:
        self.spec: Any = type("Spec", (), {"similarity": similarity, "prompts": {"query": "Q: ", "corpus": "C: "}})
        self.asked: list[dict] = []

    def embed(self, texts, **settings):
        self.asked.append(settings)
        return np.ones((len(texts), 3), np.float32)


def test_parameters_are_that_librarys():
    theirs = inspect.signature(SentenceTransformer.encode).parameters
    ours = inspect.signature(SentenceTransformerNames.encode).parameters
    assert list(ours) == [name for name in theirs if name in ours]  # same names in the same order
    missing = set(theirs) - set(ours) - {"pool", "chunk_size", "kwargs"}
    assert not missing, missing


def test_queries_and_documents_take_their_prompts():
    enc = Fixed()
    enc.encode_query(["a"])
    enc.encode_document(["a"])
    enc.encode_query(["a"], prompt="mine: ")
    assert [a["prompt_name"] for a in enc.asked] == ["query", "corpus", None]
    assert enc.asked[2]["instruction"] == "mine: "


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity_is_that_librarys(name):
    from sentence_transformers.util import cos_sim, dot_score, euclidean_sim, manhattan_sim

    theirs = {"cosine": cos_sim, "dot": dot_score, "euclidean": euclidean_sim, "manhattan": manhattan_sim}[name]
    a, b = torch.randn(3, 5), torch.randn(2, 5)
    torch.testing.assert_close(Fixed(name).similarity(a.numpy(), b), theirs(a, b))


def test_unknown_output_is_refused():
    with pytest.raises(ValueError, match="output_value is 'logits'"):
        Fixed().encode(["a"], output_value="logits")
