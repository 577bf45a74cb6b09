"""The same text gives the same bits, whatever batch, order and token budget it runs in.

A decoder of SmolLM2's width (its shapes decide what a matrix library does), few layers, 600 texts of 1 to 600
tokens. Every text runs alone once; then random batches must repeat its bits. `make soak` runs 200 batches.
"""

import os

import numpy as np
import pytest
import torch

from flashvec.kernels.backend import has_hardware_bf16
from flashvec.runtime import decoder as decoder_module
from flashvec.runtime import engine
from flashvec.runtime.decoder import Decoder, Layer
from flashvec.runtime.pooling import finish, pool
from flashvec.runtime.spec import DecoderSpec, ModelSpec

NUM_BATCHES = int(os.environ.get("FLASHVEC_SOAK_BATCHES", "6"))
LENGTHS = np.arange(1, 601, dtype=np.int32) if NUM_BATCHES > 50 else np.arange(1, 601, 7, dtype=np.int32)
DTYPES = [torch.float32, *([torch.bfloat16] if has_hardware_bf16(torch.device("cpu")) else [])]
VARIANTS = {
    "bidirectional mean": {},
    "causal last": {"attention": "causal", "pooling": ("last",)},
    "window": {"window": 20},
    "softcap": {"softcap": 5.0},
}


NUM_LAYERS = 1 if NUM_BATCHES > 50 else 2


def decoder(dtype, window=None, softcap=None, num_layers=NUM_LAYERS):
    D, F, H, G, K, V = 576, 1536, 9, 3, 64, 1000
    spec = DecoderSpec(
        "llama", V, D, F, num_layers, H, G, K, 8192, 1e-5,
        attention_scale=K**-0.5, softcap=softcap, layer_ropes=(0,) * num_layers, layer_windows=(window,) * num_layers,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    ones = torch.ones(D)
    layers = [
        Layer(ones, draw((H + 2 * G) * K, D), None, None, None, draw(D, H * K), None, None,
              ones, draw(2 * F, D), None, draw(D, F), None, None)
        for _ in range(num_layers)
    ]  # fmt: skip
    return Decoder(spec, draw(V, D), layers, ones)


def vectors(model, spec, texts, budget):
    out = torch.empty(len(texts), spec.decoder.hidden_size)
    lengths = np.array([len(t) for t in texts], dtype=np.int32)
    for done in engine.run(model, np.concatenate(texts), lengths, budget, spec.attention == "causal"):
        spans = torch.from_numpy(np.stack([np.zeros_like(lengths), lengths], 1)[done.indices].astype(np.int64))
        out[torch.from_numpy(done.indices)] = finish(spec, pool(spec, model, done, spans), (), None, None)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_bits_in_every_batch(variant, dtype):
    settings = dict(VARIANTS[variant])
    spec_settings = {k: settings.pop(k) for k in ("attention", "pooling") if k in settings}
    model = decoder(dtype, **settings)
    spec = ModelSpec(model.spec, **{"attention": "bidirectional", "pooling": ("mean",), **spec_settings}, layout="hf")
    rng = np.random.default_rng(0)
    lengths = LENGTHS if variant == "bidirectional mean" else LENGTHS[::5]
    texts = [rng.integers(0, model.spec.vocab_size, n, dtype=np.int32) for n in lengths]
    alone = torch.cat([vectors(model, spec, [t], 2048) for t in texts])
    assert alone.isfinite().all()

    num_batches = NUM_BATCHES if variant == "bidirectional mean" else max(2, NUM_BATCHES // 10)
    for _ in range(num_batches):
        chosen = rng.integers(0, len(texts), rng.integers(1, 301 if NUM_BATCHES > 50 else 60))
        budget = int(rng.choice([64, 500, 1024, 2048, 2048, 5000]))
        together = vectors(model, spec, [texts[i] for i in chosen], budget)
        differing = [
            (len(texts[i]), budget) for i, v in zip(chosen, together, strict=True) if not torch.equal(v, alone[i])
        ]
        assert not differing, f"texts of these lengths got other bits: {differing[:5]}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_would_notice_a_library_that_sums_in_another_order(dtype, monkeypatch):
    """The test's own power: products that add up backwards below 300 rows are reported."""

    def odd(x, weight, bias, plan):
        if len(x) < 300:
            x, weight = x.flip(1), weight.flip(1)
        return torch.nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(decoder_module, "linear", odd)
    model = decoder(dtype)
    spec = ModelSpec(model.spec, "bidirectional", ("mean",), "hf")
    text, others = np.arange(130, dtype=np.int32), [np.arange(100, dtype=np.int32)] * 5
    alone, together = vectors(model, spec, [text], 2048)[0], vectors(model, spec, [text, *others], 2048)[0]
    assert not torch.equal(alone, together)
