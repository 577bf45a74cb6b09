"""A GGUF file's header (metadata and tensor table) and its stored tensors, mapped.

Little-endian: "GGUF", u32 version, u64 number of tensors, u64 number of keys; per key a name, a u32 type and
the value; per tensor a name, u32 number of dimensions, these as u64 (fastest first), u32 type, u64 offset in
the data; padding to the alignment; the data. A string is a u64 length and UTF-8; an array a u32 type, a u64
count and its entries.

The gguf package's reader is not used: it makes numpy objects of each vocabulary entry (10 s and 680 MB for
Gemma 3's 262144 tokens) and believes every count it finds. Here each count is checked against the file before
it is followed, and arrays stay in the file until asked for. Types, block sizes and dequantisation do come
from the package.

Source: ggml, docs/gguf.md.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashvec.runtime.checkpoint.source import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
NUMPY_TYPES = {
    0: "u1",
    1: "i1",
    2: "u2",
    3: "i2",
    4: "u4",
    5: "i4",
    6: "f4",
    7: "?",
    10: "u8",
    11: "i8",
    12: "f8",
}

MAX_KEYS = 2**16
MAX_TENSORS = 2**16  # 1000 layers have about 14000
MAX_NAME_BYTES = 2**10
MAX_STRING_BYTES = 2**24  # a chat template or a licence
MAX_ARRAY = 2**24  # entries of a vocabulary or a merge list
MAX_DIMENSIONS = 4
MAX_SIZE = 2**32  # of one dimension
DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class StoredArray:
    """An array value, still in the file."""

    kind: int
    count: int
    start: int  # byte position of the first entry


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and how it is stored."""

    shape: tuple[int, ...]  # slowest dimension first, as torch has it
    kind: Any  # gguf.GGMLQuantizationType
    start: int  # byte position in the file
    num_bytes: int


class GGUFFile:
    """Metadata and tensors of one GGUF file; nothing but the header is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        """Raises:
        CheckpointError: missing, truncated, big-endian, split, or a header at odds with itself or the file.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"{self.path}: no such file")
        self._size = self.path.stat().st_size
        if self._size < 24:
            raise CheckpointError(f"{self.path}: {self._size} bytes, too short for a GGUF file; fetch it again")
        self._map: Tensor | None = None
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data, self.path)
            num_tensors, num_keys = _read_start(cursor)
            self.metadata = _read_metadata(cursor, num_keys)
            if self.metadata.get("split.count", 0) not in (0, 1):  # 0: parts that llama-gguf-split joined
                raise CheckpointError(f"{self.path}: one part of several; join them with llama-gguf-split --merge")
            self.tensors = _read_tensors(cursor, num_tensors, self._alignment())

    def array(self, key: str) -> list[Any]:
        """An array value: str, int, float or bool entries.

        Raises:
            CheckpointError: no such key, not an array, or a string that is not UTF-8.
        """
        stored = self.metadata.get(key)
        if not isinstance(stored, StoredArray):
            raise CheckpointError(f"{self.path}: {key} is {stored!r}, expected an array")
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data, self.path, stored.start)
            if stored.kind == STRING:
                return [cursor.string(key, MAX_STRING_BYTES) for _ in range(stored.count)]
            numbers = np.dtype(NUMPY_TYPES[stored.kind]).newbyteorder("<")
            return np.frombuffer(cursor.take(key, stored.count * numbers.itemsize), numbers).tolist()

    def stored(self, name: str) -> Tensor:
        """A tensor's bytes as they are in the file: uint8 [number of bytes], a view of the mapped file."""
        tensor = self.tensors[name]
        if self._map is None:
            # Private: a caller's mistaken write would stay in memory and never reach the file.
            self._map = torch.from_file(str(self.path), shared=False, size=self._size, dtype=torch.uint8)
        return self._map[tensor.start : tensor.start + tensor.num_bytes]

    def close(self) -> None:
        """Drop the map; views already given keep theirs."""
        self._map = None

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
            raise CheckpointError(f"{self.path}: general.alignment is {alignment!r}, expected a power of two from 8 up")
        return alignment


class _Cursor:
    """A position in the mapped file that never leaves it."""

    def __init__(self, data: mmap.mmap, path: Path, position: int = 0) -> None:
        self.data = data
        self.path = path
        self.position = position

    def skip(self, what: str, num_bytes: int) -> int:
        """Step over bytes; returns where they began."""
        start = self.position
        if num_bytes > len(self.data) - start:
            raise CheckpointError(f"{self.path}: truncated: {what} needs bytes past the end; fetch it again")
        self.position += num_bytes
        return start

    def take(self, what: str, num_bytes: int) -> bytes:
        start = self.skip(what, num_bytes)
        return self.data[start : self.position]

    def number(self, what: str, letter: str) -> Any:
        (value,) = struct.unpack_from(f"<{letter}", self.data, self.skip(what, struct.calcsize(f"<{letter}")))
        return value

    def count(self, what: str, letter: str, limit: int) -> int:
        """A count or length, bounded before anything is done with it."""
        value: int = self.number(what, letter)
        if value > limit:
            raise CheckpointError(f"{self.path}: {what}: {value} is more than the {limit} a model can have")
        return value

    def string(self, what: str, limit: int, errors: str = "strict") -> str:
        raw = self.take(what, self.count(f"the length of {what}", "Q", limit))
        try:
            return raw.decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {what} is not UTF-8 ({error.reason})") from None


def _read_start(cursor: _Cursor) -> tuple[int, int]:
    """(number of tensors, number of keys)."""
    if cursor.take("the magic", 4) != MAGIC:
        raise CheckpointError(f"{cursor.path}: not a GGUF file (it does not begin with GGUF)")
    version = cursor.number("the version", "I")
    if version & 0xFFFF == 0:
        raise CheckpointError(f"{cursor.path}: a big-endian GGUF file; convert the model again for little-endian")
    if version not in VERSIONS:
        raise CheckpointError(f"{cursor.path}: GGUF version {version}; versions 2 and 3 are read: convert it again")
    num_tensors = cursor.count("the number of tensors", "Q", MAX_TENSORS)
    return num_tensors, cursor.count("the number of keys", "Q", MAX_KEYS)


def _read_metadata(cursor: _Cursor, num_keys: int) -> dict[str, Any]:
    """Numbers, booleans, strings and `StoredArray`s by key."""
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string("a key", MAX_NAME_BYTES)
        if key in metadata:
            raise CheckpointError(f"{cursor.path}: {key} is given twice; fetch it again")
        metadata[key] = _read_value(cursor, key)
    return metadata


def _read_value(cursor: _Cursor, key: str) -> Any:
    kind = cursor.number(key, "I")
    if kind == STRING:
        return cursor.string(key, MAX_STRING_BYTES, errors="replace")
    if kind in SCALARS:
        value = cursor.number(key, SCALARS[kind])
        # The shortest decimal that has this fp32 value: a converter's 1e-06 comes back as 1e-06.
        return float(str(np.float32(value))) if kind == 6 else value
    if kind != ARRAY:
        raise CheckpointError(f"{cursor.path}: {key} has the unknown type {kind}")
    kind = cursor.number(key, "I")
    count = cursor.count(f"the length of {key}", "Q", MAX_ARRAY)
    start = cursor.position
    if kind == STRING:
        for _ in range(count):
            cursor.skip(key, cursor.count(f"an entry's length in {key}", "Q", MAX_STRING_BYTES))
    elif kind in SCALARS:
        cursor.skip(key, count * struct.calcsize(f"<{SCALARS[kind]}"))
    else:
        raise CheckpointError(f"{cursor.path}: {key} is an array of the unknown type {kind}")
    return StoredArray(kind, count, start)


def _read_tensors(cursor: _Cursor, num_tensors: int, alignment: int) -> dict[str, StoredTensor]:
    """The tensor table, each entry checked to lie in the file and beside all others."""
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(num_tensors):
        name = cursor.string("a tensor's name", MAX_NAME_BYTES)
        if name in entries:
            raise CheckpointError(f"{cursor.path}: tensor {name} is there twice; fetch it again")
        num_dimensions = cursor.count(f"the number of {name}'s dimensions", "I", MAX_DIMENSIONS)
        sizes = [cursor.count(f"a size of {name}", "Q", MAX_SIZE) for _ in range(num_dimensions)]
        kind, offset = cursor.number(name, "I"), cursor.number(name, "Q")
        entries[name] = tuple(reversed(sizes)), kind, offset
    first = -(-cursor.position // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, (shape, kind, offset) in entries.items():
        known, num_bytes = _stored_size(cursor.path, name, shape, kind)
        if offset % alignment or first + offset + num_bytes > len(cursor.data):
            raise CheckpointError(
                f"{cursor.path}: {name} is said to be {num_bytes} bytes at {first + offset}, not all in "
                f"the file of {len(cursor.data)} bytes; fetch it again"
            )
        tensors[name] = StoredTensor(shape, known, first + offset, num_bytes)
    end, before = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start < end:
            raise CheckpointError(f"{cursor.path}: {name} overlaps {before}; fetch it again")
        end, before = tensor.start + tensor.num_bytes, name
    return tensors


def _stored_size(path: Path, name: str, shape: tuple[int, ...], kind: int) -> tuple[Any, int]:
    """(gguf.GGMLQuantizationType, number of bytes)."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        known = GGMLQuantizationType(kind)
    except ValueError:
        raise CheckpointError(f"{path}: {name} has type {kind}, which the gguf package does not know") from None
    block, block_bytes = GGML_QUANT_SIZES[known]
    if not shape or 0 in shape or shape[-1] % block:
        raise CheckpointError(f"{path}: {name} has shape {list(shape)}, which {known.name} cannot hold")
    return known, math.prod(shape) // block * block_bytes
