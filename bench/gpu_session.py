"""One run on a GPU: its time, its rows, what went wrong, and how variants of one thing are timed against each other."""

import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from flashvec.bench.compile_ahead import without_ahead
from flashvec.bench.device_time import REPETITIONS, Stopwatch, Timed
from flashvec.bench.peers_gpu import Missing
from flashvec.bench.timing import spread, take_turns, write_rows

Row = dict[str, Any]
Run = Callable[[int], Any]


def named(pattern: str, name: str) -> bool:
    """True if a regular expression finds something in a name; an empty one always does."""
    return re.search(pattern, name) is not None


class DeviceLost(Exception):
    """The device answers no more: a kernel read or wrote where it must not, and took the process's context along."""


class Wrong(Exception):
    """A variant that computes something else than the definition: not timed."""


class Budget:
    """Seconds that are left of a run."""

    def __init__(self, minutes: float, now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.stop = now, now() + 60 * minutes

    def left(self) -> float:
        return self.stop - self.now()


@dataclass
class Session:
    """What the parts of a run share.

    `facts` go into every row; `ceilings` hold the device's measured rates; `wrong` names checks that failed; `skipped`
    steps found no time left; variants whose name `without` finds do not take part.
    """

    device: torch.device
    watch: Stopwatch
    budget: Budget
    folder: Path
    facts: Row = field(default_factory=dict)
    ahead: Any = field(default_factory=without_ahead)
    ceilings: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    repetitions: int = REPETITIONS
    step: str = "start"
    without: str | None = None

    def keep(self, rows: Sequence[Row]) -> None:
        """Append rows to this device's file at once: what is measured is not lost to what comes later."""
        self.rows += rows
        write_rows(rows, {**self.facts, **self._clock()}, self.folder)

    def takes(self, variant: str) -> bool:
        """True if a variant takes part."""
        return self.without is None or not named(self.without, variant)

    def begin(self, step: str, needed_s: float) -> bool:
        """True if there is time for a step, which then begins: its kernels are compiled, or not awaited any longer."""
        if self.budget.left() < needed_s:
            self.skipped.append(step)
            return False
        self.step = step
        self.say(f"{self.budget.left():4.0f} s left: {step}")
        for message in self.ahead.wait(step, min(90.0, max(1.0, self.budget.left() / 2))):
            self.say(f"  {message}")
        return True

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def fail(self, what: str) -> None:
        """Note that something is wrong; the run goes on, and ends with exit code 1."""
        self.wrong.append(what)
        self.say(f"  WRONG: {what}")

    def settle(self) -> None:
        """Give memory back and see whether the device still answers.

        Raises:
            DeviceLost: it does not.
        """
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(f"{self.step}: {str(error).splitlines()[0]}") from None

    def _clock(self) -> Row:
        try:
            return {"sm_mhz": torch.cuda.clock_rate(self.device)} if self.device.type == "cuda" else {}
        except (RuntimeError, ImportError):
            return {}  # no library to ask with


def compare(session: Session, builders: Mapping[str, Callable[[], Run]], num_sets: int) -> dict[str, Row]:
    """Median times of variants that take turns.

    Args:
        builders: name to a function that prepares the variant and returns what runs it on an input set's number. One
            that raises becomes a row that says so.
        num_sets: input sets to rotate.

    Returns:
        By name `us`, `spread`, `timing` and `repetitions`; or `missing`, or `wrong`, with the reason.
    """
    builders = {name: build for name, build in builders.items() if session.takes(name)}
    ready: dict[str, Timed] = {}
    found: dict[str, Row] = {}
    for name, build in builders.items():
        try:
            ready[name] = session.watch.prepare(build(), num_sets)
        except Missing as reason:
            found[name] = {"missing": str(reason)}
        except Wrong as fault:
            found[name] = {"wrong": str(fault)}
        except Exception as error:  # a peer may fail in any way; it must not take the others' figures along
            found[name] = {"missing": describe(error)}
        if "missing" in found.get(name, {}):
            session.settle()  # past the handler: until then the error holds what its frames held
    seconds = take_turns({name: partial(_seconds, timed) for name, timed in ready.items()}, session.repetitions)
    for name, times in seconds.items():
        found[name] = {
            "us": round(median(times) * 1e6, 2),
            "spread": spread(times),
            "timing": ready[name].how,
            "repetitions": len(times),
        }
    return {name: found[name] for name in builders}


def _seconds(timed: Timed, repetition: int) -> float:
    return timed.seconds()


def describe(error: Exception) -> str:
    """One line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
