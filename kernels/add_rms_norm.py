"""A step of the residual stream and the norm after it, in one pass.

    sum = h + y                                   or, where a layer norms what it adds (Gemma 2 and 3),
    sum = h + rms_norm(y, post_weight)
    out = rms_norm(sum, weight)

Shape letters: T = packed tokens, D = hidden size. Memory-bound: with a fp32 stream and halves beside it, reads 6*T*D
and writes 6*T*D bytes, where an add and a norm of their own move 16. The backward reads the sum and both gradients
(`y` only for its norm) and writes the stream's gradient and that of `y`.
Source: see `rms_norm`; post-norms Gemma 2 (2024).
"""

from typing import Any

import torch
from torch import Tensor

from flashvec.kernels.backend import define_op, implementation, launch, needs_gradient, tl, triton
from flashvec.kernels.checks import check_dtype, check_eps, check_rows, check_weight
from flashvec.kernels.precision import widen
from flashvec.kernels.rms_norm import (
    PER_THREAD,
    backward_grid,
    inverse_rms,
    load_weight,
    norm_grad,
    norm_grad_cpu,
    register_limit,
    rms_norm,
    rms_norm_cpu,
    rms_norm_reference,
    row_tile,
    summed,
)


def add_rms_norm_reference(
    h_TD: Tensor,
    y_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    offset: float = 0.0,
    dtype: torch.dtype | None = None,
    *,
    post_weight_D: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    h, dtype = widen(h_TD), dtype or y_TD.dtype
    if post_weight_D is not None:
        y_TD = rms_norm_reference(y_TD, post_weight_D, eps, offset, h.dtype)
    sum_TD = h + y_TD
    return sum_TD, rms_norm_reference(sum_TD, weight_D, eps, offset, dtype)


def _add_rms_norm_cpu(
    h_TD: Tensor,
    y_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    offset: float,
    dtype: torch.dtype,
    post_weight_D: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The reference's arithmetic, bit for bit, its norms in one buffer each."""
    h = widen(h_TD)
    if post_weight_D is not None:
        y_TD = rms_norm(y_TD, post_weight_D, eps, offset, h.dtype)
    if needs_gradient(h, y_TD, weight_D):
        return _AddRmsNormCpu.apply(h, y_TD, weight_D, eps, offset, dtype)
    sum_TD = h + y_TD
    return sum_TD, rms_norm_cpu(sum_TD, weight_D, eps, offset, dtype)[0]


class _AddRmsNormCpu(torch.autograd.Function):
    """A sum and its norm with one gradient: both ways into the stream are added up in place."""

    @staticmethod
    def forward(
        ctx: Any, h_TD: Tensor, y_TD: Tensor, weight_D: Tensor, eps: float, offset: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        sum_TD = h_TD + y_TD
        out_TD, inverse_T1 = rms_norm_cpu(sum_TD, weight_D, eps, offset, dtype)
        ctx.save_for_backward(sum_TD, inverse_T1, weight_D)
        ctx.offset, ctx.dtype = offset, y_TD.dtype
        ctx.set_materialize_grads(False)
        return sum_TD, out_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (dsum_TD, dout_TD), (sum_TD, inverse_T1, weight_D) = grads, ctx.saved_tensors
        dh_TD, dweight_D = dsum_TD, None
        if dout_TD is not None:
            has_dweight = ctx.needs_input_grad[2]
            dh_TD, dweight_D = norm_grad_cpu(dout_TD, sum_TD, inverse_T1, weight_D, ctx.offset, has_dweight)
            if dsum_TD is not None:
                dh_TD += dsum_TD
        return dh_TD, None if dh_TD is None else dh_TD.to(ctx.dtype), dweight_D, None, None, None


# --- kernels: one program per row, or per few short rows ------------------------------------------------


@triton.jit
def _add_rms_norm_fwd_kernel(
    h_ptr,
    y_ptr,
    weight_ptr,
    post_ptr,
    sum_ptr,
    out_ptr,
    T,
    h_stride,
    y_stride,
    eps,
    offset,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_POST: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row.to(tl.int64)[:, None]  # a row's first element may lie past 2^31
    d = tl.arange(0, BLOCK_D)
    inside = (row < T)[:, None] & (d < D)[None, :]
    h = tl.load(h_ptr + at * h_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at * y_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_POST:
        y = y * inverse_rms(y, row < T, eps, D)[:, None] * load_weight(post_ptr, offset, d, D)
    h += y
    tl.store(sum_ptr + at * D + d[None, :], h, mask=inside)
    out = h * inverse_rms(h, row < T, eps, D)[:, None] * load_weight(weight_ptr, offset, d, D)
    tl.store(out_ptr + at * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_rms_norm_bwd_kernel(
    dsum_ptr,
    dout_ptr,
    sum_ptr,
    y_ptr,
    weight_ptr,
    post_ptr,
    dh_ptr,
    dy_ptr,
    partial_ptr,
    post_partial_ptr,
    T,
    y_stride,
    steps,
    eps,
    offset,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_POST: tl.constexpr,
    HAS_DY: tl.constexpr,
    HAS_DWEIGHT: tl.constexpr,
    HAS_DPOST: tl.constexpr,
):
    """`steps` tiles of rows, one after the other; their sums for the weights' gradients go to the program's own row."""
    program = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    dweight = tl.zeros((ROWS, BLOCK_D), tl.float32)
    dpost = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for step in range(steps):
        row = (program * steps + step) * ROWS + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None]
        inside = (row < T)[:, None] & (d < D)[None, :]
        h = tl.load(sum_ptr + at * D + d[None, :], mask=inside, other=0.0)
        dout = tl.load(dout_ptr + at * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        inverse = inverse_rms(h, row < T, eps, D)
        normed = h * inverse[:, None]
        if HAS_DWEIGHT:
            dweight += dout * normed
        dh = norm_grad(dout * load_weight(weight_ptr, offset, d, D), normed, inverse, D)
        dh += tl.load(dsum_ptr + at * D + d[None, :], mask=inside, other=0.0)
        tl.store(dh_ptr + at * D + d[None, :], dh.to(dh_ptr.dtype.element_ty), mask=inside)
        if HAS_POST:
            y = tl.load(y_ptr + at * y_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
            inverse = inverse_rms(y, row < T, eps, D)
            normed = y * inverse[:, None]
            if HAS_DPOST:
                dpost += dh * normed
            dh = norm_grad(dh * load_weight(post_ptr, offset, d, D), normed, inverse, D)
        if HAS_DY:
            tl.store(dy_ptr + at * D + d[None, :], dh.to(dy_ptr.dtype.element_ty), mask=inside)
    if HAS_DWEIGHT:
        tl.store(partial_ptr + program.to(tl.int64) * D + d, tl.sum(dweight, 0), mask=d < D)
    if HAS_DPOST:
        tl.store(post_partial_ptr + program.to(tl.int64) * D + d, tl.sum(dpost, 0), mask=d < D)


# --- ops ------------------------------------------------------------------------------------------------


def launch_add_rms_norm(
    h_TD: Tensor,
    y_TD: Tensor,
    weight_D: Tensor,
    post_weight_D: Tensor | None,
    eps: float,
    offset: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    T, D = h_TD.shape
    sum_TD, out_TD = h_TD.new_empty(T, D, dtype=torch.float32), h_TD.new_empty(T, D, dtype=dtype)
    tile = row_tile(D)
    launch(
        _add_rms_norm_fwd_kernel,
        (-(-T // tile["ROWS"]),),
        h_TD,
        y_TD,
        weight_D,
        weight_D if post_weight_D is None else post_weight_D,
        sum_TD,
        out_TD,
        T,
        h_TD.stride(0),
        y_TD.stride(0),
        eps,
        offset,
        D=D,
        HAS_POST=post_weight_D is not None,
        **tile,
    )
    return sum_TD, out_TD


def launch_add_rms_norm_bwd(
    dsum_TD: Tensor,
    dout_TD: Tensor,
    sum_TD: Tensor,
    y_TD: Tensor,
    weight_D: Tensor,
    post_weight_D: Tensor | None,
    eps: float,
    offset: float,
    h_dtype: torch.dtype,
    has_dweight: bool,
    has_dpost: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The third and fourth are empty where not wanted, the second where it is the first."""
    T, D = sum_TD.shape
    has_post = post_weight_D is not None
    post = weight_D if post_weight_D is None else post_weight_D
    has_dy = has_post or y_TD.dtype != h_dtype
    dh_TD = sum_TD.new_empty(T, D, dtype=h_dtype)
    dy_TD = y_TD.new_empty(T if has_dy else 0, D)
    tile = row_tile(D, per_thread=PER_THREAD // 2 if has_dpost else PER_THREAD)  # two more arrays to hold
    programs, steps = backward_grid(T, tile["ROWS"], has_dweight or has_dpost)
    partial_PD, post_partial_PD = (sum_TD.new_empty(programs if has else 0, D) for has in (has_dweight, has_dpost))
    launch(
        _add_rms_norm_bwd_kernel,
        (programs,),
        dsum_TD,
        dout_TD,
        sum_TD,
        y_TD,
        weight_D,
        post,
        dh_TD,
        dy_TD,
        partial_PD,
        post_partial_PD,
        T,
        y_TD.stride(0),
        steps,
        eps,
        offset,
        D=D,
        HAS_POST=has_post,
        HAS_DY=has_dy,
        HAS_DWEIGHT=has_dweight,
        HAS_DPOST=has_dpost,
        **tile,
        **register_limit(sum_TD),
    )
    return dh_TD, dy_TD, summed(partial_PD, weight_D, has_dweight), summed(post_partial_PD, post, has_dpost)


def _fake(h_TD, y_TD, weight_D, post_weight_D, eps, offset, dtype):
    return h_TD.new_empty(h_TD.shape, dtype=torch.float32), h_TD.new_empty(h_TD.shape, dtype=dtype)


def _bwd_fake(dsum_TD, dout_TD, sum_TD, y_TD, weight_D, post_weight_D, eps, offset, h_dtype, has_dweight, has_dpost):
    T, D = sum_TD.shape
    has_dy = post_weight_D is not None or y_TD.dtype != h_dtype
    post = weight_D if post_weight_D is None else post_weight_D
    return (
        sum_TD.new_empty(T, D, dtype=h_dtype),
        y_TD.new_empty(T if has_dy else 0, D),
        weight_D.new_empty(D if has_dweight else 0),
        post.new_empty(D if has_dpost else 0),
    )


def _setup_context(ctx, inputs, output):
    h_TD, y_TD, weight_D, post_weight_D, ctx.eps, ctx.offset, _ = inputs
    ctx.h_dtype, ctx.y_dtype = h_TD.dtype, y_TD.dtype
    kept = y_TD if post_weight_D is not None else y_TD.new_empty(0, y_TD.shape[1])  # its dtype is all that is asked
    ctx.save_for_backward(output[0], kept, weight_D, post_weight_D)


def _backward(ctx, dsum_TD, dout_TD):
    sum_TD, y_TD, weight_D, post_weight_D = ctx.saved_tensors
    has_dweight, has_dpost = ctx.needs_input_grad[2:4]
    dh_TD, dy_TD, dweight_D, dpost_D = _add_rms_norm_bwd(
        dsum_TD.contiguous(),
        dout_TD.contiguous(),
        sum_TD,
        y_TD,
        weight_D,
        post_weight_D,
        ctx.eps,
        ctx.offset,
        ctx.h_dtype,
        has_dweight,
        has_dpost,
    )
    is_same = post_weight_D is None and ctx.y_dtype == ctx.h_dtype
    grads = dh_TD, dh_TD if is_same else dy_TD, dweight_D if has_dweight else None, dpost_D if has_dpost else None
    return *grads, None, None, None


_add_rms_norm_bwd = define_op(
    "add_rms_norm_bwd(Tensor dsum, Tensor dout, Tensor sum, Tensor y, Tensor weight, Tensor? post_weight, float eps, "
    "float offset, ScalarType h_dtype, bool has_dweight, bool has_dpost) -> (Tensor, Tensor, Tensor, Tensor)",
    launch_add_rms_norm_bwd,
    _bwd_fake,
)
_add_rms_norm = define_op(
    "add_rms_norm(Tensor h, Tensor y, Tensor weight, Tensor? post_weight, float eps, float offset, ScalarType dtype) "
    "-> (Tensor, Tensor)",
    launch_add_rms_norm,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)


# --- public ---------------------------------------------------------------------------------------------


def add_rms_norm(
    h_TD: Tensor,
    y_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    offset: float = 0.0,
    dtype: torch.dtype | None = None,
    *,
    post_weight_D: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and normalise the sum.

    Args:
        h_TD: [T, D] fp32 (also bf16 or fp16): the residual stream, any row stride.
        y_TD: [T, D] fp32, bf16 or fp16: what a layer adds, any row stride.
        weight_D: [D] weight of the norm after the sum, any float dtype.
        eps, offset: of both norms, see `rms_norm`.
        dtype: of the normalised rows; default that of `y_TD`.
        post_weight_D: [D] weight of a norm of `y_TD` before the sum, or None for no such norm.

    Returns:
        fp32 [T, D], the new residual stream, and [T, D] in `dtype`, its norm: each rounded once. Differentiable in
        both, in all four tensors.

    Raises:
        ValueError: shapes or devices that do not match, another dtype than these, a negative `eps`.

    Error: fp32 arithmetic, `y_TD`'s norm is not rounded before the sum. Each row depends on itself alone; weights'
        gradients are sums of sums over fixed runs of rows. Bitwise deterministic.
    """
    if h_TD.ndim != 2 or y_TD.shape != h_TD.shape or y_TD.device != h_TD.device:
        raise ValueError(f"h_TD is {tuple(h_TD.shape)} on {h_TD.device}, y_TD {tuple(y_TD.shape)} on {y_TD.device}")
    check_rows("h_TD", h_TD)
    check_rows("y_TD", y_TD)
    check_weight("weight_D", weight_D, h_TD)
    if post_weight_D is not None:
        check_weight("post_weight_D", post_weight_D, h_TD)
    check_eps(eps)
    if dtype is not None:
        check_dtype("dtype", dtype)
    run = implementation(h_TD)
    if run == "torch" or torch.float64 in (h_TD.dtype, y_TD.dtype):
        return add_rms_norm_reference(h_TD, y_TD, weight_D, eps, offset, dtype, post_weight_D=post_weight_D)
    if run == "cpu":
        return _add_rms_norm_cpu(h_TD, y_TD, weight_D, eps, offset, dtype or y_TD.dtype, post_weight_D)
    post_weight_D = None if post_weight_D is None else post_weight_D.contiguous()
    return _add_rms_norm(h_TD, y_TD, weight_D.contiguous(), post_weight_D, eps, offset, dtype or y_TD.dtype)
