"""Forward of `mean_pool` on a GPU: its kernels, their launches, and the op that autograd knows.

`kernels/mean_pool.py` defines what is computed and holds the public function; `kernels/mean_pool_bwd.py` the gradients.
A row's norm needs the whole row and the mean needs the norm, so a program holds a few whole rows, scales each, and adds
them to one fp32 row; the norm's weight is the same for all rows and is applied to the sum.

How spans are shared out. A span of up to CHUNK rows is one program's, so that a batch of short texts takes one launch.
A longer one is cut by its own length alone into at most MAX_CHUNKS runs of equal size, whose sums a second launch adds
in order: its bits do not depend on the batch. The host does not know the spans' values, so the grid has a place for as
many chunks as the longest span may need (`longest`, or else T); places past a span's own are left at once. The other
way, one program a span however long, leaves two thirds of 132 multiprocessors idle on 16,384 tokens in texts of 400,
and reads a text of 8,192 tokens at the rate of a single one.

Shape letters: T = packed tokens, D = hidden size, S = spans.
"""

import torch
from torch import Tensor

from flashvec.kernels.backend import define_op, launch, tl, triton
from flashvec.kernels.mean_pool_bwd import mean_pool_bwd
from flashvec.kernels.pool_spans import (
    ONE_ROW,
    SHORTEST,
    chunking,
    finish,
    first_weight,
    larger,
    row_weight,
    span_rows,
)
from flashvec.kernels.rms_norm import inverse_rms, load_weight, row_tile

CHUNK = 128  # rows: 16,384 tokens in texts of 256 give 128 programs, and 2 MB of fp32 outweigh one's start
MAX_CHUNKS = 32  # of a span: beyond, its chunks grow; a second launch adds them up one after the other
TILE = 4096  # elements of a step, at least: 16 KB of fp32 in flight, and three such programs on a multiprocessor
PARTIAL_BYTES = 1 << 26  # of sums between the two launches: more spans than fit take turns


# --- kernels: one program per span and chunk of it, then one per span of several chunks ---------------------


@triton.jit
def _mean_pool_fwd_kernel(
    x_ptr,
    delta_ptr,
    post_ptr,
    weight_ptr,
    spans_ptr,
    first_ptr,
    out_ptr,
    length_ptr,
    partial_ptr,
    S,
    first_span,
    x_stride,
    delta_stride,
    eps,
    offset,
    D: tl.constexpr,
    CUT: tl.constexpr,
    MODE: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    HAS_POST: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    chunk = tl.program_id(1)
    s = first_span + tl.program_id(0)
    start, stop = span_rows(spans_ptr, s, S, MODE)
    size, chunks = chunking(stop - start, tl.num_programs(1), CHUNK, ROWS)
    if chunk < chunks:
        d = tl.arange(0, BLOCK_D)
        first = first_weight(first_ptr, s, HAS_FIRST)
        pooled = tl.full((ROWS, BLOCK_D), float("-inf") if MODE == "max" else 0.0, tl.float32)
        last = tl.minimum(start + (chunk + 1) * size, stop)
        for at in range(start + chunk * size, last, ROWS):
            row = at + tl.arange(0, ROWS).to(tl.int64)
            exists = row < last
            inside = exists[:, None] & (d < D)[None, :]
            x = tl.load(x_ptr + row[:, None] * x_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
            if HAS_DELTA:
                y = tl.load(delta_ptr + row[:, None] * delta_stride + d[None, :], mask=inside, other=0.0)
                y = y.to(tl.float32)
                if HAS_POST:
                    y = y * inverse_rms(y, exists, eps, D)[:, None] * load_weight(post_ptr, offset, d, D)
                x += y
            scale = inverse_rms(x, exists, eps, D) * row_weight(row - start, first, MODE)
            if MODE == "max":
                x = x * scale[:, None] * load_weight(weight_ptr, offset, d, D)
                pooled = larger(pooled, tl.where(inside, x, float("-inf")))
            else:
                pooled += x * scale[:, None]
        pooled_D = tl.reduce(pooled, 0, larger) if MODE == "max" else tl.sum(pooled, 0)
        if chunks == 1:
            count = stop - start
            finish(pooled_D, weight_ptr, out_ptr, length_ptr, s, count, first, offset, D, CUT, MODE, NORMALIZE, BLOCK_D)
        else:
            place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + chunk
            tl.store(partial_ptr + place * D + d, pooled_D, mask=d < D)


@triton.jit
def _mean_pool_finish_kernel(
    partial_ptr,
    weight_ptr,
    spans_ptr,
    first_ptr,
    out_ptr,
    length_ptr,
    S,
    first_span,
    places,
    offset,
    D: tl.constexpr,
    CUT: tl.constexpr,
    MODE: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    NORMALIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    s = first_span + tl.program_id(0)
    start, stop = span_rows(spans_ptr, s, S, MODE)
    _, chunks = chunking(stop - start, places, CHUNK, ROWS)
    if chunks > 1:
        d = tl.arange(0, BLOCK_D)
        pooled = tl.full((BLOCK_D,), float("-inf") if MODE == "max" else 0.0, tl.float32)
        for chunk in range(0, chunks):
            place = tl.program_id(0).to(tl.int64) * places + chunk
            part = tl.load(partial_ptr + place * D + d, mask=d < D, other=0.0)
            pooled = larger(pooled, part) if MODE == "max" else pooled + part
        first = first_weight(first_ptr, s, HAS_FIRST)
        count = stop - start
        finish(pooled, weight_ptr, out_ptr, length_ptr, s, count, first, offset, D, CUT, MODE, NORMALIZE, BLOCK_D)


# --- op -------------------------------------------------------------------------------------------------


def launch_mean_pool(
    x_TD: Tensor,
    delta_TD: Tensor | None,
    post_weight_D: Tensor | None,
    weight_D: Tensor,
    spans_S2: Tensor,
    first_weights_S: Tensor | None,
    eps: float,
    offset: float,
    mode: str,
    truncate_dim: int,
    normalize: bool,
    longest: int,
) -> tuple[Tensor, Tensor]:
    """Pooled vectors, and their lengths before normalisation (empty without)."""
    S, D = len(spans_S2), x_TD.shape[1]
    out_SD = x_TD.new_empty(S, truncate_dim, dtype=torch.float32)
    length_S = x_TD.new_empty(S if normalize else 0, dtype=torch.float32)
    tile = row_tile(D, TILE)
    places = 1 if mode in ONE_ROW else max(1, min(-(-longest // CHUNK), MAX_CHUNKS))
    in_turn = S if places == 1 else max(1, PARTIAL_BYTES // (places * D * 4))
    partial_PD = x_TD.new_empty(min(S, in_turn) * places if places > 1 else 0, D, dtype=torch.float32)
    delta = x_TD if delta_TD is None else delta_TD
    post = weight_D if post_weight_D is None else post_weight_D
    first = spans_S2 if first_weights_S is None else first_weights_S
    same = {"D": D, "CUT": truncate_dim, "MODE": mode, "NORMALIZE": normalize, "CHUNK": CHUNK, **tile}
    same["HAS_FIRST"] = first_weights_S is not None
    for span in range(0, S, max(in_turn, 1)):
        programs = min(in_turn, S - span)
        launch(
            _mean_pool_fwd_kernel,
            (programs, places),
            x_TD,
            delta,
            post,
            weight_D,
            spans_S2,
            first,
            out_SD,
            length_S,
            partial_PD,
            S,
            span,
            x_TD.stride(0),
            delta.stride(0),
            eps,
            offset,
            HAS_DELTA=delta_TD is not None,
            HAS_POST=post_weight_D is not None,
            **same,
        )
        if places > 1:
            launch(
                _mean_pool_finish_kernel,
                (programs,),
                partial_PD,
                weight_D,
                spans_S2,
                first,
                out_SD,
                length_S,
                S,
                span,
                places,
                offset,
                **same,
            )
    return out_SD, length_S


def _fake(
    x_TD,
    delta_TD,
    post_weight_D,
    weight_D,
    spans_S2,
    first_weights_S,
    eps,
    offset,
    mode,
    truncate_dim,
    normalize,
    longest,
):
    S = spans_S2.shape[0]
    return tuple(x_TD.new_empty(size, dtype=torch.float32) for size in ((S, truncate_dim), (S if normalize else 0,)))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, ctx.offset, ctx.mode, _, ctx.normalize, _ = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dout_SD, _):
    *tensors, out_SD, length_S = ctx.saved_tensors
    if ctx.normalize:
        length_S1 = length_S[:, None]
        along_S1 = (dout_SD * out_SD).sum(-1, keepdim=True) * (length_S1 >= SHORTEST)
        dout_SD = (dout_SD - out_SD * along_S1) / length_S1.clamp_min(SHORTEST)
    has_dpost, has_dweight = ctx.needs_input_grad[2:4]
    dx, ddelta, dpost, dweight = mean_pool_bwd(
        dout_SD.contiguous(), *tensors, ctx.eps, ctx.offset, ctx.mode, has_dpost, has_dweight
    )
    grads = dx, ddelta, dpost if has_dpost else None, dweight if has_dweight else None
    return *grads, None, None, None, None, None, None, None, None


mean_pool_op = define_op(
    "mean_pool(Tensor x, Tensor? delta, Tensor? post_weight, Tensor weight, Tensor spans, Tensor? first_weights, "
    "float eps, float offset, str mode, SymInt truncate_dim, bool normalize, SymInt longest) -> (Tensor, Tensor)",
    launch_mean_pool,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
