"""Norm and rotation of query or key heads in one pass (Qwen 3, Gemma 3).

    out = rope(rms_norm(x, weight))         the norm over the K elements of each head, the same weight for all heads

Shape letters: T = packed tokens, H = heads, K = head size. Memory-bound: reads and writes T*H*K elements where two ops
move twice that, and rounds once. The backward turns the gradient back, then follows the norm; it reads x and dout.
Source: see `rms_norm` and `rope`.
"""

import torch
from torch import Tensor

from flashvec.kernels.backend import define_op, implementation, launch, tl, triton
from flashvec.kernels.checks import check_eps, check_weight
from flashvec.kernels.precision import widen
from flashvec.kernels.rms_norm import backward_grid, rms_norm, rms_norm_reference, summed
from flashvec.kernels.rope import check_heads, head_rows, head_tile, rope, rope_reference, rotate


def norm_rope_reference(
    x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor, weight_K: Tensor, eps: float, offset: float = 0.0
) -> Tensor:
    normed_THK = rms_norm_reference(x_THK, weight_K, eps, offset, widen(x_THK).dtype)
    return rope_reference(normed_THK, cos_TK, sin_TK).to(x_THK.dtype)


def _norm_rope_cpu(
    x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor, weight_K: Tensor, eps: float, offset: float
) -> Tensor:
    """The reference's roundings, with the rotation's CPU form."""
    return rope(rms_norm(x_THK, weight_K, eps, offset, widen(x_THK).dtype), cos_TK, sin_TK).to(x_THK.dtype)


# --- kernels: one program per few heads, each as its two halves ---------------------------------------------


@triton.jit
def inverse_rms_of_halves(x0, x1, exists, eps, HALF: tl.constexpr):
    """1 / sqrt(mean(x²) + eps) of fp32 heads [x0, x1] whose columns past HALF are 0; 0 of heads that do not exist."""
    return tl.where(exists, tl.rsqrt((tl.sum(x0 * x0, 1) + tl.sum(x1 * x1, 1)) / (2 * HALF) + eps), 0.0)


@triton.jit
def _norm_rope_fwd_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    weight_ptr,
    out_ptr,
    T,
    x_stride,
    head_stride,
    eps,
    offset,
    H: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, token, at, exists = head_rows(x_stride, head_stride, T, H, ROWS, tl.program_id(0))
    k = tl.arange(0, BLOCK)[None, :]
    inside = exists[:, None] & (k < HALF)
    weight0 = tl.load(weight_ptr + k, mask=k < HALF, other=0.0).to(tl.float32) + offset
    weight1 = tl.load(weight_ptr + HALF + k, mask=k < HALF, other=0.0).to(tl.float32) + offset
    x0 = tl.load(x_ptr + at[:, None] + k, mask=inside, other=0.0).to(tl.float32)
    x1 = tl.load(x_ptr + at[:, None] + HALF + k, mask=inside, other=0.0).to(tl.float32)
    angle = token.to(tl.int64)[:, None] * HALF + k
    cos = tl.load(cos_ptr + angle, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=inside, other=0.0)
    inverse = inverse_rms_of_halves(x0, x1, exists, eps, HALF)[:, None]
    out0, out1 = rotate(x0 * inverse * weight0, x1 * inverse * weight1, cos, sin, False)
    out = out_ptr + row.to(tl.int64)[:, None] * (2 * HALF) + k
    tl.store(out, out0.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out + HALF, out1.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm_rope_bwd_kernel(
    dout_ptr,
    x_ptr,
    cos_ptr,
    sin_ptr,
    weight_ptr,
    dx_ptr,
    partial_ptr,
    T,
    x_stride,
    head_stride,
    steps,
    eps,
    offset,
    H: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_DWEIGHT: tl.constexpr,
):
    """`steps` tiles of heads, one after the other; their sum for the weight's gradient is the program's own row."""
    program = tl.program_id(0)
    k = tl.arange(0, BLOCK)[None, :]
    weight0 = tl.load(weight_ptr + k, mask=k < HALF, other=0.0).to(tl.float32) + offset
    weight1 = tl.load(weight_ptr + HALF + k, mask=k < HALF, other=0.0).to(tl.float32) + offset
    dweight0 = tl.zeros((ROWS, BLOCK), tl.float32)  # summed over its rows once, at the end
    dweight1 = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(steps):
        row, token, at, exists = head_rows(x_stride, head_stride, T, H, ROWS, program * steps + step)
        inside = exists[:, None] & (k < HALF)
        own = row.to(tl.int64)[:, None] * (2 * HALF) + k
        x0 = tl.load(x_ptr + at[:, None] + k, mask=inside, other=0.0).to(tl.float32)
        x1 = tl.load(x_ptr + at[:, None] + HALF + k, mask=inside, other=0.0).to(tl.float32)
        dout0 = tl.load(dout_ptr + own, mask=inside, other=0.0).to(tl.float32)
        dout1 = tl.load(dout_ptr + own + HALF, mask=inside, other=0.0).to(tl.float32)
        angle = token.to(tl.int64)[:, None] * HALF + k
        cos = tl.load(cos_ptr + angle, mask=inside, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=inside, other=0.0)
        dout0, dout1 = rotate(dout0, dout1, cos, sin, True)
        inverse = inverse_rms_of_halves(x0, x1, exists, eps, HALF)[:, None]
        x0 *= inverse
        x1 *= inverse
        if HAS_DWEIGHT:
            dweight0 += dout0 * x0
            dweight1 += dout1 * x1
        dout0 *= weight0
        dout1 *= weight1
        mean = ((tl.sum(dout0 * x0, 1) + tl.sum(dout1 * x1, 1)) / (2 * HALF))[:, None]
        tl.store(dx_ptr + own, (inverse * (dout0 - x0 * mean)).to(dx_ptr.dtype.element_ty), mask=inside)
        tl.store(dx_ptr + own + HALF, (inverse * (dout1 - x1 * mean)).to(dx_ptr.dtype.element_ty), mask=inside)
    if HAS_DWEIGHT:
        partial = partial_ptr + program * (2 * HALF) + tl.arange(0, BLOCK)
        tl.store(partial, tl.sum(dweight0, 0), mask=tl.arange(0, BLOCK) < HALF)
        tl.store(partial + HALF, tl.sum(dweight1, 0), mask=tl.arange(0, BLOCK) < HALF)


# --- ops ------------------------------------------------------------------------------------------------


def launch_norm_rope(
    x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor, weight_K: Tensor, eps: float, offset: float
) -> Tensor:
    T, H, K = x_THK.shape
    out_THK = x_THK.new_empty(T, H, K)
    tile = head_tile(K)
    launch(
        _norm_rope_fwd_kernel,
        (-(-T * H // tile["ROWS"]),),
        x_THK,
        cos_TK,
        sin_TK,
        weight_K,
        out_THK,
        T,
        x_THK.stride(0),
        x_THK.stride(1),
        eps,
        offset,
        H=H,
        **tile,
    )
    return out_THK


def launch_norm_rope_bwd(
    dout_THK: Tensor,
    x_THK: Tensor,
    cos_TK: Tensor,
    sin_TK: Tensor,
    weight_K: Tensor,
    eps: float,
    offset: float,
    has_dweight: bool,
) -> tuple[Tensor, Tensor]:
    T, H, K = x_THK.shape
    dx_THK = x_THK.new_empty(T, H, K)
    tile = head_tile(K)
    programs, steps = backward_grid(T * H, tile["ROWS"], has_dweight)
    partial_PK = x_THK.new_empty(programs if has_dweight else 0, K, dtype=torch.float32)
    launch(
        _norm_rope_bwd_kernel,
        (programs,),
        dout_THK,
        x_THK,
        cos_TK,
        sin_TK,
        weight_K,
        dx_THK,
        partial_PK,
        T,
        x_THK.stride(0),
        x_THK.stride(1),
        steps,
        eps,
        offset,
        H=H,
        HAS_DWEIGHT=has_dweight,
        **tile,
    )
    return dx_THK, summed(partial_PK, weight_K, has_dweight)


def _bwd_fake(dout_THK, x_THK, cos_TK, sin_TK, weight_K, eps, offset, has_dweight):
    return x_THK.new_empty(x_THK.shape), weight_K.new_empty(weight_K.shape[0] if has_dweight else 0)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout_THK):
    has_dweight = ctx.needs_input_grad[3]
    dx_THK, dweight_K = _norm_rope_bwd(dout_THK.contiguous(), *ctx.saved_tensors, ctx.eps, ctx.offset, has_dweight)
    return dx_THK, None, None, dweight_K if has_dweight else None, None, None


_norm_rope_bwd = define_op(
    "norm_rope_bwd(Tensor dout, Tensor x, Tensor cos, Tensor sin, Tensor weight, float eps, float offset, "
    "bool has_dweight) -> (Tensor, Tensor)",
    launch_norm_rope_bwd,
    _bwd_fake,
)
_norm_rope = define_op(
    "norm_rope(Tensor x, Tensor cos, Tensor sin, Tensor weight, float eps, float offset) -> Tensor",
    launch_norm_rope,
    lambda x_THK, cos_TK, sin_TK, weight_K, eps, offset: x_THK.new_empty(x_THK.shape),
    setup_context=_setup_context,
    backward=_backward,
)


# --- public ---------------------------------------------------------------------------------------------


def norm_rope(
    x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor, weight_K: Tensor, eps: float, offset: float = 0.0
) -> Tensor:
    """Normalise every head, then rotate it by its token's position.

    Args:
        x_THK: [T, H, K] fp32, bf16 or fp16 (fp64 runs the reference); tokens and heads any stride apart.
        cos_TK, sin_TK: fp32 [T, K / 2], contiguous, same device: rows of `rope_table` gathered by position.
        weight_K: [K] weight of the norm, any float dtype.
        eps, offset: of the norm, see `rms_norm`.

    Returns:
        [T, H, K] in the dtype of `x_THK`, contiguous. Differentiable in `x_THK` and `weight_K`.

    Raises:
        ValueError: sizes, layouts or devices that do not match, another dtype than these, a negative `eps`, tables that
            want a gradient.

    Error: fp32 arithmetic, one rounding at the end. Each head depends on itself alone; the weight's gradient is a sum
        of sums over fixed runs of heads. Bitwise deterministic.
    """
    check_heads(x_THK, cos_TK, sin_TK)
    check_weight("weight_K", weight_K, x_THK)
    check_eps(eps)
    form = implementation(x_THK)
    if form == "triton" and x_THK.dtype != torch.float64:
        return _norm_rope(x_THK, cos_TK, sin_TK, weight_K.contiguous(), eps, offset)
    run = _norm_rope_cpu if form == "cpu" else norm_rope_reference
    return run(x_THK, cos_TK, sin_TK, weight_K, eps, offset)
