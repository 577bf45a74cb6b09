import pytest
import torch
from compare import assert_as_close_as_torch, wider

from flashvec.kernels.rms_norm import rms_norm, rms_norm_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("D", [8, 130, 576])
def test_matches_reference(D, offset, dtype, device):
    x = torch.randn(7, D, dtype=dtype, device=device)
    w = torch.randn(D, device=device)
    truth = rms_norm_reference(x.to(wider(dtype)), w, 1e-2, offset)
    same = torch.nn.functional.rms_norm(x, (D,), (w + offset).to(dtype), 1e-2)
    assert_as_close_as_torch(rms_norm(x, w, 1e-2, offset), same, truth)


def test_definition(device):
    x = torch.tensor([[3.0, 4.0]], device=device)
    w = torch.tensor([1.0, 2.0], device=device)
    got = rms_norm(x, w, eps=0.0, offset=1.0)
    torch.testing.assert_close(got, torch.tensor([[3.0 * 2, 4.0 * 3]], device=device) / 12.5**0.5)


def test_result_dtype_and_zero_rows(device):
    x = torch.zeros(2, 4, dtype=torch.bfloat16, device=device)
    got = rms_norm(x, torch.ones(4, device=device), 1e-6, dtype=torch.float32)
    assert got.dtype == torch.float32 and not got.any()


def test_gradient_matches_torch(device):
    x = torch.randn(3, 16, device=device, requires_grad=True)
    w = torch.randn(16, device=device, requires_grad=True)
    got = torch.autograd.grad(rms_norm(x, w, 1e-5).square().sum(), [x, w])
    want = torch.autograd.grad(torch.nn.functional.rms_norm(x, (16,), w, 1e-5).square().sum(), [x, w])
    torch.testing.assert_close(got, want)


def test_rejects_a_weight_of_another_width(device):
    with pytest.raises(ValueError, match=r"\(3,\)"):
        rms_norm(torch.zeros(2, 4, device=device), torch.ones(3, device=device), 1e-6)


@pytest.mark.parametrize("out", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_cpu_form_has_the_references_bits(dtype, out):
    merged = torch.randn(40, 5, 96, dtype=dtype)
    x, w = merged[:, :3], torch.randn(96)  # a strided slice of a merged product
    before = merged.clone()
    assert torch.equal(rms_norm(x, w, 1e-5, 1.0, out), rms_norm_reference(x, w, 1e-5, 1.0, out))
    assert torch.equal(merged, before)
    assert rms_norm(x[:0], w, 1e-5).shape == (0, 3, 96)
