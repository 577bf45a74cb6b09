"""Attention's forms side by side: the definition, the CPU's form, and on a GPU the Triton kernel; forward and backward.

    python -m pytest bench/bench_attention.py            # pytest-benchmark's table; needs the package pytest-benchmark

Heads of SmolLM2-135M (9 query heads, 3 kv heads of 64) and 2,048 tokens on the CPU, those of Llama 3 8B and 16,384
tokens on a GPU; equal lengths and log-normal ones. `extra_info` holds useful TFLOP/s: 4 n² K a head forward, 10 n² K
backward. Correctness is checked before time is taken. Peers on a GPU: `bench/gpu.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from flashvec.bench.criterion import distance, wider
from flashvec.bench.op_bench import run_file
from flashvec.bench.problems import AttentionShape, Maker, attention_tensors
from flashvec.kernels.attention import attention, attention_reference
from flashvec.kernels.attention_cpu import attention_cpu
from flashvec.kernels.backend import implementation
from flashvec.kernels.roofline import lengths_of
from flashvec.kernels.schedule import Schedule

Form = Callable[[Tensor, Tensor, Tensor, Schedule, float], Tensor]


def reference(q: Tensor, k: Tensor, v: Tensor, schedule: Schedule, scale: float) -> Tensor:
    return attention_reference(q, k, v, schedule, scale=scale)[0]


def cpu_form(q: Tensor, k: Tensor, v: Tensor, schedule: Schedule, scale: float) -> Tensor:
    return attention_cpu(q, k, v, schedule, scale=scale, reach=(None, None), softcap=None)


def chosen(q: Tensor, k: Tensor, v: Tensor, schedule: Schedule, scale: float) -> Tensor:
    """What `attention` picks for this device: on a GPU the kernel."""
    return attention(q, k, v, schedule, scale=scale)


FORMS: dict[str, tuple[str, Form]] = {  # name: device it is for, function
    "kernel": ("cuda", chosen),
    "reference": ("", reference),
    "cpu form": ("cpu", cpu_form),
}
LENGTHS = ("64", "256", "1024", "log-normal 90", "log-normal 256")


@dataclass(frozen=True)
class Batch:
    """Tensors of one batch on one device."""

    shape: AttentionShape
    tensors: dict[str, Tensor]
    schedule: Schedule

    def run(self, form: Form) -> Tensor:
        q, k, v = (self.tensors[name] for name in "qkv")
        return form(q, k, v, self.schedule, self.shape.K**-0.5)

    def gradients(self, form: Form) -> Callable[[], Any]:
        """The backward of a forward that runs now."""
        for name in "qkv":
            self.tensors[name] = self.tensors[name].detach().requires_grad_()
        out = self.run(form)
        dout = torch.randn_like(out)
        wanted = [self.tensors[name] for name in "qkv"]
        return lambda: torch.autograd.grad(out, wanted, dout, retain_graph=True)


def batch(lengths: str, device: str, tokens: int | None = None) -> Batch:
    """16,384 tokens of a large model on a GPU, 2,048 of a small one on the CPU."""
    tokens = tokens or (16_384 if device == "cuda" else 2048)
    H, G, K = (32, 8, 128) if device == "cuda" else (9, 3, 64)
    n = int(lengths.split()[-1])
    shape = AttentionShape(tuple(lengths_of(tokens, n)) if " " in lengths else (n,) * (tokens // n), H, G, K)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    maker = Maker(torch.device(device), dtype)
    return Batch(shape, attention_tensors(shape, maker), shape.schedule(maker.device))


def check(b: Batch, form: Form) -> None:
    q, k, v = (b.tensors[name].to(wider(b.tensors[name].dtype)) for name in "qkv")
    truth = reference(q, k, v, b.schedule, b.shape.K**-0.5)
    found = distance(b.run(form), b.run(reference), truth)
    assert found.passed, str(found)


def form_for(name: str, device: str) -> Form:
    where, form = FORMS[name]
    if where not in ("", device):
        pytest.skip(f"{name} runs on {where}, not on {device}")
    return form


def measure(benchmark: Any, run: Callable[[], Any], flops: float, device: str) -> None:
    """Time with the device's work in it, and the rate of useful FLOPs beside it."""

    def once() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    once()
    benchmark(once)
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["useful_tflops"] = float(f"{flops / benchmark.stats.stats.median / 1e12:.4g}")


def here() -> str:
    return "cuda" if torch.cuda.is_available() and implementation(torch.empty(0, device="cuda")) == "triton" else "cpu"


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_forward(benchmark: Any, lengths: str, name: str) -> None:
    device = here()
    form, b = form_for(name, device), batch(lengths, device)
    check(b, form)
    with torch.no_grad():
        measure(benchmark, lambda: b.run(form), b.shape.flops, device)


@pytest.mark.parametrize("name", ["kernel", "reference"])  # on the CPU the reference is what training differentiates
@pytest.mark.parametrize("lengths", LENGTHS)
def test_backward(benchmark: Any, lengths: str, name: str) -> None:
    device = here()
    form, b = form_for(name, device), batch(lengths, device)
    measure(benchmark, b.gradients(form), 2.5 * b.shape.flops, device)


if __name__ == "__main__":
    run_file(__file__)
