"""RMS norm of the fp32 residual stream into the compute dtype: ours, its definition, torch's.

python -m pytest bench/bench_rms_norm.py            # pytest-benchmark's table
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flashvec.bench.op_bench import OpBench, Size, here, num_bytes, run_file
from flashvec.kernels.rms_norm import rms_norm, rms_norm_reference

EPS = 1e-6
FORMS = ("ours", "reference", "torch")


def problem(size: Size) -> OpBench:
    x, w = torch.randn(size.T, size.D, device=size.device), torch.randn(size.D, device=size.device)

    def out_dtype(x: torch.Tensor) -> torch.dtype:
        return x.dtype if x.dtype == torch.float64 else size.dtype

    out = torch.empty(size.T, size.D, dtype=size.dtype, device="meta")
    return OpBench(
        leaves=[x, w],
        forms={
            "ours": lambda x, w: rms_norm(x, w, EPS, 0.0, out_dtype(x)),
            "reference": lambda x, w: rms_norm_reference(x, w, EPS, 0.0, out_dtype(x)),
            "torch": lambda x, w: F.rms_norm(x, w.shape, w, EPS).to(out_dtype(x)),
        },
        forward_work=num_bytes(x, w, out),
        backward_work=num_bytes(x, w, out, x, w),
    )


@pytest.mark.parametrize("form", FORMS)
def test_forward(benchmark: Any, form: str) -> None:
    problem(here()).forward(benchmark, form)


@pytest.mark.parametrize("form", FORMS)
def test_backward(benchmark: Any, form: str) -> None:
    problem(here()).backward(benchmark, form)


if __name__ == "__main__":
    run_file(__file__)
