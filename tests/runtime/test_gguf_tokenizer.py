"""Tokenizers built from the metadata of GGUF files."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_samples import HIDDEN, hf_tensors, with_metadata, write_gguf

from flashvec.runtime.checkpoint.gguf_tokenizer import gguf_tokenizer
from flashvec.runtime.checkpoint.source import CheckpointError

BYTES = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]  # GPT-2's alphabet
WORDS = ["12", "ab", "abc", "Ġa", "ĠĠ"]


def write_tokenizer(
    path: Path,
    model: str,
    tokens: list[str],
    architecture: str = "llama",
    types: list[int] | None = None,
    **values: Any,
) -> Path:
    """A file with a tokenizer and no layers."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types or [3 if token.startswith("<") else 1 for token in tokens])
    with_metadata(**{f"tokenizer__ggml__{name}": value for name, value in values.items()})(writer)
    writer.add_tensor("token_embd.weight", np.ones((len(tokens), 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


MERGES = ["1 2", "a b", "Ġ a", "Ġ Ġ"]


def byte_level(path: Path, merges: Any = MERGES, **values: Any) -> Path:
    tokens = [*BYTES, *WORDS, "<s>", "</s>"]
    ids = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    return write_tokenizer(path, "gpt2", tokens, merges=merges, **(ids | values))


def test_byte_level_tokenizer(tmp_path: Path) -> None:
    backend, facts = gguf_tokenizer(byte_level(tmp_path / "m.gguf", pre="gpt-2"))
    assert backend.encode("ab 12").tokens == ["ab", "Ġ", "12"]
    assert backend.encode("ab a").offsets == [(0, 2), (2, 4)]  # a word's offsets hold its leading space
    bos = len(BYTES) + len(WORDS)
    assert facts == {
        **{"bos_token": "<s>", "bos_token_id": bos, "eos_token": "</s>", "eos_token_id": bos + 1},
        **{"unk_token": None, "unk_token_id": None, "pad_token": None, "pad_token_id": None},
        **{"add_bos": False, "add_eos": False},
    }


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("add_eos", [False, True])
def test_bos_and_eos(tmp_path: Path, add_bos: bool, add_eos: bool) -> None:
    path = byte_level(tmp_path / "m.gguf", pre="qwen2", add_bos_token=add_bos, add_eos_token=add_eos)
    backend, facts = gguf_tokenizer(path)
    assert (facts["add_bos"], facts["add_eos"]) == (add_bos, add_eos)
    expected = ["<s>"] * add_bos + ["a"] + ["</s>"] * add_eos
    assert backend.encode("a").tokens == expected
    assert backend.encode("a", add_special_tokens=False).tokens == ["a"]
    assert backend.encode("<s>a", add_special_tokens=False).tokens == ["<s>", "a"]


@pytest.mark.parametrize(
    ("pre", "written", "tokens"),
    [
        ("smollm", "  12", ["ĠĠ", "1", "2"]),  # digits alone, and all spaces before them together
        ("gpt-2", "  12", ["Ġ", "Ġ", "12"]),
        ("llama-bpe", "abc", ["<s>", "abc"]),  # a whole word though no merge makes it
        ("tekken", "abc", ["<s>", "abc"]),
        ("qwen2", "abc", ["ab", "c"]),
        ("qwen2", "e\u0301", ["Ã", "©"]),  # composed first
        ("gpt-2", "e\u0301", ["e", "Ì", "ģ"]),
    ],
)
def test_what_each_family_does_before_merging(tmp_path: Path, pre: str, written: str, tokens: list[str]) -> None:
    backend, _ = gguf_tokenizer(byte_level(tmp_path / "m.gguf", pre=pre))
    assert backend.encode(written).tokens == tokens


SPM_TOKENS = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab", "▁ab", "  ", "▁▁"]


def sentencepiece(path: Path, architecture: str, **values: Any) -> Path:
    tokens = SPM_TOKENS[:-1] if architecture.startswith("gemma") else SPM_TOKENS[:-2]
    scores = [float(-index) for index in range(len(tokens))]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "scores": scores}
    types = [2, 3, 3, *[1] * (len(tokens) - 3)]
    return write_tokenizer(path, "llama", tokens, architecture, types, **(ids | values))


def test_sentencepiece_tokenizer(tmp_path: Path) -> None:
    backend, facts = gguf_tokenizer(sentencepiece(tmp_path / "m.gguf", "llama"))
    assert facts["add_bos"] is True  # llama.cpp's default
    assert backend.encode("ab a").tokens == ["<s>", "▁ab", "▁a"]
    backend, _ = gguf_tokenizer(sentencepiece(tmp_path / "m.gguf", "llama", add_space_prefix=False))
    assert backend.encode("ab a").tokens == ["<s>", "ab", "▁a"]


@pytest.mark.parametrize("architecture", ["gemma", "gemma3", "gemma-embedding"])
def test_gemma_keeps_spaces(tmp_path: Path, architecture: str) -> None:
    path = sentencepiece(tmp_path / "m.gguf", architecture, add_eos_token=True)
    backend, _ = gguf_tokenizer(path)
    assert backend.encode("ab  b").tokens == ["<s>", "ab", "▁▁", "b", "</s>"]


def test_tokenizer_agrees_with_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokens = [*BYTES, *WORDS, "<s>", "</s>"]
    merges = ["1 2", "a b", "ab c", "Ġ a", "Ġ Ġ"]
    ids = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pre": "qwen2", "add_bos_token": True}
    add = with_metadata(**{f"tokenizer__ggml__{name}": value for name, value in {"merges": merges, **ids}.items()})

    def whole(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token.startswith("<") else 1 for token in tokens])
        add(writer)

    tensors = hf_tensors("qwen2") | {"embed_tokens.weight": torch.ones(len(tokens), HIDDEN)}
    path = write_gguf(tmp_path / "m.gguf", "qwen2", tensors, add=whole)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours, _ = gguf_tokenizer(path)
    for written in ("abc 12 ab  a", " a\n\nb", "<s>a</s>", "", "naïve 日本 😀", "it's 2's"):
        assert ours.encode(written).ids == theirs(written)["input_ids"], written


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pre": "poro"}, r"tokenizer\.ggml\.pre is 'poro'; known are"),
        ({}, r"tokenizer\.ggml\.pre is None"),
        ({"pre": "qwen2", "bos_token_id": 9999}, "bos_token_id is 9999, the vocabulary has"),
        ({"pre": "qwen2", "merges": ["a", "b c d"]}, "does not convert"),
        ({"pre": "qwen2", "merges": ["x yz"]}, "does not convert"),
        ({"pre": "qwen2", "merges": [1, 2]}, "wrong type"),
        ({"pre": "qwen2", "merges": "a b"}, "expected an array"),
        ({"pre": "qwen2", "scores": [1.0]}, "scores has 1 entries for"),
        ({"pre": "qwen2", "add_bos_token": 1}, "expected true or false"),
    ],
)
def test_tokenizers_that_lie(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    path = byte_level(tmp_path / "m.gguf", **values)
    with pytest.raises(CheckpointError, match=message):
        gguf_tokenizer(path)


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.model is 'bert'"):
        gguf_tokenizer(write_tokenizer(tmp_path / "m.gguf", "bert", ["a"]))
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.model is None"):
        gguf_tokenizer(write_gguf(tmp_path / "m.gguf", "llama", hf_tensors("llama")))
    with pytest.raises(CheckpointError, match="names a token twice"):
        gguf_tokenizer(write_tokenizer(tmp_path / "m.gguf", "llama", ["a", "a"], scores=[1.0, 2.0]))
