"""Weights of a model folder in safetensors form: one file, or shards with an index. Mapped, never copied.

The safetensors library checks a header (length, JSON, offsets, sizes against shapes and dtypes); here are the
checks it leaves out: names given twice, where an index may point, links that leave the folder, dtypes.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flashvec.runtime.checkpoint.source import CheckpointError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
MAX_HEADER_BYTES = 32 * 2**20  # of one file; real ones have some hundred KB
LIBRARYS_BOUND = 100_000_000  # bytes of a header that the library reads
MAX_INDEX_BYTES = 64 * 2**20  # an 8B model's index has 25 KB; one with a million tensors 60 MB
NEVER_READ = frozenset({"lm_head.weight"})  # an encoder has no use for it: its file need not stay open for it
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class SafetensorsSource:
    """`TensorSource` over safetensors files.

    Names lose a leading `model.`, so a decoder saved with its output head and one saved without read the
    same. A file is mapped at the first read from it and released once all of it was read, or by `close`.
    """

    def __init__(self, folder: Path) -> None:
        """Args:
            folder: holds model.safetensors, or model.safetensors.index.json and the shards it names.

        Raises:
            CheckpointError: no weights there, only pickles, or files that are damaged or not what they claim.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        if (folder / WEIGHTS_FILE).is_file():
            files = {WEIGHTS_FILE: _inside(folder, WEIGHTS_FILE, WEIGHTS_FILE)}
            stored = dict.fromkeys(_header(files[WEIGHTS_FILE]), WEIGHTS_FILE)
        elif (folder / INDEX_FILE).is_file():
            stored, files = _read_index(folder)
        else:
            raise CheckpointError(_nothing_to_read(folder))
        self._set(files, stored)

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """One safetensors file by its own name (adapter_model.safetensors); a leading `model.` goes here too.

        Raises:
            CheckpointError: missing, damaged or not what it claims.
        """
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        source = cls.__new__(cls)
        file = _inside(path.parent, path.name, path.name)
        source._set({path.name: file}, dict.fromkeys(_header(file), path.name))
        return source

    def _set(self, files: dict[str, Path], stored: dict[str, str]) -> None:
        """Args: files by name, and stored tensor name -> file name."""
        self._files = files
        self._where: dict[str, tuple[str, str]] = {}  # canonical name -> (stored name, file name)
        for name, file in stored.items():
            canonical = name.removeprefix("model.")
            if canonical in self._where:
                other, other_file = self._where[canonical]
                raise CheckpointError(
                    f"{files[file]}: {name} and {other} (in {other_file}) are the same tensor, {canonical}; "
                    "save the model again so that it is stored once"
                )
            self._where[canonical] = name, file
        self._open: dict[str, Any] = {}
        self._unread: dict[str, set[str]] = {}  # per open file: what keeps it open

    def names(self) -> frozenset[str]:
        """Every tensor this source can give."""
        return frozenset(self._where)

    def place(self, name: str) -> str:
        """The file that a tensor is read from, for messages; the folder of one that is missing."""
        if name in self._where:
            return str(self._files[self._where[name][1]])
        return str(next(iter(self._files.values())).parent)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape without reading the data.

        Raises:
            KeyError: no such tensor.
        """
        stored, file = self._where[name]
        return tuple(self._opened(file).get_slice(stored).get_shape())

    def read(self, name: str) -> Tensor:
        """The tensor, a view of the mapped file: fp32, bf16 or fp16 as stored; fp64 is given as an fp32 copy.

        Raises:
            KeyError: no such tensor.
            CheckpointError: a dtype that is no floating-point weight, or a file that changed meanwhile.
        """
        stored, file = self._where[name]
        handle = self._opened(file)
        kind = handle.get_slice(stored).get_dtype()
        if kind not in DTYPES:
            raise CheckpointError(
                f"{self._files[file]}: {stored} has dtype {kind}; only {', '.join(DTYPES)} are read: "
                "use the original, unquantised checkpoint"
            )
        try:
            tensor: Tensor = handle.get_tensor(stored)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{self._files[file]}: {stored} cannot be read ({error})") from None
        self._unread[file].discard(name)
        if not self._unread[file]:  # the tensor keeps its own hold on the map
            self._release(file)
        return tensor.float() if tensor.dtype == torch.float64 else tensor

    def close(self) -> None:
        """Release every mapped file. A later read maps its file again."""
        for file in list(self._open):
            self._release(file)

    def _opened(self, file: str) -> Any:
        if file not in self._open:
            self._open[file] = _open(self._files[file])
            self._unread[file] = {name for name, (_, at) in self._where.items() if at == file} - NEVER_READ
        return self._open[file]

    def _release(self, file: str) -> None:
        del self._open[file], self._unread[file]


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file with the permissions of any new file: the library's own can be read by its owner alone.

    Raises:
        SafetensorError, OSError: the disk is full or not writable.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def _open(path: Path) -> Any:
    """The library's handle, its header checked."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a sound safetensors file ({error}); fetch it again") from None
    except (OSError, MemoryError, RuntimeError) as error:  # no memory to map it, too many open files: it may be sound
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def _header(path: Path) -> list[str]:
    """Names stored in a file, after the library's checks and ours: it keeps the last of two equal keys."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = file.read(min(size, MAX_HEADER_BYTES))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if MAX_HEADER_BYTES < size <= LIBRARYS_BOUND:  # what is larger is no header at all: the library says so
        raise CheckpointError(f"{path}: a header of {size} bytes, more than the names of tensors can take")
    names = list(_open(path).keys())
    pairs = json.loads(header, object_pairs_hook=list)
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise CheckpointError(f"{path}: its header names {twice[0]} twice; fetch it again")
    return names


def _read_index(folder: Path) -> tuple[dict[str, str], dict[str, Path]]:
    """(stored tensor name -> shard, shard -> path), each shard's header checked against the index."""
    path = folder / INDEX_FILE
    size = path.stat().st_size
    if size > MAX_INDEX_BYTES:
        raise CheckpointError(f"{path}: {size} bytes, more than an index can have ({MAX_INDEX_BYTES})")
    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a valid index ({error}); fetch it again") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is missing or empty; fetch it again")
    files: dict[str, Path] = {}
    stored: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_basename(shard) or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{path}: weight_map sends {name} to {shard!r}; expected a plain .safetensors name")
        if shard not in files:
            if not (folder / shard).is_file():
                raise CheckpointError(f"{folder / shard}: missing, but {INDEX_FILE} names it; fetch it again")
            files[shard] = _inside(folder, shard, INDEX_FILE)
            stored[shard] = set(_header(files[shard]))
        if name not in stored[shard]:
            raise CheckpointError(f"{folder / shard}: has no tensor {name}, which {INDEX_FILE} places there")
    return weight_map, files


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice} is given twice")
    return values


def _is_basename(name: str) -> bool:
    return name not in ("", ".", "..") and not any(character in name for character in "/\\:\0")


def _inside(folder: Path, name: str, named_by: str) -> Path:
    """folder/name, unless it is a link out of the folder.

    Hugging Face's cache stores `snapshots/<commit>/file` as links into the `blobs` folder beside `snapshots`:
    those pass.
    """
    home = folder.resolve()
    target = (home / name).resolve()
    if target.is_relative_to(home):
        return folder / name
    cache = next((parent.parent for parent in home.parents if parent.name == "snapshots"), None)
    if cache is not None and target.parent == cache / "blobs":
        return folder / name
    raise CheckpointError(f"{folder / name} ({named_by}) is a link that leaves the folder; put the file itself there")


def _nothing_to_read(folder: Path) -> str:
    present = sorted(path.name for path in folder.iterdir() if path.is_file())
    pickles = [name for name in present if name.endswith(PICKLE_SUFFIXES)]
    others = [name for name in present if name.endswith(".safetensors")]
    wanted = f"neither {WEIGHTS_FILE} nor {INDEX_FILE}"
    if others:
        return f"{folder}: {wanted}, but {', '.join(others[:3])}; shards need {INDEX_FILE}: fetch it"
    if pickles:
        return (
            f"{folder}: {wanted}, only {', '.join(pickles[:3])}; pickle files are not read: convert with "
            "safetensors.torch.save_file or transformers' save_pretrained(safe_serialization=True)"
        )
    return f"{folder}: {wanted}; fetch the model's safetensors files"
