"""A step of the residual stream and the norm after it, with and without Gemma's norm before: ours, definition, torch's.

python -m pytest bench/bench_add_rms_norm.py            # pytest-benchmark's table
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashvec.bench.op_bench import OpBench, Outputs, Size, here, num_bytes, run_file
from flashvec.kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference

EPS = 1e-6
FORMS = ("ours", "reference", "torch")


def torch_form(h: Tensor, y: Tensor, w: Tensor, post: Tensor | None = None) -> Outputs:
    if post is not None:
        y = F.rms_norm(y, y.shape[1:], post.to(y.dtype), EPS)
    added = h + y
    return added, F.rms_norm(added, w.shape, w, EPS).to(y.dtype)


def problem(size: Size, post: bool) -> OpBench:
    h = torch.randn(size.T, size.D, device=size.device)
    y = torch.randn(size.T, size.D, device=size.device).to(size.dtype)
    weights = [torch.randn(size.D, device=size.device) for _ in range(1 + post)]

    def form(op: Callable[..., Outputs]) -> Callable[..., Outputs]:
        return lambda h, y, w, post=None: op(h, y, w, EPS, post_weight_D=post)

    read_for_the_post_norm = [y] if post else []
    return OpBench(
        leaves=[h, y, *weights],
        forms={"ours": form(add_rms_norm), "reference": form(add_rms_norm_reference), "torch": torch_form},
        forward_work=num_bytes(h, y, *weights, h, y),
        backward_work=num_bytes(h, y, h, *weights, h, y, *weights, *read_for_the_post_norm),
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("post", [False, True], ids=["plain", "post norm"])
def test_forward(benchmark: Any, post: bool, form: str) -> None:
    problem(here(), post).forward(benchmark, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("post", [False, True], ids=["plain", "post norm"])
def test_backward(benchmark: Any, post: bool, form: str) -> None:
    problem(here(), post).backward(benchmark, form)


if __name__ == "__main__":
    run_file(__file__)
