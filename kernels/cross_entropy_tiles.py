"""Tiles of linear cross entropy on a GPU: logits of some rows and columns that live in registers alone.

The forward reduces a chunk of columns to one log-sum-exp a row; the backward writes dz of a panel of columns, which
products then read. `kernels/cross_entropy.py` defines what is computed.
"""

import torch
from torch import Tensor

from flashvec.kernels.backend import launch, tl, triton
from flashvec.kernels.panel import GROUP_M, grouped, halves, tile_sizes

CHUNK_V = 1024  # columns that one program of the forward pass reduces: its result is one number a row

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _tanh(x):
    """Within an fp32 rounding of 1, and near 0 of x: the quotient alone would lose small arguments."""
    square = x * x
    small = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    decay = tl.exp2(-2 * 1.4426950408889634 * tl.abs(x))
    large = (1 - decay) / (1 + decay)
    return tl.where(square < 0.04, small, tl.where(x < 0, -large, large))


@triton.jit
def _logits(
    h_ptr, weight_ptr, row, in_r, first, D, V, h_stride, weight_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of products h Wᵀ, fp32, from column `first` on."""
    j = tl.arange(0, BLOCK_N)
    in_v = first + j < V
    h_ptr += row[:, None] * h_stride
    weight_ptr += tl.cast(first, tl.int64) * weight_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        h = tl.load(h_ptr + d[None, :], mask=in_r[:, None] & (d < D)[None, :], other=0.0)
        at = j[None, :] * weight_stride + d[:, None]
        weight = tl.load(weight_ptr + at, mask=in_v[None, :] & (d < D)[:, None], other=0.0)
        acc = tl.dot(h, weight, acc, input_precision="ieee")
    return acc


@triton.jit
def _finished(acc, v, bias_ptr, V, scale, softcap, CAPPED: tl.constexpr):
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    acc *= scale
    if CAPPED:
        acc = softcap * _tanh(acc / softcap)
    return acc


@triton.jit
def _absorb(acc, v, goal, most, total, hit, bias_ptr, V, scale, softcap, CAPPED: tl.constexpr):
    """Add columns `v` to each row's running log-sum-exp, and its target's logit if it is among them."""
    z = _finished(acc, v, bias_ptr, V, scale, softcap, CAPPED)
    hit += tl.sum(tl.where(v[None, :] == goal[:, None], z, 0.0), 1)
    z = tl.where((v < V)[None, :], z * LOG2E, float("-inf"))
    more = tl.maximum(most, tl.max(z, 1))
    safe = tl.where(more == float("-inf"), 0.0, more)
    total = total * tl.exp2(most - safe) + tl.sum(tl.exp2(z - safe[:, None]), 1)
    return more, total, hit


@triton.jit
def _weigh(
    acc, at, first_v, lse, goal, in_r, panel_ptr, panel_stride, bias_ptr, V, scale, softcap, gain,
    CAPPED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Store gain * dz of the panel's columns `at`."""
    v = first_v + at
    z = _finished(acc, v, bias_ptr, V, scale, softcap, CAPPED)
    dz = tl.exp2((z - lse[:, None]) * LOG2E) - (v[None, :] == goal[:, None]).to(tl.float32)
    if CAPPED:
        share = z / softcap
        dz *= 1 - share * share
    dz = tl.where((v < V)[None, :], dz * gain, 0.0)
    to = panel_ptr + tl.arange(0, BLOCK_M)[:, None] * panel_stride + at[None, :]
    tl.store(to, dz.to(panel_ptr.dtype.element_ty), mask=in_r[:, None] & (at < panel_stride)[None, :])


@triton.jit
def _cross_entropy_fwd_kernel(
    h_ptr, weight_ptr, bias_ptr, row_ptr, target_ptr, partial_ptr, hit_ptr,
    T, R, D, V, h_stride, weight_stride, scale, softcap,
    CAPPED: tl.constexpr, CHUNK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of one chunk of columns for a block of rows, and their targets' logits where the chunk holds them."""
    chunk = tl.program_id(1)
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.load(row_ptr + r, mask=r < R, other=-1).to(tl.int64)
    in_r = (row >= 0) & (row < T)
    goal = tl.load(target_ptr + r, mask=r < R, other=-1)
    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total, hit = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for first in range(chunk * CHUNK_V, tl.minimum(V, (chunk + 1) * CHUNK_V), BLOCK_N):
        acc = _logits(
            h_ptr, weight_ptr, row, in_r, first, D, V, h_stride, weight_stride, BLOCK_M, BLOCK_N, BLOCK_K
        )  # fmt: skip
        if BLOCK_N > 128:
            left, right = halves(acc, BLOCK_M, BLOCK_N)
            v = first + tl.arange(0, BLOCK_N // 2)
            most, total, hit = _absorb(left, v, goal, most, total, hit, bias_ptr, V, scale, softcap, CAPPED)
            v += BLOCK_N // 2
            most, total, hit = _absorb(right, v, goal, most, total, hit, bias_ptr, V, scale, softcap, CAPPED)
        else:
            v = first + tl.arange(0, BLOCK_N)
            most, total, hit = _absorb(acc, v, goal, most, total, hit, bias_ptr, V, scale, softcap, CAPPED)
    tl.store(partial_ptr + chunk * R + r, (most + tl.log2(total)) * LN2, mask=r < R)
    held = in_r & (goal >= chunk * CHUNK_V) & (goal < tl.minimum(V, (chunk + 1) * CHUNK_V))
    tl.store(hit_ptr + r, hit, mask=held)


@triton.jit
def _cross_entropy_bwd_kernel(
    h_ptr, weight_ptr, bias_ptr, row_ptr, target_ptr, lse_ptr, panel_ptr,
    T, R, D, V, first_v, h_stride, weight_stride, panel_stride, scale, softcap, gain,
    CAPPED: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of the panel that starts at column `first_v`: gain * dz."""
    tile_r, tile_v = grouped(tl.program_id(0), tl.cdiv(R, BLOCK_M), tl.cdiv(panel_stride, BLOCK_N), GROUP_M)
    r = tile_r * BLOCK_M + tl.arange(0, BLOCK_M)
    in_r = r < R
    row = tl.load(row_ptr + r, mask=in_r, other=-1).to(tl.int64)
    acc = _logits(
        h_ptr, weight_ptr, row, (row >= 0) & (row < T), first_v + tile_v * BLOCK_N, D, V, h_stride, weight_stride,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    lse = tl.load(lse_ptr + r, mask=in_r, other=0.0)
    goal = tl.load(target_ptr + r, mask=in_r, other=-1)
    panel_ptr += (tile_r * BLOCK_M).to(tl.int64) * panel_stride
    if BLOCK_N > 128:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        at = tile_v * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        _weigh(
            left, at, first_v, lse, goal, in_r, panel_ptr, panel_stride, bias_ptr, V, scale, softcap, gain,
            CAPPED, BLOCK_M,
        )  # fmt: skip
        _weigh(
            right, at + BLOCK_N // 2, first_v, lse, goal, in_r, panel_ptr, panel_stride, bias_ptr, V, scale, softcap,
            gain, CAPPED, BLOCK_M,
        )  # fmt: skip
    else:
        at = tile_v * BLOCK_N + tl.arange(0, BLOCK_N)
        _weigh(
            acc, at, first_v, lse, goal, in_r, panel_ptr, panel_stride, bias_ptr, V, scale, softcap, gain,
            CAPPED, BLOCK_M,
        )  # fmt: skip


# --- launches -----------------------------------------------------------------------------------------


def row_losses(
    h: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, bias: Tensor | None, softcap: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of each row, fp32 [R]; NaN where row or target lies outside, and for a row chosen twice."""
    (T, D), V, R = h.shape, weight.shape[0], rows.shape[0]
    tile = tile_sizes(h, temporaries=2 if softcap else 1)
    chunks = -(-V // CHUNK_V)
    partial = h.new_empty(chunks, R, dtype=torch.float32)
    hit = h.new_full((R,), float("nan"), dtype=torch.float32)  # stays so where row or target lies outside
    launch(
        _cross_entropy_fwd_kernel, (-(-R // tile["BLOCK_M"]), chunks),
        h, weight, bias, rows, targets, partial, hit,
        T, R, D, V, h.stride(0), weight.stride(0), scale, softcap,
        CAPPED=softcap > 0, CHUNK_V=CHUNK_V, **tile,
    )  # fmt: skip
    lse = partial.logsumexp(0)
    # Of a row chosen twice only one gradient would be kept: whoever would lose its own gets no number for a loss.
    order, at = torch.arange(R, device=h.device), torch.where((rows >= 0) & (rows < T), rows, T).long()
    kept = order.new_empty(T + 1).index_copy_(0, at, order)[at]
    return torch.where(kept == order, lse - hit, float("nan")), lse


def weights(
    here: slice, h: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, bias: Tensor | None, lse: Tensor,
    softcap: float, scale: float, panel: Tensor, gain: float,
) -> Tensor:  # fmt: skip
    """gain * dz of the columns `here`, written into the panel."""
    (T, D), V, R = h.shape, weight.shape[0], rows.shape[0]
    tile = tile_sizes(h, temporaries=2 if softcap else 1)
    tiles = -(-R // tile["BLOCK_M"]) * -(-panel.shape[1] // tile["BLOCK_N"])
    launch(
        _cross_entropy_bwd_kernel, (tiles,), h, weight, bias, rows, targets, lse, panel,
        T, R, D, V, here.start, h.stride(0), weight.stride(0), panel.stride(0), scale, softcap, gain,
        CAPPED=softcap > 0, GROUP_M=GROUP_M, **tile,
    )  # fmt: skip
    return panel[:, : here.stop - here.start]
