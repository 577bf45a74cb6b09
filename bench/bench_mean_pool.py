"""Last addition, final norm, mean over texts, length: ours, the definition, torch's (norm of all rows, segment mean).

    python -m pytest bench/bench_mean_pool.py            # pytest-benchmark's table

The batch in texts of 16, 256 and all tokens.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashvec.bench.op_bench import OpBench, Size, here, num_bytes, run_file
from flashvec.kernels.mean_pool import mean_pool, mean_pool_reference

EPS = 1e-6
FORMS = ("ours", "reference", "torch")
LENGTHS = (16, 256, 2048)


def problem(size: Size, length: int) -> OpBench:
    x = torch.randn(size.T, size.D, device=size.device)
    delta = torch.randn(size.T, size.D, device=size.device).to(size.dtype)
    w = torch.randn(size.D, device=size.device)
    stops = torch.arange(length, size.T + 1, length, device=size.device)
    spans, lengths = torch.stack([stops - length, stops], 1), torch.full_like(stops, length)

    def torch_form(x: Tensor, delta: Tensor, w: Tensor) -> Tensor:
        y = F.rms_norm(x + delta, w.shape, w, EPS)
        return F.normalize(torch.segment_reduce(y, "mean", lengths=lengths, axis=0), dim=-1)

    return OpBench(
        leaves=[x, delta, w],
        forms={
            "ours": lambda x, d, w: mean_pool(x, spans, w, EPS, delta_TD=d, normalize=True, longest=length),
            "reference": lambda x, d, w: mean_pool_reference(x, spans, w, EPS, delta_TD=d, normalize=True),
            "torch": torch_form,
        },
        forward_work=num_bytes(x, delta, w) + len(spans) * size.D * 4,
        backward_work=num_bytes(x, delta, w, x, delta, w) + len(spans) * size.D * 4,
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", LENGTHS)
def test_forward(benchmark: Any, length: int, form: str) -> None:
    problem(here(), length).forward(benchmark, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", LENGTHS)
def test_backward(benchmark: Any, length: int, form: str) -> None:
    problem(here(), length).backward(benchmark, form)


if __name__ == "__main__":
    run_file(__file__)
