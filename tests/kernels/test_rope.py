import math
from dataclasses import replace

import pytest
import torch
from compare import assert_as_close_as_torch, wider

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
