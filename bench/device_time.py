"""How long work on a GPU takes: by events, recorded as a CUDA graph where it can be.

A replayed graph has no launches in its time, so that what is compared is kernels and not Python. Work that cannot be
recorded (it waits for the device) is run as it is, and its rows say `eager`: there a launch that takes longer than
its kernel shows.

The stream's caches are warm, but every repetition walks several input sets, chosen to be larger than the L2 cache
together.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

L2_BYTES = 150e6  # sets together are at least this: three times an H100's cache
LONG_ENOUGH_S = 2e-3  # of one measurement: events resolve half a microsecond, and clocks settle
REPETITIONS = 15


@dataclass(frozen=True)
class Timed:
    """Work that is ready to be timed: `seconds()` runs it and returns the device's time for one call."""

    seconds: Callable[[], float]
    how: str  # graph, eager, or host


class Stopwatch(Protocol):
    """Prepares work for timing."""

    def prepare(self, run: Callable[[int], Any], num_sets: int) -> Timed:
        """Warm up `run`, a function of the input set's number, and make it ready; raises what `run` raises."""
        ...

    def on_stream(self) -> Any:
        """A context in which work lands on the stopwatch's stream: a backward runs where its forward ran."""
        ...


def num_sets(bytes_of_a_set: float, most: int = 6) -> int:
    """Input sets to rotate."""
    return max(2, min(most, -int(-L2_BYTES // max(1.0, bytes_of_a_set))))


class DeviceStopwatch:
    """Events on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def on_stream(self) -> Any:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self.stream)

    def prepare(self, run: Callable[[int], Any], num_sets: int) -> Timed:
        with self.on_stream():
            for _ in range(2):
                for i in range(num_sets):
                    run(i)
            self.stream.synchronize()
            graph = self._record(run, num_sets)

            def once() -> None:
                if graph is not None:
                    graph.replay()
                else:
                    for i in range(num_sets):
                        run(i)

            rounds = max(1, min(50, round(LONG_ENOUGH_S / max(1e-6, self._seconds(once, 1)))))
        return Timed(lambda: self._seconds(once, rounds) / num_sets, "eager" if graph is None else "graph")

    def _record(self, run: Callable[[int], Any], num_sets: int) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        try:
            for i in range(num_sets):
                run(i)
            graph.capture_end()
        except torch.OutOfMemoryError:
            _abandon(graph)
            raise
        except (RuntimeError, AssertionError, ValueError):  # what refuses to be recorded
            _abandon(graph)
            torch.cuda.synchronize(self.device)
            return None
        return graph

    def _seconds(self, once: Callable[[], None], rounds: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            start.record(self.stream)
            for _ in range(rounds):
                once()
            stop.record(self.stream)
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / rounds


def _abandon(graph: torch.cuda.CUDAGraph) -> None:
    """End a recording that failed; ending it fails too."""
    with contextlib.suppress(RuntimeError):
        graph.capture_end()


class HostStopwatch:
    """Wall time, for the CPU: what tests run."""

    def on_stream(self) -> Any:
        return contextlib.nullcontext()

    def prepare(self, run: Callable[[int], Any], num_sets: int) -> Timed:
        for i in range(num_sets):
            run(i)

        def seconds() -> float:
            start = time.perf_counter()
            for i in range(num_sets):
                run(i)
            return max(1e-9, (time.perf_counter() - start) / num_sets)

        return Timed(seconds, "host")
