import math
from dataclasses import replace

import pytest
import torch
from compare import assert_as_close_as_torch, wider
from gradients import HALVES, assert_op_and_gradients, dense_past_2_31, far_apart, heads_far_apart, surrounded

from flashvec.kernels.backend import launches
from flashvec.kernels.rope import Rope, rope, rope_frequencies, rope_reference, rope_table

YARN = Rope(10_000.0, "yarn", 4.0, original_max_positions=64, attention_factor=1.2)
LLAMA3 = Rope(10_000.0, "llama3", 8.0, 1.0, 4.0, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("K", [2, 16, 64])
def test_matches_reference(K, dtype, device):
    x = torch.randn(9, 3 + 2, K, dtype=dtype, device=device)[:, :3]  # a strided slice of a merged product
    cos, sin = (t.to(device) for t in rope_table(Rope(10.0), K, 9))
    truth = rope_reference(x.to(wider(dtype)), cos, sin)
    x0, x1 = x.chunk(2, -1)
    c, s = cos[:, None].to(dtype), sin[:, None].to(dtype)
    same = torch.cat([x0 * c - x1 * s, x1 * c + x0 * s], -1)
    assert_as_close_as_torch(rope(x, cos, sin), same, truth)


def test_rotates_each_plane_by_its_angle():
    cos, sin = rope_table(Rope(100.0), 4, 3)
    x = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(3, 1, 4)
    got = rope(x, cos, sin)[2, 0]
    angles = [2 * 1.0, 2 * 100.0**-0.5]
    want = torch.tensor([math.cos(angles[0]), math.cos(angles[1]), math.sin(angles[0]), math.sin(angles[1])])
    torch.testing.assert_close(got, want)


def test_scores_depend_on_distance_alone():
    cos, sin = rope_table(Rope(10.0), 16, 40)
    q, k = torch.randn(2, 1, 1, 16).expand(2, 40, 1, 16)
    q, k = rope(q, cos, sin)[:, 0], rope(k, cos, sin)[:, 0]
    scores = q @ k.T
    torch.testing.assert_close(scores[5, 2], scores[35, 32])


@pytest.mark.parametrize(
    ("spec", "hf"),
    [
        (Rope(500.0, "linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
        (
            LLAMA3,
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
        (YARN, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
        (
            replace(YARN, truncate=False, beta_fast=20.0, beta_slow=2.0),
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 20.0,
                "beta_slow": 2.0,
                "truncate": False,
            },
        ),
    ],
    ids=["linear", "llama3", "yarn", "yarn-untruncated"],
)
def test_stretched_tables_are_hugging_faces(spec, hf):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(head_dim=32, max_position_embeddings=256, rope_parameters={"rope_theta": spec.theta, **hf})
    want, _ = ROPE_INIT_FUNCTIONS[spec.kind](config, torch.device("cpu"))
    assert torch.equal(rope_frequencies(spec, 32), want)


def test_rejects_tables_that_do_not_fit():
    cos, sin = rope_table(Rope(), 8, 3)
    with pytest.raises(ValueError, match=r"\(4, 1, 8\)"):
        rope(torch.zeros(4, 1, 8), cos, sin)


def test_rejects_layouts_the_kernel_cannot_read():
    cos, sin = rope_table(Rope(), 8, 4)
    with pytest.raises(ValueError, match=r"x_THK's rows must be contiguous, its strides are \(8, 8, 4\)"):
        rope(torch.zeros(4, 1, 8)[:, :, ::4], *(t[:, :1].contiguous() for t in (cos, sin)))
    with pytest.raises(ValueError, match="sin_TK must be contiguous"):
        rope(torch.zeros(4, 1, 8), cos, sin.T.contiguous().T)
    with pytest.raises(ValueError, match=r"x_THK is \(4, 1, 9\)"):
        rope(torch.zeros(4, 1, 9), cos, sin)


# --- the kernel -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("K", [2, 16, 64, 80])
@pytest.mark.parametrize(("T", "H"), [(1, 1), (7, 5), (32, 1), (11, 3)])
def test_kernel_and_its_gradient(T, H, K, dtype, device, interpreted):
    cos, sin = (t.to(device) for t in rope_table(Rope(10.0), K, T))
    merged = torch.randn(T, H + 2, K, device=device).to(dtype)
    before = launches["_rope_fwd_kernel"]
    assert_op_and_gradients(
        lambda x: rope(x[:, 1 : H + 1], cos, sin),
        lambda x: rope_reference(x[:, 1 : H + 1], cos, sin),
        [merged],
    )
    assert launches["_rope_fwd_kernel"] == before + 2  # there and back


def test_kernel_undone_by_the_opposite_angle(device, interpreted):
    cos, sin = (t.to(device) for t in rope_table(Rope(10.0), 16, 9))
    x = torch.randn(9, 3, 16, device=device)
    rotated = rope(x, cos, sin)
    torch.testing.assert_close(torch.ops.flashvec.rope(rotated, cos, sin, True), x)
    torch.testing.assert_close(rope(rotated, cos, -sin), x)


def test_kernel_reads_its_own_heads_alone(device, interpreted):
    cos, sin = (t.to(device) for t in rope_table(Rope(10.0), 20, 9))
    x = torch.randn(9, 3, 20, device=device)
    got = rope(surrounded(x), cos, sin)
    assert got.is_contiguous() and torch.equal(got, rope(x, cos, sin))
    assert torch.equal(got[4:6, 1:2], rope(x[4:6, 1:2], cos[4:6], sin[4:6]))
    assert rope(x[:0], cos[:0], sin[:0]).shape == (0, 3, 20)


def test_op_is_well_formed(device, interpreted):
    cos, sin = (t.to(device) for t in rope_table(Rope(10.0), 8, 3))
    x = torch.randn(3, 4, 8, device=device, dtype=torch.float16)[:, :2].requires_grad_()
    torch.library.opcheck(torch.ops.flashvec.rope.default, (x, cos, sin, False))


def test_reads_tokens_past_2_31_elements(device, interpreted):
    cos, sin = (t.to(device) for t in rope_table(Rope(10.0), 32, 3))
    op, reference = (lambda x, of=of: of(x, cos, sin) for of in (rope, rope_reference))
    assert_op_and_gradients(op, reference, [far_apart(torch.randn(3, 4, 32, device=device))])


def test_reads_heads_past_2_31_elements(device, interpreted):
    cos, sin = (t.to(device) for t in rope_table(Rope(10.0), 32, 2))
    op, reference = (lambda x, of=of: of(x, cos, sin) for of in (rope, rope_reference))
    assert_op_and_gradients(op, reference, [heads_far_apart(torch.randn(2, 3, 32, device=device))])


@dense_past_2_31()
def test_heads_past_2_31_elements():
    T = 2**31 // 4096 + 2
    cos, sin = (t.cuda()[torch.zeros(T, dtype=torch.int64)] for t in rope_table(Rope(10.0), 128, 2))
    x = torch.ones(T, 32, 128, dtype=torch.bfloat16, device="cuda")
    cos[-1] = 0.5
    want = rope_reference(x[-1:], cos[-1:], sin[-1:])
    assert_as_close_as_torch(rope(x, cos, sin)[-1:], want, want)
