"""What a run comes from: its settings, the files it reads, and what those who made these files had read.

A run is resumed, or taken for ended, only where all of that is as it was (`fingerprint`). The texts it may know by
heart are its own and those of every adapter and model below it (`earlier_seen`).
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flashvec.runtime.checkpoint.open import parts_of, resolve
from flashvec.runtime.checkpoint.peft import WEIGHTS_FILE
from flashvec.training.config import MntpConfig, TrainConfig, read_config
from flashvec.training.data import text_files
from flashvec.training.files import whole
from flashvec.training.model import ENCODER_FOLDER, training_dtype

SEEN_FILE, CONFIG_FILE = "seen.npy", "train.yaml"
MODEL_FILES = (".json", ".safetensors", ".gguf", ".model")  # what is read of a model: weights, settings, tokenizer
WHOLE_BYTES = 1 << 26
HEAD_BYTES, BLOCKS, BLOCK_BYTES = 1 << 20, 256, 4096
# Where things are written, how often, and how much runs at once changes no step.
FREE = ("output", "sts", "device")
FREE_LOOP = (
    *("log_every", "tensorboard", "save_every", "keep_checkpoints", "average_checkpoints", "evaluate_every"),
    *("activation_gib", "recompute", "shard_base"),
)


def fingerprint(config: TrainConfig) -> str:
    """Names what must not change between a run and its resumption: settings, and the contents of all files it reads.

    Raises:
        CheckpointError, OSError: a model, an adapter or a file that is not there.
    """
    digest = hashlib.sha256(json.dumps(_fixed(config), sort_keys=True).encode())
    texts = text_files((*getattr(config, "texts", ()), *getattr(config, "pairs", ())))
    for path in (*texts, *(file for place in _places(config) for file in _model_files(place))):
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        digest.update(_content(path, is_text=path in texts))
    return digest.hexdigest()


def difference(config: TrainConfig) -> str:
    """What is another than in the run whose settings lie in `config.output`, in words, for an error."""
    try:
        before = _flat(_fixed(read_config(type(config), Path(config.output) / CONFIG_FILE)))
    except (OSError, ValueError):
        return "settings (or files)"
    now = _flat(_fixed(config))
    changed = [key for key in now | before if before.get(key) != now.get(key)]
    listed = (f"{key} ({before.get(key)!r}, now {now.get(key)!r})" for key in changed)
    return ", ".join(listed) or "contents of the files that it reads"


def _fixed(config: TrainConfig) -> dict[str, Any]:
    """The settings that must not change."""
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in FREE}
    for key in FREE_LOOP:
        settings["loop"].pop(key)
    settings["lora"].pop("saved_as")
    if isinstance(config, MntpConfig) and not config.depths:
        settings.pop("depths")  # it came later: runs from before go on
    settings["dtype"] = str(training_dtype(config))  # one that is not set goes by the device
    return settings


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys with dots."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _content(path: Path, is_text: bool) -> bytes:
    """Of texts, adapters and small files a digest of every byte.

    Of a base's weights one of the header and of blocks all over the file: they are gigabytes, which every start would
    read, and training or converting a model leaves hardly a number of it as it was.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if is_text or path.name == WEIGHTS_FILE or size <= WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").digest()
        digest = hashlib.sha256(file.read(HEAD_BYTES))
        for block in range(1, BLOCKS + 1):
            file.seek((size - BLOCK_BYTES) * block // BLOCKS)
            digest.update(file.read(BLOCK_BYTES))
        return digest.digest()


def _places(config: TrainConfig) -> Iterator[Path]:
    """The model with what lies below it, and the adapters that the run goes on from or is taught by."""
    base, adapters = parts_of(resolve(config.model, None, True), True)
    yield from (base, *adapters)
    for name in (*config.adapters, config.lora.start, *getattr(config, "teachers", ())):
        if name:
            yield resolve(name, None, True)


def _model_files(place: Path) -> list[Path]:
    """Of a folder, those of its modules (1_Pooling) among them; checkpoints and logs of a run are none."""
    found = [place] if place.is_file() else [*place.glob("*"), *place.glob("[0-9]_*/*")]
    return sorted(path for path in found if path.suffix.lower() in MODEL_FILES and path.is_file())


def earlier_seen(config: TrainConfig) -> set[int]:
    """Hashes of the texts that the model and its adapters were trained on, where they say so."""
    found: set[int] = set()
    for place in _places(config):
        folder = place.parent if place.name == ENCODER_FOLDER else place  # a trained body lies below its run's folder
        if (folder / SEEN_FILE).is_file():
            found |= set(np.load(folder / SEEN_FILE, allow_pickle=False).tolist())
    return found


def write_seen(path: Path, names: Iterable[int]) -> None:
    """Sorted hashes, int64 [n]."""
    with whole(path) as partial, partial.open("wb") as file:
        np.save(file, np.array(sorted(names), np.int64), allow_pickle=False)
