"""flashvec's own folder: a sentence-transformers folder plus flashvec.json, the whole `ModelSpec`.

Everything is restored from flashvec.json, span rules and int8 ranges included. It is a file like any other:
its types, names and sizes are checked before anything is built from them.
"""

import types
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from flashvec.runtime.checkpoint.hf import (
    choose_attention,
    choose_max_length,
    choose_pooling,
    read_config,
)
from flashvec.runtime.checkpoint.json_files import read_object
from flashvec.runtime.checkpoint.llm2vec import reference_rules
from flashvec.runtime.checkpoint.open import Checkpoint, Overrides
from flashvec.runtime.checkpoint.safetensors_files import SafetensorsSource
from flashvec.runtime.checkpoint.sentence_transformers import check_dense_chain, read_dense_weights
from flashvec.runtime.checkpoint.source import CheckpointError
from flashvec.runtime.families import FAMILIES, LIMITS, NORM_EPS, NUMBERS, ROPE_BASE, checked_number, decoder_spec
from flashvec.runtime.pooling import cut_ranges
from flashvec.runtime.spec import DENSE_ACTIVATIONS, VECTOR_LENGTHS, DecoderSpec, ModelSpec, spec_from_dict
from flashvec.runtime.tokenize import Tokenizer

SPEC_FILE = "flashvec.json"
LAYOUTS = ("hf", "llm2vec", "sentence-transformers", "gguf", "flashvec")
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
MAX_PROMPT_CHARS = 2**16
MAX_FP32 = 3.4e38
SIZES = {  # field of DecoderSpec -> the bound of config.json's key of the same meaning
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "mlp_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "max_positions": "max_position_embeddings",
}
REALS = ("attention_scale", "embedding_scale")
REALS_OR_NONE = ("softcap", "head_softcap")
ROPE_REALS = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")


def dense_folder(index: int) -> str:
    """Folder of the dense head with this index: 0_Transformer is the root, 1_Pooling comes before."""
    return f"{index + 2}_Dense"


def open_saved(folder: Path, overrides: Overrides) -> Checkpoint:
    """Open a folder that `Encoder.save` or `convert` wrote.

    Raises:
        CheckpointError: a damaged flashvec.json or a missing file.
    """
    saved = spec = read_spec(folder)
    attention = choose_attention(overrides.attention) or spec.attention
    if attention != spec.attention:  # a window's reach depends on it
        config = read_config(folder)
        if spec.direction_key == "use_bidirectional_attention":  # not stated where the model was saved as causal
            config[spec.direction_key] = True
        spec = replace(spec, attention=attention, decoder=decoder_spec(config, attention))
    spec = replace(
        spec,
        pooling=choose_pooling(overrides.pooling) or spec.pooling,
        max_length=choose_max_length(overrides.max_length, spec.max_length, spec.decoder.max_positions),
        truncate_dim=overrides.truncate_dim or spec.truncate_dim,
    )
    if overrides.compat == "llm2vec" and spec.layout == "llm2vec":
        spec = reference_rules(spec)
    spec = replace(spec, int8_ranges=_ranges_left(saved, spec))
    check_dense_chain(spec, SPEC_FILE)
    if (folder / dense_folder(len(spec.dense))).is_dir():
        raise CheckpointError(
            f"{SPEC_FILE} names {len(spec.dense)} dense heads, but {folder.name} has one more, "
            f"{dense_folder(len(spec.dense))}: were these files written together?"
        )
    dense = [read_dense_weights(folder / dense_folder(i), head) for i, head in enumerate(spec.dense)]
    return Checkpoint(spec, SafetensorsSource(folder), Tokenizer.from_folder(folder), dense)


def _ranges_left(saved: ModelSpec, spec: ModelSpec) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The saved int8 ranges, as far as they hold for `spec`: none where it gives other vectors."""
    if replace(spec, max_length=saved.max_length, truncate_dim=saved.truncate_dim) != saved:
        return None
    if saved.int8_ranges is None or len(saved.int8_ranges[0]) <= spec.embedding_size:
        return saved.int8_ranges
    return cut_ranges(spec, spec.embedding_size)


def read_spec(folder: Path) -> ModelSpec:
    """flashvec.json, checked."""
    try:
        spec = spec_from_dict(read_object(folder / SPEC_FILE))
    except ValueError as error:
        raise CheckpointError(f"{SPEC_FILE}: {error}") from None
    check_spec(spec)
    return spec


def check_spec(spec: ModelSpec, where: str = SPEC_FILE) -> None:
    """Types, names and bounds of a spec that came from a file.

    Raises:
        CheckpointError: the first value that is out of place, by its name.
    """
    _check_dataclass(spec, where)
    decoder = spec.decoder
    _check_decoder(decoder, f"{where}: decoder")
    choices: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("layout", spec.layout, LAYOUTS),
        ("similarity", spec.similarity, SIMILARITIES),
        ("direction_key", spec.direction_key, ("is_causal", "use_bidirectional_attention")),
        ("compat", spec.compat, (None, "llm2vec")),
        ("int8_length", spec.int8_length, (None, *VECTOR_LENGTHS)),
        ("decoder.family", decoder.family, tuple(FAMILIES)),
        *(("dense.activation", head.activation, DENSE_ACTIVATIONS) for head in spec.dense),
    ]
    for name, value, known in choices:
        if value not in known:
            raise CheckpointError(f"{where}: {name} is {value!r}, known are {', '.join(map(str, known))}")
    if spec.default_prompt_name is not None and spec.default_prompt_name not in spec.prompts:
        prompts = ", ".join(spec.prompts) or "none"
        raise CheckpointError(f"{where}: default_prompt_name is {spec.default_prompt_name!r}; prompts are {prompts}")
    texts = [*spec.prompts, *spec.prompts.values(), spec.template or "", spec.text_suffix]
    if max(len(text) for text in texts) > MAX_PROMPT_CHARS:
        raise CheckpointError(f"{where}: a prompt or template is longer than {MAX_PROMPT_CHARS} characters")
    if spec.template is not None and spec.template.count("{text}") != 1:
        raise CheckpointError(f"{where}: template holds {{text}} {spec.template.count('{text}')} times, not once")
    for name, prompt in spec.prompts.items():
        if spec.layout != "sentence-transformers" and prompt.count("{text}") > 1:
            raise CheckpointError(f"{where}: prompts: {name} holds {{text}} {prompt.count('{text}')} times, not once")
    if not 1 <= len(spec.pooling) <= 8:
        raise CheckpointError(f"{where}: pooling has {len(spec.pooling)} modes")
    limits = [("max_length", spec.max_length, decoder.max_positions)]
    limits += [("document_max_length", spec.document_max_length or 1, LIMITS["max_position_embeddings"])]
    limits += [("truncate_dim", spec.truncate_dim or 1, replace(spec, truncate_dim=None).embedding_size)]
    for name, size, limit in limits:
        if not 1 <= size <= limit:
            raise CheckpointError(f"{where}: {name} is {size}; expected 1 to {limit}")
    if spec.int8_ranges is not None:
        low, high = spec.int8_ranges
        if not 1 <= len(low) == len(high) <= spec.embedding_size:  # narrower: those of cut vectors
            raise CheckpointError(
                f"{where}: int8_ranges has {len(low)} minima and {len(high)} maxima; "
                f"expected as many of each, 1 to {spec.embedding_size}"
            )


def _check_decoder(decoder: DecoderSpec, where: str) -> None:
    for name, key in SIZES.items():
        if not 0 < getattr(decoder, name) <= LIMITS[key]:
            raise CheckpointError(f"{where}.{name} is {getattr(decoder, name)}; expected 1 to {LIMITS[key]}")
    if decoder.num_heads % decoder.num_kv_heads or decoder.head_size % 2:
        raise CheckpointError(f"{where}.num_kv_heads or head_size does not fit num_heads {decoder.num_heads}")
    for name in ("layer_ropes", "layer_windows"):
        if len(getattr(decoder, name)) != decoder.num_layers:
            raise CheckpointError(f"{where}.{name} has {len(getattr(decoder, name))} entries, not {decoder.num_layers}")
    if not decoder.ropes or not all(0 <= table < len(decoder.ropes) for table in decoder.layer_ropes):
        raise CheckpointError(f"{where}.layer_ropes names a table that ropes lacks")
    if any(window is not None and not 0 <= window <= LIMITS["sliding_window"] for window in decoder.layer_windows):
        raise CheckpointError(f"{where}.layer_windows holds a window out of bounds")
    _check_reals(decoder, where)


def _check_reals(decoder: DecoderSpec, where: str) -> None:
    checked_number(decoder.norm_eps, f"{where}.norm_eps", NORM_EPS)
    checked_number(decoder.norm_offset, f"{where}.norm_offset", (0, 1))
    given = [name for name in REALS_OR_NONE if getattr(decoder, name) is not None]
    for name in (*REALS, *given):
        checked_number(getattr(decoder, name), f"{where}.{name}")
    if decoder.query_scale_beta:
        checked_number(decoder.query_scale_beta, f"{where}.query_scale_beta")
        checked_number(decoder.query_scale_positions, f"{where}.query_scale_positions", (1, NUMBERS[1]))
    for rope in decoder.ropes:
        checked_number(rope.theta, f"{where}.ropes: theta", ROPE_BASE)
        for name in ROPE_REALS:
            checked_number(getattr(rope, name), f"{where}.ropes: {name}")
        if rope.kind in ("llama3", "yarn"):
            checked_number(rope.original_max_positions, f"{where}.ropes: original_max_positions", (1, NUMBERS[1]))


def _check_dataclass(value: Any, where: str) -> None:
    hints = get_type_hints(type(value))
    for field in fields(value):
        if not _has_type(own := getattr(value, field.name), hints[field.name], f"{where}: {field.name}"):
            raise CheckpointError(f"{where}: {field.name} is {str(own)[:80]!r}, of another kind than it should be")


def _has_type(value: Any, hint: Any, where: str) -> bool:
    """Does a value read from JSON have the type that a field declares; numbers must be finite."""
    origin, options = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in options
    if origin in (Union, types.UnionType):
        return any(_has_type(value, option, where) for option in options)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if options[1:] != (Ellipsis,):
            return len(value) == len(options) and all(
                _has_type(v, o, where) for v, o in zip(value, options, strict=True)
            )
        return all(_has_type(v, options[0], where) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _has_type(k, options[0], where) and _has_type(v, options[1], where) for k, v in value.items()
        )
    if is_dataclass(hint):
        _check_dataclass(value, where)
        return True
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MAX_FP32
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
