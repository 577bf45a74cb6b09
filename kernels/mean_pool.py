"""Final norm and pooling: token rows of the last layer become one vector per span of tokens.

    x[t] = x[t] + delta[t]                  or x[t] + rms_norm(delta[t], post_norm_weight), where there is a delta
    out[s] = pool(rms_norm(x[t]) for t in range(spans[s, 0], spans[s, 1]))[:truncate_dim]
    out[s] = out[s] / |out[s]|              where asked for

`pool` is mean, weighted_mean (weights grow with the position: k, k + 1, ...), mean_sqrt_len (sum / sqrt(count)), max,
last or cls (the span's last and first row). Spans may nest, overlap or leave rows out.

Shape letters: T = packed tokens, D = hidden size, S = spans. Memory-bound: a span's rows are read once, and nothing of
size [T, D] is written. A row's norm needs the whole row and the mean needs the norm, so a program holds a few whole
rows, scales each, and adds them to one fp32 row; the norm's weight is the same for all rows and is applied to the sum.

How spans are shared out. A span of up to CHUNK rows is one program's, so that a batch of short texts takes one launch.
A longer one is cut by its own length alone into at most MAX_CHUNKS runs of equal size, whose sums a second launch adds
in order: its bits do not depend on the batch. The host does not know the spans' values, so the grid has a place for as
many chunks as the longest span may need (`longest`, or else T); places past a span's own are left at once. The other
way, one program a span however long, leaves two thirds of 132 multiprocessors idle on 16,384 tokens in texts of 400,
and reads a text of 8,192 tokens at the rate of a single one.

Source: LLM2Vec (BehnamGhader et al. 2024), SGPT for the weighted mean (Muennighoff 2022).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flashvec.kernels.backend import define_op, implementation, launch, tl, triton
from flashvec.kernels.checks import INTEGERS, check_eps, check_rows, check_spans, check_weight, may_look
from flashvec.kernels.mean_pool_bwd import mean_pool_bwd
from flashvec.kernels.pool_spans import MODES, ONE_ROW, chunking, finish, first_weight, larger, row_weight, span_rows
from flashvec.kernels.precision import widen
from flashvec.kernels.rms_norm import (
    inverse_rms,
    load_weight,
    rms_norm_reference,
    row_tile,
)

CHUNK = 128  # rows: 16,384 tokens in texts of 256 give 128 programs, and 2 MB of fp32 outweigh one's start
MAX_CHUNKS = 32  # of a span: beyond, its chunks grow; a second launch adds them up one after the other
TILE = 4096  # elements of a step, at least: 16 KB of fp32 in flight, and three such programs on a multiprocessor
SHORTEST = 1e-12  # divides a zero vector, which stays zero, as in torch.nn.functional.normalize
PARTIAL_BYTES = 1 << 26  # of sums between the two launches: more spans than fit take turns


def mean_pool_reference(
    x_TD: Tensor,
    spans_S2: Tensor,
    norm_weight_D: Tensor,
    eps: float,
    *,
    norm_offset: float = 0.0,
    mode: str = "mean",
    first_weights_S: Tensor | None = None,
    delta_TD: Tensor | None = None,
    post_norm_weight_D: Tensor | None = None,
    truncate_dim: int | None = None,
    normalize: bool = False,
) -> Tensor:
    def normed(rows_R: Tensor) -> Tensor:
        x_RD = widen(x_TD[rows_R])
        if delta_TD is not None:
            delta_RD = delta_TD[rows_R]
            if post_norm_weight_D is not None:
                delta_RD = rms_norm_reference(delta_RD, post_norm_weight_D, eps, norm_offset, x_RD.dtype)
            x_RD = x_RD + delta_RD
        return rms_norm_reference(x_RD, norm_weight_D, eps, norm_offset)

    start_S, stop_S = spans_S2.to(torch.int64).unbind(1)
    if mode in ONE_ROW:
        out_SD = normed(stop_S - 1 if mode == "last" else start_S)
    else:
        out_SD = _pool_reference(normed, start_S, stop_S - start_S, mode, first_weights_S)
    out_SD = out_SD[:, :truncate_dim]
    return F.normalize(out_SD, dim=-1, eps=SHORTEST) if normalize else out_SD


def _pool_reference(
    normed: Callable[[Tensor], Tensor], start_S: Tensor, count_S: Tensor, mode: str, first_weights_S: Tensor | None
) -> Tensor:
    span_R = torch.repeat_interleave(count_S)  # which span owns row r of the gathered rows
    rank_R = torch.arange(len(span_R), device=start_S.device) - (count_S.cumsum(0) - count_S)[span_R]
    y_RD = normed(start_S[span_R] + rank_R)
    out_SD = y_RD.new_zeros(len(start_S), y_RD.shape[1])
    if mode == "max":
        index_RD = span_R[:, None].expand_as(y_RD)
        return out_SD.scatter_reduce_(0, index_RD, y_RD, "amax", include_self=False)

    total_S = count_S.to(y_RD.dtype)
    if mode == "mean_sqrt_len":
        total_S = total_S.sqrt()
    if mode == "weighted_mean":
        first_S = torch.ones_like(start_S) if first_weights_S is None else first_weights_S
        weight_R = (first_S[span_R] + rank_R).to(y_RD.dtype)
        y_RD = y_RD * weight_R[:, None]
        total_S = total_S.new_zeros(len(start_S)).index_add_(0, span_R, weight_R)
    # index_add_ walks the rows in order on the CPU: a span's sum does not depend on its neighbours.
    return out_SD.index_add_(0, span_R, y_RD) / total_S[:, None]


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


# --- ops ------------------------------------------------------------------------------------------------


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


_mean_pool = define_op(
    "mean_pool(Tensor x, Tensor? delta, Tensor? post_weight, Tensor weight, Tensor spans, Tensor? first_weights, "
    "float eps, float offset, str mode, SymInt truncate_dim, bool normalize, SymInt longest) -> (Tensor, Tensor)",
    launch_mean_pool,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)


# --- public ---------------------------------------------------------------------------------------------


def mean_pool(
    x_TD: Tensor,
    spans_S2: Tensor,
    norm_weight_D: Tensor,
    eps: float,
    *,
    norm_offset: float = 0.0,
    mode: str = "mean",
    first_weights_S: Tensor | None = None,
    delta_TD: Tensor | None = None,
    post_norm_weight_D: Tensor | None = None,
    truncate_dim: int | None = None,
    normalize: bool = False,
    longest: int | None = None,
) -> Tensor:
    """Normalise token rows and pool them over spans.

    Args:
        x_TD: [T, D] fp32, bf16 or fp16 (fp64 runs the reference): the residual stream after the last layer, or before
            its last addition where `delta_TD` is given. Any row stride.
        spans_S2: [S, 2] int32 or int64, contiguous, same device: first row and one past the last of each span, never
            empty; in any order.
        norm_weight_D: [D] weight of the final RMSNorm.
        eps, norm_offset: of that norm (and the one before the addition), see `rms_norm`.
        mode: one of `MODES`.
        first_weights_S: [S] integers, weighted_mean only: the weight of each span's first row; default 1.
        delta_TD: [T, D] fp32, bf16 or fp16: added to the residual stream first.
        post_norm_weight_D: [D] weight of a norm of `delta_TD` before it is added, or None for no such norm.
        truncate_dim: columns to keep of each vector; default D.
        normalize: divide each vector by its Euclidean length, after the cut.
        longest: rows of the longest span, where the host knows it, so that a GPU runs no programs for chunks that no
            span has; default T. Too small a value costs speed and the bits' independence of the batch, nothing else.

    Returns:
        fp32 [S, truncate_dim]: norm and sums in fp32, never rounded to a narrower dtype. Differentiable in x_TD,
        delta_TD and both weights; spans that overlap add up.

    Raises:
        ValueError: an unknown mode, a wrong shape, layout, dtype or device; on the CPU also a span that is empty or
            reaches past the rows. On a GPU looking would wait: these give values of no meaning there.

    Error: fp32 summation in an order that depends on the span's length alone; the same span gives the same bits in
        any batch. Bitwise deterministic, forward and backward. On a GPU, mode max has a backward through the
        reference only, which writes the rows of all spans.
    """
    _check(x_TD, spans_S2, norm_weight_D, mode, first_weights_S, delta_TD, post_norm_weight_D, truncate_dim, eps)
    if may_look(spans_S2):
        check_spans(spans_S2, len(x_TD))
    wanted = (x_TD, delta_TD, norm_weight_D, post_norm_weight_D)
    has_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in wanted)
    if implementation(x_TD) != "triton" or x_TD.dtype == torch.float64 or (mode == "max" and has_grad):
        return mean_pool_reference(
            x_TD,
            spans_S2,
            norm_weight_D,
            eps,
            norm_offset=norm_offset,
            mode=mode,
            first_weights_S=first_weights_S,
            delta_TD=delta_TD,
            post_norm_weight_D=post_norm_weight_D,
            truncate_dim=truncate_dim,
            normalize=normalize,
        )
    return _mean_pool(
        x_TD,
        delta_TD,
        None if post_norm_weight_D is None else post_norm_weight_D.contiguous(),
        norm_weight_D.contiguous(),
        spans_S2,
        first_weights_S.contiguous() if first_weights_S is not None and mode == "weighted_mean" else None,
        eps,
        norm_offset,
        mode,
        truncate_dim or x_TD.shape[1],
        normalize,
        x_TD.shape[0] if longest is None else longest,
    )[0]


def _check(
    x_TD: Tensor,
    spans_S2: Tensor,
    norm_weight_D: Tensor,
    mode: str,
    first_weights_S: Tensor | None,
    delta_TD: Tensor | None,
    post_norm_weight_D: Tensor | None,
    truncate_dim: int | None,
    eps: float,
) -> None:
    if mode not in MODES:
        raise ValueError(f"pooling mode is {mode!r}, known are {', '.join(MODES)}")
    if spans_S2.ndim != 2 or spans_S2.shape[1] != 2 or not spans_S2.is_contiguous():
        raise ValueError(
            f"spans_S2 must be contiguous [S, 2], got {tuple(spans_S2.shape)}, strides {spans_S2.stride()}"
        )
    if first_weights_S is not None and first_weights_S.shape != spans_S2.shape[:1]:
        raise ValueError(f"first_weights_S is {tuple(first_weights_S.shape)}, there are {len(spans_S2)} spans")
    for name, x in (("spans_S2", spans_S2), ("first_weights_S", first_weights_S)):
        if x is not None and (x.dtype not in INTEGERS or x.device != x_TD.device):
            raise ValueError(f"{name} is {x.dtype} on {x.device}, expected int32 or int64 on {x_TD.device} as x_TD")
    if x_TD.ndim != 2:
        raise ValueError(f"x_TD must be [T, D], got {tuple(x_TD.shape)}")
    check_rows("x_TD", x_TD)
    check_eps(eps)
    check_weight("norm_weight_D", norm_weight_D, x_TD)
    if delta_TD is not None:
        if delta_TD.shape != x_TD.shape or delta_TD.device != x_TD.device:
            raise ValueError(
                f"delta_TD is {tuple(delta_TD.shape)} on {delta_TD.device}, x_TD {tuple(x_TD.shape)} on {x_TD.device}"
            )
        check_rows("delta_TD", delta_TD)
    if post_norm_weight_D is not None:
        if delta_TD is None:
            raise ValueError("post_norm_weight_D norms delta_TD, which is None")
        check_weight("post_norm_weight_D", post_norm_weight_D, x_TD)
    if truncate_dim is not None and not 0 < truncate_dim <= x_TD.shape[1]:
        raise ValueError(f"truncate_dim is {truncate_dim}, vectors have {x_TD.shape[1]} elements")
