"""Tensors of GGUF files, read back as Hugging Face's weights, and against transformers' own reading of them."""

import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_samples import HIDDEN, VOCAB, hf_tensors, is_gemma, override, write_gguf

from flashvec.runtime.checkpoint.gguf import GGUFSource
from flashvec.runtime.checkpoint.gguf_config import ARCHITECTURES, gguf_config
from flashvec.runtime.checkpoint.gguf_tokenizer import gguf_tokenizer
from flashvec.runtime.checkpoint.source import CheckpointError

IN_TRANSFORMERS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")


def as_stored(tensor: torch.Tensor, kind: Kind) -> torch.Tensor:
    """What is left of a weight after storage; blocks lie along rows, so moving rows changes nothing."""
    if tensor.ndim != 2:
        return tensor
    if kind in (Kind.F16, Kind.BF16):
        return tensor.to(torch.float16 if kind == Kind.F16 else torch.bfloat16)
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), kind), kind))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_1], ids=lambda kind: kind.name)
def test_tensors_come_back(tmp_path: Path, architecture: str, kind: Kind) -> None:
    tensors = hf_tensors(architecture)
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", architecture, tensors, kind))
    assert source.names() == set(tensors)
    for name, tensor in tensors.items():
        expected = as_stored(tensor, kind)
        if is_gemma(architecture) and name.endswith("norm.weight"):
            expected = (tensor + 1) - 1  # the converter's rounding
        read = source.read(name)
        assert source.shape(name) == read.shape == tensor.shape
        assert read.dtype == expected.dtype
        assert torch.equal(read, expected), name
    source.close()
    assert torch.equal(source.read("norm.weight"), source.read("norm.weight"))  # and a read after close maps again


def hf_model(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    """transformers' decoder of a config.json with these weights."""
    from transformers import AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kept = {k: v for k, v in config.items() if not k.startswith("_") and k != "model_type"}
    model = AutoModel.from_config(CONFIG_MAPPING[config["model_type"]](**kept)).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items() if name != "lm_head.weight"})
    return model


@pytest.mark.parametrize("architecture", IN_TRANSFORMERS)
def test_weights_and_configuration_agree_with_transformers(tmp_path: Path, architecture: str) -> None:
    from transformers import AutoModelForCausalLM

    tensors = hf_tensors(architecture) | {"lm_head.weight": torch.randn(VOCAB, HIDDEN)}
    if is_gemma(architecture):  # always tied there
        del tensors["lm_head.weight"]
    path = write_gguf(tmp_path / "m.gguf", architecture, tensors, Kind.Q8_0)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    source = GGUFSource(path)
    ours = {name: source.read(name) for name in source.names()}
    state = {name.removeprefix("model."): tensor for name, tensor in theirs.state_dict().items()}
    assert set(state) - {"lm_head.weight"} == set(ours) - {"lm_head.weight"}
    for name, tensor in ours.items():
        assert torch.equal(tensor, state[name]), name

    config = gguf_config(path)
    assert config["tie_word_embeddings"] == ("lm_head.weight" not in tensors)
    ids = torch.arange(40)[None] % VOCAB  # past the sliding window
    with torch.no_grad():
        expected = theirs.model(ids).last_hidden_state
        torch.testing.assert_close(hf_model(config, ours)(ids).last_hidden_state, expected)


def test_chunks_of_a_large_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashvec.runtime.checkpoint.gguf.CHUNK", 320)  # divides no tensor
    tensors = hf_tensors("llama")
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", "llama", tensors, Kind.Q8_0))
    for name, tensor in tensors.items():
        assert torch.equal(source.read(name), as_stored(tensor, Kind.Q8_0))


def test_dequantising_needs_little_beside_the_tensor(tmp_path: Path) -> None:
    tensors = hf_tensors("llama") | {"embed_tokens.weight": torch.ones(2**17, HIDDEN)}  # 32 MiB in fp32
    source = GGUFSource(write_gguf(tmp_path / "m.gguf", "llama", tensors, Kind.Q4_1))
    tracemalloc.start()  # sees numpy's temporaries, not torch's result
    try:
        assert source.read("embed_tokens.weight").shape == (2**17, HIDDEN)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 24 * 2**20


def test_biases_of_permuted_heads(tmp_path: Path) -> None:
    bias = {f"layers.0.self_attn.{name}_proj.bias": torch.randn(size) for name, size in (("q", 64), ("k", 32))}
    path = write_gguf(tmp_path / "m.gguf", "llama", hf_tensors("llama") | bias)
    source = GGUFSource(path)
    for name, tensor in bias.items():
        assert torch.equal(source.read(name), tensor)
    assert gguf_config(path)["attention_bias"] is True


def test_unknown_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "falcon")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for read in (GGUFSource, gguf_config, gguf_tokenizer):
        with pytest.raises(CheckpointError, match=r"general\.architecture is 'falcon'; known are llama, "):
            read(tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["blk.0.ffn_gate_exps.weight", "blk.0.attn_qkv.weight", "blk.00.attn_q.weight", "x"])
def test_tensors_without_a_place(tmp_path: Path, name: str) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor(name, np.ones((2, 2), np.float32))

    path = write_gguf(tmp_path / "m.gguf", "llama", hf_tensors("llama"), add=add)
    with pytest.raises(CheckpointError, match=f"tensor {name} has no place in a llama decoder"):
        GGUFSource(path)


def test_types_that_are_no_weights(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("output.weight", np.ones((2, 2), np.int8))

    path = write_gguf(tmp_path / "m.gguf", "llama", hf_tensors("llama"), add=add)
    with pytest.raises(CheckpointError, match=r"output\.weight has type I8"):
        GGUFSource(path)


def test_heads_that_do_not_divide_the_rows(tmp_path: Path) -> None:
    add = override({"attention__head_count": 5})
    path = write_gguf(tmp_path / "m.gguf", "llama", hf_tensors("llama"), add=add)
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q\.weight has 64 rows for 5 heads"):
        GGUFSource(path)
