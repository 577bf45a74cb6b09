"""A layer's query, key and value products with low-rank updates: ours, its definition, and as PEFT composes them.

python -m pytest bench/bench_lora.py            # pytest-benchmark's table
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashvec.bench.op_bench import OpBench, Size, here, run_file
from flashvec.kernels.dropout import Dropout
from flashvec.kernels.lora import lora, lora_reference, mask_keys

FORMS = ("ours", "reference", "torch")
RANK, SCALE = 16, 2.0
DROPOUT = Dropout(p=0.05, seed=1, step=2, site=3)


def problem(size: Size, dropout: Dropout | None) -> OpBench:
    """Without dropout torch's three products are the same function; with it torch draws masks of its own."""
    splits = [size.H * size.K, size.G * size.K, size.G * size.K]
    N, device = sum(splits), size.device
    x = torch.randn(size.T, size.D, device=device).to(size.dtype)
    weight = (torch.randn(N, size.D, device=device) / size.D**0.5).to(size.dtype)
    a = torch.randn(len(splits), RANK, size.D, device=device) / size.D**0.5
    b = torch.randn(N, RANK, device=device) / RANK**0.5
    rows = torch.arange(size.T, device=device)
    keyed: dict[str, Any] = {}
    masked: tuple[Any, ...] = ()
    if dropout:
        keyed = {"dropout": dropout, "identities_T": rows, "positions_T": rows}
        masked = mask_keys(dropout, rows, rows), dropout.threshold

    def own(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora(x, weight, a, b, scales=SCALE, splits=splits, **keyed)

    def reference(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_reference(x, weight.to(x.dtype), None, a, b, splits, [SCALE] * len(splits), *masked)

    def torch_form(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        outs = []
        for w, down, up in zip(weight.split(splits), a.to(x.dtype), b.to(x.dtype).split(splits), strict=True):
            dropped = F.dropout(x, dropout.p) if dropout else x
            outs.append(F.linear(x, w) + SCALE * F.linear(F.linear(dropped, down), up))
        return torch.cat(outs, 1)

    base, update = 2 * size.T * size.D * N, 2 * size.T * RANK * (len(splits) * size.D + N)
    return OpBench(
        leaves=[x, a, b],
        forms={"ours": own, "reference": reference, "torch": torch_form},
        forward_work=base + update,
        backward_work=base + 2 * update,
        unit="GFLOP/s",
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["plain", "dropout"])
def test_forward(benchmark: Any, dropout: Dropout | None, form: str) -> None:
    problem(here(), dropout).forward(benchmark, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["plain", "dropout"])
def test_backward(benchmark: Any, dropout: Dropout | None, form: str) -> None:
    problem(here(), dropout).backward(benchmark, form)


if __name__ == "__main__":
    run_file(__file__)
