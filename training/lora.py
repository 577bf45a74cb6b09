"""Low-rank updates of a packed decoder as trainable parameters, under PEFT's names.

The decoder multiplies query, key and value by one merged weight, gate and up by another. An update is stored as the
kernel reads it: A stacked over the projections of one product, B under one another. A projection that is no target has
factor 0: its share of the update is zero, and so is its gradient.

Masters are fp32 whatever the decoder runs in; the kernel computes in the decoder's dtype and sums gradients in fp32.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from flashvec.runtime.decoder import Decoder, LayerLora, LoraPair
from flashvec.runtime.spec import DecoderSpec
from flashvec.training.config import LoraConfig

PRODUCTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def product_splits(spec: DecoderSpec) -> dict[str, list[int]]:
    """Rows of each projection in the merged weights."""
    query, kv = spec.num_heads * spec.head_size, spec.num_kv_heads * spec.head_size
    return {
        "qkv": [query, kv, kv],
        "out": [spec.hidden_size],
        "gate_up": [spec.mlp_size] * 2,
        "down": [spec.hidden_size],
    }


class Lora:
    """The updates of every layer: leaves that want gradients.

    A is drawn as PEFT draws it (uniform within 1 / sqrt(inputs)), B is zero: at the start nothing is changed.
    """

    def __init__(self, decoder: Decoder, config: LoraConfig, seed: int) -> None:
        self.config, self.spec = config, decoder.spec
        self.splits = product_splits(decoder.spec)
        scale = config.alpha / (math.sqrt(config.r) if config.rslora else config.r)
        generator = torch.Generator().manual_seed(seed)
        self._layers: list[dict[str, LoraPair]] = []
        self._num_trained = len(decoder.layers)
        for layer in decoder.layers:
            pairs = {}
            for product, names in PRODUCTS.items():
                chosen = [name.split(".")[1] in config.targets for name in names]
                if not any(chosen):
                    continue
                weight = getattr(layer, product)
                outputs, inputs = weight.shape
                a = torch.rand(len(names), config.r, inputs, generator=generator).mul_(2).sub_(1).div_(inputs**0.5)
                a_PRC = a.to(decoder.device).requires_grad_()
                b_NR = torch.zeros(outputs, config.r, device=decoder.device).requires_grad_()
                pairs[product] = LoraPair(a_PRC, b_NR, tuple(scale * is_chosen for is_chosen in chosen))
            self._layers.append(pairs)

    def layers(self) -> Sequence[LayerLora]:
        """What `Training` takes."""
        return [LayerLora(**pairs) for pairs in self._layers]

    def parameters(self) -> dict[str, Tensor]:
        """The leaves that are trained, by name: layers.0.qkv.a and so on."""
        found = {}
        for index, pairs in enumerate(self._layers[: self._num_trained]):
            for product, pair in pairs.items():
                found[f"layers.{index}.{product}.a"] = pair.a_PRC
                found[f"layers.{index}.{product}.b"] = pair.b_NR
        return found

    def matrices(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """For each target: its module (layers.0.self_attn.q_proj), A [r, inputs] and B [outputs, r], as views."""
        for index, pairs in enumerate(self._layers):
            for product, pair in pairs.items():
                parts = pair.b_NR.detach().split(self.splits[product])
                for p, (name, b_nR) in enumerate(zip(PRODUCTS[product], parts, strict=True)):
                    if pair.scales[p]:
                        yield f"layers.{index}.{name}", pair.a_PRC.detach()[p], b_nR

    def freeze_after(self, num_layers: int) -> None:
        """Train the first layers alone; updates of those behind stay as they are, and stay part of what is saved."""
        self._num_trained = num_layers
        for pairs in self._layers[num_layers:]:
            for pair in pairs.values():
                pair.a_PRC.requires_grad_(False)
                pair.b_NR.requires_grad_(False)

    def untouched(self) -> list[str]:
        """Trained targets whose B is still zero: after a step none should be."""
        frozen = tuple(f"layers.{index}." for index in range(self._num_trained, len(self._layers)))
        return [name for name, _, b_nR in self.matrices() if not name.startswith(frozen) and not bool(b_nR.any())]
