"""How an op is judged: against a wider truth, it may be at most twice as far off as torch in the same dtype."""

import torch
from torch import Tensor


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype of truth: fp32 for halves, fp64 for fp32."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def assert_as_close_as_torch(got: Tensor, same_dtype: Tensor, truth: Tensor) -> None:
    """`truth` is the reference run in `wider(got.dtype)`, `same_dtype` the reference run in the dtype of `got`."""
    assert got.dtype == same_dtype.dtype and got.shape == truth.shape
    error = (got.to(truth.dtype) - truth).abs().max()
    torch_error = (same_dtype.to(truth.dtype) - truth).abs().max()
    one_rounding = torch.finfo(got.dtype).eps * truth.abs().max()
    allowed = 2 * torch_error + one_rounding
    assert error <= allowed, f"off by {error:.2e}, allowed {allowed:.2e} (torch is off by {torch_error:.2e})"
