"""Norm and rotation of query heads: ours in one pass, its definition, and as two ops of ours.

python -m pytest bench/bench_norm_rope.py            # pytest-benchmark's table
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from flashvec.bench.bench_rope import tables
from flashvec.bench.op_bench import OpBench, Size, here, num_bytes, run_file
from flashvec.kernels.norm_rope import norm_rope, norm_rope_reference
from flashvec.kernels.rms_norm import rms_norm
from flashvec.kernels.rope import rope

EPS = 1e-6
FORMS = ("ours", "reference", "two ops")


def two_ops(x: Tensor, cos: Tensor, sin: Tensor, w: Tensor, eps: float) -> Tensor:
    return rope(rms_norm(x, w, eps, dtype=torch.float32), cos, sin).to(x.dtype)


def problem(size: Size) -> OpBench:
    merged = torch.randn(size.T, size.H + 2 * size.G, size.K, device=size.device).to(size.dtype)
    x, (cos, sin) = merged[:, : size.H], tables(size)
    w = torch.randn(size.K, device=size.device)
    ops = {"ours": norm_rope, "reference": norm_rope_reference, "two ops": two_ops}
    return OpBench(
        leaves=[x, w],
        forms={name: lambda x, w, op=op: op(x, cos, sin, w, EPS) for name, op in ops.items()},
        forward_work=num_bytes(x, cos, sin, w, x),
        backward_work=num_bytes(x, x, cos, sin, w, x, w),
    )


@pytest.mark.parametrize("form", FORMS)
def test_forward(benchmark: Any, form: str) -> None:
    problem(here()).forward(benchmark, form)


@pytest.mark.parametrize("form", FORMS)
def test_backward(benchmark: Any, form: str) -> None:
    problem(here()).backward(benchmark, form)


if __name__ == "__main__":
    run_file(__file__)
