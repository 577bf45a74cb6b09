"""LLM2Vec checkpoints: a base model, an adapter from masked next token prediction (MNTP), often a second one.

    MNTP folder      adapter_config.json + config.json: the base is the one that adapter_config.json names
    second adapter   adapter_config.json, no config.json (-unsup-simcse, -supervised): it names the raw base,
    yet was
                     trained on base + MNTP, which is found by its name: the suffix taken off
    merged folder    config.json + weights, as `LLM2Vec.save` writes them after merging

The tokenizer is the MNTP folder's: it was saved with `_` as mask token and splits texts accordingly. The
template goes by the id of the original base, wherever that lies now. Source: llm2vec 0.2.3, `llm2vec.py`.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from flashvec.runtime.checkpoint.hf import (
    choose_attention,
    choose_max_length,
    choose_pooling,
    direction_key,
    read_config,
)
from flashvec.runtime.checkpoint.json_files import read_object
from flashvec.runtime.checkpoint.open import Checkpoint, Overrides
from flashvec.runtime.checkpoint.peft import CONFIG_FILE, AdapterSource, read_adapter_config
from flashvec.runtime.checkpoint.safetensors_files import SafetensorsSource
from flashvec.runtime.checkpoint.source import CheckpointError, TensorSource
from flashvec.runtime.families import decoder_spec
from flashvec.runtime.spec import ModelSpec, PoolingMode
from flashvec.runtime.tokenize import Tokenizer

SETTINGS_FILE = "llm2vec_config.json"
SECOND_SUFFIXES = ("-unsup-simcse", "-supervised")
ARCHITECTURES = ("BiModel", "BiForMNTP", "EncoderModel")
DOCUMENT_MAX_LENGTH = 400  # tokens, the reference's default

TEMPLATES = {  # by the id of the original base: the reference knows these and no other
    "meta-llama/Meta-Llama-3-8B-Instruct": "<|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>",
    "mistralai/Mistral-7B-Instruct-v0.2": "[INST] {text} [/INST]",
    "meta-llama/Llama-2-7b-chat-hf": "[INST] {text} [/INST]",
    "google/gemma-2-9b-it": "<bos><start_of_turn>user\n{text}<end_of_turn>",
    "Qwen/Qwen2-1.5B-Instruct": "<|im_start|>user\n{text}<|im_end|>",
    "Qwen/Qwen2-7B-Instruct": "<|im_start|>user\n{text}<|im_end|>",
}
NO_EOS_AFTER_TEMPLATE = ("meta-llama/Meta-Llama-3-8B-Instruct",)
EOS_BY_BASE = {"meta-llama/Meta-Llama-3-8B": "<|end_of_text|>"}
EOS_BY_FAMILY = {"llama": " </s>", "mistral": " </s>", "ministral": " </s>", "gemma": "<eos>", "qwen2": "<|endoftext|>"}
POOLING: dict[str, PoolingMode] = {
    "mean": "mean",
    "weighted_mean": "weighted_mean",
    "eos_token": "last",
    "last_token": "last",
    "bos_token": "cls",
}


def is_llm2vec(folder: Path, name: str) -> bool:
    """Does a folder bear LLM2Vec's marks: its own settings file, or one of its classes in a configuration.

    Args:
        name: the folder's, or its hub id.
    """
    if (folder / SETTINGS_FILE).is_file():
        return True
    named: list[Any] = []
    if (folder / CONFIG_FILE).is_file():
        mapping = read_object(folder / CONFIG_FILE).get("auto_mapping")
        named += [mapping.get("base_model_class")] if isinstance(mapping, dict) else []
        named.append(name)
    if (folder / "config.json").is_file():
        config = read_object(folder / "config.json")
        names, code = config.get("architectures"), config.get("auto_map")
        named += names if isinstance(names, list) else []
        named += list(code.values()) if isinstance(code, dict) else []  # read as a name, never imported
    return any(str(each).endswith(ARCHITECTURES + SECOND_SUFFIXES) for each in named)


def mntp_name(name: str) -> str | None:
    """The MNTP model that a second adapter's name implies, or None for other names."""
    return next((name.removesuffix(suffix) for suffix in SECOND_SUFFIXES if name.endswith(suffix)), None)


def is_second_adapter(folder: Path, name: str) -> bool:
    """An adapter that goes on top of base + MNTP: told by its name or a trained encoder's settings."""
    if (folder / "config.json").is_file() or not (folder / CONFIG_FILE).is_file():
        return False
    return mntp_name(name) is not None or (folder / SETTINGS_FILE).is_file()


def open_llm2vec(base: Path, adapters: list[Path], overrides: Overrides) -> Checkpoint:
    """Open base weights with adapters merged in their order.

    Args:
        base: holds the weights, and config.json unless an adapter has its own.
        adapters: adapter folders, the MNTP one first.
        overrides: the caller's own settings.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit the others.
    """
    folders = [*adapters, base]
    config_folder = next(f for f in folders if (f / "config.json").is_file() or f == base)
    config = read_config(config_folder)
    settings: dict[str, Any] = {}
    for folder in (base, *adapters):
        if (folder / SETTINGS_FILE).is_file():
            settings = read_object(folder / SETTINGS_FILE)
    spec = llm2vec_spec(config, settings, overrides, _original_base(config, adapters))
    source: TensorSource = SafetensorsSource(base)
    for adapter in adapters:
        source = AdapterSource(source, adapter)
    tokenizer = Tokenizer.from_folder(next(f for f in folders if has_tokenizer(f) or f == base))
    return Checkpoint(spec, source, tokenizer)


def llm2vec_spec(
    config: dict[str, Any], settings: dict[str, Any], overrides: Overrides, original_base: str | None
) -> ModelSpec:
    """The encoder that config.json and llm2vec_config.json make.

    Args:
        config: config.json.
        settings: llm2vec_config.json, empty if there is none.
        original_base: hub id of the model it all started from; decides the template.
    """
    attention = choose_attention(overrides.attention) or "bidirectional"
    decoder = decoder_spec(config, attention)
    mode = settings.get("pooling_mode", "mean")
    modes = choose_pooling(overrides.pooling)
    if modes is None and (not isinstance(mode, str) or mode not in POOLING):
        raise CheckpointError(
            f"{SETTINGS_FILE}: pooling_mode is {mode!r}, known are {', '.join(POOLING)}; pass pooling= to choose"
        )
    skip_instruction = settings.get("skip_instruction", True)
    suffix = ""
    if mode == "eos_token" and modes in (None, ("last",)) and original_base not in NO_EOS_AFTER_TEMPLATE:
        suffix = EOS_BY_BASE.get(original_base or "") or EOS_BY_FAMILY.get(decoder.family, "")
    spec = ModelSpec(
        decoder=decoder,
        attention=attention,
        pooling=modes or (POOLING[mode],),
        layout="llm2vec",
        # All tokens, as prompt_tokens has them, where the instruction is to be pooled too.
        span="template" if skip_instruction else "prompt_tokens",
        template=TEMPLATES.get(original_base or ""),
        text_suffix=suffix,
        max_length=choose_max_length(overrides.max_length, _length(settings, "max_length"), decoder.max_positions),
        document_max_length=_length(settings, "doc_max_length") or DOCUMENT_MAX_LENGTH,
        truncate_dim=overrides.truncate_dim,
        direction_key=direction_key(config),
        base_model=original_base,
    )
    return reference_rules(spec) if overrides.compat == "llm2vec" else spec


def reference_rules(spec: ModelSpec) -> ModelSpec:
    """The same model under the reference's own rules: mask by count, no window, vectors as they are."""
    return replace(
        spec,
        decoder=replace(spec.decoder, layer_windows=(None,) * spec.decoder.num_layers),
        span="count_from_right" if spec.span == "template" else spec.span,
        normalize=False,
        compat="llm2vec",
    )


def has_tokenizer(folder: Path) -> bool:
    """Does a folder come with a tokenizer of its own."""
    return (folder / "tokenizer.json").is_file() or (folder / "tokenizer.model").is_file()


def _original_base(config: dict[str, Any], adapters: list[Path]) -> str | None:
    """The id the weights started from, as config.json or an adapter has it."""
    stated = [read_adapter_config(adapter).get("base_model_name_or_path") for adapter in adapters]
    return first_base([config.get("_name_or_path"), *stated])


def first_base(stated: Iterable[Any]) -> str | None:
    """Of several names of one base the first with rules of its own, else the first."""
    names = [str(name) for name in stated if name]
    return next((n for n in names if n in TEMPLATES or n in EOS_BY_BASE), names[0] if names else None)


def _length(settings: dict[str, Any], key: str) -> int | None:
    value = settings.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise CheckpointError(f"{SETTINGS_FILE}: {key} is {value!r}; expected a positive whole number")
    return value
