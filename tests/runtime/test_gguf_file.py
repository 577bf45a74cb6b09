"""Headers of GGUF files: every way in which one can be damaged or lie."""

import struct
from pathlib import Path

import pytest
from gguf_samples import hf_tensors, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from flashvec.runtime.checkpoint.gguf import GGUFSource
from flashvec.runtime.checkpoint.gguf_config import gguf_config
from flashvec.runtime.checkpoint.gguf_file import GGUFFile, StoredArray
from flashvec.runtime.checkpoint.gguf_tokenizer import gguf_tokenizer
from flashvec.runtime.checkpoint.source import CheckpointError


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def header(
    keys: bytes = b"", tensors: bytes = b"", counts: tuple[int, int] | None = None, version: int = 3, data: int = 0
) -> bytes:
    """A GGUF header made by hand: `keys` and `tensors` each hold one entry unless `counts` says otherwise."""
    num_tensors, num_keys = counts or (int(bool(tensors)), int(bool(keys)))
    start = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + keys + tensors
    return start + bytes(-len(start) % 32 + data)


def tensor(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too short"),
    "magic": (b"GGML" + bytes(40), "does not begin with GGUF"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(40), "big-endian"),
    "version 1": (header(version=1), "version 1"),
    "version 4": (header(version=4), "version 4"),
    "tensors": (header(counts=(2**40, 0)), "number of tensors: 1099511627776 is more"),
    "keys": (header(counts=(0, 2**40)), "number of keys"),
    "keys past the end": (header(counts=(0, 9)), "truncated|is given twice"),
    "name past the end": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 999), "truncated"),
    "name too long": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**60), "length of a key: .* more than"),
    "name not UTF-8": (header(key("ab", 4, bytes(4)).replace(b"ab", b"\xff\xfe")), "a key is not UTF-8"),
    "key twice": (header(key("a", 4, bytes(4)) * 2, counts=(0, 2)), "a is given twice"),
    "type": (header(key("a", 13, bytes(4))), "a has the unknown type 13"),
    "array of arrays": (header(key("a", 9, struct.pack("<IQ", 9, 1))), "array of the unknown type 9"),
    "array too long": (header(key("a", 9, struct.pack("<IQ", 0, 2**60))), "length of a: .* more than"),
    "array past the end": (header(key("a", 9, struct.pack("<IQ", 12, 2**20))), "truncated"),
    "strings past the end": (header(key("a", 9, struct.pack("<IQ", 8, 2**20))), "truncated"),
    "string too long": (header(key("a", 8, struct.pack("<Q", 2**40))), "length of a: .* more than"),
    "alignment": (header(key("general.alignment", 4, struct.pack("<I", 33))), "alignment is 33"),
    "alignment 0": (header(key("general.alignment", 4, bytes(4))), "alignment is 0"),
    "split": (header(key("split.count", 2, struct.pack("<H", 2))), "one part of several"),
    "dimensions": (header(tensors=tensor("t", (1,) * 5), data=4), "number of t's dimensions: 5"),
    "no dimensions": (header(tensors=tensor("t", ()), data=4), r"shape \[\]"),
    "size": (header(tensors=tensor("t", (2**40,)), data=4), "a size of t"),
    "sizes together": (header(tensors=tensor("t", (2**32,) * 4), data=4), "not all in the file"),
    "zero": (header(tensors=tensor("t", (0, 4)), data=4), r"shape \[4, 0\]"),
    "no whole block": (header(tensors=tensor("t", (33,), kind=8), data=99), "Q8_0 cannot hold"),
    "tensor type": (header(tensors=tensor("t", (4,), kind=99), data=16), "type 99"),
    "removed type": (header(tensors=tensor("t", (4,), kind=4), data=16), "type 4"),
    "tensor truncated": (header(tensors=tensor("t", (5,)), data=16), "not all in the file"),
    "offset past the end": (header(tensors=tensor("t", (4,), offset=2**63), data=16), "not all in the file"),
    "offset unaligned": (header(tensors=tensor("t", (4,), offset=8), data=24), "not all in the file"),
    "tensor twice": (header(tensors=tensor("t", (4,)) * 2, counts=(2, 0), data=16), "t is there twice"),
    "overlap": (header(tensors=tensor("t", (4,)) + tensor("u", (4,)), counts=(2, 0), data=16), "u overlaps t"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_headers_that_lie(tmp_path: Path, damage: str) -> None:
    content, message = DAMAGED[damage]
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"m\.gguf: .*({message})"):
        GGUFSource(tmp_path / "m.gguf")


def test_values_of_every_type(tmp_path: Path) -> None:
    values: dict[str, tuple[int, str, float]] = {
        "a": (0, "B", 200),
        "b": (1, "b", -3),
        "c": (2, "H", 60000),
        "d": (3, "h", -9),
        "e": (4, "I", 2**31),
    }
    values |= {"f": (5, "i", -7), "g": (6, "f", 1e-6), "h": (7, "?", True), "i": (10, "Q", 2**60)}
    values |= {"j": (11, "q", -(2**60)), "k": (12, "d", 0.1)}
    keys = b"".join(key(name, kind, struct.pack(f"<{letter}", value)) for name, (kind, letter, value) in values.items())
    for name, (kind, letter, value) in values.items():
        keys += key(name * 2, 9, struct.pack(f"<IQ2{letter}", kind, 2, value, value))
    keys += key("text", 8, text("naïve")) + key("texts", 9, struct.pack("<IQ", 8, 2) + text("a") + text("ü"))
    (tmp_path / "m.gguf").write_bytes(header(keys, counts=(0, 2 * len(values) + 2)))
    file = GGUFFile(tmp_path / "m.gguf")
    for name, (_, _, value) in values.items():
        assert file.metadata[name] == value  # 1e-6 too, though it was stored in fp32
        assert isinstance(file.metadata[name * 2], StoredArray)
        assert file.array(name * 2) == pytest.approx([value, value])
    assert file.metadata["text"] == "naïve"
    assert file.array("texts") == ["a", "ü"]
    with pytest.raises(CheckpointError, match="text is 'naïve', expected an array"):
        file.array("text")


@pytest.mark.parametrize("count", [0, 1])
def test_joined_parts_are_one_file(tmp_path: Path, count: int) -> None:
    """llama-gguf-split --merge, the cure that the refusal of a part names, writes 0."""
    (tmp_path / "m.gguf").write_bytes(header(key("split.count", 2, struct.pack("<H", count))))
    assert GGUFFile(tmp_path / "m.gguf").metadata == {"split.count": count}


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        GGUFSource(tmp_path / "m.gguf")


HEADER_BYTES = 2000  # of the sample below: damage to weights shows in their values alone


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole small file, which nobody damages."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", "llama", hf_tensors("llama"))


@settings(max_examples=300, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, HEADER_BYTES), st.integers(0, 255)), max_size=3),
    cut=st.integers(0, 10**6),
)
def test_any_damage_is_a_checkpoint_error(sample: Path, changes: list[tuple[int, int]], cut: int) -> None:
    path = sample.with_name("damaged.gguf")
    damaged = bytearray(sample.read_bytes())
    for position, value in changes:
        damaged[position] = value
    path.write_bytes(damaged[: cut % len(damaged)] if not changes else damaged)
    for read in (GGUFSource, gguf_config, gguf_tokenizer):
        try:
            found = read(path)
        except CheckpointError as error:
            assert path.name in str(error)
            continue
        if isinstance(found, GGUFSource):
            for name in found.names():
                found.read(name)
