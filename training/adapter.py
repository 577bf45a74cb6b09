"""PEFT adapters in and out: what `Lora` holds as adapter_model.safetensors and adapter_config.json.

A trained folder also carries config.json, llm2vec_config.json and the tokenizer, so that `Encoder.load(folder)` finds
direction, pooling and base by itself. PEFT reads the two adapter files and passes over the rest.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch

from flashvec.runtime.checkpoint.chain import model_name
from flashvec.runtime.checkpoint.llm2vec import SETTINGS_FILE
from flashvec.runtime.checkpoint.peft import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config
from flashvec.runtime.checkpoint.safetensors_files import SafetensorsSource, write_tensors
from flashvec.runtime.checkpoint.source import CheckpointError
from flashvec.runtime.spec import ModelSpec
from flashvec.runtime.tokenize import Tokenizer
from flashvec.training.files import whole
from flashvec.training.lora import Lora

POOLING_NAMES = {"mean": "mean", "weighted_mean": "weighted_mean", "last": "last_token", "cls": "bos_token"}
PREFIXES = {"headless": "base_model.model.", "causal_lm": "base_model.model.model."}


def write_adapter(
    folder: Path, lora: Lora, base_name: str | None, wrapped: Literal["headless", "causal_lm"] = "headless"
) -> None:
    """Write adapter_model.safetensors (in the dtype that `LoraConfig.saved_as` names) and adapter_config.json.

    Args:
        folder: where to; made if it is not there.
        base_name: the base's id or path, for whoever loads the adapter alone.
        wrapped: which of Hugging Face's classes PEFT will put it on: its keys carry one more `model.` for the class
            with a language-model head. `Encoder.load` takes both.

    Raises:
        OSError: the disk is full or not writable; names the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    dtype = getattr(torch, lora.config.saved_as)
    for name, a_RC, b_nR in lora.matrices():
        for letter, x in (("A", a_RC), ("B", b_nR)):
            tensors[f"{PREFIXES[wrapped]}{name}.lora_{letter}.weight"] = x.to("cpu", dtype).contiguous().clone()
    with whole(folder / WEIGHTS_FILE) as partial:
        write_tensors(tensors, partial)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name,
        "r": lora.config.r,
        "lora_alpha": lora.config.alpha,
        "lora_dropout": lora.config.dropout,
        "target_modules": sorted(lora.config.targets),
        "use_rslora": lora.config.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }
    _write_json(folder / CONFIG_FILE, config)


def base_part(stated: Any, folder: Path) -> str:
    """The last part of a base's hub id or path, which both have in common; empty where an adapter names none.

    Args:
        stated: base_model_name_or_path.
        folder: the adapter's, from which a path such as ../base is seen.
    """
    if not isinstance(stated, str) or not stated:
        return ""
    return model_name(folder / stated if stated.startswith(".") else Path(stated)).rpartition("/")[2]


def read_adapter(folder: Path, lora: Lora, base: str = "") -> None:
    """Fill `lora` from an adapter folder, either key prefix.

    Args:
        base: `base_part` of what it shall go on over; empty accepts any.

    Raises:
        CheckpointError: another base, rank, scaling or set of targets, a tensor that is missing or fits nowhere.
    """
    config = read_adapter_config(folder)
    stated = config.get("base_model_name_or_path")
    if base and base_part(stated, folder) not in ("", base):
        raise CheckpointError(
            f"{folder.name}/{CONFIG_FILE}: base_model_name_or_path is {stated!r}, the run's base is {base!r}; if both "
            "are one model, set base_name to the former"
        )
    for key, mine in (("r", lora.config.r), ("lora_alpha", lora.config.alpha), ("use_rslora", lora.config.rslora)):
        if (config.get(key) or 0) != mine:
            ours = "lora." + key.removeprefix("lora_").removeprefix("use_")
            raise CheckpointError(f"{folder.name}/{CONFIG_FILE}: {key} is {config.get(key)!r}; set {ours} to it")
    for key in ("rank_pattern", "alpha_pattern", "use_dora"):
        if config.get(key):
            raise CheckpointError(f"{folder.name}/{CONFIG_FILE}: {key} is set; merge it (adapters:) to go on from it")
    source = SafetensorsSource.from_file(folder / WEIGHTS_FILE)
    try:
        stored = {key.removeprefix("base_model.model.").removeprefix("model."): key for key in source.names()}
        for name, a_RC, b_nR in lora.matrices():
            for letter, x in (("A", a_RC), ("B", b_nR)):
                key = stored.pop(f"{name}.lora_{letter}.weight", "")
                if not key:
                    raise CheckpointError(f"{folder.name}/{WEIGHTS_FILE}: has no {name}.lora_{letter}: other targets")
                if source.shape(key) != tuple(x.shape):
                    raise CheckpointError(
                        f"{folder.name}/{WEIGHTS_FILE}: {key} has shape {source.shape(key)}, the base asks for "
                        f"{tuple(x.shape)}: the adapter is for another model"
                    )
                with torch.no_grad():
                    x.copy_(source.read(key))
                if not bool(x.isfinite().all()):
                    raise CheckpointError(f"{folder.name}/{WEIGHTS_FILE}: {key} holds a number that is not finite")
        if stored:
            raise CheckpointError(f"{folder.name}/{WEIGHTS_FILE}: {sorted(stored)[0]} fits nowhere in the base")
    finally:
        source.close()


def write_surroundings(folder: Path, spec: ModelSpec, config: dict[str, Any] | None, tokenizer: Tokenizer) -> None:
    """What makes an adapter folder one that `Encoder.load` opens by itself: config.json, pooling, tokenizer.

    Args:
        config: the base's config.json; None for a base that has none (GGUF): such an adapter is named as
            `Encoder.load(base, adapters=[folder])`.
    """
    if config is not None:
        _write_json(folder / "config.json", config)
    # A GGUF file states its rules itself; without config.json this file would mean a second adapter.
    if config is not None and len(spec.pooling) == 1 and spec.pooling[0] in POOLING_NAMES:
        settings = {
            "pooling_mode": "eos_token" if spec.text_suffix else POOLING_NAMES[spec.pooling[0]],
            "max_length": spec.max_length,
            "skip_instruction": spec.span != "prompt_tokens",
        }
        _write_json(folder / SETTINGS_FILE, settings)
    tokenizer.save(folder)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with whole(path) as partial:
        partial.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
