"""The CPU's norms and rotation with their gradients, against the references; kernels have theirs beside them."""

from functools import partial

import pytest
import torch
from gradients import assert_op_and_gradients, outputs_and_gradients

from flashvec.kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from flashvec.kernels.norm_rope import norm_rope, norm_rope_reference
from flashvec.kernels.rms_norm import rms_norm, rms_norm_reference
from flashvec.kernels.rope import Rope, rope, rope_reference, rope_table

DTYPES = [torch.float32, torch.bfloat16]


def kept_by(op, *leaves):
    """Elements of what a graph keeps, each tensor once."""
    kept = {}

    def note(x):
        kept[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        op(*(leaf.detach().requires_grad_() for leaf in leaves))
    return sum(kept.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 96), (7, 3, 24), (1, 5), (24,), (0, 8)])
@pytest.mark.parametrize("out", [None, torch.float32])
def test_rms_norm(shape, dtype, out):
    x, w = torch.randn(shape).to(dtype), torch.randn(shape[-1])
    same = lambda x, w: rms_norm_reference(x, w, 1e-6, 1.0, None if x.dtype == torch.float64 else out)  # noqa: E731
    assert_op_and_gradients(lambda x, w: rms_norm(x, w, 1e-6, 1.0, out), same, [x, w])


def test_a_norm_keeps_its_rows_and_a_number_of_each():
    assert kept_by(partial(rms_norm, eps=1e-6), torch.randn(50, 64), torch.randn(64)) == 50 * 64 + 50 + 64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_post", [False, True])
def test_add_rms_norm(dtype, has_post):
    leaves = [torch.randn(30, 48), torch.randn(30, 48).to(dtype), torch.randn(48), torch.randn(48)]

    def run(op, h, y, weight, post):
        out = torch.float64 if h.dtype == torch.float64 else dtype
        return op(h, y, weight, 1e-5, 1.0, out, post_weight_D=post if has_post else None)

    leaves = leaves if has_post else leaves[:3]
    op, reference = (
        partial(run, op, **({} if has_post else {"post": None})) for op in (add_rms_norm, add_rms_norm_reference)
    )
    assert_op_and_gradients(op, reference, leaves)


@pytest.mark.parametrize("used", [0, 1])
def test_of_a_sum_and_its_norm_one_alone_may_be_used(used):
    """The last stream's norm has no reader, nor has the stream below a norm that nothing adds to."""
    leaves = [torch.randn(9, 16), torch.randn(9, 16).bfloat16()]
    weight = torch.randn(16)
    got, want = (
        outputs_and_gradients(lambda h, y, op=op: op(h, y, weight, 1e-6)[used], leaves)
        for op in (add_rms_norm, add_rms_norm_reference)
    )
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-5)


def test_a_gradient_that_is_shared_by_both_addends_is_not_written_over():
    """In fp32 both have the same one: what is added to the stream's on its way must not reach the other's."""
    weight = torch.randn(16)

    def chain(op, h, y):
        first, normed = op(h, y, weight, 1e-6)
        return op(first, normed.tanh() + y, weight, 1e-6)

    assert_op_and_gradients(
        partial(chain, add_rms_norm), partial(chain, add_rms_norm_reference), [torch.randn(9, 16), torch.randn(9, 16)]
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotations_of_a_part_of_a_merged_product(dtype):
    cos, sin = rope_table(Rope(10.0), 32, 11)
    merged = torch.randn(11, 6, 32).to(dtype)
    plain = [lambda x, op=op: op(x[:, 1:4], cos, sin) for op in (rope, rope_reference)]
    assert_op_and_gradients(*plain, [merged])
    assert kept_by(plain[0], merged) == cos.numel() + sin.numel()
    normed = [lambda x, w, op=op: op(x[:, 1:4], cos, sin, w, 1e-6) for op in (norm_rope, norm_rope_reference)]
    assert_op_and_gradients(*normed, [merged, torch.randn(32)])
