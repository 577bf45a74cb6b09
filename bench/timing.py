"""The project's one stop-watch: variants take turns on the same inputs, medians are compared, rows are kept.

These machines are noisy, so a number means something only beside another from the same run: every repetition runs
each variant once, in an order that rotates. Work on a GPU is timed by `bench/device_time.py`, in the same turns.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
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
    return take_turns({name: partial(_seconds, run, clock) for name, run in variants.items()}, repetitions)


def take_turns(measures: dict[str, Callable[[int], float]], repetitions: int) -> dict[str, list[float]]:
    """What each measure, a function of the repetition's number, gave in each repetition."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    names = list(measures)
    for repetition in range(repetitions):
        shift = repetition % len(names)
        for name in names[shift:] + names[:shift]:
            found[name].append(measures[name](repetition))
    return found


def _seconds(run: Callable[[int], Any], clock: Callable[[], float], repetition: int) -> float:
    start = clock()
    run(repetition)
    return clock() - start


def spread(values: Sequence[float]) -> str:
    """Half the distance from minimum to maximum, as a share of the median."""
    return f"±{(max(values) - min(values)) / 2 / median(values):.0%}"


def at_least_one(text: str) -> int:
    """The `type` of an argument that counts something."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few, expected at least 1")
    return number


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


def run_name() -> str:
    """A name for one run, which all its rows carry: only they were measured in turn."""
    return secrets.token_hex(4)


def device_name() -> str:
    """Name of this machine's results file: the GPU, or the CPU's instruction set and core count."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu-{os.cpu_count()}-core-{instruction_set().replace('_', '-')}"


def append_rows(rows: Sequence[dict[str, Any]]) -> Path:
    """Add rows, each with the machine's facts, to this device's results."""
    path = write_rows(rows, machine(), RESULTS)
    print(f"{len(rows)} rows added to {path}", file=sys.stderr)
    return path


def write_rows(rows: Sequence[dict[str, Any]], facts: dict[str, Any], folder: Path) -> Path:
    """Add rows, each with these facts, to this device's file in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{device_name()}.jsonl"
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps({**row, **facts}) + "\n")
    return path


def gpu_facts() -> dict[str, Any]:
    """What a row must say about the GPU it was measured on, beside `machine()`; without one only the versions."""
    facts = {"triton": _version("triton"), "transformers": _version("transformers")}
    query = ["driver_version", "compute_cap", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit"]
    names = ["driver", "compute_capability", "sm_mhz", "max_sm_mhz", "memory_mhz", "power_limit_w"]
    command = ["nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader,nounits"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        found = [value.strip() for value in printed.splitlines()[0].split(",")]
        facts |= dict(zip(names, found, strict=True))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        pass  # an AMD device, or a container without the tool: the rows go without clocks
    if torch.cuda.is_available():
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "hip": torch.version.hip}
    return facts


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _commit() -> str:
    """Short hash of the checkout, with + where it has uncommitted changes; outside one, a digest of the code.

    A checkout around an installed package, as of a project whose environment lies in its folder, is not the package's.
    """
    here = Path(__file__).resolve().parent
    try:
        run = lambda *args: subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout  # noqa: E731
        run("ls-files", "--error-unmatch", Path(__file__).name)
        dirty = any(not line.endswith(".jsonl") for line in run("status", "--porcelain", "-uno").splitlines())
        return run("rev-parse", "--short", "HEAD").strip() + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return f"code-{_code_digest()}"


def _code_digest() -> str:
    """Of every Python file beside and below this package's folders: names a copy that carries no history."""
    digest = hashlib.sha256()
    for folder in ("kernels", "runtime", "training", "bench"):
        for path in sorted((Path(__file__).resolve().parents[1] / folder).rglob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:8]
