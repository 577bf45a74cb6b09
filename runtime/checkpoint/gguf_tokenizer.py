"""The tokenizer in a GGUF file's metadata, as Hugging Face's `tokenizers` runs it.

transformers turns vocabulary and merges into a backend. Added here is what Hugging Face's own tokenizer of
the same model does and that conversion leaves out: splitting rules it does not know, Qwen2's NFC, Llama 3's
and Mistral's whole-word lookup before merges, and BOS and EOS where the file asks for them.
"""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors

from flashvec.runtime.checkpoint.gguf_config import architecture_of
from flashvec.runtime.checkpoint.gguf_file import GGUFFile, StoredArray
from flashvec.runtime.checkpoint.source import CheckpointError

MAX_TOKENS = 2**22  # the largest vocabulary there is has 2 ** 18
WHOLE_WORDS = (
    "llama-bpe",
    "llama3",
    "llama-v3",
    "tekken",
)  # a word of the vocabulary is taken before any merge
GPT2_SPLITS = ("gpt-2", "default")  # what the conversion does unless told otherwise
DIGIT_SPLITS = ("smollm",)  # GPT-2's, but every digit stands alone
SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}


def gguf_tokenizer(file: GGUFFile | Path) -> tuple[Tokenizer, dict[str, Any]]:
    """Tokenizer of a GGUF file; no tensor is read.

    Returns:
        The backend, whose post-processor adds BOS and EOS as the file says, and its plain facts:
        `bos_token`, `eos_token`, `unk_token`, `pad_token` (str or None), the same with `_id` (int or None),
        `add_bos` and `add_eos` (bool).

    Raises:
        CheckpointError: no tokenizer in the file, one of an unknown kind, or one at odds with itself.
    """
    if not isinstance(file, GGUFFile):
        file = GGUFFile(file)
    architecture_of(file)
    facts = _tokenizer_facts(file)
    tokens = facts["tokens"]
    special: dict[str, Any] = {}
    for name, key in SPECIAL.items():
        token_id = file.metadata.get(f"tokenizer.ggml.{key}")
        if token_id is not None and (not isinstance(token_id, int) or not 0 <= token_id < len(tokens)):
            raise CheckpointError(
                f"{file.path}: tokenizer.ggml.{key} is {token_id!r}, the vocabulary has {len(tokens)} tokens"
            )
        special[f"{name}_token"] = None if token_id is None else tokens[token_id]
        special[f"{name}_token_id"] = token_id
    kind, split = facts["tokenizer_type"], facts.get("pre_tokenizer_type")
    # llama.cpp's defaults for files that do not say
    with_bos = special["bos_token"] is not None and (kind == "llama" or split in WHOLE_WORDS)
    special["add_bos"] = _flag(file, "add_bos_token", with_bos)
    special["add_eos"] = _flag(file, "add_eos_token", False)
    backend = _convert(file, facts)
    _complete(backend, kind, split, _flag(file, "add_space_prefix", True))
    backend.post_processor = _post_processor(file, special, kind)
    return backend, special


def _tokenizer_facts(file: GGUFFile) -> dict[str, Any]:
    """What transformers' conversion takes, under its names; arrays read, and checked against each other."""
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.model is {kind!r}; known are gpt2 (byte-level BPE) and llama (SentencePiece)"
        )
    facts: dict[str, Any] = {"tokenizer_type": kind}
    if kind == "gpt2":
        facts["pre_tokenizer_type"] = file.metadata.get("tokenizer.ggml.pre")
    tokens = _array(file, "tokens", None)
    rows = file.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in file.tensors else len(tokens)
    if not 0 < len(tokens) <= min(rows, MAX_TOKENS):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.tokens has {len(tokens)} entries for {rows} embeddings")
    if len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.tokens names a token twice")
    facts["tokens"] = tokens
    for key in ("scores", "token_type"):
        if f"tokenizer.ggml.{key}" in file.metadata:
            facts[key] = _array(file, key, len(tokens))
    if kind == "gpt2" or "tokenizer.ggml.merges" in file.metadata:
        facts["merges"] = _array(file, "merges", None)
    elif "scores" not in facts:
        raise CheckpointError(f"{file.path}: neither tokenizer.ggml.merges nor tokenizer.ggml.scores")
    return facts


def _array(file: GGUFFile, key: str, length: int | None) -> list[Any]:
    stored = file.metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(stored, StoredArray) or stored.count > MAX_TOKENS:
        raise CheckpointError(f"{file.path}: tokenizer.ggml.{key} is {stored!r}; expected an array of a vocabulary")
    if length is not None and stored.count != length:
        raise CheckpointError(f"{file.path}: tokenizer.ggml.{key} has {stored.count} entries for {length} tokens")
    values = file.array(f"tokenizer.ggml.{key}")
    text = key in ("tokens", "merges")
    if any(isinstance(value, str) != text for value in values):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.{key} holds values of the wrong type")
    return values


def _flag(file: GGUFFile, key: str, default: bool) -> bool:
    value = file.metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.{key} is {value!r}; expected true or false")
    return value


def _convert(file: GGUFFile, facts: dict[str, Any]) -> Tokenizer:
    """transformers' conversion, which is quick and takes metadata, not a file."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import (
            GGUF_PRE_TOKENIZER_SPLITS,
            convert_gguf_tokenizer,
        )
    except ImportError:
        raise CheckpointError(
            f"{file.path}: converting a GGUF tokenizer needs transformers 5.19 or later; "
            "upgrade it: pip install -U transformers"
        ) from None
    known = (*GGUF_PRE_TOKENIZER_SPLITS, *GPT2_SPLITS, *DIGIT_SPLITS)
    split = facts.get("pre_tokenizer_type", "default")
    if split not in known:  # a guess would cut words differently than the model learned them
        raise CheckpointError(f"{file.path}: tokenizer.ggml.pre is {split!r}; known are {', '.join(sorted(known))}")
    architecture = file.metadata["general.architecture"]
    # It knows Gemma's SentencePiece (spaces kept, merges in vocabulary order) by architecture.
    architecture = "gemma3" if architecture == "gemma-embedding" else architecture
    try:
        backend, _ = convert_gguf_tokenizer(architecture, facts)
    except Exception as error:  # of many types, from Python and Rust, all of them about the file's arrays
        raise CheckpointError(f"{file.path}: the tokenizer does not convert: {error}") from None
    return backend


def _complete(backend: Tokenizer, kind: str, split: str | None, space_prefix: bool) -> None:
    """What Hugging Face's own tokenizer of the model does and the conversion leaves out."""
    if kind == "llama":
        if not space_prefix and isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
            backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="never", split=False)
        return
    if split in DIGIT_SPLITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if split in WHOLE_WORDS:
        backend.model.ignore_merges = True
    if split == "qwen2":
        backend.normalizer = normalizers.NFC()


def _post_processor(file: GGUFFile, special: dict[str, Any], kind: str) -> Any:
    """BOS and EOS around the text where the file asks for them; offsets keep a word's leading space."""
    begin = [special["bos_token"]] if special["add_bos"] else []
    end = [special["eos_token"]] if special["add_eos"] else []
    for name, wanted in (("bos", begin), ("eos", end)):
        if wanted == [None]:
            raise CheckpointError(f"{file.path}: add_{name}_token without {SPECIAL[name]}")
    steps: list[Any] = []
    if kind == "gpt2":
        steps.append(processors.ByteLevel(trim_offsets=False))
    if begin or end:
        ids = {special[f"{name}_token"]: special[f"{name}_token_id"] for name in ("bos", "eos")}
        try:
            steps.append(
                processors.TemplateProcessing(
                    single=[*begin, "$A", *end],
                    pair=[*begin, "$A", *end, *begin, "$B", *end],
                    special_tokens=[(token, ids[token]) for token in {*begin, *end}],
                )
            )
        except ValueError as error:
            raise CheckpointError(f"{file.path}: special tokens {[*begin, *end]} fit no template: {error}") from None
    return processors.Sequence(steps)
