"""A progress bar on stderr: texts done, tokens per second, time left. Silent unless asked for or on a terminal."""

import sys
from typing import Any

WORTH_A_BAR = 1000  # texts


def is_watched() -> bool:
    """Is stderr a terminal; it may also be closed, or missing as in a program without a console."""
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


class Progress:
    """Use as a context manager; `advance` after every pack.

    Args:
        total: texts to come.
        show: True or False, or None: on a terminal, when there are many texts.
        doing, unit: what the bar says is done, and to what.
    """

    def __init__(self, total: int, show: bool | None, doing: str = "embedding", unit: str = "texts") -> None:
        self.total = total
        self.doing, self.unit = doing, unit
        self.show = show if show is not None else total >= WORTH_A_BAR and is_watched()
        self.num_tokens = 0
        self.bar: Any = None

    def __enter__(self) -> "Progress":
        if self.show:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            rate = TextColumn(f"{self.unit}  {{task.fields[rate]}}")
            columns = (
                TextColumn(self.doing),
                BarColumn(),
                MofNCompleteColumn(),
                rate,
                TimeRemainingColumn(),
            )
            self.bar = Bar(*columns, console=Console(stderr=True))
            self.bar.start()
            self.task = self.bar.add_task("", total=self.total, rate="")
        return self

    def advance(self, num_texts: int, num_tokens: int) -> None:
        if self.bar is not None:
            self.num_tokens += num_tokens
            elapsed = self.bar.tasks[0].elapsed or 1e-9
            rate = f"{self.num_tokens / elapsed:,.0f} tokens/s" if self.num_tokens else ""  # not always counted
            self.bar.update(self.task, advance=num_texts, rate=rate)

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()
