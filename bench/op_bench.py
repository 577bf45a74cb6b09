"""What the benchmarks of the ops around the matrix products share: shapes, forms checked against each other, timing.

On a GPU one batch of 16,384 tokens of Llama 3 8B in bf16, on the CPU one of 2,048 tokens of SmolLM2-135M. `extra_info`
holds the rate of an op's work. Most ops move bytes: each input read once, each output written once, whatever a form
moves besides. Those that multiply matrices count their FLOPs, those that every form needs. On a GPU it also holds the
most memory that was allocated beside what was there before.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flashvec.kernels.backend import implementation

Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Size:
    """Rows of a batch and a layer's sizes; letters as in the kernels."""

    T: int
    D: int
    F: int
    H: int
    G: int
    K: int
    V: int
    dtype: torch.dtype
    device: str


def here() -> Size:
    """The size that is timed on this machine."""
    if torch.cuda.is_available() and implementation(torch.empty(0, device="cuda")) == "triton":
        return Size(16_384, 4096, 14_336, 32, 8, 128, 128_256, torch.bfloat16, "cuda")
    return Size(2048, 576, 1536, 9, 3, 64, 49_152, torch.bfloat16, "cpu")


@dataclass(frozen=True)
class OpBench:
    """Forms of one op, functions of the same tensors; `reference` is one of them, and defines the others.

    `forward_work` and `backward_work` are bytes, or floating-point operations where `unit` says so.
    """

    leaves: Sequence[Tensor]
    forms: Mapping[str, Callable[..., Outputs]]
    forward_work: int
    backward_work: int
    unit: Literal["GB/s", "GFLOP/s"] = "GB/s"

    def check(self, form: str) -> None:
        """Raise AssertionError unless a form errs at most twice as far as the reference does, and a rounding more."""
        truth = _tuple(self.forms["reference"](*(x.double() for x in self.leaves)))
        own, got = (_tuple(self.forms[name](*self.leaves)) for name in ("reference", form))
        for x, y, true in zip(got, own, truth, strict=True):
            allowed = 2 * (y - true).abs().max() + torch.finfo(y.dtype).eps * true.abs().max()
            error = (x - true).abs().max()
            assert error <= allowed, f"{form} is off by {error:.2e}, allowed {allowed:.2e}"

    def forward(self, benchmark: Any, form: str) -> None:
        if form != "torch":  # torch's own rounds in between, and is here for its time
            self.check(form)
        with torch.no_grad():
            self._measure(benchmark, lambda: self.forms[form](*self.leaves), self.forward_work)

    def backward(self, benchmark: Any, form: str) -> None:
        leaves = [x.detach().requires_grad_() for x in self.leaves]
        outputs = _tuple(self.forms[form](*leaves))
        directions = [torch.randn_like(out) for out in outputs]
        run = lambda: torch.autograd.grad(outputs, leaves, directions, retain_graph=True)  # noqa: E731
        self._measure(benchmark, run, self.backward_work)

    def _measure(self, benchmark: Any, run: Callable[[], Any], work: int) -> None:
        def once() -> None:
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        once()
        if torch.cuda.is_available():
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            once()
            benchmark.extra_info["peak MB"] = (torch.cuda.max_memory_allocated() - before) >> 20
        benchmark(once)
        if benchmark.stats is not None:  # None with --benchmark-disable
            benchmark.extra_info[self.unit] = float(f"{work / benchmark.stats.stats.median / 1e9:.4g}")


def run_file(path: str) -> None:
    """What `python -m` does with a benchmark's file, which by itself does nothing: pytest, with the arguments given."""
    import pytest

    sys.exit(pytest.main([path, *sys.argv[1:]]))


def num_bytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs
