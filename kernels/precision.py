"""The arithmetic of references: at least fp32, and fp64 for fp64 inputs, so that fp32 results have a truth too."""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """`x` in fp32, or as it is if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
