"""Linear cross entropy at a fifth of a batch's rows: ours, its definition, torch's two operations with all logits.

python -m pytest bench/bench_cross_entropy.py            # pytest-benchmark's table
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashvec.bench.op_bench import OpBench, Size, here, run_file
from flashvec.kernels.cross_entropy import cross_entropy, cross_entropy_reference

FORMS = ("ours", "reference", "torch")
MASKED = 5  # one token in five predicts


def problem(size: Size) -> OpBench:
    """The head frozen, as masked next token prediction trains: the gradient is of the hidden states."""
    R = size.T // MASKED
    h = torch.randn(size.T, size.D, device=size.device).to(size.dtype)
    weight = (torch.randn(size.V, size.D, device=size.device) / size.D**0.5).to(size.dtype)
    rows = torch.randperm(size.T, device=size.device)[:R]
    targets = torch.randint(0, size.V, (R,), device=size.device)

    def torch_form(h: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h[rows], weight.to(h.dtype)).float(), targets, reduction="none")

    return OpBench(
        leaves=[h],
        forms={
            "ours": lambda h: cross_entropy(h, weight, rows, targets, reduction="none"),
            "reference": lambda h: cross_entropy_reference(h, weight.to(h.dtype), rows, targets),
            "torch": torch_form,
        },
        forward_work=2 * R * size.D * size.V,
        backward_work=2 * R * size.D * size.V,
        unit="GFLOP/s",
    )


@pytest.mark.parametrize("form", FORMS)
def test_forward(benchmark: Any, form: str) -> None:
    problem(here()).forward(benchmark, form)


@pytest.mark.parametrize("form", FORMS)
def test_backward(benchmark: Any, form: str) -> None:
    problem(here()).backward(benchmark, form)


if __name__ == "__main__":
    run_file(__file__)
