"""Safetensors folders: names, dtypes, mapping, and every way in which one can be damaged or lie."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flashvec.runtime.checkpoint.safetensors_files import INDEX_FILE, WEIGHTS_FILE, SafetensorsSource
from flashvec.runtime.checkpoint.source import CheckpointError


def memory_bytes(kind: str) -> int:
    """RssAnon (allocated) or RssFile (mapped) of this process."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def write_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]]) -> dict[str, str]:
    """Shards and their index; returns the weight map."""
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    """A safetensors file with any header, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(start: int, end: int, shape: tuple[int, ...] = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize("prefix", ["", "model."])
def test_names_lose_the_models_prefix(tmp_path: Path, prefix: str) -> None:
    weight = torch.randn(3, 4)
    tensors = {f"{prefix}layers.0.self_attn.q_proj.weight": weight, "lm_head.weight": torch.randn(2, 4)}
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    source = SafetensorsSource(tmp_path)
    assert source.names() == {"layers.0.self_attn.q_proj.weight", "lm_head.weight"}
    assert source.shape("layers.0.self_attn.q_proj.weight") == (3, 4)
    assert torch.equal(source.read("layers.0.self_attn.q_proj.weight"), weight)
    with pytest.raises(KeyError):
        source.read("model.layers.0.self_attn.q_proj.weight")


def test_other_prefixes_are_left_alone(tmp_path: Path) -> None:
    save_file({"base_model.model.model.norm.lora_A.weight": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    source = SafetensorsSource.from_file(tmp_path / "adapter_model.safetensors")
    assert source.names() == {"base_model.model.model.norm.lora_A.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_floating_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.randn(5, dtype=torch.float64).to(dtype)
    save_file({"norm.weight": weight}, tmp_path / WEIGHTS_FILE)
    read = SafetensorsSource(tmp_path).read("norm.weight")
    expected = weight.float() if dtype == torch.float64 else weight
    assert read.dtype == expected.dtype
    assert torch.equal(read, expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int64, torch.uint8])
def test_other_dtypes_are_refused_when_read(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"norm.weight": torch.ones(4), "scale": torch.ones(4).to(dtype)}, tmp_path / WEIGHTS_FILE)
    source = SafetensorsSource(tmp_path)
    source.read("norm.weight")
    with pytest.raises(CheckpointError, match=r"scale has dtype .*unquantised"):
        source.read("scale")


def test_shards(tmp_path: Path) -> None:
    first = {"model.embed_tokens.weight": torch.randn(4, 2), "model.norm.weight": torch.randn(2)}
    second = {"model.layers.0.mlp.up_proj.weight": torch.randn(3, 2), "lm_head.weight": torch.randn(4, 2)}
    shards = {"model-00001-of-00002.safetensors": first, "model-00002-of-00002.safetensors": second}
    write_shards(tmp_path, shards)
    source = SafetensorsSource(tmp_path)
    for name, tensor in (first | second).items():
        name = name.removeprefix("model.")
        assert source.shape(name) == tuple(tensor.shape)
        assert torch.equal(source.read(name), tensor)


def test_files_are_mapped_lazily_and_released(tmp_path: Path) -> None:
    files = [tmp_path / f"model-{i}.safetensors" for i in range(2)]
    write_shards(
        tmp_path,
        {
            files[0].name: {"a": torch.ones(9), "b": torch.ones(9)},
            files[1].name: {"c": torch.ones(9), "lm_head.weight": torch.ones(9)},
        },
    )
    source = SafetensorsSource(tmp_path)
    assert not is_mapped(files[0])
    source.read("a")
    assert is_mapped(files[0])
    assert not is_mapped(files[1])
    source.read("b")
    assert not is_mapped(files[0])  # all of it was read
    kept = source.read("c")  # lm_head.weight is no reason to stay open
    assert kept.sum() == 9
    del kept
    assert not is_mapped(files[1])
    source.read("a")
    source.close()
    assert not is_mapped(files[0])
    assert torch.equal(source.read("a"), torch.ones(9))  # and a read after close maps again


def test_reading_maps_and_does_not_copy(tmp_path: Path) -> None:
    size = 2**24  # 64 MiB a tensor
    save_file({"a": torch.ones(size), "b": torch.ones(size)}, tmp_path / WEIGHTS_FILE)
    source = SafetensorsSource(tmp_path)
    before = memory_bytes("RssAnon")
    assert source.read("a").sum() == size
    assert memory_bytes("RssAnon") - before < 8 * 2**20


def test_two_names_for_one_tensor(tmp_path: Path) -> None:
    save_file({"model.norm.weight": torch.ones(2), "norm.weight": torch.ones(2)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=r"same tensor, norm\.weight"):
        SafetensorsSource(tmp_path)


def _nothing(folder: Path) -> None:
    folder.rmdir()


def _pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"")


def _shards_without_index(folder: Path) -> None:
    save_file({"a": torch.ones(1)}, folder / "model-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (_nothing, "no such folder"),
        (_pickle, r"only pytorch_model\.bin; pickle files are not read: .*save_file"),
        (_shards_without_index, r"model-00001-of-00002\.safetensors; shards need"),
        (lambda folder: None, r"neither model\.safetensors nor model\.safetensors\.index\.json; fetch"),
    ],
)
def test_folders_without_weights(tmp_path: Path, prepare: Callable[[Path], None], message: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsSource(folder)


DAMAGED: dict[str, tuple[Any, bytes, int | None]] = {
    "truncated": ({"a": entry(0, 8)}, bytes(7), None),
    "bytes after the data": ({"a": entry(0, 8)}, bytes(9), None),
    "header past the file": ({"a": entry(0, 8)}, bytes(8), 10**6),
    "header over 100 MB": ({"a": entry(0, 8)}, bytes(8), 2**63),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), None),
    "hole": ({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20), None),
    "offset past the file": ({"a": entry(0, 8), "b": entry(8, 16)}, bytes(8), None),
    "reversed offsets": ({"a": entry(8, 0)}, bytes(8), None),
    "size does not fit shape": ({"a": entry(0, 8, (3,))}, bytes(8), None),
    "size overflows": ({"a": entry(0, 8, (2**63, 8))}, bytes(8), None),
    "negative size": ({"a": entry(0, 8, (-2,))}, bytes(8), None),
    "unknown dtype": ({"a": entry(0, 8, (2,), "F31")}, bytes(8), None),
    "no JSON": (b'{"a"', b"", None),
    "deep JSON": (b"[" * 100_000, b"", None),
    "key twice": (b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 8)).encode(),) * 2), bytes(8), None),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files(tmp_path: Path, damage: str) -> None:
    write_raw(tmp_path / WEIGHTS_FILE, *DAMAGED[damage])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*fetch it again"):
        SafetensorsSource(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*fetch it again"):
        SafetensorsSource.from_file(tmp_path / WEIGHTS_FILE)


@pytest.mark.parametrize("content", [b"", b"abc"])
def test_files_too_short_for_a_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match="not a sound safetensors file"):
        SafetensorsSource(tmp_path)


def test_a_sound_file_that_cannot_be_opened_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / WEIGHTS_FILE)

    def full(*arguments: Any, **keywords: Any) -> None:
        raise RuntimeError("unable to mmap 538088776 bytes: Cannot allocate memory (12)")

    monkeypatch.setattr("flashvec.runtime.checkpoint.safetensors_files.safe_open", full)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read \(.*Cannot allocate memory.*\)$"):
        SafetensorsSource(tmp_path)


def test_a_header_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashvec.runtime.checkpoint.safetensors_files.MAX_HEADER_BYTES", 10)
    save_file({"a": torch.ones(1)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: a header of \d+ bytes, more than the names"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"{", "not a valid index"),
        (b"[" * 100_000, "not a valid index"),
        (b"[]", "weight_map is missing"),
        (b'{"weight_map": {}}', "weight_map is missing or empty"),
        (b'{"weight_map": {"a": "s.safetensors", "a": "s.safetensors"}}', "a is given twice"),
        (b'{"weight_map": {"a": 3}}', "sends a to 3"),
        (b'{"weight_map": {"a": "../s.safetensors"}}', "plain .safetensors name"),
        (b'{"weight_map": {"a": "/etc/s.safetensors"}}', "plain .safetensors name"),
        (b'{"weight_map": {"a": "sub/s.safetensors"}}', "plain .safetensors name"),
        (b'{"weight_map": {"a": "sub\\\\s.safetensors"}}', "plain .safetensors name"),
        (b'{"weight_map": {"a": "pytorch_model.bin"}}', "plain .safetensors name"),
        (b'{"weight_map": {"a": "gone.safetensors"}}', r"gone\.safetensors: missing, but model"),
        (b'{"weight_map": {"b": "s.safetensors"}}', r"s\.safetensors: has no tensor b"),
    ],
)
def test_indexes_that_lie(tmp_path: Path, index: bytes, message: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "s.safetensors")
    (tmp_path / INDEX_FILE).write_bytes(index)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsSource(tmp_path)


def test_an_index_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashvec.runtime.checkpoint.safetensors_files.MAX_INDEX_BYTES", 10)
    write_shards(tmp_path, {"s.safetensors": {"a": torch.ones(1)}})
    with pytest.raises(CheckpointError, match="more than an index can have"):
        SafetensorsSource(tmp_path)


def test_links_may_not_leave_the_folder(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "elsewhere.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / WEIGHTS_FILE).symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(CheckpointError, match="link that leaves the folder"):
        SafetensorsSource(folder)
    with pytest.raises(CheckpointError, match="link that leaves the folder"):
        SafetensorsSource.from_file(folder / WEIGHTS_FILE)


@pytest.mark.parametrize("subfolder", ["", "2_Dense"])
def test_links_into_the_hub_cache_pass(tmp_path: Path, subfolder: str) -> None:
    blobs = tmp_path / "models--a--b" / "blobs"
    folder = tmp_path / "models--a--b" / "snapshots" / "0123abcd" / subfolder
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    save_file({"a": torch.ones(1)}, blobs / "f00d")
    (folder / WEIGHTS_FILE).symlink_to(Path("../" * (3 if subfolder else 2)) / "blobs" / "f00d")
    assert SafetensorsSource(folder).names() == {"a"}
