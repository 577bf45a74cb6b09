"""InfoNCE of a batch of 1,024 queries (256 on a CPU) among eight times as many documents: ours, its definition.

python -m pytest bench/bench_info_nce.py            # pytest-benchmark's table
"""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from flashvec.bench.op_bench import OpBench, Size, here, run_file
from flashvec.kernels.info_nce import info_nce, info_nce_reference

FORMS = ("ours", "reference")
DOCUMENTS = 8  # a query: its own and seven hard negatives
TEMPERATURE = 0.05


def _each(op: Any, positives: Tensor, prefixes: list[int] | None, queries: Tensor, documents: Tensor) -> Tensor:
    loss: Tensor = op(queries, documents, positives, TEMPERATURE, prefixes=prefixes)
    return loss


def problem(size: Size, prefixes: list[int] | None) -> OpBench:
    """Unmasked, with all columns or with several leading parts of them (Matryoshka)."""
    B = 1024 if size.device == "cuda" else 256
    queries = torch.randn(B, size.D, device=size.device).to(size.dtype)
    documents = torch.randn(DOCUMENTS * B, size.D, device=size.device).to(size.dtype)
    positives = torch.arange(B, device=size.device) * DOCUMENTS
    ops = {"ours": info_nce, "reference": info_nce_reference}
    forms = {name: partial(_each, op, positives, prefixes) for name, op in ops.items()}
    products = 2 * B * len(documents) * sum(prefixes or [size.D])
    return OpBench(
        leaves=[queries, documents],
        forms=forms,
        forward_work=products,
        backward_work=2 * products,
        unit="GFLOP/s",
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prefixes", [None, [64, 256]], ids=["all columns", "prefixes"])
def test_forward(benchmark: Any, prefixes: list[int] | None, form: str) -> None:
    problem(here(), prefixes).forward(benchmark, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prefixes", [None, [64, 256]], ids=["all columns", "prefixes"])
def test_backward(benchmark: Any, prefixes: list[int] | None, form: str) -> None:
    problem(here(), prefixes).backward(benchmark, form)


if __name__ == "__main__":
    run_file(__file__)
