"""How an op is judged: against fp32 truth, it may be at most twice as far off as torch in the same dtype."""

import torch
from torch import Tensor


def assert_as_close_as_torch(got: Tensor, same_dtype: Tensor, truth: Tensor) -> None:
    """`truth` is the reference run in fp32, `same_dtype` the reference run in the dtype of `got`."""
    assert got.dtype == same_dtype.dtype and got.shape == truth.shape
    error = (got.float() - truth).abs().max()
    torch_error = (same_dtype.float() - truth).abs().max()
    one_rounding = torch.finfo(got.dtype).eps * truth.abs().max()
    allowed = 2 * torch_error + one_rounding
    assert error <= allowed, f"off by {error:.2e}, allowed {allowed:.2e} (torch is off by {torch_error:.2e})"
