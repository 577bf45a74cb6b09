"""Metadata of GGUF files as a Hugging Face configuration, and as the decoder that it makes."""

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_samples import (
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    MLP,
    VOCAB,
    head_size,
    hf_tensors,
    is_gemma,
    override,
    with_metadata,
    write_gguf,
)

from flashvec.kernels.rope import Rope, rope_frequencies
from flashvec.runtime.checkpoint.gguf import GGUFSource
from flashvec.runtime.checkpoint.gguf_config import ARCHITECTURES, gguf_config
from flashvec.runtime.checkpoint.source import CheckpointError
from flashvec.runtime.families import decoder_spec


def config_of(path: Path, architecture: str, tensors: dict[str, torch.Tensor] | None = None, **values: Any) -> Any:
    tensors = hf_tensors(architecture) | (tensors or {})
    return gguf_config(write_gguf(path / "m.gguf", architecture, tensors, add=with_metadata(**values)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_a_decoder(tmp_path: Path, architecture: str) -> None:
    extra: dict[str, Any] = {}
    if architecture == "mistral3":
        extra = {"rope__scaling__type": "yarn", "rope__scaling__original_context_length": 128}
        extra |= {"rope__scaling__factor": 4.0, "rope__scaling__yarn_log_multiplier": 1.0}
        extra |= {"attention__temperature_scale": 0.2, "rope__freq_base": 1e6}
    config = config_of(tmp_path, architecture, **extra)
    spec = decoder_spec(config, "bidirectional")
    sizes = (spec.vocab_size, spec.hidden_size, spec.mlp_size, spec.num_layers, spec.num_heads, spec.num_kv_heads)
    assert sizes == (VOCAB, HIDDEN, MLP, LAYERS, HEADS, KV_HEADS)
    assert spec.head_size == head_size(architecture)
    assert spec.norm_eps == 1e-6
    assert spec.max_positions == 512
    assert spec.activation == ("gelu_tanh" if is_gemma(architecture) else "silu")
    assert config["_gguf_causal"] is (False if architecture in ("llama-embed", "gemma-embedding") else None)
    if architecture == "mistral3":
        assert spec.query_scale_beta == pytest.approx(0.2)
        assert spec.query_scale_positions == 128
        assert spec.ropes == (Rope(1e6, "yarn", 4.0, original_max_positions=128),)


def test_gemma_2(tmp_path: Path) -> None:
    config = config_of(tmp_path, "gemma2", attn_logit_softcapping=20.0)
    assert config["attn_logit_softcapping"] == 20.0
    assert config["final_logit_softcapping"] == 30.0
    assert config["layer_types"] == ["sliding_attention", "full_attention"]
    assert config["query_pre_attn_scalar"] == 256


def test_gemma_3(tmp_path: Path) -> None:
    config = config_of(tmp_path, "gemma3", rope__freq_base=1e6, block_count=7, rope__scaling__factor=8.0)
    assert config["layer_types"] == ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    ropes = decoder_spec(config, "causal").ropes
    assert ropes == (Rope(1e6, "linear", 8.0), Rope(1e4))


@pytest.mark.parametrize(("architecture", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_27b_gemmas_scale_scores_by_width(tmp_path: Path, architecture: str, layers: int) -> None:
    assert config_of(tmp_path, architecture, block_count=layers)["query_pre_attn_scalar"] == HIDDEN // HEADS


@pytest.mark.parametrize(
    ("pattern", "expected"), [(1, ["full", "full"]), ([False, True], ["full", "sliding"]), (2, ["sliding", "full"])]
)
def test_window_pattern_in_the_file(tmp_path: Path, pattern: Any, expected: list[str]) -> None:
    config = config_of(tmp_path, "gemma3", attention__sliding_window_pattern=pattern)
    assert config["layer_types"] == [f"{kind}_attention" for kind in expected]


def test_embedding_gemma(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_pooling_type(gguf.PoolingType.MEAN)
        for name in ("dense_2.weight", "dense_3.weight"):
            writer.add_tensor(name, np.ones((32, 64), np.float32))

    path = write_gguf(tmp_path / "m.gguf", "gemma-embedding", hf_tensors("gemma-embedding"), add=add)
    config = gguf_config(path)
    assert (config["_gguf_causal"], config["_gguf_pooling"]) == (False, "mean")
    assert config["_gguf_dense"] == ["dense_2.weight", "dense_3.weight"]
    assert GGUFSource(path).read("dense_2.weight").shape == (32, 64)
    assert decoder_spec(config, "bidirectional").layer_windows == (8, 8)  # half of the window to each side


@pytest.mark.parametrize("causal", [True, False, None])
@pytest.mark.parametrize(("pooling", "name"), [(0, None), (1, "mean"), (2, "cls"), (3, "last"), (4, None)])
def test_direction_and_pooling(tmp_path: Path, causal: bool | None, pooling: int, name: str | None) -> None:
    """One that states its pooling and no direction is causal, as llama.cpp reads it; a plain decoder states neither."""
    stated = True if causal is None and name is not None else causal
    extra: dict[str, Any] = {} if causal is None else {"attention__causal": causal}
    config = config_of(tmp_path, "qwen3", pooling_type=pooling, **extra)
    assert (config["_gguf_causal"], config["_gguf_pooling"]) == (stated, name)
    assert config.get("is_causal") is stated


def rope_freqs(rope: Rope, size: int) -> dict[str, torch.Tensor]:
    """llama.cpp's tensor for a stretched table: how many times slower each plane turns."""
    factors = rope_frequencies(Rope(rope.theta), size) / rope_frequencies(rope, size)
    return {"rope_freqs.weight": factors.float()}


LLAMA3 = Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(
    "rope", [LLAMA3, Rope(5e5, "llama3", 32.0, 1.0, 4.0, 8192), Rope(1e4, "llama3", 4.0, 1.0, 3.0, 2048)]
)
def test_llama_3_rule_from_its_factors(tmp_path: Path, size: int, rope: Rope) -> None:
    extra = {"attention__key_length": size, "attention__value_length": size, "rope__freq_base": rope.theta}
    config = llama_with_rope(tmp_path, rope_freqs(rope, size), extra)
    (found,) = decoder_spec(config, "causal").ropes
    assert found.original_max_positions == rope.original_max_positions
    torch.testing.assert_close(rope_frequencies(found, size), rope_frequencies(rope, size), rtol=1e-4, atol=0)


def test_an_equivalent_rule_is_as_good(tmp_path: Path) -> None:
    rope = Rope(5e5, "llama3", 8.0, 2.0, 8.0, 32768)
    extra = {"attention__key_length": 128, "attention__value_length": 128, "rope__freq_base": rope.theta}
    (found,) = decoder_spec(llama_with_rope(tmp_path, rope_freqs(rope, 128), extra), "causal").ropes
    assert found.original_max_positions == 16384
    torch.testing.assert_close(rope_frequencies(found, 128), rope_frequencies(rope, 128), rtol=1e-4, atol=0)


def llama_with_rope(folder: Path, rope: dict[str, torch.Tensor], extra: dict[str, Any]) -> dict[str, Any]:
    path = folder / "m.gguf"
    return gguf_config(write_gguf(path, "qwen3", hf_tensors("qwen3") | rope, add=override(extra)))


def test_factors_without_a_rule_are_given(tmp_path: Path) -> None:
    factors = [1.0, 3.0, 2.0, 5.0, 1.0, 4.0, 9.0, 2.0]
    config = config_of(tmp_path, "llama", {"rope_freqs.weight": torch.tensor(factors)})
    assert config["rope_factors"] == factors
    assert "rope_scaling" not in config
    assert "rope_freqs.weight" not in GGUFSource(tmp_path / "m.gguf").names()


def test_factors_of_one_change_nothing(tmp_path: Path) -> None:
    config = config_of(tmp_path, "llama", {"rope_freqs.weight": torch.ones(8)})
    assert not {"rope_factors", "rope_scaling"} & set(config)


def test_heads_given_per_layer(tmp_path: Path) -> None:
    same = override({"attention__head_count": [HEADS, HEADS]})
    path = write_gguf(tmp_path / "m.gguf", "llama", hf_tensors("llama"), add=same)
    assert gguf_config(path)["num_attention_heads"] == HEADS
    differing = override({"attention__head_count": [HEADS, 2]})
    path = write_gguf(tmp_path / "m.gguf", "llama", hf_tensors("llama"), add=differing)
    with pytest.raises(CheckpointError, match="one number for all layers"):
        gguf_config(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_count": 1001}, r"llama\.block_count is 1001; expected a whole number from 1 to 1000"),
        ({"block_count": 0}, r"llama\.block_count is 0"),
        ({"embedding_length": 2**24 + 1}, r"llama\.embedding_length"),
        ({"embedding_length": "64"}, r"llama\.embedding_length is '64'"),
        ({"feed_forward_length": True}, r"llama\.feed_forward_length is True"),
        ({"attention__head_count": 0}, r"llama\.attention\.head_count is 0"),
        ({"attention__layer_norm_rms_epsilon": math.nan}, r"layer_norm_rms_epsilon is nan"),
        ({"attention__value_length": 8}, "keys and values differ"),
        ({"rope__dimension_count": 8}, "8 of 16 head dimensions rotate"),
        ({"rope__freq_base": -1.0}, r"rope\.freq_base is -1"),
        ({"rope__freq_base": math.inf}, r"rope\.freq_base is inf"),
        ({"rope__scaling__type": "longrope"}, "none, linear or yarn"),
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0}, "original_context_length is None"),
        ({"expert_count": 8}, "mixture of experts"),
        ({"pooling_type": 9}, r"pooling_type is 9"),
        ({"attention__causal": 1}, r"attention\.causal is 1"),
        ({"tokenizer__ggml__bos_token_id": VOCAB}, r"bos_token_id is 48, the vocabulary has 48"),
    ],
)
def test_metadata_out_of_bounds(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", hf_tensors("llama"), add=override(values))
    with pytest.raises(CheckpointError, match=message):
        gguf_config(path)
