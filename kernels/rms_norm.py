"""Root-mean-square norm over the last dimension.

    out = x / sqrt(mean(x²) + eps) * (offset + weight)

Shape letters: T = packed tokens, D = hidden size. Memory-bound: reads T*D, writes T*D elements.
Source: Zhang and Sennrich 2019; `offset` 1 is Gemma's form, whose weights are stored as w - 1.
"""

import torch
from torch import Tensor

from flashvec.kernels.backend import implementation
from flashvec.kernels.precision import widen


def rms_norm_reference(
    x_TD: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0, dtype: torch.dtype | None = None
) -> Tensor:
    x = widen(x_TD)
    scale_D = weight_D.to(x.dtype) + offset
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale_D).to(dtype or x_TD.dtype)


def _rms_norm_cpu(x_TD: Tensor, weight_D: Tensor, eps: float, offset: float, dtype: torch.dtype | None) -> Tensor:
    """The reference's arithmetic, bit for bit, in one buffer: its steps are small, allocating is what costs."""
    x = widen(x_TD)
    out = x.square()
    scale = out.mean(-1, keepdim=True).add_(eps).rsqrt_()
    return torch.mul(x, scale, out=out).mul_(weight_D.to(x.dtype) + offset).to(dtype or x_TD.dtype)


def rms_norm(
    x_TD: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0, dtype: torch.dtype | None = None
) -> Tensor:
    """Normalise each row by its root mean square.

    Args:
        x_TD: [..., D] fp32, bf16 or fp16.
        weight_D: [D], any float dtype.
        eps: added to the mean square.
        offset: added to the weight; 1 for Gemma, else 0.
        dtype: of the result; default that of `x_TD`.

    Returns:
        [..., D]; computed in fp32, rounded once.

    Raises:
        ValueError: `weight_D` does not match the last dimension.

    Error: one rounding to `dtype` beyond fp32. Each row depends on itself alone.
    """
    if weight_D.shape != x_TD.shape[-1:]:
        raise ValueError(f"weight_D is {tuple(weight_D.shape)}, x_TD's rows have {x_TD.shape[-1]} elements")
    # Training differentiates through the reference; the CPU form overwrites what its gradient would need.
    grad = torch.is_grad_enabled() and (x_TD.requires_grad or weight_D.requires_grad)
    run = _rms_norm_cpu if implementation(x_TD) == "cpu" and not grad else rms_norm_reference
    return run(x_TD, weight_D, eps, offset, dtype)
