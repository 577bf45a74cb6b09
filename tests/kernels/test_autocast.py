"""Under autocast every op runs as it is given, forward and backward: the bits are those without it."""

import pytest
import torch
from gradients import outputs_and_gradients
from torch import Tensor

from flashvec.kernels.add_rms_norm import add_rms_norm
from flashvec.kernels.attention import Rotation, attention, attention_reference
from flashvec.kernels.cross_entropy import cross_entropy
from flashvec.kernels.dropout import Dropout
from flashvec.kernels.info_nce import info_nce
from flashvec.kernels.linear import linear
from flashvec.kernels.lora import lora
from flashvec.kernels.mean_pool import mean_pool
from flashvec.kernels.norm_rope import norm_rope
from flashvec.kernels.rms_norm import rms_norm
from flashvec.kernels.rope import Rope, rope, rope_table
from flashvec.kernels.schedule import build_schedule
from flashvec.kernels.swiglu import swiglu

LENGTHS = [5, 1, 9]
T, H, G, K, D = sum(LENGTHS), 4, 2, 16, 32
HEADS = [(T, H, K), (T, G, K), (T, G, K)]


def attend(q, k, v, **options):
    schedule = build_schedule(LENGTHS, device=q.device, identities=range(len(LENGTHS)))
    return attention(q, k, v, schedule, scale=0.25, **options)


def tables(x: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = rope_table(Rope(), K, T)
    return cos.to(x.device), sin.to(x.device)


def rows(x):
    return torch.arange(6, device=x.device)


def spans(x):
    return torch.tensor([[0, 5], [4, 15]], device=x.device)


OPS = {  # an op of its leaves, and their sizes
    "attention": (attend, HEADS),
    "attention causal": (lambda *x: attend(*x, causal=True), HEADS),
    "attention soft-cap window": (lambda *x: attend(*x, softcap=5.0, window=3), HEADS),
    "attention dropout": (lambda *x: attend(*x, dropout=Dropout(0.25, 1)), HEADS),
    "attention rotation": (lambda *x: attend(*x, rotation=Rotation(*tables(x[0]))), HEADS),
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-6), [(T, D), (D,)]),
    "add_rms_norm": (lambda h, y, w, p: add_rms_norm(h, y, w, 1e-6, post_weight_D=p), [(T, D), (T, D), (D,), (D,)]),
    "rope": (lambda x: rope(x, *tables(x)), [(T, H, K)]),
    "norm_rope": (lambda x, w: norm_rope(x, *tables(x), w, 1e-6), [(T, H, K), (K,)]),
    "swiglu": (swiglu, [(T, D)]),
    "mean_pool": (lambda x, w: mean_pool(x, spans(x), w, 1e-6), [(T, D), (D,)]),
    "lora": (lambda x, a, b: lora(x, torch.ones(24, D).to(x), a, b, scales=2.0), [(T, D), (1, 4, D), (24, 4)]),
    "cross_entropy": (lambda h, w: cross_entropy(h, w, rows(h), rows(h)), [(T, D), (40, D)]),
    "info_nce": (lambda q, c: info_nce(q, c, rows(q), 0.05), [(6, D), (9, D)]),
}


def with_and_without(op, leaves):
    plain = outputs_and_gradients(op, leaves)
    with torch.autocast(leaves[0].device.type, torch.bfloat16):
        return zip(outputs_and_gradients(op, leaves), plain, strict=True)


@pytest.mark.parametrize("name", OPS)
def test_same_bits(name, device):
    op, sizes = OPS[name]
    leaves = [torch.randn(size, device=device) for size in sizes]
    for got, plain in with_and_without(op, leaves):
        assert got.dtype == plain.dtype and torch.equal(got, plain)
    with torch.autocast(device, torch.bfloat16), torch.no_grad():
        got = op(*leaves)
    with torch.no_grad():
        torch.testing.assert_close(got, op(*leaves), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["attention rotation", "lora", "cross_entropy", "info_nce"])
def test_same_bits_of_kernels(name, device, interpreted):
    op, sizes = OPS[name]
    for got, plain in with_and_without(op, [torch.randn(size, device=device) for size in sizes]):
        assert got.dtype == plain.dtype and torch.equal(got, plain)


@pytest.mark.parametrize("plan", [None, (5, 10)], ids=str)
def test_linear(plan, device):
    x, w = torch.randn(T, D, device=device), torch.randn(D, D, device=device)
    with torch.autocast(device, torch.bfloat16):
        got = linear(x_TC=x, weight_NC=w, row_plan=plan)
    assert torch.equal(got, linear(x, w, None, plan))
    assert linear(x.to("meta"), w.to("meta"), None, plan).shape == (T, D)  # as launches are recorded


def test_the_reference_of_attention(device):
    q, k, v = (torch.randn(size, device=device) for size in HEADS)
    schedule = build_schedule(LENGTHS, device=device)
    with torch.autocast(device, torch.bfloat16):
        got = attention_reference(q, k, v, schedule, scale=0.25)
    torch.testing.assert_close(got, attention_reference(q, k, v, schedule, scale=0.25), rtol=0, atol=0)
