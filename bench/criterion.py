"""How an op is judged: against a wider truth, it may be at most twice as far off as torch in the same dtype.

Tests (`tests/compare.py`) and the checks that a GPU's figures start with (`bench/gpu_checks.py`) share this rule.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Distance:
    """How far a result is from the truth, how far it may be, and how far torch is in the same dtype."""

    error: float
    allowed: float
    torch_error: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # false for NaN

    def __str__(self) -> str:
        return f"off by {self.error:.2e}, allowed {self.allowed:.2e} (torch is off by {self.torch_error:.2e})"


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype of truth: fp32 for halves, fp64 for fp32."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def distance(got: Tensor, same_dtype: Tensor, truth: Tensor) -> Distance:
    """Largest absolute difference from the truth, judged.

    Args:
        got: the op's result.
        same_dtype: the reference run in the dtype of `got`.
        truth: the reference run in `wider(got.dtype)`.
    """
    if not truth.numel():
        return Distance(0.0, 0.0, 0.0)
    error = (got.to(truth.dtype) - truth).abs().max()
    torch_error = (same_dtype.to(truth.dtype) - truth).abs().max()
    one_rounding = torch.finfo(got.dtype).eps * truth.abs().max()
    return Distance(float(error), float(2 * torch_error + one_rounding), float(torch_error))
