"""One command for a machine with a GPU: are the kernels right there, and how fast beside what is installed there.

    python -m bench.gpu --part kernels --minutes 8      # every kernel: checks, then attention, then the ops around it
    python -m bench.gpu --part embed --minutes 8        # whole models, random weights at real shapes
    python -m bench.gpu --part train --minutes 6        # a LoRA step, against transformers + PEFT
    python -m bench.gpu --part kernels --only "K 128|check" --without flex   # only these steps, one peer fewer

Run from the repository's root; nothing needs to be installed but torch and triton, and transformers (and peft) for
whole models. No network is used. `--minutes` is a budget: steps come most valuable first, each looks at what is left,
and what found no time is named at the end. Kernels are compiled ahead on all cores (`bench/compile_ahead.py`).

How to read it. Rows, with device, driver, versions, commit, date and clocks, are appended step by step to
`<device>.jsonl` in bench/results, or in $OUT where that is set (or `--out`), so that they can be brought back. The
short tables printed last are made of these rows. Two rates measured first are the yardsticks of all others: TFLOP/s of
an 8192³ bf16 product (benchmark `gpu ceiling`) and GB/s of a copy, bytes read plus written.

- `gpu check`: forward and backward of a kernel against its definition; `passed`, `share_of_allowed` (of the error that
  the criterion allows), `faults`. One that fails is not timed, and the exit code is 1.
- `gpu attention`: useful `tflops`; variants `flashvec`, `candidate ROWSxKEYS, ...` (tiles that the tables could choose,
  see bench/gpu_attention.py), and peers. `missing` says why a peer has no figure, `wrong` what it computed instead.
- `gpu op`: `gb_per_s` or `tflops`, `share` of the yardstick, beside torch's eager and compiled forms.
- `gpu embed`: `tokens_per_s`, `share_of_989` TFLOP/s in useful FLOPs, `share_of_products`: of the rate that the model's
  bare products reach here. `gpu train`: the same for forward and backward, with the step's own memory.

`timing` says `graph` where a variant was replayed as a CUDA graph, so that no launch is in its time, else `eager`.

Exit code: 0 done, 1 something was wrong, 2 no GPU, 3 stopped because a step did not come back.
"""

import argparse
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flashvec.bench import gpu_attention, gpu_checks, gpu_embed, gpu_ops, gpu_train
from flashvec.bench.compile_ahead import Ahead
from flashvec.bench.device_time import DeviceStopwatch
from flashvec.bench.gpu_session import Budget, DeviceLost, Row, Session, named
from flashvec.bench.problems import Maker
from flashvec.bench.timing import RESULTS, gpu_facts, machine
from flashvec.kernels.backend import TARGETS, Target, has_triton

PARTS = ("kernels", "embed", "train")
GRACE_S = 60.0  # past the budget: then a step is taken not to come back
LARGE_CHECK_BYTES = 60e9


# --- yardsticks -------------------------------------------------------------------------------------------


def measure_ceilings(session: Session, size: int = 8192, copied_bytes: int = 2**31) -> None:
    """The device's rates of a large product and a large copy, which other rows are shares of."""
    a, b = (torch.randn(size, size, device=session.device).bfloat16() for _ in range(2))
    source = torch.randn(copied_bytes // 4, device=session.device)
    target = torch.empty_like(source)
    product = session.watch.prepare(lambda i: a @ b, 2)
    # By a kernel: a copy in a recorded graph goes another, slower way (2.4 instead of 3.0 TB/s on an H100).
    copy = session.watch.prepare(lambda i: torch.mul(source, 1.0, out=target), 2)
    product_s, copy_s = (sorted(t.seconds() for _ in range(session.repetitions))[session.repetitions // 2]
                         for t in (product, copy))  # fmt: skip
    session.ceilings = {
        "tflops": float(f"{2 * size**3 / product_s / 1e12:.4g}"),
        "gb_per_s": float(f"{2 * source.numel() * 4 / copy_s / 1e9:.4g}"),
    }
    session.keep([{"benchmark": "gpu ceiling", "product": size, "copied_bytes": copied_bytes, **session.ceilings}])
    session.settle()


# --- part kernels -------------------------------------------------------------------------------------------

Step = tuple[str, float, Callable[[Session], None], Callable[[], None] | None]  # name, seconds, run, record


def kernel_steps() -> list[Step]:
    """Checks in bf16, attention's time, checks in fp16, the ops' time, offsets past 2^31."""
    attention: list[Step] = [
        (group.name, 15.0, partial(_time_attention, group), partial(gpu_attention.record, group))
        for group in gpu_attention.groups()
    ]
    ops: list[Step] = [
        (group.name, 15.0, partial(_time_op, group), partial(gpu_ops.record, group)) for group in gpu_ops.groups()
    ]
    large: list[Step] = [
        (name, 20.0, partial(_check_large, name, case), None) for name, case in gpu_checks.large_cases().items()
    ]
    return [*check_steps(torch.bfloat16), *attention, *check_steps(torch.float16), *ops, *large]


def check_steps(dtype: torch.dtype) -> list[Step]:
    found: list[Step] = []
    for name, case in gpu_checks.cases().items():
        label = f"check {name} {str(dtype).removeprefix('torch.')}"
        found.append((label, 3.0, partial(_check, name, case, dtype), partial(_record_check, case, dtype)))
    return found


def _check(name: str, case: gpu_checks.Case, dtype: torch.dtype, session: Session) -> None:
    _keep_verdict(session, gpu_checks.check(name, case, session.device, dtype, seed=len(session.rows)))


def _check_large(name: str, case: gpu_checks.Case, session: Session) -> None:
    if torch.cuda.mem_get_info(session.device)[0] < LARGE_CHECK_BYTES:
        session.skipped.append(f"{name}: not enough memory")
        return
    _keep_verdict(session, gpu_checks.check_large(name, case, session.device, torch.bfloat16))


def _keep_verdict(session: Session, verdict: gpu_checks.Verdict) -> None:
    session.keep([verdict.row()])
    for fault in verdict.faults:
        session.fail(f"{verdict.name} {verdict.dtype}: {fault}")
    session.settle()


def _record_check(case: gpu_checks.Case, dtype: torch.dtype) -> None:
    problem = case(Maker(torch.device("meta"), dtype))
    gpu_checks.evaluate(problem, problem.run, problem.tensors, gpu_checks.draw_seeds(problem, torch.device("meta")))


def _time_attention(group: gpu_attention.Group, session: Session) -> None:
    gpu_attention.time_group(session, group)


def _time_op(group: gpu_ops.OpGroup, session: Session) -> None:
    broken = [row["variant"] for row in session.rows if row["benchmark"] == "gpu check" and not row["passed"]]
    if any(name.startswith(f"{group.op} ") for name in broken):
        session.keep([{"benchmark": "gpu op", "op": group.op, "direction": group.direction, "model": group.model,
                       "variant": "flashvec", "wrong": "its check failed"}])  # fmt: skip
        return
    gpu_ops.time_group(session, group)


def run_steps(session: Session, steps: Sequence[Step]) -> None:
    """Each step that there is time for."""
    for name, needed_s, run, _ in steps:
        if session.begin(name, needed_s):
            run(session)


# --- the command --------------------------------------------------------------------------------------------


def summary(session: Session) -> list[str]:
    """The short tables, and what went wrong or was left out."""
    checks = [row for row in session.rows if row["benchmark"] == "gpu check"]
    facts = session.facts
    lines = ["", ", ".join(f"{key} {facts[key]}" for key in SHOWN if facts.get(key))]
    if session.ceilings:
        lines.append(f"8192³ product {session.ceilings['tflops']} TFLOP/s, copy {session.ceilings['gb_per_s']} GB/s")
    for part in (gpu_ops.summary, gpu_attention.summary, gpu_embed.summary, gpu_train.summary):
        lines += part(session.rows)
    lines.append(f"{sum(row['passed'] for row in checks)} of {len(checks)} checks passed")
    if session.skipped:
        lines.append(f"{len(session.skipped)} steps found no time or memory: {'; '.join(session.skipped)}"[:1500])
    lines += [f"WRONG: {what}"[:300] for what in session.wrong]
    return lines


SHOWN = ("gpu", "driver", "torch", "cuda", "triton", "transformers", "commit", "date", "sm_mhz", "max_sm_mhz")


def target_of(facts: Row) -> Target | None:
    """The target a GPU's kernels are compiled for, from what the driver's own tool says: nothing is initialised yet."""
    capability = facts.get("compute_capability", "")
    major, _, minor = capability.partition(".")
    if not (major.isdigit() and minor.isdigit()):
        return None
    known = [t for t in TARGETS.values() if isinstance(t.arch, int) and t.arch <= int(major) * 10 + int(minor)]
    return max(known, key=lambda t: int(t.arch)) if known else None


def start_ahead(part: str, facts: Row, only: str, jobs: int | None) -> Any:
    """Compile what the part's steps will launch, on all cores; None where the GPU's kind is not known."""
    target = target_of(facts)
    if target is None or not has_triton():
        return None
    if part == "kernels":
        steps = {name: record for name, _, _, record in kernel_steps() if record is not None and named(only, name)}
    elif part == "embed":
        steps = {p.name: partial(gpu_embed.record, p) for p in gpu_embed.profiles() if named(only, p.name)}
    elif part == "train":
        steps = {b.name: partial(gpu_train.record, b) for b in gpu_train.batches() if named(only, b.name)}
    else:
        return None
    return Ahead(steps, target, jobs)


def pattern(text: str) -> str:
    """A regular expression, checked."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None
    return text


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--part", choices=PARTS, required=True)
    made.add_argument("--minutes", type=float, default=8.0, help="budget; default 8")
    made.add_argument(
        "--only", default="", type=pattern, metavar="PATTERN", help="steps whose name this regular expression finds"
    )
    made.add_argument("--without", type=pattern, metavar="PATTERN", help="leave out variants whose name this finds")
    made.add_argument("--out", type=Path, help="folder for rows; default $OUT, else bench/results")
    made.add_argument("--commit", help="for rows, where the copy carries no history")
    made.add_argument("--jobs", type=int, help="processes that compile ahead; default one a core, 0 for none")
    return made


def run_part(session: Session, part: str, only: str) -> None:
    """Run a part's steps."""
    measure_ceilings(session)
    if part == "kernels":
        run_steps(session, [step for step in kernel_steps() if named(only, step[0])])
        return
    other = {"embed": gpu_embed.run, "train": gpu_train.run}
    other[part](session, only)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.gpu: torch sees no GPU here; nothing was measured")
        return 2
    folder = options.out or Path(os.environ.get("OUT") or RESULTS)
    facts = {**machine(), **gpu_facts()}
    facts["commit"] = options.commit or facts["commit"]
    ahead = None
    budget = Budget(options.minutes)
    if options.jobs != 0:
        ahead = start_ahead(options.part, facts, options.only, options.jobs)  # forks: before the device is touched
    device = torch.device("cuda", torch.cuda.current_device())
    session = Session(device, DeviceStopwatch(device), budget, folder, facts, without=options.without)
    if ahead is not None:
        session.ahead = ahead
        session.say(f"{ahead.num_kernels} kernels are being compiled ahead; {len(ahead.problems)} steps not recorded")
        for name, problem in list(ahead.problems.items())[:5]:
            session.say(f"  {name}: {problem}")
    stop = threading.Timer(60 * options.minutes + GRACE_S, _give_up, (session,))
    stop.daemon = True
    stop.start()
    try:
        run_part(session, options.part, options.only)
    except DeviceLost as lost:
        session.fail(f"the device is lost: {lost}")
    finally:
        stop.cancel()
        session.ahead.close()
    print("\n".join(summary(session)), flush=True)
    return int(bool(session.wrong))


def _give_up(session: Session) -> None:
    """A step hangs in the driver, where no exception reaches: say what is known and leave."""
    session.wrong.append(f"did not come back: {session.step}")
    print("\n".join(summary(session)), flush=True)
    os._exit(3)


if __name__ == "__main__":
    sys.exit(main())
