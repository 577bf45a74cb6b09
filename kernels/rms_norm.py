"""Root-mean-square norm over the last dimension.

    out = x / sqrt(mean(x²) + eps) * (offset + weight)

Shape letters: T = packed tokens, D = hidden size. Memory-bound: reads T*D, writes T*D elements.
Source: Zhang and Sennrich 2019; `offset` 1 is Gemma's form, whose weights are stored as w - 1.
"""

import torch
from torch import Tensor

from flashvec.kernels.precision import widen


def rms_norm_reference(
    x_TD: Tensor, weight_D: Tensor, eps: float, offset: float = 0.0, dtype: torch.dtype | None = None
) -> Tensor:
    x = widen(x_TD)
    scale_D = weight_D.to(x.dtype) + offset
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale_D).to(dtype or x_TD.dtype)


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
    return rms_norm_reference(x_TD, weight_D, eps, offset, dtype)
