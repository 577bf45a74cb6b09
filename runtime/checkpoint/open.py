"""Which layout a model has, and the reader for it.

    *.gguf                                       gguf_encoder.py
    flashvec.json                                flashvec's own folder (`Encoder.save`): saved.py
    modules.json                                 sentence_transformers.py
    adapter_config.json, llm2vec_config.json     chain.py (what is merged into what), llm2vec.py, peft.py
    config.json                                  hf.py

The first that a model has counts.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from flashvec.runtime.checkpoint.source import CheckpointError, TensorSource
from flashvec.runtime.spec import ModelSpec
from flashvec.runtime.texts import check_path
from flashvec.runtime.tokenize import Tokenizer

HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*/*.json", "*/*.safetensors")


@dataclass(frozen=True)
class Overrides:
    """What the caller of `Encoder.load` states himself; None leaves the layout's own word."""

    attention: str | None = None
    pooling: str | tuple[str, ...] | None = None
    max_length: int | None = None
    truncate_dim: int | None = None
    compat: str | None = None


@dataclass
class Checkpoint:
    """A model as its files describe it, its decoder weights not read yet."""

    spec: ModelSpec
    source: TensorSource
    tokenizer: Tokenizer
    dense: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)  # weight [out, in], bias [out]
    notices: list[str] = field(default_factory=list)  # what the user should know, one sentence each


def resolve(model: str | Path, revision: str | None = None, local_files_only: bool = False) -> Path:
    """The local file or folder of a model: itself, or a hub id's snapshot.

    Raises:
        TypeError: no name of a model.
        ValueError: a name that no library can open.
        CheckpointError: neither exists; one line.
    """
    if not isinstance(model, str | os.PathLike):
        raise TypeError(f"model is {type(model).__name__}: give a folder, a .gguf file or a hub id")
    path, name = Path(model).expanduser(), str(model)
    if not name:
        raise CheckpointError("the model's name is empty: give a folder, a .gguf file or a hub id")
    if path.exists():
        if revision is not None:
            raise CheckpointError(
                f"{name}: revision is {revision!r}, but this is a place on this machine, with no revisions"
            )
        check_path(path)
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1 or path.suffix.lower() == ".gguf":
        raise CheckpointError(f"{name}: no such file or folder (a hub id has the form owner/name)")
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name, revision=revision, local_files_only=local_files_only, allow_patterns=list(HUB_FILES)
        )
    except Exception as error:  # the hub client raises many kinds; all mean: not to be had
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{name}: no such folder here, and the hub could not give it ({reason})") from None
    if not any(Path(folder).glob("*.json")):
        raise CheckpointError(
            f"{name}: the hub's repository holds no model's config.json; of one of GGUF files download a file "
            f"(hf download {name} FILE.gguf) and name it here"
        )
    return Path(folder)


def parts_of(path: Path, local_files_only: bool = False) -> tuple[Path, list[Path]]:
    """What holds a model's base, a folder or .gguf file, and the adapters that its folder leads to, lowest first.

    Raises:
        CheckpointError: as `adapter_chain`.
    """
    from flashvec.runtime.checkpoint.chain import adapter_chain
    from flashvec.runtime.checkpoint.saved import SPEC_FILE
    from flashvec.runtime.checkpoint.sentence_transformers import MODULES_FILE

    if any((path / name).is_file() for name in (SPEC_FILE, MODULES_FILE)):
        return path, []
    return adapter_chain(path, local_files_only)


def made_of(path: Path, local_files_only: bool = False) -> list[Path]:
    """Every folder and file that a model's weights are read from, those that its adapters name among them.

    Raises:
        CheckpointError: as `adapter_chain`.
    """
    from flashvec.runtime.checkpoint.chain import adapter_chain
    from flashvec.runtime.checkpoint.saved import SPEC_FILE
    from flashvec.runtime.checkpoint.sentence_transformers import MODULES_FILE, transformer_folder

    base, chain = parts_of(path, local_files_only)
    if not (base / MODULES_FILE).is_file() or (base / SPEC_FILE).is_file():
        return [base, *chain]
    below, adapters = adapter_chain(transformer_folder(base), local_files_only)  # of an adapter that the library saved
    return [base, below, *adapters]


def open_checkpoint(
    path: Path, overrides: Overrides, adapters: tuple[str, ...] = (), local_files_only: bool = False
) -> Checkpoint:
    """Read a model's configuration and open its weights.

    Args:
        path: a folder or a GGUF file.
        overrides: the caller's own settings.
        adapters: PEFT adapters to merge on top, in this order: folders or hub ids.
        local_files_only: never ask the hub, for adapters and what they are based on either.

    Raises:
        CheckpointError: the layout is unknown or a file is missing or damaged; names the file and the cure.
        ValueError: an override that the layout cannot follow.
    """
    from flashvec.runtime.checkpoint.llm2vec import reference_rules

    extra = [resolve(adapter, None, local_files_only) for adapter in adapters]
    checkpoint, merged = _open(path, overrides, extra, local_files_only)
    _merge(checkpoint, extra[merged:])
    checkpoint.notices += _missing_notices(path, extra)
    if overrides.compat is not None and checkpoint.spec.compat != overrides.compat:
        if checkpoint.spec.layout != "llm2vec":
            raise ValueError(
                f"compat={overrides.compat!r} is for LLM2Vec models and plain decoders; "
                f"{path.name} is a {checkpoint.spec.layout} model"
            )
        checkpoint.spec = reference_rules(checkpoint.spec)
    return checkpoint


def _open(path: Path, overrides: Overrides, extra: list[Path], local_files_only: bool) -> tuple[Checkpoint, int]:
    """The checkpoint, and how many of the extra adapters are merged into it already."""
    from flashvec.runtime.checkpoint.chain import model_name
    from flashvec.runtime.checkpoint.gguf_encoder import open_gguf
    from flashvec.runtime.checkpoint.hf import open_hf
    from flashvec.runtime.checkpoint.llm2vec import is_llm2vec, open_llm2vec
    from flashvec.runtime.checkpoint.saved import SPEC_FILE, open_saved
    from flashvec.runtime.checkpoint.sentence_transformers import MODULES_FILE, open_sentence_transformers

    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise CheckpointError(f"{path.name}: not a model; give a model folder or a .gguf file")
        return open_gguf(path, overrides), 0
    base, chain = parts_of(path, local_files_only)
    if base.is_file():
        checkpoint = open_gguf(base, overrides)
    elif (base / SPEC_FILE).is_file():
        checkpoint = open_saved(base, overrides)
    elif (base / MODULES_FILE).is_file():
        checkpoint = open_sentence_transformers(base, overrides, local_files_only)
    elif overrides.compat or any(is_llm2vec(f, model_name(f)) for f in (base, *chain, *extra)):
        checkpoint = open_llm2vec(base, [*chain, *extra], overrides)
        checkpoint.notices += _base_notice(base, chain)
        return checkpoint, len(extra)
    else:
        checkpoint = open_hf(base, overrides)
    _merge(checkpoint, chain)
    checkpoint.notices += _base_notice(base, chain)
    return checkpoint, 0


def _merge(checkpoint: Checkpoint, adapters: list[Path]) -> None:
    """Merge adapters in order; the last tokenizer among them replaces the base's."""
    from flashvec.runtime.checkpoint.llm2vec import has_tokenizer
    from flashvec.runtime.checkpoint.peft import AdapterSource

    for adapter in adapters:
        checkpoint.source = AdapterSource(checkpoint.source, adapter)
        if has_tokenizer(adapter):
            checkpoint.tokenizer = Tokenizer.from_folder(adapter)
    if adapters:  # int8 ranges were measured without them
        checkpoint.spec = replace(checkpoint.spec, int8_ranges=None)


def _missing_notices(path: Path, extra: list[Path]) -> list[str]:
    """Adapters that were trained on top of another one which is not merged in below them."""
    from flashvec.runtime.checkpoint.chain import MAX_CHAIN, adapter_below

    below, found = [path], []
    while extra and len(below) <= MAX_CHAIN and (under := adapter_below(path)) is not None:
        below.append(path := under)
    for adapter in extra:
        under = adapter_below(adapter)
        if under is not None and not any(under.samefile(place) for place in below):
            found.append(f"{adapter.name} was trained on the adapter {under.name}, which is not merged in below it")
        below.append(adapter)
    return found


def _base_notice(base: Path, chain: list[Path]) -> list[str]:
    """Weights that somebody else's file named are shown, not taken in silence."""
    from flashvec.runtime.checkpoint.chain import model_name

    if not chain:
        return []
    adapters = ", then ".join(model_name(adapter) for adapter in chain)
    return [f"the weights are those of {model_name(base)}, as adapter_config.json names it, with {adapters} merged in"]
