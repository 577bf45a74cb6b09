from functools import partial

import pytest
import torch
from compare import assert_as_close_as_torch, wider
from gradients import HALVES, assert_op_and_gradients, dense_past_2_31, far_apart, surrounded

from flashvec.kernels.backend import launches
from flashvec.kernels.rms_norm import backward_grid, rms_norm, rms_norm_reference, row_tile


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


def test_rejects_rows_that_are_not_contiguous(device):
    with pytest.raises(ValueError, match=r"strides are \(1, 2\)"):
        rms_norm(torch.zeros(2, 4, device=device).T.contiguous().T, torch.ones(4, device=device), 1e-6)


# --- the kernel -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("T", "D"), [(1, 8), (31, 16), (33, 16), (7, 130), (9, 130), (3, 576), (2, 2050)])
def test_kernel_and_its_gradients(T, D, offset, dtype, device, interpreted):
    x = torch.randn(T, D, device=device).to(dtype)
    w = torch.randn(D, device=device)
    before = launches.copy()
    assert_op_and_gradients(
        lambda x, w: rms_norm(x, w, 1e-2, offset), lambda x, w: rms_norm_reference(x, w, 1e-2, offset), [x, w]
    )
    ran = launches - before
    assert ran["_rms_norm_fwd_kernel"] == ran["_rms_norm_bwd_kernel"] == 1


@pytest.mark.parametrize("dtype", HALVES)
def test_kernel_from_the_residual_stream_to_products(dtype, device, interpreted):
    x, w = torch.randn(5, 48, device=device), torch.randn(48, device=device).to(dtype)
    assert_op_and_gradients(
        lambda x, w: rms_norm(x, w, 1e-2, 0.0, dtype),
        lambda x, w: rms_norm_reference(x, w, 1e-2, 0.0, x.dtype if x.dtype == torch.float64 else dtype),
        [x, w],
    )


def test_kernel_sums_the_weights_gradient_over_many_tiles(device, interpreted, monkeypatch):
    monkeypatch.setattr("flashvec.kernels.rms_norm.PARTIALS", 2)
    x, w = torch.randn(100, 16, device=device), torch.randn(16, device=device)
    assert backward_grid(100, row_tile(16)["ROWS"], True) == (2, 2)  # of four tiles
    assert_op_and_gradients(lambda x, w: rms_norm(x, w, 1e-2), lambda x, w: rms_norm_reference(x, w, 1e-2), [x, w])


def test_kernel_without_a_gradient_for_the_weight(device, interpreted):
    x, w = torch.randn(3, 24, device=device, requires_grad=True), torch.randn(24, device=device)
    (got,) = torch.autograd.grad(rms_norm(x, w, 1e-2).square().sum(), x)
    (want,) = torch.autograd.grad(rms_norm_reference(x, w, 1e-2).square().sum(), x)
    torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # eps 0 divides by zero in the rows of a tile past the last
def test_kernel_reads_its_own_rows_alone(device, interpreted):
    x, w = torch.randn(5, 40, device=device), torch.randn(40, device=device)
    got = rms_norm(surrounded(x), w, 0.0)
    assert torch.equal(got, rms_norm(x, w, 0.0)) and torch.equal(got[2:3], rms_norm(x[2:3], w, 0.0))
    heads = torch.randn(3, 4, 40, device=device)
    assert torch.equal(rms_norm(heads, w, 1e-6)[1], rms_norm(heads[1], w, 1e-6))
    assert rms_norm(x[:0], w, 1e-6).shape == (0, 40)


def test_op_is_well_formed(device, interpreted):
    x = torch.randn(3, 8, device=device, dtype=torch.float16, requires_grad=True)
    w = torch.randn(8, device=device, requires_grad=True)
    for rows in (surrounded(x.detach()).requires_grad_(), x[:0]):
        torch.library.opcheck(torch.ops.flashvec.rms_norm.default, (rows, w, 1e-6, 0.0, torch.float32))


def test_reads_rows_past_2_31_elements(device, interpreted):
    x, w = torch.randn(3, 48, device=device), torch.randn(48, device=device)
    assert_op_and_gradients(partial(rms_norm, eps=1e-6), partial(rms_norm_reference, eps=1e-6), [far_apart(x), w])


@dense_past_2_31()
def test_rows_past_2_31_elements():
    T, D = 2**31 // 4096 + 2, 4096
    x, w = torch.ones(T, D, dtype=torch.bfloat16, device="cuda"), torch.ones(D, device="cuda")
    x[-1] = torch.randn(D)
    assert_as_close_as_torch(rms_norm(x, w, 1e-6)[-1], *[rms_norm_reference(x[-1], w, 1e-6)] * 2)


@pytest.mark.parametrize("out", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_cpu_form_has_the_references_bits(dtype, out):
    merged = torch.randn(40, 5, 96, dtype=dtype)
    x, w = merged[:, :3], torch.randn(96)  # a strided slice of a merged product
    before = merged.clone()
    assert torch.equal(rms_norm(x, w, 1e-5, 1.0, out), rms_norm_reference(x, w, 1e-5, 1.0, out))
    assert torch.equal(merged, before)
    assert rms_norm(x[:0], w, 1e-5).shape == (0, 3, 96)
