import pytest
import torch
from compare import assert_as_close_as_torch, wider

from flashvec.kernels.linear import can_pack, linear, linear_reference, pack, unpacked


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


def packable(dtype):
    weight = torch.randn(72, 40).to(dtype)
    if not can_pack(weight):
        pytest.skip(f"this torch packs no {dtype} weight on this processor")
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight_is_the_same_numbers(dtype):
    weight = packable(dtype)
    packed = pack(weight)
    assert packed.is_mkldnn and packed.shape == weight.shape and packed.dtype == dtype
    assert torch.equal(unpacked(packed), weight) and unpacked(weight) is weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("plan", [None, (48,), (16, 32)], ids=str)
def test_a_packed_weight_matches_the_reference(plan, bias, dtype):
    weight = packable(dtype)
    x = torch.randn(48, 80).to(dtype)[:, ::2]  # rows that are not contiguous in themselves
    b = torch.randn(72).to(dtype) if bias else None
    truth = linear_reference(*(None if t is None else t.to(wider(dtype)) for t in (x, weight, b)))
    assert_as_close_as_torch(linear(x, pack(weight), b, plan), torch.nn.functional.linear(x, weight, b), truth)


def test_a_packed_weight_hands_gradients_on():
    weight = packable(torch.float32)
    x, b = torch.randn(16, 40, requires_grad=True), torch.randn(72, requires_grad=True)
    got = torch.autograd.grad(linear(x, pack(weight), b).square().sum(), (x, b))
    want = torch.autograd.grad(linear(x, weight, b).square().sum(), (x, b))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_half_is_not_packed():
    assert not can_pack(torch.zeros(4, 4, dtype=torch.float16)) and not can_pack(torch.zeros(4, 4, device="meta"))
