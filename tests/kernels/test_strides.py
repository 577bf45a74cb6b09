"""Tensors of one dimension may lie with any stride: kernels, which read neighbours, get them side by side."""

from functools import partial

import pytest
import torch

from flashvec.kernels.add_rms_norm import add_rms_norm
from flashvec.kernels.attention import Rotation, attention
from flashvec.kernels.cross_entropy import cross_entropy
from flashvec.kernels.dropout import Dropout
from flashvec.kernels.info_nce import info_nce
from flashvec.kernels.lora import lora
from flashvec.kernels.mean_pool import mean_pool
from flashvec.kernels.norm_rope import norm_rope
from flashvec.kernels.rms_norm import rms_norm
from flashvec.kernels.schedule import build_schedule

T, D = 12, 16
DROPOUT = Dropout(0.5, seed=3)


def spread(x):
    """The same values two apart; whoever reads them one apart finds each twice."""
    return x.repeat_interleave(2)[::2]


def norms(device, seen):
    x, y = torch.randn(2, T, D, device=device).requires_grad_()
    weights = [seen(w).requires_grad_() for w in torch.randn(4, D, device=device)]
    tables = torch.rand(2, 3, D // 2, device=device)
    turned = norm_rope(x.view(3, 4, D), *tables, weights[3], 1e-6)
    return sum(map(torch.sum, (rms_norm(x, weights[0], 1e-6), *add_rms_norm(x, y, weights[1], 1e-6,
        post_weight_D=weights[2]), turned))), weights  # fmt: skip


def pooling(device, seen, mode):
    x, delta = torch.randn(2, T, D, device=device).requires_grad_()
    weights = [seen(w).requires_grad_() for w in torch.randn(2, D, device=device)]
    spans = torch.tensor([[0, 5], [2, 12], [7, 8]], device=device)
    first = seen(torch.tensor([2, 5, 1], device=device))
    options = {"mode": mode, "first_weights_S": first, "delta_TD": delta, "post_norm_weight_D": weights[1]}
    return mean_pool(x, spans, weights[0], 1e-6, **options).square().sum(), weights


def contrast(device, seen):
    q, c = torch.randn(3, D, device=device), torch.randn(6, D, device=device).requires_grad_()
    positives, ids = (torch.tensor(x, device=device) for x in ([4, 1, 0], [0, 1, 2, 2, 1, 0]))
    return info_nce(q, c, seen(positives), 0.1, document_ids_M=seen(ids)).sum(), [c]


def prediction(device, seen):
    h, weight, bias = (torch.randn(*size, device=device).requires_grad_() for size in ((T, D), (40, D), (40,)))
    rows, targets = torch.randperm(T, device=device)[:5], torch.randint(0, 40, (5,), device=device)
    return cross_entropy(h, weight, seen(rows), seen(targets), bias_V=seen(bias)), [h, weight, bias]


def low_rank(device, seen):
    x, weight = torch.randn(T, D, device=device), torch.randn(8, D, device=device)
    a, b = torch.randn(1, 2, D, device=device).requires_grad_(), torch.randn(8, 2, device=device).requires_grad_()
    names = {"identities_T": seen(torch.arange(T, device=device)), "positions_T": seen(torch.arange(T, device=device))}
    bias = seen(torch.randn(8, device=device))
    return lora(x, weight, a, b, scales=1.0, bias_N=bias, dropout=DROPOUT, **names).square().sum(), [a, b]


def attended(device, seen, normed):
    q, k, v = torch.randn(3, T, 2, D, device=device)
    identities = seen(torch.arange(3, dtype=torch.int32))
    schedule = build_schedule([3, 4, 5], device=device, identities=identities)
    v.requires_grad_(not normed)
    weights = [seen(w) for w in torch.randn(2, D, device=device)] if normed else [None, None]
    rotation = Rotation(*torch.rand(2, T, D // 2, device=device), *weights, norm_eps=1e-6)
    out = attention(q, k, v, schedule, scale=0.3, rotation=rotation, dropout=None if normed else DROPOUT)
    return out.square().sum(), [] if normed else [v]


RUNS = {
    "norms": norms,
    **{f"mean_pool {mode}": partial(pooling, mode=mode) for mode in ("mean", "weighted_mean")},
    "info_nce": contrast,
    "cross_entropy": prediction,
    "lora": low_rank,
    "attention": partial(attended, normed=False),
    "attention with head norms": partial(attended, normed=True),
}


@pytest.mark.parametrize("run", RUNS)
def test_kernels_find_what_lies_apart(run, device, interpreted):
    found = []
    for seen in (torch.clone, spread):
        torch.manual_seed(0)
        out, leaves = RUNS[run](device, seen)
        found.append([out.detach(), *(torch.autograd.grad(out, leaves) if leaves else ())])
    for together, apart in zip(*found, strict=True):
        assert torch.equal(together, apart)
