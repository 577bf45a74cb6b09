"""Backward of `mean_pool`: from the gradient of pooled vectors, before normalisation, to that of the residual stream.

    a[t] = sum over spans s with t: weight(t, s) / total(s) * dpooled[s]
    g[t] = a[t] * norm_weight
    dx[t] = r (g[t] - x[t] r mean(g[t] x[t] r))         dnorm_weight = sum over t of a[t] x[t] r

Shape letters: T = packed tokens, D = hidden size, S = spans. Memory-bound: reads x (and delta) in the rows that a span
has, writes dx in all. The normed rows are computed again, never stored.

One program per row, or few short ones, gathers from the spans that hold it, in the order of the spans: nothing is added
atomically, and a row's gradient depends on its own spans alone. To find them it looks at all S spans, SPANS at a time,
two loads and a minimum: once for a batch of 200 texts, 64 times for 16,384 spans of a token each. Then it takes a step
for each span that holds one of its rows.
"""

import torch
from torch import Tensor

from flashvec.kernels.backend import define_op, launch, tl, triton
from flashvec.kernels.pool_spans import first_weight, row_weight, span_rows, span_total
from flashvec.kernels.rms_norm import (
    backward_grid,
    inverse_rms,
    load_weight,
    norm_grad,
    register_limit,
    row_tile,
    summed,
)

SPANS = 256  # looked at in one step: two a thread in the narrowest form, most batches in one step
TILE = 1024  # elements of a program, at least: rows of one program share few spans
PER_THREAD = 8  # elements: up to seven fp32 arrays are held


@triton.jit
def _gathered(
    dpooled_ptr,
    spans_ptr,
    first_ptr,
    at,
    S,
    CUT: tl.constexpr,
    MODE: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    SPANS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """a[t] for ROWS rows from `at` on, and which of them a span holds."""
    row = at + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    gathered = tl.zeros((ROWS, BLOCK_D), tl.float32)
    is_held = row < 0
    for base in range(0, S, SPANS):
        spans = base + tl.arange(0, SPANS)
        start, stop = span_rows(spans_ptr, spans, S, MODE)
        is_hit = (start < at + ROWS) & (stop > at)
        s = tl.min(tl.where(is_hit, spans, S), 0)
        while s < S:
            begin, end = span_rows(spans_ptr, s, S, MODE)
            first = first_weight(first_ptr, s, HAS_FIRST)
            inside = (row >= begin) & (row < end)
            share = row_weight(row - begin, first, MODE) / span_total(end - begin, first, MODE)
            dpooled = tl.load(dpooled_ptr + s.to(tl.int64) * CUT + d, mask=d < CUT, other=0.0)
            gathered += tl.where(inside, share, 0.0)[:, None] * dpooled[None, :]
            is_held = is_held | inside
            s = tl.min(tl.where(is_hit & (spans > s), spans, S), 0)
    return gathered, is_held


@triton.jit
def _mean_pool_bwd_kernel(
    dpooled_ptr,
    x_ptr,
    delta_ptr,
    post_ptr,
    weight_ptr,
    spans_ptr,
    first_ptr,
    dx_ptr,
    ddelta_ptr,
    partial_ptr,
    post_partial_ptr,
    T,
    S,
    x_stride,
    delta_stride,
    steps,
    eps,
    offset,
    D: tl.constexpr,
    CUT: tl.constexpr,
    MODE: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    HAS_POST: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_DDELTA: tl.constexpr,
    HAS_DPOST: tl.constexpr,
    HAS_DWEIGHT: tl.constexpr,
    SPANS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`steps` tiles of rows, one after the other; their sums for the weights' gradients go to the program's own row."""
    program = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    dweight = tl.zeros((ROWS, BLOCK_D), tl.float32)
    dpost = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for step in range(steps):
        at = (program * steps + step).to(tl.int64) * ROWS
        row = at + tl.arange(0, ROWS)
        dx, is_held = _gathered(dpooled_ptr, spans_ptr, first_ptr, at, S, CUT, MODE, HAS_FIRST, SPANS, ROWS, BLOCK_D)
        inside = is_held[:, None] & (d < D)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
        if HAS_DELTA:
            y = tl.load(delta_ptr + row[:, None] * delta_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
            if HAS_POST:
                post_inverse = inverse_rms(y, is_held, eps, D)
                y *= post_inverse[:, None]
                x += y * load_weight(post_ptr, offset, d, D)
            else:
                x += y
        inverse = inverse_rms(x, is_held, eps, D)
        x *= inverse[:, None]
        if HAS_DWEIGHT:
            dweight += dx * x
        dx = norm_grad(dx * load_weight(weight_ptr, offset, d, D), x, inverse, D)
        own = row[:, None] * D + d[None, :]
        exists = (row < T)[:, None] & (d < D)[None, :]
        tl.store(dx_ptr + own, dx.to(dx_ptr.dtype.element_ty), mask=exists)
        if HAS_POST:
            if HAS_DPOST:
                dpost += dx * y
            dx = norm_grad(dx * load_weight(post_ptr, offset, d, D), y, post_inverse, D)
        if HAS_DDELTA:
            tl.store(ddelta_ptr + own, dx.to(ddelta_ptr.dtype.element_ty), mask=exists)
    if HAS_DWEIGHT:
        tl.store(partial_ptr + program.to(tl.int64) * D + d, tl.sum(dweight, 0), mask=d < D)
    if HAS_DPOST:
        tl.store(post_partial_ptr + program.to(tl.int64) * D + d, tl.sum(dpost, 0), mask=d < D)


def launch_mean_pool_bwd(
    dpooled_SD: Tensor,
    x_TD: Tensor,
    delta_TD: Tensor | None,
    post_weight_D: Tensor | None,
    weight_D: Tensor,
    spans_S2: Tensor,
    first_weights_S: Tensor | None,
    eps: float,
    offset: float,
    mode: str,
    has_dpost: bool,
    has_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, delta and both weights; empty where not wanted, or where delta's is that of x."""
    T, D = x_TD.shape
    S = len(spans_S2)
    delta = x_TD if delta_TD is None else delta_TD
    post = weight_D if post_weight_D is None else post_weight_D
    first = spans_S2 if first_weights_S is None else first_weights_S
    has_ddelta = _has_own_gradient(x_TD, delta_TD, post_weight_D)
    dx_TD, ddelta_TD = x_TD.new_empty(T, D), delta.new_empty(T if has_ddelta else 0, D)
    tile = row_tile(D, TILE, PER_THREAD)
    programs, steps = backward_grid(T, tile["ROWS"], has_dweight or has_dpost)
    partial_PD, post_partial_PD = (
        x_TD.new_empty(programs if has else 0, D, dtype=torch.float32) for has in (has_dweight, has_dpost)
    )
    launch(
        _mean_pool_bwd_kernel,
        (programs,),
        dpooled_SD,
        x_TD,
        delta,
        post,
        weight_D,
        spans_S2,
        first,
        dx_TD,
        ddelta_TD,
        partial_PD,
        post_partial_PD,
        T,
        S,
        x_TD.stride(0),
        delta.stride(0),
        steps,
        eps,
        offset,
        D=D,
        CUT=dpooled_SD.shape[1],
        MODE=mode,
        HAS_DELTA=delta_TD is not None,
        HAS_POST=post_weight_D is not None,
        HAS_FIRST=first_weights_S is not None,
        HAS_DDELTA=has_ddelta,
        HAS_DPOST=has_dpost,
        HAS_DWEIGHT=has_dweight,
        SPANS=SPANS,
        **tile,
        **register_limit(x_TD),
    )
    return dx_TD, ddelta_TD, summed(post_partial_PD, post, has_dpost), summed(partial_PD, weight_D, has_dweight)


def _has_own_gradient(x_TD: Tensor, delta_TD: Tensor | None, post_weight_D: Tensor | None) -> bool:
    """Whether delta's gradient is another tensor than that of x."""
    return delta_TD is not None and (post_weight_D is not None or delta_TD.dtype != x_TD.dtype)


def _fake(
    dpooled_SD,
    x_TD,
    delta_TD,
    post_weight_D,
    weight_D,
    spans_S2,
    first_weights_S,
    eps,
    offset,
    mode,
    has_dpost,
    has_dweight,
):
    T, D = x_TD.shape
    delta = x_TD if delta_TD is None else delta_TD
    post = weight_D if post_weight_D is None else post_weight_D
    return (
        x_TD.new_empty(T, D),
        delta.new_empty(T if _has_own_gradient(x_TD, delta_TD, post_weight_D) else 0, D),
        post.new_empty(D if has_dpost else 0),
        weight_D.new_empty(D if has_dweight else 0),
    )


_mean_pool_bwd = define_op(
    "mean_pool_bwd(Tensor dpooled, Tensor x, Tensor? delta, Tensor? post_weight, Tensor weight, Tensor spans, "
    "Tensor? first_weights, float eps, float offset, str mode, bool has_dpost, bool has_dweight) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    launch_mean_pool_bwd,
    _fake,
)


def mean_pool_bwd(
    dpooled_SD: Tensor, x_TD: Tensor, delta_TD: Tensor | None, post_weight_D: Tensor | None, *rest
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The op, with delta's gradient given where it is that of x, and None where there is no delta."""
    dx_TD, ddelta_TD, dpost_D, dweight_D = _mean_pool_bwd(dpooled_SD, x_TD, delta_TD, post_weight_D, *rest)
    if delta_TD is None:
        return dx_TD, None, dpost_D, dweight_D
    own = _has_own_gradient(x_TD, delta_TD, post_weight_D)
    return dx_TD, ddelta_TD if own else dx_TD, dpost_D, dweight_D
