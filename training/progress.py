"""A training run's line on stderr: step, loss, tokens per second, memory, time left. Silent where nobody looks."""

from collections.abc import Mapping
from typing import Any

from flashvec.runtime.progress import is_watched


class TrainingBar:
    """Use as a context manager; `advance` after every step.

    Args:
        steps: of the whole run.
        done: before this process began.
        show: True or False, or None: on a terminal.
    """

    def __init__(self, steps: int, done: int, show: bool | None) -> None:
        self.steps, self.done = steps, done
        self.show = is_watched() if show is None else show
        self.bar: Any = None

    def __enter__(self) -> "TrainingBar":
        if self.show:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"), TimeRemainingColumn())
            self.bar = Progress(TextColumn("training"), *columns, console=Console(stderr=True))
            self.bar.start()
            self.task = self.bar.add_task("", total=self.steps, completed=self.done, facts="")
        return self

    def advance(self, line: Mapping[str, Any]) -> None:
        """Show a step's line of the log."""
        if self.bar is not None:
            facts = f"loss {line['loss']:.4f}  {line['tokens_per_s']:,.0f} tokens/s  {line['memory_gib']:.1f} GiB"
            if "sts" in line:
                facts += f"  sts {line['sts']:.2f}"
            self.bar.update(self.task, advance=1, facts=facts)

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()
