"""Rotary position embedding, half-split form (Hugging Face's layout of Llama, Mistral, Qwen and Gemma).

    out = [x0 * cos - x1 * sin, x1 * cos + x0 * sin]        x0, x1: first and second half of a head

Its backward is the rotation by the opposite angle.

Shape letters: T = packed tokens, H = heads, K = head size. Memory-bound: reads and writes T*H*K elements; a token's
cosines and sines are read once for all of its heads, the rest comes from cache.
Source: Su et al. 2021; the stretched tables are those of linear position interpolation (Chen et al. 2023),
Llama 3.1's piecewise rule and YaRN (Peng et al. 2023).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flashvec.kernels.backend import define_op, implementation, launch, needs_gradient, tl, triton
from flashvec.kernels.checks import check_constant, check_rows
from flashvec.kernels.precision import widen
from flashvec.kernels.rms_norm import MAX_ROWS

TILE = 2048  # elements of a program's heads: 16 a thread in 4 warps, two loads of 16 bytes in halves


@dataclass(frozen=True)
class Rope:
    """One rotary table: base frequency and the rule that stretches it.

    `kind` is default, linear, llama3 or yarn; the other numbers are that rule's own.
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0  # cos and sin are multiplied by it
    truncate: bool = True


def rope_frequencies(rope: Rope, head_size: int) -> Tensor:
    """Radians per position for each of the head's K / 2 planes: fp32 [K / 2].

    Computed in fp32, in the order of the models' own code: a model was trained with these roundings, and at position
    4,000 a frequency that is exact instead turns a plane by another 2e-4 radians.
    """
    period = rope.theta ** (torch.arange(0, head_size, 2, dtype=torch.float32, device="cpu") / head_size)
    frequencies = 1.0 / period
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    if rope.kind == "yarn":
        return _yarn(period, rope, head_size)
    return frequencies


def _llama3(frequencies: Tensor, rope: Rope) -> Tensor:
    """Keep fast planes, slow those down by `factor` whose wave is long, blend between the two wavelengths."""
    wavelengths = 2 * math.pi / frequencies
    shortest, longest = (rope.original_max_positions / f for f in (rope.high_freq_factor, rope.low_freq_factor))
    blend = rope.original_max_positions / wavelengths - rope.low_freq_factor
    blend = blend / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
    slowed = torch.where(wavelengths > longest, frequencies / rope.factor, frequencies)
    return torch.where((wavelengths >= shortest) & (wavelengths <= longest), blended, slowed)


def _yarn(period: Tensor, rope: Rope, head_size: int) -> Tensor:
    """Keep planes that turn more than `beta_fast` times, slow those below `beta_slow`, ramp between."""

    def plane_with(turns: float) -> float:
        ratio = rope.original_max_positions / (turns * 2 * math.pi)
        return head_size * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = plane_with(rope.beta_fast), plane_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    width = high - low if high != low else 0.001
    keep = 1 - ((torch.arange(head_size // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    return 1.0 / (rope.factor * period) * (1 - keep) + 1.0 / period * keep


def rope_table(rope: Rope, head_size: int, num_positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 .. num_positions - 1.

    Returns:
        Two fp32 [num_positions, K / 2] tensors; angles are fp32 products, as in the models' own code.
    """
    angles = torch.arange(num_positions, dtype=torch.float32, device="cpu")[:, None] * rope_frequencies(rope, head_size)
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor


def rope_reference(x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    x0, x1 = widen(x_THK).chunk(2, -1)
    cos, sin = cos_TK[:, None], sin_TK[:, None]
    return torch.cat([x0 * cos - x1 * sin, x1 * cos + x0 * sin], -1).to(x_THK.dtype)


def _rope_cpu(x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor, is_back: bool = False) -> Tensor:
    """The reference in few passes over memory: one product for whole heads, then each half's other one in its place."""
    sign = -1 if is_back else 1
    x_TH2K = widen(x_THK).unflatten(2, (2, -1))
    out_TH2K = torch.mul(x_TH2K, cos_TK[:, None, None], out=x_TH2K.new_empty(x_TH2K.shape))  # in order, however x lies
    out_TH2K[:, :, 0].addcmul_(x_TH2K[:, :, 1], sin_TK[:, None], value=-sign)
    out_TH2K[:, :, 1].addcmul_(x_TH2K[:, :, 0], sin_TK[:, None], value=sign)
    return out_TH2K.flatten(2).to(x_THK.dtype)


class _RopeCpu(torch.autograd.Function):
    """`_rope_cpu` and back."""

    @staticmethod
    def forward(ctx: Any, x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TK, sin_TK)
        return _rope_cpu(x_THK, cos_TK, sin_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos_TK, sin_TK = ctx.saved_tensors
        return _rope_cpu(grads[0], cos_TK, sin_TK, is_back=True), None, None


# --- kernels: one program per few heads -------------------------------------------------------------------


@triton.jit
def head_rows(x_stride, head_stride, T, H: tl.constexpr, ROWS: tl.constexpr, tile):
    """Heads of a tile, counted over all tokens: token of each, offset of its first element, and whether it exists.

    Heads are fewer than 2^31 in any memory; their elements may be more.
    """
    row = tile * ROWS + tl.arange(0, ROWS)
    token = row // H
    at = token.to(tl.int64) * x_stride + (row % H).to(tl.int64) * head_stride
    return row, token, at, token < T


@triton.jit
def rotate(x0, x1, cos, sin, INVERSE: tl.constexpr):
    """Turn the planes (x0, x1) by their angles, or back."""
    if INVERSE:
        sin = -sin
    return x0 * cos - x1 * sin, x1 * cos + x0 * sin


@triton.jit
def _rope_fwd_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    T,
    x_stride,
    head_stride,
    H: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INVERSE: tl.constexpr,
):
    row, token, at, exists = head_rows(x_stride, head_stride, T, H, ROWS, tl.program_id(0))
    k = tl.arange(0, BLOCK)[None, :]
    inside = exists[:, None] & (k < HALF)
    angle = token.to(tl.int64)[:, None] * HALF + k
    cos = tl.load(cos_ptr + angle, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=inside, other=0.0)
    x0 = tl.load(x_ptr + at[:, None] + k, mask=inside, other=0.0).to(tl.float32)
    x1 = tl.load(x_ptr + at[:, None] + HALF + k, mask=inside, other=0.0).to(tl.float32)
    out0, out1 = rotate(x0, x1, cos, sin, INVERSE)
    out = out_ptr + row.to(tl.int64)[:, None] * (2 * HALF) + k
    tl.store(out, out0.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out + HALF, out1.to(out_ptr.dtype.element_ty), mask=inside)


# --- ops ------------------------------------------------------------------------------------------------


def head_tile(K: int) -> dict[str, int]:
    """How kernels that turn heads cut them: constants and warps of a launch."""
    block = max(8, 1 << (K // 2 - 1).bit_length())
    rows = min(MAX_ROWS, max(1, TILE // 2 // block))
    return {"HALF": K // 2, "ROWS": rows, "BLOCK": block, "num_warps": 4}


def launch_rope(x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor, inverse: bool) -> Tensor:
    T, H, K = x_THK.shape
    out_THK = x_THK.new_empty(T, H, K)
    tile = head_tile(K)
    launch(
        _rope_fwd_kernel,
        (-(-T * H // tile["ROWS"]),),
        x_THK,
        cos_TK,
        sin_TK,
        out_THK,
        T,
        x_THK.stride(0),
        x_THK.stride(1),
        H=H,
        INVERSE=inverse,
        **tile,
    )
    return out_THK


def _setup_context(ctx, inputs, output):
    _, cos_TK, sin_TK, ctx.inverse = inputs
    ctx.save_for_backward(cos_TK, sin_TK)


def _backward(ctx, dout_THK):
    return _rope(dout_THK.contiguous(), *ctx.saved_tensors, not ctx.inverse), None, None, None


_rope = define_op(
    "rope(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor",
    launch_rope,
    lambda x_THK, cos_TK, sin_TK, inverse: x_THK.new_empty(x_THK.shape),
    setup_context=_setup_context,
    backward=_backward,
)


# --- public ---------------------------------------------------------------------------------------------


def check_heads(x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> None:
    """Raise ValueError unless heads have an even size, and fp32 tables a row for each token and a column a plane."""
    shape = tuple(x_THK.shape)
    if len(shape) != 3 or shape[2] % 2 or cos_TK.shape != (shape[0], shape[2] // 2) or sin_TK.shape != cos_TK.shape:
        raise ValueError(f"x_THK is {shape}, cos_TK {tuple(cos_TK.shape)}, sin_TK {tuple(sin_TK.shape)}")
    check_rows("x_THK", x_THK)
    for name, table in (("cos_TK", cos_TK), ("sin_TK", sin_TK)):
        if not table.is_contiguous() or table.device != x_THK.device:
            raise ValueError(
                f"{name} must be contiguous on {x_THK.device}, got strides {table.stride()} on {table.device}"
            )
        check_constant(name, table)
        if table.dtype not in (torch.float32, torch.promote_types(x_THK.dtype, torch.float32)):
            raise ValueError(f"{name} is {table.dtype}, expected torch.float32: narrower angles turn far tokens wrong")


def rope(x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotate every head by its token's position.

    Args:
        x_THK: [T, H, K] fp32, bf16 or fp16 (fp64 runs the reference); tokens and heads any stride apart (a slice of a
            merged product is fine).
        cos_TK, sin_TK: fp32 [T, K / 2], contiguous, same device: rows of `rope_table` gathered by position.

    Returns:
        [T, H, K] in the dtype of `x_THK`, contiguous. Differentiable in `x_THK`.

    Raises:
        ValueError: sizes, layouts or devices that do not match, another dtype than these, tables that want a gradient.

    Error: fp32 arithmetic, one rounding. Bitwise deterministic; each head depends on itself alone.
    """
    check_heads(x_THK, cos_TK, sin_TK)
    run = implementation(x_THK)
    if run == "torch" or x_THK.dtype == torch.float64 or (run == "cpu" and torch.compiler.is_compiling()):
        return rope_reference(x_THK, cos_TK, sin_TK)
    if run == "cpu":
        return (_RopeCpu.apply if needs_gradient(x_THK) else _rope_cpu)(x_THK, cos_TK, sin_TK)
    return _rope(x_THK, cos_TK, sin_TK, False)
