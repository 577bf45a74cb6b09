"""Gated activations: ours, their definition, torch's two operations.

python -m pytest bench/bench_swiglu.py            # pytest-benchmark's table
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from flashvec.bench.op_bench import OpBench, Size, here, num_bytes, run_file
from flashvec.kernels.swiglu import ACTIVATIONS, swiglu, swiglu_reference

FORMS = ("ours", "reference", "torch")


def torch_form(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return ACTIVATIONS[activation](gate) * up


def problem(size: Size, activation: str) -> OpBench:
    gate_up = torch.randn(size.T, 2 * size.F, device=size.device).to(size.dtype)
    ops = {"ours": swiglu, "reference": swiglu_reference, "torch": torch_form}
    return OpBench(
        leaves=[gate_up],
        forms={name: lambda x, op=op: op(x, activation) for name, op in ops.items()},
        forward_work=num_bytes(gate_up) * 3 // 2,
        backward_work=num_bytes(gate_up) * 5 // 2,
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_forward(benchmark: Any, activation: str, form: str) -> None:
    problem(here(), activation).forward(benchmark, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_backward(benchmark: Any, activation: str, form: str) -> None:
    problem(here(), activation).backward(benchmark, form)


if __name__ == "__main__":
    run_file(__file__)
