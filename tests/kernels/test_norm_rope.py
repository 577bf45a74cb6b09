import pytest
import torch
from compare import assert_as_close_as_torch, wider
from gradients import HALVES, assert_op_and_gradients, dense_past_2_31, far_apart, outputs_and_gradients, surrounded

from flashvec.kernels.backend import launches
from flashvec.kernels.norm_rope import norm_rope, norm_rope_reference
from flashvec.kernels.rms_norm import rms_norm
from flashvec.kernels.rope import Rope, rope, rope_table


def tables(K, T, device):
    return tuple(t.to(device) for t in rope_table(Rope(10.0), K, T))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_is_a_norm_and_a_rotation(offset, dtype, device):
    x = torch.randn(9, 3 + 2, 16, device=device).to(dtype)[:, :3]  # a strided slice of a merged product
    w = torch.randn(16, device=device)
    cos, sin = tables(16, 9, device)
    got = norm_rope(x, cos, sin, w, 1e-2, offset)
    two_steps = rope(rms_norm(x, w, 1e-2, offset, torch.float32), cos, sin).to(dtype)
    truth = norm_rope_reference(x.to(wider(dtype)), cos, sin, w, 1e-2, offset)
    assert got.is_contiguous()
    assert_as_close_as_torch(got, two_steps, truth)
    if device == "cpu":
        assert torch.equal(got, two_steps)  # users of a CPU keep their bits


def test_definition(device):
    x = torch.tensor([[[3.0, 4.0]]], device=device)
    angle = torch.tensor([[torch.pi / 2]], device=device)
    got = norm_rope(x, angle.cos(), angle.sin(), torch.tensor([1.0, 2.0], device=device), eps=0.0)
    torch.testing.assert_close(got, torch.tensor([[[-8.0, 3.0]]], device=device) / 12.5**0.5)


def test_rejects(device):
    x, w, tables_of_8 = torch.zeros(4, 1, 8, device=device), torch.ones(8, device=device), tables(8, 4, device)
    with pytest.raises(ValueError, match=r"weight_K is \(4,\)"):
        norm_rope(x, *tables_of_8, w[:4], 1e-6)
    with pytest.raises(ValueError, match=r"x_THK is \(3, 1, 8\)"):
        norm_rope(x[:3], *tables_of_8, w, 1e-6)


# --- the kernel -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("K", [4, 16, 64, 80])
@pytest.mark.parametrize(("T", "H"), [(1, 3), (7, 5), (32, 1)])
def test_kernel_and_its_gradients(T, H, K, offset, dtype, device, interpreted):
    cos, sin = tables(K, T, device)
    merged, w = torch.randn(T, H + 2, K, device=device).to(dtype), torch.randn(K, device=device)
    before = launches.copy()
    assert_op_and_gradients(
        lambda x, w: norm_rope(x[:, 1 : H + 1], cos, sin, w, 1e-2, offset),
        lambda x, w: norm_rope_reference(x[:, 1 : H + 1], cos, sin, w, 1e-2, offset),
        [merged, w],
    )
    ran = launches - before
    assert ran["_norm_rope_fwd_kernel"] == ran["_norm_rope_bwd_kernel"] == 1


def test_kernel_sums_the_weights_gradient_over_many_tiles(device, interpreted, monkeypatch):
    monkeypatch.setattr("flashvec.kernels.rms_norm.PARTIALS", 2)  # 105 heads: four tiles, two programs
    cos, sin = tables(16, 35, device)
    x, w = torch.randn(35, 3, 16, device=device), torch.randn(16, device=device)
    assert_op_and_gradients(
        lambda x, w: norm_rope(x, cos, sin, w, 1e-2), lambda x, w: norm_rope_reference(x, cos, sin, w, 1e-2), [x, w]
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # eps 0 divides by zero in the heads of a tile past the last
def test_kernel_reads_its_own_heads_alone(device, interpreted):
    cos, sin = tables(20, 9, device)
    x, w = torch.randn(9, 3, 20, device=device), torch.randn(20, device=device)
    want = outputs_and_gradients(lambda x, w: norm_rope(x, cos, sin, w, 0.0), [x, w])
    got = outputs_and_gradients(lambda x, w: norm_rope(surrounded(x), cos, sin, w, 0.0), [x, w])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(want[0][4:6, 1:2], norm_rope(x[4:6, 1:2], cos[4:6], sin[4:6], w, 0.0))
    assert norm_rope(x[:0], cos[:0], sin[:0], w, 0.0).shape == (0, 3, 20)


def test_kernel_without_a_gradient_for_the_weight(device, interpreted):
    cos, sin = tables(8, 3, device)
    x, w = torch.randn(3, 2, 8, device=device), torch.randn(8, device=device)
    got, want = (
        outputs_and_gradients(lambda x, form=form: form(x, cos, sin, w, 1e-2), [x])
        for form in (norm_rope, norm_rope_reference)
    )
    torch.testing.assert_close(got, want)


def test_op_is_well_formed(device, interpreted):
    cos, sin = tables(8, 3, device)
    x = torch.randn(3, 4, 8, device=device, dtype=torch.float16)[:, :2].requires_grad_()
    w = torch.randn(8, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.flashvec.norm_rope.default, (x, cos, sin, w, 1e-6, 1.0))


def test_reads_tokens_past_2_31_elements(device, interpreted):
    x, w = torch.randn(3, 4, 32, device=device), torch.randn(32, device=device)
    cos, sin = (t.to(device) for t in rope_table(Rope(10.0), 32, 3))
    op, reference = (lambda x, w, of=of: of(x, cos, sin, w, 1e-6) for of in (norm_rope, norm_rope_reference))
    assert_op_and_gradients(op, reference, [far_apart(x), w])


@dense_past_2_31()
def test_heads_past_2_31_elements():
    T = 2**31 // 4096 + 2
    cos, sin = (t.cuda()[torch.zeros(T, dtype=torch.int64)] for t in rope_table(Rope(10.0), 128, 2))
    x, w = torch.ones(T, 32, 128, dtype=torch.bfloat16, device="cuda"), torch.ones(128, device="cuda")
    x[-1] = torch.randn(32, 128)
    want = norm_rope_reference(x[-1:], cos[-1:], sin[-1:], w, 1e-6)
    assert_as_close_as_torch(norm_rope(x, cos, sin, w, 1e-6)[-1:], want, want)
