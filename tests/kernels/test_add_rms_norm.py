from functools import partial

import pytest
import torch
from compare import assert_as_close_as_torch, wider
from gradients import HALVES, assert_op_and_gradients, dense_past_2_31, far_apart, outputs_and_gradients, surrounded

from flashvec.kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from flashvec.kernels.backend import launches
from flashvec.kernels.rms_norm import rms_norm


def leaves(T, D, y_dtype, post, device, h_dtype=torch.float32):
    h, y = torch.randn(T, D, device=device).to(h_dtype), torch.randn(T, D, device=device).to(y_dtype)
    return [h, y, *(torch.randn(D, device=device) for _ in range(1 + post))]


def op_and_reference(dtype, offset=0.0, eps=1e-2):
    def run(form):
        def op(h, y, w, post=None):
            out = torch.float64 if h.dtype == torch.float64 else dtype
            return form(h, y, w, eps, offset, out, post_weight_D=post)

        return op

    return run(add_rms_norm), run(add_rms_norm_reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("post", [False, True])
def test_is_an_add_and_a_norm(post, dtype, device):
    h, y, w, *post_weight = leaves(5, 130, dtype, post, device)
    post_weight = post_weight[0] if post else None
    got_sum, got = add_rms_norm(h, y, w, 1e-2, 1.0, post_weight_D=post_weight)
    added = rms_norm(y, post_weight, 1e-2, 1.0, torch.float32) if post else y
    assert got_sum.dtype == torch.float32 and got.dtype == dtype
    torch.testing.assert_close(got_sum, h + added)
    true = h.to(wider(dtype)) + added
    truth = torch.nn.functional.rms_norm(true, (130,), (w + 1).to(true.dtype), 1e-2)
    same = torch.nn.functional.rms_norm((h + added).to(dtype), (130,), (w + 1).to(dtype), 1e-2)
    assert_as_close_as_torch(got, same, truth)


def test_definition(device):
    h, y = torch.tensor([[2.0, 5.0]], device=device), torch.tensor([[1.0, -1.0]], device=device)
    w = torch.tensor([1.0, 2.0], device=device)
    got_sum, got = add_rms_norm(h, y, w, eps=0.0)
    torch.testing.assert_close(got_sum, torch.tensor([[3.0, 4.0]], device=device))
    torch.testing.assert_close(got, torch.tensor([[3.0, 8.0]], device=device) / 12.5**0.5)
    got_sum, _ = add_rms_norm(h, y * 3, w, eps=0.0, post_weight_D=w)  # y / its root mean square, 3, times the weight
    torch.testing.assert_close(got_sum, torch.tensor([[3.0, 3.0]], device=device))


# --- the kernel -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("y_dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize(("T", "D"), [(1, 8), (33, 16), (9, 130), (3, 576), (2, 2050)])
def test_kernel_and_its_gradients(T, D, post, offset, y_dtype, device, interpreted):
    before = launches.copy()
    assert_op_and_gradients(*op_and_reference(y_dtype, offset), leaves(T, D, y_dtype, post, device))
    ran = launches - before
    assert ran["_add_rms_norm_fwd_kernel"] == ran["_add_rms_norm_bwd_kernel"] == 1


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("h_is_half", "y_is_half"), [(True, True), (True, False), (False, False)])
def test_kernel_in_other_dtypes(h_is_half, y_is_half, dtype, device, interpreted):
    h_dtype, y_dtype = (dtype if half else torch.float32 for half in (h_is_half, y_is_half))
    assert_op_and_gradients(*op_and_reference(dtype), leaves(4, 40, y_dtype, False, device, h_dtype))


def test_kernel_sums_the_weights_gradients_over_many_tiles(device, interpreted, monkeypatch):
    monkeypatch.setattr("flashvec.kernels.rms_norm.PARTIALS", 2)  # 100 rows of 16: four tiles, two programs
    assert_op_and_gradients(*op_and_reference(torch.float32), leaves(100, 16, torch.float32, True, device))


@pytest.mark.parametrize("post", [False, True])
def test_kernel_without_gradients_for_the_weights(post, device, interpreted):
    op, reference = op_and_reference(torch.float32)
    h, y, *weights = leaves(3, 24, torch.float32, post, device)
    got, want = (outputs_and_gradients(lambda h, y, op=op: op(h, y, *weights), [h, y]) for op in (op, reference))
    torch.testing.assert_close(got, want)


def test_kernel_where_one_output_is_used(device, interpreted):
    op, reference = op_and_reference(torch.float32)
    for i in (0, 1):
        inputs = leaves(3, 24, torch.float32, True, device)[: 3 + i]
        got, want = (
            torch.autograd.grad(form(*ls)[i].square().sum(), ls[:2])
            for form in (op, reference)
            for ls in [[t.clone().requires_grad_() for t in inputs]]
        )
        torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # eps 0 divides by zero in the rows of a tile past the last
@pytest.mark.parametrize("post", [False, True])
def test_kernel_reads_its_own_rows_alone(post, device, interpreted):
    op, _ = op_and_reference(torch.float16, eps=0.0)
    h, y, *weights = leaves(5, 40, torch.float16, post, device)
    want = outputs_and_gradients(op, [h, y, *weights])
    got = outputs_and_gradients(lambda h, y, *w: op(surrounded(h), surrounded(y), *w), [h, y, *weights])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    alone = op(h[2:3], y[2:3], *weights)
    assert all(torch.equal(a[2:3], b) for a, b in zip(want[:2], alone, strict=True))
    assert [out.shape for out in op(h[:0], y[:0], *weights)] == [(0, 40)] * 2


def test_op_is_well_formed(device, interpreted):
    h, y, w, post = (t.requires_grad_() for t in leaves(3, 8, torch.float16, True, device))
    op = torch.ops.flashvec.add_rms_norm.default
    torch.library.opcheck(op, (h, y, w, post, 1e-6, 0.0, torch.float16))
    torch.library.opcheck(op, (h[:0], y[:0].float(), w, None, 1e-6, 0.0, torch.float16))


@pytest.mark.parametrize("which", [0, 1])
def test_reads_rows_past_2_31_elements(which, device, interpreted):
    leaves = [torch.randn(3, 48, device=device), torch.randn(3, 48, device=device), torch.randn(48, device=device)]
    leaves[which] = far_apart(leaves[which])
    assert_op_and_gradients(partial(add_rms_norm, eps=1e-6), partial(add_rms_norm_reference, eps=1e-6), leaves)


@dense_past_2_31(2**32)
def test_rows_past_2_31_elements():
    T, D = 2**31 // 4096 + 2, 4096
    h, w = torch.ones(T, D, dtype=torch.bfloat16, device="cuda"), torch.ones(D, device="cuda")
    h[-1] = torch.randn(D)
    got_sum, got = (x[-1:] for x in add_rms_norm(h, h, w, 1e-6))
    want_sum, want = add_rms_norm_reference(h[-1:], h[-1:], w, 1e-6)
    assert torch.equal(got_sum, want_sum)
    assert_as_close_as_torch(got, want, want)


def test_rejects(device):
    h, w = torch.zeros(2, 4, device=device), torch.ones(4, device=device)
    with pytest.raises(ValueError, match=r"h_TD is \(2, 4\) on .*, y_TD \(3, 4\)"):
        add_rms_norm(h, torch.zeros(3, 4, device=device), w, 1e-6)
    with pytest.raises(ValueError, match=r"post_weight_D is \(3,\)"):
        add_rms_norm(h, h, w, 1e-6, post_weight_D=w[:3])
    with pytest.raises(ValueError, match="y_TD's rows must be contiguous"):
        add_rms_norm(h, h.T.contiguous().T, w, 1e-6)
