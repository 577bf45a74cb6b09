"""Root-mean-square norm over the last dimension.

    out = x r (offset + weight)         r = 1 / sqrt(mean(x²) + eps)

    with g = dout (offset + weight):    dx = r (g - x r mean(g x r))         dweight = sum over rows of dout x r

Shape letters: T = packed tokens, D = hidden size. Memory-bound: reads T*D and writes T*D elements, backward reads 2*T*D
and writes T*D. Nothing is stored for the backward: the row is read there anyway, and r comes with it.
Source: Zhang and Sennrich 2019; `offset` 1 is Gemma's form, whose weights are stored as w - 1.
"""

from typing import Any

import torch
from torch import Tensor

from flashvec.kernels.backend import define_op, implementation, launch, needs_gradient, target, tl, triton
from flashvec.kernels.checks import check_dtype, check_eps, check_rows, check_weight
from flashvec.kernels.precision import widen

TILE = 2048  # elements of a program, at least: below it, rows share one, or its 4 warps had too little to load
MAX_ROWS = 32  # of a program: rows of under 64 elements are a test model's
PER_THREAD = 16  # elements: 64 bytes of a fp32 row in flight a thread, and the arrays of a backward fit its registers
MAX_WARPS = 16  # 1,024 threads where a warp has 64
MAX_REGISTERS = 128  # of a thread, what 16 warps may have; left alone, ptxas spills a few to fit more programs
PARTIALS = 512  # programs that a weight's gradient is summed over: they fill any GPU, their sums are 1 % of the bytes


def rms_norm_reference(
    x_TD: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0, dtype: torch.dtype | None = None
) -> Tensor:
    x = widen(x_TD)
    scale_D = weight_D.to(x.dtype) + offset
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale_D).to(dtype or x_TD.dtype)


def rms_norm_cpu(
    x_TD: Tensor, weight_D: Tensor, eps: float, offset: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """The reference's arithmetic, bit for bit, in one buffer: its steps are small, allocating is what costs.

    Returns:
        The normalised rows, and what each was multiplied by before the weight: fp32 [..., 1].
    """
    x = widen(x_TD)
    out = x.square()
    inverse = out.mean(-1, keepdim=True).add_(eps).rsqrt_()
    return torch.mul(x, inverse, out=out).mul_(weight_D.to(x.dtype) + offset).to(dtype or x_TD.dtype), inverse


def norm_grad_cpu(
    dout_TD: Tensor, x_TD: Tensor, inverse_T1: Tensor, weight_D: Tensor, offset: float, has_dweight: bool
) -> tuple[Tensor, Tensor | None]:
    """`norm_grad` in few passes over memory: fp32 gradient of what `rms_norm_cpu` normalised, and its weight's."""
    x = widen(x_TD)
    g = dout_TD * (weight_D.to(x.dtype) + offset)
    share_T1 = (g * x).sum(-1, keepdim=True).mul_(inverse_T1 * inverse_T1).div_(x.shape[-1])
    dweight_D = None
    if has_dweight:
        dweight_D = (dout_TD * x).mul_(inverse_T1).reshape(-1, x.shape[-1]).sum(0).to(weight_D.dtype)
    return g.addcmul_(x, share_T1, value=-1).mul_(inverse_T1), dweight_D


class _RmsNormCpu(torch.autograd.Function):
    """`rms_norm_cpu` with a gradient: the reference's graph goes over its rows twice as often."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float, offset: float, dtype: torch.dtype | None
    ) -> Tensor:
        out_TD, inverse_T1 = rms_norm_cpu(x_TD, weight_D, eps, offset, dtype)
        ctx.save_for_backward(x_TD, inverse_T1, weight_D)
        ctx.offset = offset
        return out_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, inverse_T1, weight_D = ctx.saved_tensors
        dx_TD, dweight_D = norm_grad_cpu(grads[0], x_TD, inverse_T1, weight_D, ctx.offset, ctx.needs_input_grad[1])
        return dx_TD.to(x_TD.dtype), dweight_D, None, None, None


# --- kernels: one program per row, or per few short rows ------------------------------------------------


@triton.jit
def inverse_rms(x, exists, eps, D: tl.constexpr):
    """r of each row of a fp32 tile whose columns past D are 0; 0 of rows that do not exist, even if eps is 0."""
    return tl.where(exists, tl.rsqrt(tl.sum(x * x, 1) / D + eps), 0.0)


@triton.jit
def norm_grad(g, normed, inverse, D: tl.constexpr):
    """Gradient of rows x from `g`, that of `normed` = x r; `inverse` is r."""
    return inverse[:, None] * (g - normed * (tl.sum(g * normed, 1) / D)[:, None])


@triton.jit
def load_weight(weight_ptr, offset, d, D: tl.constexpr):
    """offset + weight in fp32, one row; what lies past D meets zeros."""
    return tl.load(weight_ptr + d[None, :], mask=d[None, :] < D, other=0.0).to(tl.float32) + offset


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    T,
    x_stride,
    eps,
    offset,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row.to(tl.int64)[:, None]  # a row's first element may lie past 2^31
    d = tl.arange(0, BLOCK_D)
    inside = (row < T)[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + at * x_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
    out = x * inverse_rms(x, row < T, eps, D)[:, None] * load_weight(weight_ptr, offset, d, D)
    tl.store(out_ptr + at * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rms_norm_bwd_kernel(
    dout_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    partial_ptr,
    T,
    x_stride,
    steps,
    eps,
    offset,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_DWEIGHT: tl.constexpr,
):
    """`steps` tiles of rows, one after the other; their sum for the weight's gradient goes to the program's own row."""
    program = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    weight = load_weight(weight_ptr, offset, d, D)
    dweight = tl.zeros((ROWS, BLOCK_D), tl.float32)  # summed over its rows once, at the end
    for step in range(steps):
        row = (program * steps + step) * ROWS + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None]
        inside = (row < T)[:, None] & (d < D)[None, :]
        x = tl.load(x_ptr + at * x_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + at * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        inverse = inverse_rms(x, row < T, eps, D)
        normed = x * inverse[:, None]
        dx = norm_grad(dout * weight, normed, inverse, D)
        tl.store(dx_ptr + at * D + d[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if HAS_DWEIGHT:
            dweight += dout * normed
    if HAS_DWEIGHT:
        tl.store(partial_ptr + program.to(tl.int64) * D + d, tl.sum(dweight, 0), mask=d < D)


# --- ops ------------------------------------------------------------------------------------------------


def row_tile(D: int, tile: int = TILE, per_thread: int = PER_THREAD) -> dict[str, int]:
    """How kernels that need whole rows cut them: constants and warps of a launch."""
    block = max(16, 1 << (D - 1).bit_length())
    rows = min(MAX_ROWS, max(1, tile // block))
    return {"ROWS": rows, "BLOCK_D": block, "num_warps": min(MAX_WARPS, max(4, rows * block // (32 * per_thread)))}


def register_limit(x: Tensor) -> dict[str, int]:
    """The option of a launch that lets a backward have the registers it needs; AMD's compiler has no such option."""
    return {"maxnreg": MAX_REGISTERS} if target(x).backend == "cuda" else {}


def backward_grid(T: int, rows: int, has_dweight: bool) -> tuple[int, int]:
    """Programs, and tiles of `rows` rows that each walks: by T alone, so that the order of a sum is always the same."""
    tiles = -(-T // rows)
    steps = max(1, -(-tiles // PARTIALS)) if has_dweight else 1
    return -(-tiles // steps), steps


def launch_rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, offset: float, dtype: torch.dtype) -> Tensor:
    T, D = x_TD.shape
    out_TD = x_TD.new_empty(T, D, dtype=dtype)
    tile = row_tile(D)
    grid = (-(-T // tile["ROWS"]),)
    launch(_rms_norm_fwd_kernel, grid, x_TD, weight_D, out_TD, T, x_TD.stride(0), eps, offset, D=D, **tile)
    return out_TD


def launch_rms_norm_bwd(
    dout_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float, offset: float, has_dweight: bool
) -> tuple[Tensor, Tensor]:
    T, D = x_TD.shape
    dx_TD = x_TD.new_empty(T, D)
    tile = row_tile(D)
    programs, steps = backward_grid(T, tile["ROWS"], has_dweight)
    partial_PD = x_TD.new_empty(programs if has_dweight else 0, D, dtype=torch.float32)
    launch(
        _rms_norm_bwd_kernel,
        (programs,),
        dout_TD,
        x_TD,
        weight_D,
        dx_TD,
        partial_PD,
        T,
        x_TD.stride(0),
        steps,
        eps,
        offset,
        D=D,
        HAS_DWEIGHT=has_dweight,
        **tile,
        **register_limit(x_TD),
    )
    return dx_TD, summed(partial_PD, weight_D, has_dweight)


def summed(partial_PD: Tensor, weight_D: Tensor, has_dweight: bool) -> Tensor:
    """The weight's gradient from the programs' sums, in their order; empty where it is not wanted."""
    return partial_PD.sum(0).to(weight_D.dtype) if has_dweight else weight_D.new_empty(0)


def _rms_norm_bwd_fake(dout_TD, x_TD, weight_D, eps, offset, has_dweight):
    return torch.empty_like(x_TD, memory_format=torch.contiguous_format), weight_D.new_empty(
        weight_D.shape[0] if has_dweight else 0
    )


def _setup_context(ctx, inputs, output):
    x_TD, weight_D, ctx.eps, ctx.offset, _ = inputs
    ctx.save_for_backward(x_TD, weight_D)


def _backward(ctx, dout_TD):
    has_dweight = ctx.needs_input_grad[1]
    dx_TD, dweight_D = _rms_norm_bwd(dout_TD.contiguous(), *ctx.saved_tensors, ctx.eps, ctx.offset, has_dweight)
    return dx_TD, dweight_D if has_dweight else None, None, None, None


_rms_norm_bwd = define_op(
    "rms_norm_bwd(Tensor dout, Tensor x, Tensor weight, float eps, float offset, bool has_dweight) -> (Tensor, Tensor)",
    launch_rms_norm_bwd,
    _rms_norm_bwd_fake,
)
_rms_norm = define_op(
    "rms_norm(Tensor x, Tensor weight, float eps, float offset, ScalarType dtype) -> Tensor",
    launch_rms_norm,
    lambda x_TD, weight_D, eps, offset, dtype: x_TD.new_empty(x_TD.shape, dtype=dtype),
    setup_context=_setup_context,
    backward=_backward,
)


# --- public ---------------------------------------------------------------------------------------------


def rms_norm(
    x_TD: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0, dtype: torch.dtype | None = None
) -> Tensor:
    """Normalise each row by its root mean square.

    Args:
        x_TD: [..., D] fp32, bf16 or fp16 (fp64 runs the reference). Rows may lie any stride apart; more than one
            leading dimension is read in place only where they flatten to one.
        weight_D: [D], any float dtype, same device.
        eps: added to the mean square.
        offset: added to the weight; 1 for Gemma, else 0.
        dtype: of the result; default that of `x_TD`.

    Returns:
        [..., D]; computed in fp32, rounded once. Differentiable in `x_TD` and `weight_D`.

    Raises:
        ValueError: `weight_D` does not match the last dimension, or is on another device; another dtype than these,
            rows that are not contiguous, a negative `eps`.

    Error: one rounding to `dtype` beyond fp32. Each row depends on itself alone; the weight's gradient is a sum of
        sums over fixed runs of rows. Bitwise deterministic.
    """
    check_rows("x_TD", x_TD)
    check_weight("weight_D", weight_D, x_TD)
    check_eps(eps)
    if dtype is not None:
        check_dtype("dtype", dtype)
    run = implementation(x_TD)
    if run == "torch" or x_TD.dtype == torch.float64:
        return rms_norm_reference(x_TD, weight_D, eps, offset, dtype)
    if run == "cpu":
        if needs_gradient(x_TD, weight_D):
            return _RmsNormCpu.apply(x_TD, weight_D, eps, offset, dtype)
        return rms_norm_cpu(x_TD, weight_D, eps, offset, dtype)[0]
    x_RD = x_TD.flatten(0, -2) if x_TD.ndim != 1 else x_TD[None]
    return _rms_norm(x_RD, weight_D.contiguous(), eps, offset, dtype or x_TD.dtype).view(x_TD.shape)
