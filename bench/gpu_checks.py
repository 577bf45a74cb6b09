"""Are the kernels right on this device? Asked before any of them is timed.

Each problem gets fresh random inputs, with the edges of tiles and length classes among its sizes. Its outputs and
gradients are judged by `bench/criterion.py` against the definition in fp64, texts of like lengths by themselves, with
every empty tensor poisoned by NaN.
Run again, the bits must be the same; with its rows, sequences or spans in another order or fewer, so must each row's.
What is wrong is reported, and not timed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from flashvec.bench.criterion import Distance, distance
from flashvec.bench.op_problems import OPS, Size
from flashvec.bench.problems import AttentionShape, Maker, Outputs, Problem, Tensors, attention_problem

Results = dict[str, Tensor]

EDGES = (
    1,
    0,
    2,
    31,
    32,
    33,
    63,
    64,
    65,
    127,
    128,
    129,
    191,
    193,
    255,
    257,
    301,
)  # multiples of 16 in all, as timed batches are: Triton compiles others apart
LONG = (1, 700, 64, 2049, 2)
SHORT = 63  # tokens: shorter units are judged together, longer ones with those of up to twice their length
MOST_UNITS = 64  # of a problem whose units are texts, not rows


@dataclass
class Verdict:
    """What was found of one problem: its faults, and the worst error as a share of what is allowed."""

    name: str
    dtype: str
    faults: list[str] = field(default_factory=list)
    worst: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.faults

    def row(self) -> dict[str, Any]:
        return {
            "benchmark": "gpu check",
            "variant": self.name,
            "dtype": self.dtype,
            "passed": self.passed,
            "share_of_allowed": round(self.worst, 3),
            "faults": self.faults,
        }


# --- evaluating -------------------------------------------------------------------------------------------


@contextmanager
def poisoned() -> Iterator[None]:
    """`new_empty` returns NaN, so that an element which a kernel forgot to write shows."""
    new_empty = torch.Tensor.new_empty

    def filled(self: Tensor, *size: Any, **keywords: Any) -> Tensor:
        out = new_empty(self, *size, **keywords)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    with mock.patch.object(torch.Tensor, "new_empty", filled):
        yield


def leaves(problem: Problem, tensors: Tensors) -> Tensors:
    """The tensors with gradients asked for; slices stay slices."""
    return {key: x.detach().requires_grad_(key in problem.differentiable) for key, x in tensors.items()}


def evaluate(
    problem: Problem, form: Callable[[Tensors], Outputs], tensors: Tensors, seeds: Sequence[Tensor]
) -> Results:
    """Outputs by "out i" and gradients by "d name"; `seeds` are the outputs' gradients."""
    inputs = leaves(problem, tensors)
    outs = form(inputs)
    results = {f"out {i}": out.detach() for i, out in enumerate(outs)}
    if problem.differentiable:
        wanted = [inputs[key] for key in problem.differentiable]
        grads = torch.autograd.grad(outs, wanted, [s.to(o.dtype) for s, o in zip(seeds, outs, strict=True)])
        results |= {f"d {key}": grad for key, grad in zip(problem.differentiable, grads, strict=True)}
    return results


def draw_seeds(problem: Problem, device: torch.device) -> list[Tensor]:
    """Random gradients for the outputs, in their dtypes."""
    with torch.no_grad():
        outs = problem.run(problem.tensors)
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(99)
    return [torch.empty_like(o).normal_(generator=generator) if generator else torch.empty_like(o) for o in outs]


def judge(problem: Problem, name: str, dtype: torch.dtype, order: Sequence[int] | None = None) -> Verdict:
    """Run a problem, its definition, the problem again and in another order.

    Args:
        order: units of the reordered run; default all of them shuffled.
    """
    verdict = Verdict(name, str(dtype).removeprefix("torch."))
    device = next(iter(problem.tensors.values())).device
    seeds = draw_seeds(problem, device)
    with poisoned():
        got = evaluate(problem, problem.run, problem.tensors, seeds)
        again = evaluate(problem, problem.run, problem.tensors, seeds)
    wide = {key: x.double() if x.is_floating_point() else x for key, x in problem.tensors.items()}
    truth = evaluate(problem, problem.reference, wide, seeds)
    same = evaluate(problem, problem.reference, problem.tensors, seeds)
    classes = _length_classes(problem)
    for key, value in got.items():
        parts = [rows[key] for rows in classes if key in rows] or [torch.arange(len(value), device=value.device)]
        found = max((distance(value[i], same[key][i], truth[key][i]) for i in parts), key=_share)
        verdict.worst = max(verdict.worst, _share(found))
        if not found.passed:
            verdict.faults.append(f"{key} {found}")
        if not torch.equal(value, again[key]):
            verdict.faults.append(f"{key} has other bits when run again")
    if problem.take is not None and problem.num_units:
        units = np.random.default_rng(1).permutation(problem.num_units) if order is None else np.asarray(order)
        verdict.faults += _reordered(problem, units, seeds, got)
    return verdict


def _length_classes(problem: Problem) -> list[dict[str, Tensor]]:
    """Rows of units of like lengths, by result: the values of a long text are smaller, and so are its errors to be.

    Short ones are judged together: gradients of a single token are differences of what is alike, which have no scale.
    None in fp32, where errors are those of sums in another order, not of one rounding at the end.
    """
    is_half = all(x.dtype != torch.float32 for x in problem.tensors.values() if x.ndim > 2)
    if not is_half or problem.take is None or not 1 < problem.num_units <= MOST_UNITS:
        return []
    units: dict[int, list[int]] = {}
    for unit in range(problem.num_units):
        longest = max((len(rows) for rows in problem.take([unit])[1].values()), default=0)
        units.setdefault(max(SHORT, longest).bit_length(), []).append(unit)
    return [problem.take(each)[1] for each in units.values()]


def _reordered(problem: Problem, units: np.ndarray, seeds: Sequence[Tensor], got: Results) -> list[str]:
    """Names of what has other bits when only some units run, in another order."""
    assert problem.take is not None
    other, by_row = problem.take(units.tolist())
    rows = {key: index for key, index in by_row.items() if key.startswith("out")}
    own = [seed[rows[f"out {i}"]] if f"out {i}" in rows else seed for i, seed in enumerate(seeds)]
    with poisoned():
        moved = evaluate(other, other.run, other.tensors, own)
    return [
        f"{key} depends on what else is in the batch"
        for key, index in by_row.items()
        if key in moved and not torch.equal(moved[key], got[key][index])
    ]


def _share(found: Distance) -> float:
    if found.error == 0:
        return 0.0
    share = found.error / found.allowed if found.allowed else float("inf")
    return float("inf") if math.isnan(share) else share


# --- which problems ---------------------------------------------------------------------------------------

Case = Callable[[Maker], Problem]

ATTENTION: dict[str, AttentionShape] = {
    "attention 128": AttentionShape(EDGES, 32, 8, 128),
    "attention 64": AttentionShape(EDGES, 32, 8, 64),
    "attention 128, long": AttentionShape(LONG, 32, 8, 128),
    "attention 64, long": AttentionShape(LONG, 32, 8, 64),
    "attention 128, rotation": AttentionShape(EDGES, 32, 8, 128, rotate="rope"),
    "attention 128, head norms": AttentionShape(EDGES, 16, 8, 128, rotate="norms"),
    "attention 64, rotation": AttentionShape(EDGES, 32, 8, 64, rotate="rope"),
    "attention 128, selected queries": AttentionShape(EDGES, 32, 8, 128, rotate="rope", selected=True),
    "attention 128, dropout": AttentionShape(EDGES, 32, 8, 128, drop=0.1),
    "attention 64, dropout": AttentionShape(EDGES, 32, 8, 64, drop=0.1),
    "attention 128, causal": AttentionShape(EDGES, 32, 8, 128, causal=True),
    "attention 256, window, norms": AttentionShape((*EDGES, 592), 4, 1, 256, window=128, rotate="norms"),
    "attention 256, softcap": AttentionShape(EDGES, 8, 4, 256, softcap=50.0),
    "attention 128, one head a group": AttentionShape(EDGES, 16, 16, 128),
    "attention 64, one head a group": AttentionShape(EDGES, 32, 32, 64),
    "attention 64, seven heads a group": AttentionShape(EDGES, 14, 2, 64),
    "attention 128, seven heads a group, rotation": AttentionShape(EDGES, 14, 2, 128, rotate="rope"),
    "attention 128, long, rotation": AttentionShape(LONG, 32, 8, 128, rotate="rope"),
    "attention 64, window of two sizes": AttentionShape((*EDGES, 592), 4, 2, 64, window=(100, 10)),
    "attention 80": AttentionShape(EDGES, 8, 8, 80),
    "attention 96, causal window": AttentionShape((*EDGES, 400), 8, 8, 96, causal=True, window=70),
}
SMALL = tuple(n for n in EDGES if n) * 2
SIZES = {  # Qwen3 0.6B, whose rows are a power of two, and Gemma 3 270M and Llama 3 8B, whose rows are none or long
    "qwen3-0.6b": Size(SMALL, 1024, 3072, 16, 8, 128, V=5_003),
    "gemma-3-270m": Size(SMALL, 640, 2048, 4, 1, 256, V=5_003),
    "llama-3-8b": Size(SMALL, 4096, 14336, 32, 8, 128, V=5_003),
}


def cases() -> dict[str, Case]:
    """What is checked, most valuable first."""
    found: dict[str, Case] = {name: partial(attention_problem, shape) for name, shape in ATTENTION.items()}
    for model, size in SIZES.items():
        for op, build in OPS.items():
            found[f"{op} {model}"] = partial(build, size)
    return found


def check(name: str, case: Case, device: torch.device, dtype: torch.dtype, seed: int) -> Verdict:
    """Judge one case; what it raises, but for a device that is lost, is its fault."""
    try:
        return judge(case(Maker(device, dtype, seed)), name, dtype)
    except Exception as error:  # one broken kernel must not keep the others from being checked
        message = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return Verdict(name, str(dtype).removeprefix("torch."), [message[:300]], float("inf"))


# --- offsets past 2^31 elements ---------------------------------------------------------------------------

PAST_INT32 = 2**31 + 2**24  # elements of the largest tensor


def large_cases() -> dict[str, Case]:
    """Problems whose largest tensor has more than 2^31 elements."""
    length = 1024
    sequences = PAST_INT32 // (length * 32 * 64) + 1
    tokens = PAST_INT32 // 28_672 + 1
    size = Size((tokens,), 4096, 14_336, 32, 8, 128)
    wide = Size((PAST_INT32 // 4096 + 1,), 4096, 1, 1, 1, 2)
    return {
        "attention 64, past 2^31": partial(attention_problem, AttentionShape((length,) * sequences, 32, 8, 64)),
        "swiglu, past 2^31": partial(OPS["swiglu"], size),
        "add_rms_norm, past 2^31": partial(OPS["add_rms_norm"], wide),
        "rms_norm, past 2^31": partial(OPS["rms_norm"], wide),
    }


def check_large(name: str, case: Case, device: torch.device, dtype: torch.dtype, tail: int = 3) -> Verdict:
    """The last units of a problem too large for 32-bit offsets, against the same units alone: equal bits."""
    verdict = Verdict(name, str(dtype).removeprefix("torch."))
    try:
        problem = case(Maker(device, dtype, 3))
        assert problem.take is not None
        seeds = draw_seeds(problem, device)
        got = evaluate(problem, problem.run, problem.tensors, seeds)
        verdict.faults = _reordered(problem, np.arange(problem.num_units)[-tail:], seeds, got)
    except Exception as error:  # as in `check`
        verdict.faults = [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]]
    return verdict
