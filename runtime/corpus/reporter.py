"""What a job's events look like to a person, on a terminal or in a log, and to a machine."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from flashvec.runtime.console import printable
from flashvec.runtime.corpus.local import Event

LINE_EVERY_S = 10.0


class Tally:
    """Sums over the events of a run; `line` says them in one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.start: float | None = None
        self.shards = self.shards_done = self.rows = self.rows_done = self.rows_now = self.tokens = 0
        self.bytes = self.errors = 0
        self.seconds = dict.fromkeys(("read_s", "embed_s", "write_s"), 0.0)
        self.in_work: dict[int, int] = {}  # rows that steps told of, by shard

    def take(self, event: Event) -> None:
        """Count one event."""
        kind = event["event"]
        if kind == "plan":
            self.shards, self.rows, self.shards_done = event["shards"], event["rows"], event["done"]
        elif kind == "ready":
            self.start, self.rows_done = self.clock(), event["rows_done"]
        elif kind == "step":
            self.rows_now += event["rows"]
            self.tokens += event["tokens"]
            self.in_work[event["shard"]] = self.in_work.get(event["shard"], 0) + event["rows"]
            for name in self.seconds:
                self.seconds[name] += event[name]
        elif kind == "done":
            self.shards_done += 1
            self.bytes += event["bytes"]
            self.errors += event["errors"]
            self.rows_now += event["read"] - self.in_work.pop(event["shard"], 0)
        elif kind in ("retry", "set_aside"):
            self.rows_now -= self.in_work.pop(event["shard"], 0)

    @property
    def waited(self) -> float:
        """Share of the workers' time in which the model waited for rows or for the writer."""
        return (self.seconds["read_s"] + self.seconds["write_s"]) / max(sum(self.seconds.values()), 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """By the rate so far; None before there is one."""
        if self.start is None or not self.rows_now:
            return None
        elapsed = self.clock() - self.start
        return max(self.rows - self.rows_done - self.rows_now, 0) * elapsed / self.rows_now

    def line(self) -> str:
        """The state of the job, what matters most first: a bar of a terminal is cut at its edge."""
        elapsed = max(self.clock() - self.start, 1e-9) if self.start is not None else 1e-9
        left = self.seconds_left
        parts = [
            f"{self.shards_done} of {counted(self.shards, 'shard')}",
            f"{self.rows_done + self.rows_now:,} of about {self.rows:,} rows",
        ]
        if left is not None:
            parts.append(f"{duration(left)} left")
        if self.errors:
            parts.append(counted(self.errors, "error"))
        parts.append(f"{self.rows_now / elapsed:,.0f} rows/s")
        if self.tokens:
            parts.append(f"{self.tokens / elapsed:,.0f} tokens/s")
        parts += [f"model waited {self.waited:.1%}", f"{_size(self.bytes)} written"]
        return ", ".join(parts)


class Reporter:
    """Shows events: JSON lines, a bar on a terminal, or a line now and then. A context manager."""

    def __init__(self, as_json: bool, out: TextIO | None = None, is_terminal: bool | None = None) -> None:
        self.as_json, self.out = as_json, out or (sys.stdout if as_json else sys.stderr)
        self.tally = Tally()
        self.bar: Any = None
        self.is_terminal = self.out.isatty() if is_terminal is None else is_terminal
        self.last_line = 0.0

    def __enter__(self) -> "Reporter":
        if self.is_terminal and not self.as_json:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (BarColumn(bar_width=20), TextColumn("{task.description}"))
            self.bar = Progress(*columns, console=Console(file=self.out))
            self.bar.start()
            self.task = self.bar.add_task("planning", total=None)
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        self.tally.take(event)
        kind = event["event"]
        if self.as_json:
            print(json.dumps(event), file=self.out, flush=True)
            return
        if kind == "note":
            self._say(f"note: {event['text']}")
        elif kind in ("retry", "set_aside"):
            what = "is tried again" if kind == "retry" else "is set aside"
            self._say(f"shard {event['shard']} {what}: {event['message']}")
        elif self.bar is not None:
            done = self.tally.rows_done + self.tally.rows_now
            self.bar.update(self.task, total=self.tally.rows, completed=done, description=self.tally.line())
        elif kind in ("ready", "done", "step") and time.monotonic() - self.last_line >= LINE_EVERY_S:
            self.last_line = time.monotonic()
            self._say(self.tally.line())

    def _say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.console.print(printable(text), markup=False, highlight=False)
        else:
            print(printable(text), file=self.out, flush=True)


def counted(number: int, noun: str) -> str:
    """1 shard, 2,000 shards."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
