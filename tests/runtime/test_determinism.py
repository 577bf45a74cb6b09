"""The same text gives the same bits, whatever batch, order and token budget it runs in.

A decoder of SmolLM2's width (its shapes decide what a matrix library does), few layers, 600 texts of 1 to 600
tokens. Every text runs alone once; then random batches must repeat its bits. `make soak` runs 200 batches.
"""

import os
import time

import numpy as np
import pytest
import torch

from flashvec.kernels.backend import has_hardware_bf16
from flashvec.runtime import decoder as decoder_module
from flashvec.runtime import row_counts
from flashvec.runtime.batches import TokenRows
from flashvec.runtime.decoder import Decoder, Layer
from flashvec.runtime.engine import Engine
from flashvec.runtime.program import embedding_program
from flashvec.runtime.spec import DecoderSpec, ModelSpec

NUM_BATCHES = int(os.environ.get("FLASHVEC_SOAK_BATCHES", "6"))
SOAK = NUM_BATCHES > 50
LENGTHS = np.arange(1, 601, dtype=np.int32) if SOAK else np.arange(1, 601, 7, dtype=np.int32)
DTYPES = [torch.float32, *([torch.bfloat16] if has_hardware_bf16(torch.device("cpu")) else [])]
VARIANTS = {
    "bidirectional mean": {},
    "causal last": {"attention": "causal", "pooling": ("last",)},
    "window": {"window": 20},
    "softcap": {"softcap": 5.0},
    "biases": {"has_biases": True},
}


NUM_LAYERS = 1 if SOAK else 2


def decoder(dtype, window=None, softcap=None, num_layers=NUM_LAYERS, has_biases=False):
    D, F, H, G, K, V = 576, 1536, 9, 3, 64, 1000
    spec = DecoderSpec(
        "llama", V, D, F, num_layers, H, G, K, 8192, 1e-5,
        attention_scale=K**-0.5, softcap=softcap, layer_ropes=(0,) * num_layers, layer_windows=(window,) * num_layers,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    def bias(size):
        return draw(size, 1)[:, 0] if has_biases else None

    ones = torch.ones(D)
    qkv_rows = (H + 2 * G) * K
    layers = [
        Layer(ones, draw(qkv_rows, D), bias(qkv_rows), None, None, draw(D, H * K), bias(D), None,
              ones, draw(2 * F, D), bias(2 * F), draw(D, F), bias(D), None)
        for _ in range(num_layers)
    ]  # fmt: skip
    return Decoder(spec, draw(V, D), layers, ones)


def vectors(model, spec, texts, budget):
    out = torch.empty(len(texts), spec.decoder.hidden_size)
    lengths = np.array([len(t) for t in texts], dtype=np.int32)
    spans = np.stack([np.zeros_like(lengths), lengths], 1).astype(np.int64)
    rows = TokenRows(np.concatenate(texts), lengths, spans)
    for ran in Engine(model, graphs=False).run(rows, budget, embedding_program(spec, ())):  # as `Encoder.embed` does
        (out[torch.from_numpy(ran.indices)],) = ran.outputs
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
    started, num_tokens = time.perf_counter(), 0
    for batch in range(num_batches):
        chosen = rng.integers(0, len(texts), rng.integers(1, 301 if SOAK else 60))
        budget = int(rng.choice([64, 500, 1024, 2048, 2048, 5000]))
        together = vectors(model, spec, [texts[i] for i in chosen], budget)
        differing = [
            (len(texts[i]), budget) for i, v in zip(chosen, together, strict=True) if not torch.equal(v, alone[i])
        ]
        assert not differing, f"texts of these lengths got other bits: {differing[:5]}"
        num_tokens += sum(len(texts[i]) for i in chosen)
        if SOAK and (batch + 1) % 10 == 0:
            minutes = (time.perf_counter() - started) / 60
            print(f"{variant}, {dtype}: {batch + 1} of {num_batches} batches, {num_tokens:,} tokens, {minutes:.1f} min")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_with_a_library_that_does_not_agree_with_itself(dtype, monkeypatch):
    """A stand-in for AMX, where bf16 products of 33 to some 900 rows were measured to sum in another order.

    No table knows it: its row counts are measured, and then every batch must run at counts that agree.
    """
    real, plans = torch.nn.functional.linear, set()

    def odd(x, weight, bias=None):
        if 32 < len(x) < 900:
            x, weight = x.flip(1), weight.flip(1)
        return real(x, weight, bias)

    def planned(x, weight, bias, plan):
        plans.add(tuple(plan))
        return torch.cat([odd(part, weight, bias) for part in x.split(plan)])

    monkeypatch.setattr(row_counts, "machine_key", lambda packed: "stand-in")
    monkeypatch.setattr(torch.nn.functional, "linear", odd)
    monkeypatch.setattr(decoder_module, "linear", planned)
    model = decoder(dtype)
    spec = ModelSpec(model.spec, "bidirectional", ("mean",), "hf")
    lengths = [1, 16, 31, 33, 64, 100, 130, 257, 600]
    texts = [np.arange(n, dtype=np.int32) + n % 400 for n in lengths]

    def differing():
        alone = torch.cat([vectors(model, spec, [t], 2048) for t in texts])
        orders = [(texts[:k] + texts[k + 1 :] + [texts[k]], budget) for k in (0, 5) for budget in (64, 300, 5000)]
        return {
            len(text)
            for batch, budget in orders
            for text, vector in zip(batch, vectors(model, spec, batch, budget), strict=True)
            if not torch.equal(vector, alone[lengths.index(len(text))])
        }

    assert not differing()
    counts = {count for plan in plans for count in plan}
    assert not any(32 < count < 900 for count in counts)
    assert {32} < counts and max(counts) >= 900, "the batches met both sides of the gap"
    assert any(len(plan) > 2 for plan in plans)

    monkeypatch.setattr(model.row_counts, "agrees", lambda rows: True)
    assert len(differing()) > 2, "without the plan, the stand-in would be noticed"


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
