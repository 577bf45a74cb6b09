"""Rotation of query and key heads out of one merged product: ours, its definition, the form of the models' own code.

python -m pytest bench/bench_rope.py            # pytest-benchmark's table
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from flashvec.bench.op_bench import OpBench, Size, here, num_bytes, run_file
from flashvec.kernels.rope import Rope, rope, rope_reference, rope_table

FORMS = ("ours", "reference", "torch")


def tables(size: Size) -> tuple[Tensor, Tensor]:
    """Rows of positions in texts of 256 tokens."""
    positions = torch.arange(size.T) % 256
    cos, sin = (table[positions].to(size.device) for table in rope_table(Rope(), size.K, 256))
    return cos, sin


def torch_form(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x0, x1 = x.chunk(2, -1)
    cos, sin = (torch.cat([t, t], -1)[:, None].to(x.dtype) for t in (cos, sin))
    return x * cos + torch.cat([-x1, x0], -1) * sin


def problem(size: Size) -> OpBench:
    heads = size.H + size.G
    merged = torch.randn(size.T, heads + size.G, size.K, device=size.device).to(size.dtype)
    x, (cos, sin) = merged[:, :heads], tables(size)
    ops = {"ours": rope, "reference": rope_reference, "torch": torch_form}
    return OpBench(
        leaves=[x],
        forms={name: lambda x, op=op: op(x, cos, sin) for name, op in ops.items()},
        forward_work=num_bytes(x, cos, sin, x),
        backward_work=num_bytes(x, cos, sin, x),
    )


@pytest.mark.parametrize("form", FORMS)
def test_forward(benchmark: Any, form: str) -> None:
    problem(here()).forward(benchmark, form)


@pytest.mark.parametrize("form", FORMS)
def test_backward(benchmark: Any, form: str) -> None:
    problem(here()).backward(benchmark, form)


if __name__ == "__main__":
    run_file(__file__)
