from functools import partial

import pytest
import torch
from compare import assert_as_close_as_torch, wider
from gradients import HALVES, assert_op_and_gradients, dense_past_2_31, far_apart, surrounded

from flashvec.kernels.backend import launches
from flashvec.kernels.swiglu import ACTIVATIONS, swiglu, swiglu_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(0, 8), (1, 6), (5, 200)], ids=str)
def test_matches_reference(shape, activation, dtype, device):
    x = torch.randn(shape, dtype=dtype, device=device)
    before = x.clone()
    got = swiglu(x, activation)
    assert torch.equal(x, before)  # the CPU form works in place, on its own memory
    if shape[0]:
        truth = swiglu_reference(x.to(wider(dtype)), activation)
        gate, up = x.chunk(2, -1)
        assert_as_close_as_torch(got, ACTIVATIONS[activation](gate) * up, truth)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_processors_gradient_and_what_it_keeps(activation, dtype, device):
    if device == "cuda":
        pytest.skip("the CPU's own form")
    leaf = torch.randn(37, 2 * 48).to(dtype)
    reference = partial(swiglu_reference, activation=activation)
    assert_op_and_gradients(partial(swiglu, activation=activation), reference, [leaf])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        swiglu(leaf.requires_grad_(), activation)
    assert kept == [leaf.shape]


def test_definition(device):
    x = torch.tensor([[0.0, 2.0, 5.0, 3.0]], device=device)
    torch.testing.assert_close(swiglu(x), torch.tensor([[0.0, 2 / (1 + torch.e**-2.0) * 3]], device=device))


def test_rejects(device):
    with pytest.raises(ValueError, match="even width, got 3"):
        swiglu(torch.zeros(1, 3, device=device))
    with pytest.raises(ValueError, match="'tanh'"):
        swiglu(torch.zeros(1, 4, device=device), "tanh")
    with pytest.raises(ValueError, match=r"\[T, 2 F\], got \(1, 3, 4\)"):
        swiglu(torch.zeros(1, 3, 4, device=device))
    with pytest.raises(ValueError, match="rows must be contiguous"):
        swiglu(torch.zeros(4, 3, device=device).T)


# --- the kernel -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 6), (5, 200), (2, 2 * 512), (3, 2 * 1025)], ids=str)
def test_kernel_and_its_gradient(shape, activation, dtype, device, interpreted):
    x = (2 * torch.randn(shape, device=device)).to(dtype)
    before = launches.copy()
    assert_op_and_gradients(lambda x: swiglu(x, activation), lambda x: swiglu_reference(x, activation), [x])
    ran = launches - before
    assert ran["_swiglu_fwd_kernel"] == ran["_swiglu_bwd_kernel"] == 1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # exp2 overflows to infinity, whose inverse is the 0 wanted
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_kernel_far_from_zero(activation, device, interpreted):
    gate = torch.tensor([-3e38, -1e19, -1e4, -200.0, -100.0, -20.0, -0.0, 20.0, 100.0, 1e4, 3e38], device=device)
    x = torch.stack([gate, torch.ones_like(gate)], 1).requires_grad_()
    got, want = swiglu(x, activation), swiglu_reference(x, activation)
    torch.testing.assert_close(got, want, atol=1e-36, rtol=1e-5)
    got, want = (torch.autograd.grad(out.sum(), x)[0] for out in (got, want))
    want[:, 0] = torch.where(gate.abs() < 1e15, want[:, 0], (gate > 0).float())  # beyond, torch may say inf * 0
    torch.testing.assert_close(got, want, atol=1e-36, rtol=1e-5)


def test_kernel_reads_its_own_rows_alone(device, interpreted):
    x = torch.randn(5, 2 * 30, device=device)
    got = swiglu(surrounded(x))
    assert torch.equal(got, swiglu(x)) and torch.equal(got[2:3], swiglu(x[2:3]))
    assert swiglu(x[:0]).shape == (0, 30)


def test_op_is_well_formed(device, interpreted):
    x = torch.randn(3, 16, device=device, dtype=torch.float16, requires_grad=True)
    torch.library.opcheck(torch.ops.flashvec.swiglu.default, (x[:, 2:-2], "gelu_tanh"))


def test_reads_rows_past_2_31_elements(device, interpreted):
    assert_op_and_gradients(swiglu, swiglu_reference, [far_apart(torch.randn(3, 2 * 48, device=device))])


@dense_past_2_31()
def test_rows_past_2_31_elements():
    x = torch.ones(2**31 // 28672 + 2, 28672, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.randn(28672)
    want = swiglu_reference(x[-1:])
    assert_as_close_as_torch(swiglu(x)[-1:], want, want)
