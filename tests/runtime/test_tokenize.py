"""Ids against Hugging Face's over the same folder; files; and cutting a text before tokenising it, which is exact."""

# ruff: noqa: RUF001 - full-width punctuation is under test

import json
import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from flashvec.runtime import tokenize
from flashvec.runtime.checkpoint.source import CheckpointError
from flashvec.runtime.precut import boundary_pattern
from flashvec.runtime.tokenize import Tokenizer

CORPUS = [
    "the cat sat on the mat and the dog ran over the red bridge, the cat said: it's 1234 o'clock!",
    "hello world, hello there; numbers 12 345 6789 and code x = y + 1\n\tdef f(self): return None",
    "straße naïve café Zürich 10 % of €20, cafe\u0301 and fiancée",
    "东京都是日本的首都，人口很多。今天天气很好、我们去公园。",
    "こんにちは世界 ここは東京です 안녕하세요 세계 привет мир 😀🎉 family 👨‍👩‍👧",
] * 8
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def _byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer, normalizer=None, size: int = 600) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    steps = [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(steps)


def _sentencepiece(changes: dict, crossing: bool = False) -> Backend:
    """A BPE with byte fallback, trained on words (or, `crossing`, on whole lines), then given another front end."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if crossing:
        backend.normalizer = normalizers.Replace(" ", "▁")
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL + BYTES, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][: len(SPECIAL)]
    backend = Backend.from_str(json.dumps(state | changes))
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return backend


def _unigram() -> Backend:
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 2)])
    return backend


TO_METASPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
LLAMA2 = {
    "pre_tokenizer": None,
    "normalizer": {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "▁"}, TO_METASPACE],
    },
}
GEMMA = {
    "normalizer": TO_METASPACE,
    "pre_tokenizer": {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    },
}
NO_SPLIT = {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}}
KINDS = {
    "gpt2": lambda: _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt2_trimmed": lambda: _byte_level(pre_tokenizers.ByteLevel(), normalizers.Lowercase()),
    "llama3": lambda: _byte_level(_split(LLAMA3)),
    "qwen": lambda: _byte_level(_split(QWEN), normalizers.NFC()),
    "o200k": lambda: _byte_level(_split(O200K), normalizers.NFKC()),
    "smollm": lambda: _byte_level(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        normalizers.Strip(),
    ),
    "metaspace": lambda: _sentencepiece({}),
    "metaspace_no_split": lambda: _sentencepiece(NO_SPLIT),
    "llama2": lambda: _sentencepiece(LLAMA2),
    "gemma": lambda: _sentencepiece(GEMMA),
    "unigram": _unigram,
}


@cache
def backend_of(kind: str) -> Backend:
    return KINDS[kind]()


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    return Tokenizer.from_backend(backend_of(kind), bos_id=1, eos_id=2, unk_id=0)


TEXTS = [
    "the cat sat on the mat",
    " leading and  double  spaces ",
    "",
    " ",
    "\n\n\t",
    "naïve café cafe\u0301 ﬁne ½",
    "东京都是日本的首都，人口很多。",
    "a 😀 b 👨‍👩‍👧 c",
    "stop </s> and <s>go</s>",
    "x" * 50,
    "it's 1234567 o'clock, isn't it?",
]


def write_folder(folder: Path, backend: Backend, config: dict) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_length", [2, 3, 7, 512])
def test_ids_are_hugging_faces(tmp_path: Path, kind: str, max_length: int) -> None:
    write_folder(tmp_path, backend_of(kind), NAMES | FAST)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    tokens = tokenizer.encode(TEXTS, max_length)
    assert tokens.ids.dtype == tokens.lengths.dtype == np.int32 and tokens.truncated.dtype == bool
    for text, ids, truncated in zip(TEXTS, _rows(tokens), tokens.truncated, strict=True):
        whole = theirs(text)["input_ids"]
        expected = theirs(text, truncation=True, max_length=max_length)["input_ids"]
        assert ids == (expected or [2])
        assert truncated == (len(whole) > max_length)
    assert tokenizer.count(TEXTS, special=True).tolist() == [max(1, len(theirs(t)["input_ids"])) for t in TEXTS]
    bare = [len(theirs(t, add_special_tokens=False)["input_ids"]) for t in TEXTS]
    assert tokenizer.count(TEXTS).tolist() == bare


def _rows(tokens: tokenize.Tokens) -> list[list[int]]:
    return [row.tolist() for row in np.split(tokens.ids, np.cumsum(tokens.lengths)[:-1])]


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


# Special tokens and the configuration files


def test_special_tokens_of_the_configuration(tmp_path: Path) -> None:
    backend = Backend.from_str(backend_of("llama2").to_str())
    backend.add_special_tokens([AddedToken("<pad>", special=True)])
    config = {
        "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False},
        "eos_token": None,
        "mask_token": "_",
    }
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, backend, config | FAST))
    assert tokenizer.bos_id == 1 and tokenizer.eos_id is None  # said to be none: not looked for
    assert tokenizer.pad_id == backend.token_to_id("<pad>")  # named nowhere: by its usual name
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == ((1,), ())
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.mask_id == theirs.mask_token_id
    assert tokenizer.encode(["a_b cat"], 32).ids.tolist() == theirs("a_b cat")["input_ids"]  # "_" now stands alone


def test_special_tokens_map_and_added_tokens_of_older_folders(tmp_path: Path) -> None:
    write_folder(tmp_path, backend_of("llama2"), FAST)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "pad_token": "</s>"}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<extra>": 900}))
    tokenizer, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_id, tokenizer.pad_id) == (1, 2) == (theirs.bos_token_id, theirs.pad_token_id)
    assert tokenizer.encode(["cat <extra>"], 32).ids.tolist() == theirs("cat <extra>")["input_ids"]


@pytest.mark.parametrize("kind", ["llama2", "gpt2", "llama3", "unigram"])
def test_eos_is_added_where_the_configuration_says_so(tmp_path: Path, kind: str) -> None:
    write_folder(tmp_path, backend_of(kind), NAMES | FAST | {"add_eos_token": True, "add_bos_token": False})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.suffix_ids == (2,)
    assert tokenizer.prefix_ids == ((1,) if kind == "llama2" else ())  # the template adds it: false changes nothing
    assert tokenizer.encode(["the cat sat on the mat"], 4).ids[-1] == 2
    tokenizer.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text, ids in zip(TEXTS, _rows(tokenizer.encode(TEXTS, 6)), strict=True):
        assert ids == theirs(text, truncation=True, max_length=6)["input_ids"]


def test_bos_is_added_where_the_configuration_says_so(tmp_path: Path) -> None:
    config = NAMES | FAST | {"add_eos_token": True, "add_bos_token": True}
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, backend_of("gpt2"), config))
    assert (tokenizer.prefix_ids, tokenizer.suffix_ids) == ((1,), (2,))
    assert Tokenizer.from_backend(backend_of("gpt2"), bos_id=1, add_bos=True).prefix_ids == (1,)


def test_a_llama_folder_follows_tokenizer_json(tmp_path: Path) -> None:
    """transformers 5 rebuilds LlamaTokenizer from its class: other ids for a leading space (see the module)."""
    write_folder(tmp_path, backend_of("llama2"), NAMES | {"tokenizer_class": "LlamaTokenizer"})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    plain = ["the cat sat on the mat", "东京都是日本的首都，人口很多。", "naïve café", "x\ny", ""]
    assert _rows(tokenizer.encode(plain, 99)) == [theirs(text)["input_ids"] for text in plain]
    spaced = " the cat"
    assert tokenizer.encode([spaced], 99).ids.tolist() == backend_of("llama2").encode(spaced).ids


@pytest.mark.parametrize("kind", KINDS)
def test_saved_folder_opens_in_transformers(tmp_path: Path, kind: str) -> None:
    write_folder(tmp_path, backend_of(kind), NAMES | FAST | {"model_max_length": 77, "padding_side": "left"})
    tokenizer = Tokenizer.from_folder(tmp_path)
    tokenizer.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.pad_token_id == tokenizer.eos_id == 2
    assert theirs.model_max_length == 77 and theirs.padding_side == "left"
    again = Tokenizer.from_folder(tmp_path / "saved")
    for max_length in (3, 512):
        rows = _rows(tokenizer.encode(TEXTS, max_length))
        assert rows == _rows(again.encode(TEXTS, max_length))
        found = theirs(TEXTS, truncation=True, max_length=max_length)
        assert set(found) == {"input_ids", "attention_mask"}
        assert rows == [ids or [2] for ids in found["input_ids"]]


def test_saving_needs_a_token_to_pad_with(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_backend(backend_of("gpt2"), bos_id=1)
    tokenizer.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["pad_token"] == "<s>"
    with pytest.raises(ValueError, match="to pad with"):
        Tokenizer.from_backend(backend_of("llama2")).save(tmp_path)


def test_missing_and_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"has tokenizer\.model but no tokenizer\.json.*save_pretrained"):
        Tokenizer.from_folder(tmp_path)
    for damaged in ("", "{}", "[]", backend_of("gpt2").to_str()[:-50]):
        (tmp_path / "tokenizer.json").write_text(damaged)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: damaged"):
            Tokenizer.from_folder(tmp_path)
    backend_of("gpt2").save(str(tmp_path / "tokenizer.json"))
    for damaged, message in (
        ("{", "damaged"),
        ("[" * 100_000, "damaged"),
        ("[]", "expected a JSON object"),
        ('{"eos_token": 3}', "eos_token"),
        ('{"added_tokens_decoder": {"x": {}}}', "added tokens"),
        ('{"added_tokens_decoder": [1]}', "added tokens"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(damaged)
        with pytest.raises(CheckpointError, match=message):
            Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    monkeypatch.setattr("flashvec.runtime.tokenizer_files.MAX_TOKENIZER_BYTES", 100)
    with pytest.raises(CheckpointError, match="at most 100"):
        Tokenizer.from_folder(tmp_path)


# Cutting before tokenising

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
    *["</s>", "<s>", " </s> ", "\u2581the", "don't stop", "人口很多，今天", "0" * 9, "z" * 40, "\u3000", "龥，龥"],
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
def boundary_pattern_of(kind: str):
    pattern = boundary_pattern(backend_of(kind))
    assert pattern is not None and pattern.search("the cat")
    return pattern


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(rows=st.lists(texts, min_size=1, max_size=4), max_length=st.integers(2, 40), offsets=st.booleans())
def test_encode_gives_the_tokens_of_the_whole_text(kind: str, rows: list[str], max_length: int, offsets: bool) -> None:
    tokenizer, backend = tokenizer_of(kind), backend_of(kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize, "CUT_CHARS_PER_TOKEN", 1)  # many cuts, many of them too short
        patch.setattr(tokenize, "CUT_CHARS_EXTRA", 0)
        tokens = tokenizer.encode(rows, max_length, offsets=offsets)
    room = max_length - len(tokenizer.prefix_ids) - len(tokenizer.suffix_ids)
    at = 0
    for text, ids, truncated in zip(rows, _rows(tokens), tokens.truncated, strict=True):
        whole = backend.encode(text, add_special_tokens=False)
        expected = [*tokenizer.prefix_ids, *whole.ids[:room], *tokenizer.suffix_ids]
        assert ids == (expected or [2])
        assert truncated == (len(whole) > room)
        if offsets and tokens.offsets is not None:
            first = at + len(tokenizer.prefix_ids)
            spans = [list(span) for span in whole.offsets[:room]]
            assert tokens.offsets[first : first + len(spans)].tolist() == spans
        at += len(ids)


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


def test_no_boundary_where_tokens_may_cross_it() -> None:
    crossing = _sentencepiece({"pre_tokenizer": None, "normalizer": TO_METASPACE}, crossing=True)
    assert any("e▁" in token for token in crossing.get_vocab())
    assert boundary_pattern(crossing) is None

    added = Backend.from_str(backend_of("llama3").to_str())
    added.add_tokens([AddedToken("New York", normalized=True)])
    pattern = boundary_pattern(added)
    assert pattern is None or not pattern.search("New York")

    for pre_tokenizer in (
        pre_tokenizers.ByteLevel(use_regex=False),
        pre_tokenizers.Split(" ", "merged_with_previous"),
        _split(r"\p{L}+ \p{L}+|\s+|\S"),
        pre_tokenizers.CharDelimiterSplit("e"),
    ):
        assert boundary_pattern(_byte_level(pre_tokenizer, size=400)) is None
    for normalizer in (normalizers.Replace("t c", "x"), normalizers.Replace(Regex(r"\w \w"), "x")):
        backend = Backend.from_str(backend_of("llama3").to_str())
        backend.normalizer = normalizer
        assert boundary_pattern(backend) is None
