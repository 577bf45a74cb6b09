"""The project's one stop-watch: variants take turns on the same inputs, medians are compared, rows are kept.

These machines are noisy, so a number means something only beside another from the same run: every repetition runs
each variant once, in an order that rotates.
"""

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from flashvec.kernels.backend import instruction_set

RESULTS = Path(__file__).resolve().parent / "results"


def interleave(
    variants: dict[str, Callable[[int], Any]], repetitions: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each variant in each repetition.

    Args:
        variants: name to a function of the repetition's number; all get the same inputs for the same number.
        repetitions: counted ones; the caller warms up.
        clock: gives seconds; `time.thread_time` where one thread runs on a machine that others use too.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for repetition in range(repetitions):
        shift = repetition % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock()
            variants[name](repetition)
            seconds[name].append(clock() - start)
    return seconds


def spread(values: Sequence[float]) -> str:
    """Half the distance from minimum to maximum, as a share of the median."""
    return f"±{(max(values) - min(values)) / 2 / median(values):.0%}"


def machine() -> dict[str, Any]:
    """What a row must say about where it was measured."""
    return {
        "cpu": _cpu_name(),
        "instructions": instruction_set(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def device_name() -> str:
    """Name of this machine's results file: the GPU, or the CPU's instruction set and core count."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu-{os.cpu_count()}-core-{instruction_set().replace('_', '-')}"


def append_rows(rows: Sequence[dict[str, Any]]) -> Path:
    """Add rows, each with the machine's facts, to this device's results."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{device_name()}.jsonl"
    facts = machine()
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps({**row, **facts}) + "\n")
    print(f"{len(rows)} rows added to {path.relative_to(RESULTS.parents[1])}", file=sys.stderr)
    return path


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _commit() -> str:
    """Short hash of the checkout, with + where it has uncommitted changes; unknown outside one."""
    here = Path(__file__).resolve().parent
    try:
        run = lambda *args: subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout  # noqa: E731
        dirty = any(not line.endswith(".jsonl") for line in run("status", "--porcelain", "-uno").splitlines())
        return run("rev-parse", "--short", "HEAD").strip() + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
