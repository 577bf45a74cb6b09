"""Rotary position embedding, half-split form (Hugging Face's layout of Llama, Mistral, Qwen and Gemma).

    out = [x0 * cos - x1 * sin, x1 * cos + x0 * sin]        x0, x1: first and second half of a head

Shape letters: T = packed tokens, H = heads, K = head size. Memory-bound.
Source: Su et al. 2021; the stretched tables are those of linear position interpolation (Chen et al. 2023),
Llama 3.1's piecewise rule and YaRN (Peng et al. 2023).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flashvec.kernels.backend import implementation
from flashvec.kernels.precision import widen


@dataclass(frozen=True)
class Rope:
    """One rotary table: base frequency and the rule that stretches it.

    `kind` is default, linear, llama3 or yarn; the other numbers are that rule's own .
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
    period = rope.theta ** (torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
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
    keep = 1 - ((torch.arange(head_size // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return 1.0 / (rope.factor * period) * (1 - keep) + 1.0 / period * keep


def rope_table(rope: Rope, head_size: int, num_positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 .. num_positions - 1.

    Returns:
        Two fp32 [num_positions, K / 2] tensors; angles are fp32 products, as in the models' own code.
    """
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * rope_frequencies(rope, head_size)
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor


def rope_reference(x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    x0, x1 = widen(x_THK).chunk(2, -1)
    cos, sin = cos_TK[:, None], sin_TK[:, None]
    return torch.cat([x0 * cos - x1 * sin, x1 * cos + x0 * sin], -1).to(x_THK.dtype)


def _rope_cpu(x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """The reference in half its passes over memory: two products a half, the second straight into the result."""
    out_THK = torch.empty(x_THK.shape, dtype=x_THK.dtype)
    x0, x1 = widen(x_THK).chunk(2, -1)
    out0, out1 = out_THK.chunk(2, -1)
    cos, sin = cos_TK[:, None], sin_TK[:, None]
    torch.addcmul(x0 * cos, x1, sin, value=-1, out=out0)
    torch.addcmul(x1 * cos, x0, sin, out=out1)
    return out_THK


def rope(x_THK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotate every head by its token's position.

    Args:
        x_THK: [T, H, K] fp32, bf16 or fp16; any row stride (a slice of a merged product is fine).
        cos_TK, sin_TK: fp32 [T, K / 2], rows of `rope_table` gathered by position.

    Returns:
        [T, H, K] in the dtype of `x_THK`, contiguous.

    Raises:
        ValueError: sizes that do not match.

    Error: fp32 arithmetic, one rounding.
    """
    if cos_TK.shape != (x_THK.shape[0], x_THK.shape[2] // 2) or sin_TK.shape != cos_TK.shape:
        raise ValueError(f"x_THK is {tuple(x_THK.shape)}, cos_TK {tuple(cos_TK.shape)}, sin_TK {tuple(sin_TK.shape)}")
    # Training differentiates through the reference; the CPU form writes into its result.
    in_place = implementation(x_THK) == "cpu" and not (torch.is_grad_enabled() and x_THK.requires_grad)
    return (_rope_cpu if in_place else rope_reference)(x_THK, cos_TK, sin_TK)
