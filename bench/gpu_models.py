"""Models of real shapes with random weights: Hugging Face's own, and our decoder with the same weights.

What a GPU makes of a model's shapes does not depend on what its weights have learned, and a machine without a network
has no others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashvec.runtime.decoder import Decoder
from flashvec.runtime.decoder_loader import DecoderLoader
from flashvec.runtime.families import decoder_spec
from flashvec.runtime.spec import DecoderSpec, ModelSpec

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _sizes(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, head: int, vocabulary: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "vocab_size": vocabulary,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "model_type": "qwen3",
        **_sizes(1024, 3072, 28, 16, 8, 128, 151_936),
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40_960,
    },
    "llama-3-8b": {
        "model_type": "llama",
        **_sizes(4096, 14_336, 32, 32, 8, 128, 128_256),
        "rope_theta": 500_000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        **_sizes(2048, 8192, 16, 32, 8, 64, 128_256),
        "rope_parameters": LLAMA3_ROPE,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131_072,
    },
    "gemma-3-270m": {
        "model_type": "gemma3_text",
        **_sizes(640, 2048, 18, 4, 1, 256, 262_144),
        "sliding_window": 512,
        "query_pre_attn_scalar": 256,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10_000.0,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32_768,
    },
}


@dataclass(frozen=True)
class RandomModel:
    """One model: Hugging Face's module, our spec and our decoder, which holds copies of its weights."""

    name: str
    module: torch.nn.Module
    spec: ModelSpec
    decoder: Decoder


class ModuleSource:
    """A Hugging Face module's parameters as a tensor source."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.tensors = dict(module.state_dict())

    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def place(self, name: str) -> str:
        return "memory"

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def close(self) -> None:
        self.tensors = {}


class _ShapesOnly(DecoderLoader):
    """A decoder without storage: enough to record what it launches."""

    def _read(
        self, names: list[str], rows: list[int], columns: int | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        self.checked.untaken -= set(names)
        tail = () if columns is None else (columns,)
        return torch.empty(sum(rows), *tail, dtype=dtype or self.dtype, device="meta")


def model_spec(config: dict[str, Any]) -> ModelSpec:
    """Bidirectional, mean over all tokens, unit vectors."""
    return ModelSpec(decoder_spec(config, "bidirectional"), "bidirectional", ("mean",), "hf")


def hugging_face(
    config: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
) -> torch.nn.Module:
    """transformers' own model, drawn on the device itself."""
    from transformers import AutoModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kept = {key: value for key, value in config.items() if key != "model_type"}
    hf_config = CONFIG_MAPPING[config["model_type"]](**(kept | {"is_causal": False}))
    torch.manual_seed(0)
    with device:
        return AutoModel.from_config(hf_config, attn_implementation="sdpa", dtype=dtype).eval().requires_grad_(False)


def random_model(name: str, config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> RandomModel:
    """A model and our decoder of it."""
    module, spec = hugging_face(config, device, dtype), model_spec(config)
    decoder = DecoderLoader(spec.decoder, ModuleSource(module), dtype, device).load()
    return RandomModel(name, module, spec, decoder)


def meta_decoder(config: dict[str, Any], dtype: torch.dtype) -> Decoder:
    """Our decoder without storage."""
    meta = torch.device("meta")
    source = ModuleSource(torch.nn.Module())
    return _ShapesOnly(model_spec(config).decoder, source, dtype, meta).load()


def weight_bytes(config: dict[str, Any], element_bytes: int = 2) -> float:
    """Of the embedding and all layers' products."""
    spec = model_spec(config).decoder
    return element_bytes * (spec.num_layers * product_weights(spec) + spec.vocab_size * spec.hidden_size)


def product_weights(spec: DecoderSpec) -> int:
    """Elements of the matrices of one layer."""
    heads = (2 * spec.num_heads + 2 * spec.num_kv_heads) * spec.head_size
    return spec.hidden_size * (heads + 3 * spec.mlp_size)


def flops_of(spec: DecoderSpec, lengths: Sequence[int]) -> float:
    """Useful ones of the forward: products, and attention over each sequence (or its windows)."""
    n = np.asarray(lengths, np.float64)
    total = 2.0 * n.sum() * product_weights(spec) * spec.num_layers
    for window in spec.layer_windows:
        pairs = n * n
        if window is not None:  # less those beyond it, a triangle on each side
            pairs -= np.maximum(n - window - 1, 0) * np.maximum(n - window, 0)
        total += float((4.0 * pairs).sum()) * spec.head_size * spec.num_heads
    return total


def draw_texts(num_tokens: int, mean_length: int, seed: int, vocabulary: int, longest: int = 8192) -> list[np.ndarray]:
    """Token ids of texts with log-normal lengths (sigma 0.6), in no order; a text is never drawn twice."""
    generator = np.random.default_rng(seed)
    texts, total = [], 0
    while total < num_tokens:
        length = int(np.clip(round(generator.lognormal(np.log(mean_length) - 0.18, 0.6)), 1, longest))
        texts.append(generator.integers(3, vocabulary, length, dtype=np.int32))
        total += length
    return texts
