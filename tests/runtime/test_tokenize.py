"""Ids, truncation and offsets against Hugging Face's over the same folder."""

import random
from pathlib import Path

import numpy as np
import pytest
from tokenizer_samples import CORPUS, FAST, KINDS, NAMES, TEXTS, backend_of, rows_of, tokenizer_of, write_folder
from tokenizers import Regex, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from flashvec.runtime import tokenize
from flashvec.runtime.tokenize import Tokenizer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_length", [2, 3, 7, 512])
def test_ids_are_hugging_faces(tmp_path: Path, kind: str, max_length: int) -> None:
    write_folder(tmp_path, backend_of(kind), NAMES | FAST)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    tokens = tokenizer.encode(TEXTS, max_length)
    assert tokens.ids.dtype == tokens.lengths.dtype == np.int32 and tokens.truncated.dtype == bool
    for text, ids, truncated in zip(TEXTS, rows_of(tokens), tokens.truncated, strict=True):
        whole = theirs(text)["input_ids"]
        expected = theirs(text, truncation=True, max_length=max_length)["input_ids"]
        assert ids == (expected or [2])
        assert truncated == (len(whole) > max_length)
    assert tokenizer.count(TEXTS, special=True).tolist() == [max(1, len(theirs(t)["input_ids"])) for t in TEXTS]
    bare = [len(theirs(t, add_special_tokens=False)["input_ids"]) for t in TEXTS]
    assert tokenizer.count(TEXTS).tolist() == bare


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_are_characters_of_the_text(tmp_path: Path, kind: str) -> None:
    write_folder(tmp_path, backend_of(kind), NAMES | FAST)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    tokens = Tokenizer.from_folder(tmp_path).encode(TEXTS, 9, offsets=True)
    assert tokens.offsets is not None and tokens.special is not None and tokens.offsets.dtype == np.int32
    at = 0
    for text, length in zip(TEXTS, tokens.lengths, strict=True):
        found = theirs(
            text, truncation=True, max_length=9, return_offsets_mapping=True, return_special_tokens_mask=True
        )
        offsets, special = tokens.offsets[at : at + length], tokens.special[at : at + length]
        assert offsets.tolist() == ([list(span) for span in found["offset_mapping"]] or [[0, 0]])
        assert (offsets[special] == 0).all() and (offsets <= len(text)).all()
        in_text = sum(i in (1, 2) for i in tokens.ids[at : at + length][~special])
        assert special.sum() == (sum(found["special_tokens_mask"]) or not found["input_ids"])
        assert in_text == (text.count("</s>") + text.count("<s>") if length < 9 else in_text)
        at += length


def test_offsets_of_multi_byte_characters() -> None:
    tokens = tokenizer_of("llama3").encode(["a😀b"], 32, offsets=True)
    assert tokens.offsets is not None
    spans = tokens.offsets.tolist()
    assert spans[0] == [0, 1] and spans[-1] == [2, 3] and all(span == [1, 2] for span in spans[1:-1])


def test_nothing_to_encode() -> None:
    tokens = tokenizer_of("llama2").encode([], 8, offsets=True)
    assert tokens.ids.shape == tokens.lengths.shape == tokens.truncated.shape == (0,)
    assert tokens.offsets is not None and tokens.offsets.shape == (0, 2)
    assert tokenizer_of("llama2").count([]).shape == (0,)


def test_a_text_without_tokens_is_one_special_token() -> None:
    tokens = tokenizer_of("gpt2").encode(["", "a", ""], 8, offsets=True)
    assert tokens.lengths.tolist() == [1, 1, 1] and tokens.ids[[0, 2]].tolist() == [2, 2]
    assert tokens.special is not None and tokens.special.tolist() == [True, False, True]
    assert not tokens.truncated.any()
    assert Tokenizer.from_backend(backend_of("gpt2"), bos_id=1).encode([""], 8).ids.tolist() == [1]
    with pytest.raises(ValueError, match="no special token"):
        Tokenizer.from_backend(backend_of("gpt2"))


def test_special_tokens_written_in_a_text() -> None:
    tokenizer = tokenizer_of("llama3")
    assert 2 in tokenizer.encode(["a</s>b"], 32).ids
    assert 2 not in tokenizer.encode(["a</s>b"], 32, split_special=True).ids
    assert 2 in tokenizer.encode(["a</s>b"], 32).ids


def test_arguments() -> None:
    tokenizer = tokenizer_of("llama2")
    assert tokenizer.encode(["the cat sat"], 2).lengths.tolist() == [2]
    with pytest.raises(ValueError, match="max_length is 1; the least is 2"):
        tokenizer.encode(["a"], 1)
    with pytest.raises(TypeError, match="give a list"):
        tokenizer.encode("abc", 8)
    with pytest.raises(ValueError, match="eos_id is 99999"):
        Tokenizer.from_backend(backend_of("llama2"), eos_id=99999)


def test_truncation_and_padding_of_the_file_are_off() -> None:
    backend = Backend.from_str(backend_of("llama2").to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=16, pad_id=0)
    tokenizer = Tokenizer.from_backend(backend, eos_id=2)
    assert backend.truncation and backend.padding  # the caller's own is left alone
    assert tokenizer.encode(["the cat sat on the mat"], 512).lengths[0] == tokenizer_of("llama2").count(
        ["the cat sat on the mat"], special=True
    )


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    rows = [" ".join(rng.choices(CORPUS[:5], k=rng.randrange(4))) for _ in range(100)]
    expected = tokenizer_of("llama3").encode(rows, 20)
    monkeypatch.setattr(tokenize, "CHUNK_TEXTS", 7)
    monkeypatch.setattr(tokenize, "CHUNK_CHARS", 300)
    found = tokenizer_of("llama3").encode(rows, 20)
    assert np.array_equal(found.ids, expected.ids) and np.array_equal(found.truncated, expected.truncated)


@pytest.mark.parametrize("kind", ["llama3", "llama2", "unigram"])
def test_a_megabyte_of_text(kind: str) -> None:
    rows = ["the cat sat on the mat and ran " * 33_000, "z" * 200_000]
    tokens = tokenizer_of(kind).encode(rows, 512)
    assert tokens.lengths.tolist() == [512, 512] or kind == "unigram"
    assert tokens.truncated[0]


def test_a_text_at_which_a_regular_expression_gives_up_is_an_error() -> None:
    """The library panics there, which is no `Exception`: workers and the server's thread would end by it."""
    backend = Backend.from_str(backend_of("llama3").to_str())
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    tokenizer = Tokenizer.from_backend(backend, eos_id=2)
    text = "a" * 40 + "b"
    for tokenise in (lambda: tokenizer.encode([text], 99), lambda: tokenizer.count([text])):
        with pytest.raises(ValueError, match=r"the tokenizer fails at a text: .*retry-limit"):
            tokenise()
    with pytest.raises(ValueError, match="the tokenizer fails at a text"):
        tokenizer.join([(text, False)])


def test_a_template_may_add_tokens_of_the_vocabulary_alone() -> None:
    backend = Backend.from_str(backend_of("llama3").to_str())
    special = [("<s>", 4_000_000_000)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=special)
    with pytest.raises(ValueError, match="adds the token 4000000000, which the vocabulary does not have"):
        Tokenizer.from_backend(backend, eos_id=2)
