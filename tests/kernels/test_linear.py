import pytest
import torch
from compare import assert_as_close_as_torch, wider

from flashvec.kernels.linear import linear, linear_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("plan", [None, (48,), (16, 32), (16, 16, 16)], ids=str)
def test_matches_reference(plan, bias, dtype, device):
    x, w = torch.randn(48, 40, dtype=dtype, device=device), torch.randn(24, 40, dtype=dtype, device=device)
    b = torch.randn(24, dtype=dtype, device=device) if bias else None
    truth = linear_reference(*(None if t is None else t.to(wider(dtype)) for t in (x, w, b)))
    assert_as_close_as_torch(linear(x, w, b, plan), torch.nn.functional.linear(x, w, b), truth)


def test_rejects_a_plan_that_leaves_rows_out():
    with pytest.raises(ValueError, match="covers 32 rows, x_TC has 48"):
        linear(torch.zeros(48, 4), torch.zeros(3, 4), row_plan=(16, 16))
