import pytest
import torch

from flashvec.kernels.precision import widen


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_at_least_fp32(dtype, wide):
    assert widen(torch.ones(1, dtype=dtype)).dtype == wide
