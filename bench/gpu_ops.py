"""Time of the ops around attention on a GPU, against the bytes they must move and against torch.

Each runs at the shapes of real models on 16,384 tokens. Memory-bound ops are given in GB/s of bytes that must move
(each input read once, each output written once) and as a share of what a copy reaches on the same device; LoRA and the
losses in TFLOP/s and as a share of what a large product reaches. Beside ours stand torch's own operations, eager and
compiled: for LoRA and the losses what torch's users write, for the others the op's definition, wider inside (fp32) than
most would write it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashvec.bench.device_time import num_sets
from flashvec.bench.gpu_checks import leaves
from flashvec.bench.gpu_session import Row, Run, Session, compare
from flashvec.bench.op_problems import OPS, Size
from flashvec.bench.problems import Maker, Outputs, Problem, Tensors
from flashvec.kernels.roofline import MODELS, lengths_of

TOKENS = 16_384
MEAN_LENGTH = 256
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class OpGroup:
    """One op at one model's shape, in one direction."""

    op: str
    model: str
    size: Size
    direction: str

    @property
    def name(self) -> str:
        return f"{self.op} {self.direction} {self.model}"


def groups(tokens: int = TOKENS) -> list[OpGroup]:
    """What is timed, most valuable first."""
    lengths = tuple(lengths_of(tokens, MEAN_LENGTH))
    sizes = {}
    for model in ("llama-3-8b", "qwen3-0.6b", "gemma-3-270m"):
        s = MODELS[model]
        sizes[model] = Size(lengths, s.D, s.F, s.H, s.G, s.K)
    usual = (
        "add_rms_norm",
        "swiglu",
        "mean_pool",
        "rope",
        "norm_rope",
        "lora",
        "rms_norm",
        "cross_entropy",
        "info_nce",
    )
    gemma = ("add_rms_norm, post norm", "swiglu, gelu_tanh")
    found = []
    for model, ops in (("llama-3-8b", usual), ("qwen3-0.6b", usual), ("gemma-3-270m", gemma)):
        for direction in ("forward", "backward"):
            found += [OpGroup(op, model, sizes[model], direction) for op in ops if op in OPS]
    return found


Form = Callable[[Tensors], Outputs]


def forms(problem: Problem, compiled: bool) -> dict[str, Form]:
    """Ours, torch's operations, and these compiled."""
    by_torch = problem.torch_form or problem.reference
    found = {"flashvec": problem.run, "torch": by_torch}
    if compiled:
        found["torch, compiled"] = torch.compile(by_torch, dynamic=False)
    return found


def build(form: Form, problems: Sequence[Problem], direction: str, session: Session) -> Run:
    """A form ready to run on each problem's tensors."""
    if direction == "forward":

        def forward(i: int) -> Any:
            with torch.no_grad():
                return form(problems[i].tensors)

        return forward
    with session.watch.on_stream():
        backwards = [backward_of(problem, form) for problem in problems]
    return lambda i: backwards[i]()


def backward_of(problem: Problem, form: Form) -> Callable[[], tuple[Tensor, ...]]:
    """The gradients of a forward that runs now."""
    inputs = leaves(problem, problem.tensors)
    with torch.enable_grad():
        outs = form(inputs)
    douts = [torch.randn_like(out) for out in outs]
    wanted = [inputs[name] for name in problem.differentiable]
    return lambda: torch.autograd.grad(outs, wanted, douts, retain_graph=True)


def time_group(session: Session, group: OpGroup, dtype: torch.dtype = DTYPE, compiled: bool = True) -> None:
    """Rows of one op."""
    first = OPS[group.op](group.size, Maker(session.device, dtype, 0))
    count = num_sets(first.input_bytes, most=4)
    problems = [first, *(OPS[group.op](group.size, Maker(session.device, dtype, i)) for i in range(1, count))]
    builders: dict[str, Any] = {
        name: partial(build, form, problems, group.direction, session) for name, form in forms(first, compiled).items()
    }
    found = compare(session, builders, count)
    session.keep([row_of(session, group, first, name, measured) for name, measured in found.items()])
    del problems, first, builders
    session.settle()


def row_of(session: Session, group: OpGroup, problem: Problem, variant: str, measured: Row) -> Row:
    """A form's row: its rate, and that rate's share of the device's own."""
    row: Row = {
        "benchmark": "gpu op",
        "op": group.op,
        "variant": variant,
        "direction": group.direction,
        "model": group.model,
        "tokens": group.size.T,
        **measured,
    }
    if "us" not in measured:
        return row
    for cost, rate, scale in (("flops", "tflops", 1e6), ("bytes", "gb_per_s", 1e3)):
        amount = problem.cost.get(f"{group.direction} {cost}")
        if amount:
            row[rate] = float(f"{amount / measured['us'] / scale:.4g}")
            if rate in session.ceilings:
                row["share"] = round(row[rate] / session.ceilings[rate], 3)
    return row


def record(group: OpGroup, dtype: torch.dtype = DTYPE) -> None:
    """Run ours on meta tensors, for the kernels' recording."""
    problem = OPS[group.op](group.size, Maker(torch.device("meta"), dtype))
    if group.direction == "forward":
        problem.run(problem.tensors)
    else:
        backward_of(problem, problem.run)()


def summary(rows: Sequence[Row]) -> list[str]:
    """One line per op: rate and share of the ceiling, and ours against torch."""
    grouped: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        if row["benchmark"] == "gpu op":
            grouped.setdefault((row["op"], row["direction"], row["model"]), {})[row["variant"]] = row
    lines = []
    for (op, direction, model), found in grouped.items():
        own = found["flashvec"]
        if "us" not in own:
            lines.append(f"{op:24} {direction:8} {model:12} {own.get('missing') or own.get('wrong')}")
            continue
        rate = f"{own['gb_per_s']:6.0f} GB/s" if "gb_per_s" in own else f"{own.get('tflops', 0):6.0f} TF/s"
        others = [
            f"{own_name} {row['us'] / own['us']:.2f}x"
            for own_name, row in found.items()
            if own_name != "flashvec" and "us" in row
        ]
        share = f"{own['share']:4.0%}" if "share" in own else "   -"
        lines.append(f"{op:24} {direction:8} {model:12} {rate} {share} {own['us']:8.1f} us  " + ", ".join(others))
    return ["ops: rate, share of the measured copy or product, time; others' time over ours", *lines] if lines else []
