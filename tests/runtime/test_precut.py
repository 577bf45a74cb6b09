"""A text cut before it is tokenised has the same first tokens."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import (
    KINDS,
    TO_METASPACE,
    backend_of,
    byte_level,
    rows_of,
    sentencepiece,
    split_by,
    tokenizer_of,
)
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from flashvec.runtime import tokenize
from flashvec.runtime.precut import boundary_pattern

PIECES = [
    *["the", "cat", " ", " ", " ", "  ", "a", "B", "x1", "12345", "\n", "\r\n", "\t", "'s", "n't", ".", ", ", "!?"],
    *[
        "东京",
        "，",
        "。",
        "、",
        "日本的",
        "です",
        "ﬁ",
        "é",
        "e\u0301",
        "\u0301",
        "\u3099",
        "😀",
        "👨‍👩‍👧",
        "▁",
        "ｱ",
        "\u00a0",
    ],
    *[
        "<l>",
        " <r> ",
        "THE ",
        "cat,",
        "’s",
        "</s>",
        "<s>",
        " </s> ",
        "\u2581the",
        "don't stop",
        "人口很多，今天",
        "0" * 9,
        "z" * 40,
        "\u3000",
        "龥，龥",
    ],
]
texts = (
    st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=60)
    .map("".join)
    .map(lambda text: text.encode("utf-8", "replace").decode())
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=texts)
def test_a_cut_at_a_boundary_keeps_the_first_tokens(kind: str, text: str) -> None:
    backend, pattern = backend_of(kind), boundary_pattern_of(kind)
    whole = backend.encode(text, add_special_tokens=False)
    for match in pattern.finditer(text):
        head = backend.encode(text[: match.start()], add_special_tokens=False)
        assert head.ids == whole.ids[: len(head)]


@cache
def splitting_backend_of(kind: str) -> Backend:
    backend = Backend.from_str(backend_of(kind).to_str())
    backend.encode_special_tokens = True
    return backend


@cache
def boundary_pattern_of(kind: str):
    pattern = boundary_pattern(backend_of(kind))
    assert pattern is not None and pattern.search("the cat")
    return pattern


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(texts, min_size=1, max_size=4),
    max_length=st.integers(2, 40),
    offsets=st.booleans(),
    split_special=st.booleans(),
)
def test_encode_gives_the_tokens_of_the_whole_text(
    kind: str, rows: list[str], max_length: int, offsets: bool, split_special: bool
) -> None:
    tokenizer, backend = tokenizer_of(kind), splitting_backend_of(kind) if split_special else backend_of(kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "CUT_CHARS_PER_TOKEN", 1)  # many cuts, many of them too short
        patch.setattr(tokenize, "CUT_CHARS_EXTRA", 0)
        tokens = tokenizer.encode(rows, max_length, offsets=offsets, split_special=split_special)
    room = max_length - len(tokenizer.prefix_ids) - len(tokenizer.suffix_ids)
    at = 0
    for text, ids, truncated in zip(rows, rows_of(tokens), tokens.truncated, strict=True):
        whole = backend.encode(text, add_special_tokens=False)
        expected = [*tokenizer.prefix_ids, *whole.ids[:room], *tokenizer.suffix_ids]
        assert ids == (expected or [2])
        assert truncated == (len(whole) > room)
        if offsets and tokens.offsets is not None:
            first = at + len(tokenizer.prefix_ids)
            spans = [list(span) for span in whole.offsets[:room]]
            assert tokens.offsets[first : first + len(spans)].tolist() == spans
        at += len(ids)


def _cuts_at_spaces(backend: Backend) -> bool:
    pattern = boundary_pattern(backend)
    return pattern is not None and pattern.search("the cat") is not None


def test_no_boundary_where_tokens_may_cross_it() -> None:
    crossing = sentencepiece({"pre_tokenizer": None, "normalizer": TO_METASPACE}, crossing=True)
    assert any("e▁" in token for token in crossing.get_vocab())
    assert boundary_pattern(crossing) is None

    added = Backend.from_str(backend_of("llama3").to_str())
    added.add_tokens([AddedToken("New York", normalized=True)])
    assert not _cuts_at_spaces(added)
    added = Backend.from_str(backend_of("o200k").to_str())
    added.add_tokens([AddedToken("\uff4e\u3000y", normalized=True)])  # "n y" once normalised
    assert not _cuts_at_spaces(added)

    for pre_tokenizer in (
        pre_tokenizers.ByteLevel(use_regex=False),
        pre_tokenizers.Split(" ", "merged_with_previous"),
        split_by(r"\p{L}+ \p{L}+|\s+|\S"),
        pre_tokenizers.CharDelimiterSplit("e"),
    ):
        assert boundary_pattern(byte_level(pre_tokenizer, size=400)) is None
    for normalizer in (normalizers.Replace("t c", "x"), normalizers.Replace(Regex(r"\w \w"), "x")):
        backend = Backend.from_str(backend_of("llama3").to_str())
        backend.normalizer = normalizer
        assert boundary_pattern(backend) is None
