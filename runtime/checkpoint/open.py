"""Which layout a model has, and the reader for it.

    *.gguf                                       gguf.py
    flashvec.json                                flashvec's own folder (`Encoder.save`), read by hf.py
    modules.json                                 sentence_transformers.py
    adapter_config.json or llm2vec_config.json   llm2vec.py (chains) and peft.py (bare adapters)
    config.json                                  hf.py
"""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from flashvec.runtime.checkpoint.source import CheckpointError, TensorSource
from flashvec.runtime.spec import ModelSpec
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
        CheckpointError: neither exists; one line.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    name = str(model)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1 or path.suffix == ".gguf":
        raise CheckpointError(f"{name}: no such file or folder (a hub id has the form owner/name)")
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name, revision=revision, local_files_only=local_files_only, allow_patterns=list(HUB_FILES)
        )
    except Exception as error:  # the hub client raises many kinds; all mean: not to be had
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{name}: no such folder here, and the hub could not give it ({reason})") from None
    return Path(folder)


def open_checkpoint(path: Path, overrides: Overrides, adapters: tuple[str, ...] = ()) -> Checkpoint:
    """Read a model's configuration and open its weights.

    Args:
        path: a folder or a GGUF file.
        overrides: the caller's own settings.
        adapters: PEFT adapters to merge on top, in this order: folders or hub ids.

    Raises:
        CheckpointError: the layout is unknown or a file is missing or damaged; names the file and the cure.
    """
    from flashvec.runtime.checkpoint.hf import open_hf

    if path.is_file():
        raise CheckpointError(f"{path.name}: not a model; give a model folder or a .gguf file")
    checkpoint = open_hf(path, overrides)
    if adapters:
        raise CheckpointError("adapters are not read yet")
    return checkpoint
