"""Tokenizer files: tokenizer.json and the configuration beside it, read as untrusted input, and written."""

import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

from flashvec.runtime.checkpoint.json_files import read_object
from flashvec.runtime.checkpoint.source import CheckpointError

logger = logging.getLogger("flashvec")

MAX_TOKENIZER_BYTES = 200 * 10**6  # the largest vocabularies in use (Gemma 3) take 33 MB

# Hugging Face's names, in the order in which it adds missing ones to the vocabulary.
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What a token is usually called, for when no file names it. Only added tokens marked special count.
_USUAL = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>"),
    "eos_token": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "unk_token": ("<unk>",),
    "pad_token": ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>"),
    "mask_token": ("<mask>", "[MASK]"),
}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_KEPT = {"model_max_length": int, "padding_side": str, "clean_up_tokenization_spaces": bool}
_OTHER_FORMATS = (
    "tokenizer.model",
    "spiece.model",
    "tiktoken.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)


@dataclass(frozen=True)
class SpecialTokens:
    """Special tokens by use, and what the configuration asks to add around a text."""

    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    mask_id: int | None = None
    unk_id: int | None = None
    add_bos: bool = False
    add_eos: bool = False
    kept: dict[str, Any] = field(default_factory=dict)  # other tokenizer_config.json entries, to write again

    def blank_ids(self) -> tuple[int, ...]:
        """The token given to a text that has none; empty if there is no special token."""
        found = [i for i in (self.eos_id, self.bos_id, self.pad_id, self.unk_id) if i is not None]
        return tuple(found[:1])

    def padding_id(self) -> int | None:
        return next((i for i in (self.pad_id, self.eos_id, self.unk_id, self.bos_id) if i is not None), None)


def read_backend(folder: Path) -> tokenizers.Tokenizer:
    """Read `folder`/tokenizer.json.

    Raises:
        CheckpointError: missing, with how to make it; too large; not a tokenizer.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        others = [name for name in _OTHER_FORMATS if (folder / name).is_file()]
        if not others:
            raise CheckpointError(f"{folder}: no tokenizer.json; it belongs in a model's folder")
        name = repr(str(folder))
        raise CheckpointError(
            f"{folder}: has {others[0]} but no tokenizer.json. To make it: `pip install sentencepiece tiktoken`, "
            f"then in Python transformers.AutoTokenizer.from_pretrained({name}).save_pretrained({name})"
        )
    if (size := path.stat().st_size) > MAX_TOKENIZER_BYTES:
        raise CheckpointError(f"{path}: {size:,} bytes; at most {MAX_TOKENIZER_BYTES:,} are read")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower class
        raise CheckpointError(f"{path}: damaged, or not a tokenizer: {error}") from None
    if getattr(backend.model, "dropout", None):
        logger.warning("%s: its dropout, a rule of training that gives a text other tokens each time, is off", path)
        backend.model.dropout = None
    return backend


def read_config(folder: Path, backend: tokenizers.Tokenizer) -> SpecialTokens:
    """Find the special tokens, and add to `backend` those it lacks (as Hugging Face does, with the same ids).

    tokenizer_config.json names them; special_tokens_map.json and added_tokens.json where that file is of an
    older form (without added_tokens_decoder); the entries of tokenizer.json where none does.

    Raises:
        CheckpointError: a damaged or oversized file, or an entry of the wrong type, named.
    """
    config = _object(folder / "tokenizer_config.json")
    if (side := config.get("truncation_side")) not in (None, "right"):
        logger.warning("%s: truncation_side is %.80r; here long texts keep their starts", folder.name, side)
    for key in ("add_bos_token", "add_eos_token"):
        if not isinstance(config.get(key), bool | None):
            raise CheckpointError(
                f"{folder / 'tokenizer_config.json'}: {key} is {repr(config[key])[:80]}; expected true or false"
            )
    older = _object(folder / "special_tokens_map.json")
    is_old_form = "added_tokens_decoder" not in config
    entries = {**config, **older} if is_old_form else {**older, **config}
    named = {name: _token(entries[name], name, folder, special=True) for name in _NAMES if name in entries}
    extra = entries.get("extra_special_tokens") or entries.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    if not isinstance(extra, list):
        raise CheckpointError(f"{folder}: extra_special_tokens in the tokenizer's configuration is not a list")
    extra += [value for key, value in config.items() if _names_a_token(key) and isinstance(value, str)]

    decoder = config.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict):
        raise CheckpointError(f"{folder}: added_tokens_decoder in the tokenizer's configuration is not an object")
    listed = _by_id(list(decoder.items()), folder)
    if is_old_form:
        by_name = {token.content for token in named.values() if token is not None}
        older = _object(folder / "added_tokens.json")
        listed += _by_id([(i, {"content": token, "special": token in by_name}) for token, i in older.items()], folder)
    added = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
    wanted = [
        *listed,
        *named.values(),
        *(_token(token, "extra_special_tokens", folder, special=True) for token in extra),
    ]
    for token in wanted:
        if token is not None and token.content and token.content not in added:
            backend.add_tokens([token])
            added[token.content] = token.special

    ids: dict[str, int | None] = {}
    for name in _NAMES:
        token = named.get(name)
        contents = [token.content] if token is not None else []
        if name not in named:
            contents = [content for content in _USUAL.get(name, ()) if added.get(content)]
        ids[name] = backend.token_to_id(contents[0]) if contents else None
    return SpecialTokens(
        bos_id=ids["bos_token"],
        eos_id=ids["eos_token"],
        pad_id=ids["pad_token"],
        mask_id=ids["mask_token"],
        unk_id=ids["unk_token"],
        add_bos=config.get("add_bos_token") is True,
        add_eos=config.get("add_eos_token") is True,
        kept={key: config[key] for key, kind in _KEPT.items() if type(config.get(key)) is kind},
    )


def write_tokenizer(folder: Path, backend: tokenizers.Tokenizer, special: SpecialTokens) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json; see `Tokenizer.save`."""
    pad_id = special.padding_id()
    if pad_id is None:
        raise ValueError("the tokenizer has no pad, end-of-text, unknown or begin-of-text token to pad with")
    ids = {
        "bos_token": special.bos_id,
        "eos_token": special.eos_id,
        "unk_token": special.unk_id,
        "pad_token": pad_id,
        "mask_token": special.mask_id,
    }
    names = {name: backend.id_to_token(i) for name, i in ids.items() if i is not None}
    config = {
        **special.kept,
        **names,
        # The class that reads tokenizer.json as it is; others rebuild it from their own idea of a model.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],  # no token types: decoders do not take them
    }
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    for name, values in (("tokenizer_config.json", config), ("special_tokens_map.json", names)):
        text = json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def template_ids(backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids that `backend` adds before and after every text, measured.

    Raises:
        ValueError: its post-processor does more than that.
    """
    for probe in ("a", "A", "0", ".", " ", "中"):
        text_ids = backend.encode(probe, add_special_tokens=False).ids
        if not text_ids:
            continue  # not in the vocabulary
        whole = backend.encode(probe)
        num_before = [*whole.special_tokens_mask, 0].index(0)
        stop = num_before + len(text_ids)
        if whole.ids[num_before:stop] != text_ids or not all(whole.special_tokens_mask[stop:]):
            raise ValueError("the tokenizer's post_processor does more than add tokens before and after a text")
        return tuple(whole.ids[:num_before]), tuple(whole.ids[stop:])
    raise ValueError("the tokenizer knows no common character, not even 'a'")


def add_template(
    backend: tokenizers.Tokenizer, before: tuple[int, ...], after: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Make `backend` add these tokens around every text, in place of its template; returns what it adds."""
    tokens = {i: str(backend.id_to_token(i)) for i in (*before, *after)}
    names = {i: re.sub(r"[\s:$]", "_", token) for i, token in tokens.items()}  # a template's own syntax
    single = [*(names[i] for i in before), "$A", *(names[i] for i in after)]
    template = TemplateProcessing(
        single=single,
        pair=[
            *single,
            *(f"{'$B' if piece == '$A' else piece}:1" for piece in single),
        ],
        special_tokens=[{"id": names[i], "ids": [i], "tokens": [tokens[i]]} for i in tokens],
    )
    # In a sequence, a second template drops the tokens of the first; so only the byte-level step, which trims
    # offsets, is kept beside ours.
    current = backend.post_processor
    steps = [] if current is None else [json.loads(current.__getstate__())]
    if steps and steps[0]["type"] == "Sequence":
        steps = steps[0]["processors"]
    trims = [ByteLevel(trim_offsets=step["trim_offsets"]) for step in steps if step["type"] == "ByteLevel"]
    backend.post_processor = Sequence([*trims, template]) if trims else template
    return template_ids(backend)


def _token(value: Any, name: str, folder: Path, **flags: bool) -> AddedToken | None:
    """A token as the configuration files write it: its text, or an object with "content" and flags."""
    if value is None:
        return None
    if isinstance(value, str):
        return AddedToken(value, special=True)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        stated = {key: entry is True for key, entry in value.items() if key in _FLAGS}
        return AddedToken(value["content"], **(stated | flags))
    raise CheckpointError(f"{folder}: {name} in the tokenizer's configuration is {value!r:.80}; expected its text")


def _names_a_token(key: str) -> bool:
    """Is `key` a model's own special token, such as Gemma 3's boi_token?"""
    return key.endswith("_token") and key not in _NAMES


def _by_id(tokens: list[tuple[Any, Any]], folder: Path) -> list[AddedToken | None]:
    """Entries of added_tokens_decoder or added_tokens.json, lowest id first."""
    try:
        ordered = sorted(((int(i), token) for i, token in tokens), key=lambda entry: entry[0])
    except (TypeError, ValueError):
        raise CheckpointError(f"{folder}: added tokens in the tokenizer's configuration have no numbers") from None
    return [_token(token, f"added token {i}", folder) for i, token in ordered]


def _object(path: Path) -> dict[str, Any]:
    """What a file holds; nothing where there is none."""
    return read_object(path) if path.is_file() else {}
