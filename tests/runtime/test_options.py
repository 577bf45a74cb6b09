"""What type checkers see of `Encoder`: `mypy` checks each `assert_type`, pytest that what comes is of that type."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Literal, assert_type

import numpy as np
import pytest
import torch

from flashvec import Encoder
from flashvec.runtime import options
from flashvec.runtime.parts import SpanVectors, TokenVectors

TEXTS = ["a river", "bread"]


def test_vectors_of_texts(enc: Encoder) -> None:
    assert isinstance(assert_type(enc.embed("a river"), np.ndarray), np.ndarray)
    assert isinstance(assert_type(enc.embed(TEXTS, truncate_dim=8, precision="binary"), np.ndarray), np.ndarray)
    assert isinstance(assert_type(enc.embed(TEXTS, out=np.empty((2, 32), np.float32)), np.ndarray), np.ndarray)
    assert isinstance(assert_type(enc.embed(TEXTS, output="torch", max_length=8), torch.Tensor), torch.Tensor)
    assert isinstance(assert_type(enc.embed(TEXTS, spans=[[(0, 1)], []]), SpanVectors), SpanVectors)
    numpy, tensors = enc.embed_iter(TEXTS), enc.embed_iter(TEXTS, output="torch", instruction="Find: ")
    assert isinstance(next(assert_type(numpy, Iterator[np.ndarray])), np.ndarray)
    assert isinstance(next(assert_type(tensors, Iterator[torch.Tensor])), torch.Tensor)


@pytest.mark.parametrize(("output", "spans"), [("numpy", None), ("torch", [[], []])])
def test_arguments_known_only_when_it_runs(enc: Encoder, output: Any, spans: Any) -> None:
    kind: Literal["numpy", "torch"] = output
    parts: Sequence[Sequence[tuple[int, int]]] | None = spans
    assert_type(enc.embed(TEXTS, output=kind), np.ndarray | torch.Tensor)
    assert_type(enc.embed(TEXTS, spans=parts), np.ndarray | SpanVectors)
    texts: str | Sequence[str] = TEXTS if parts else str(output)
    assert_type(enc.count_tokens(texts), int | np.ndarray)


def test_parts_and_counts(enc: Encoder) -> None:
    assert isinstance(assert_type(enc.embed_tokens(TEXTS, max_length=8), list[TokenVectors])[0], TokenVectors)
    assert isinstance(assert_type(enc.embed_words([TEXTS], max_length=8), list[np.ndarray])[0], np.ndarray)
    assert isinstance(assert_type(enc.count_tokens("a river"), int), int)
    assert isinstance(assert_type(enc.count_tokens(TEXTS), np.ndarray), np.ndarray)


def test_vectors_under_that_librarys_names(enc: Encoder) -> None:
    assert isinstance(assert_type(enc.encode(TEXTS, convert_to_tensor=True), torch.Tensor), torch.Tensor)
    assert isinstance(assert_type(enc.encode(TEXTS, convert_to_tensor=False), np.ndarray), np.ndarray)
    assert isinstance(assert_type(enc.encode_query("a river", normalize_embeddings=True), np.ndarray), np.ndarray)
    assert isinstance(assert_type(enc.encode_document(TEXTS, convert_to_tensor=True), torch.Tensor), torch.Tensor)
    assert_type(enc.encode("a river", None, "Find: ", convert_to_numpy=False), Any)
    assert isinstance(assert_type(enc.similarity(enc.encode(TEXTS), enc.encode(TEXTS)), torch.Tensor), torch.Tensor)


@pytest.mark.parametrize(
    ("method", "given"),
    [
        (Encoder.embed, options.EmbedOptions),
        (Encoder.embed_iter, options.StreamOptions),
        (Encoder.encode, options.EncodeOptions),
    ],
)
def test_options_are_the_methods_own(method: Any, given: Any) -> None:
    own = inspect.signature(method).parameters
    names = own.keys() | (options.RunOptions.__annotations__ if "run" in own else {})
    assert given.__annotations__.keys() <= names
    same = {name: own[name].annotation for name in given.__annotations__ if name in own}
    assert same == {name: given.__annotations__[name] for name in same}
