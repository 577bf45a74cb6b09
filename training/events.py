"""A run's log as TensorBoard events, for those who watch runs there: `loop.tensorboard: true`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashvec.training.settings import ConfigError

FOLDER = "tensorboard"
NO_CURVES = ("step", "seconds")


class Events:
    """Writes lines of the log; call `close` at the end.

    Args:
        output: the run's folder.
        step: the first step of this process: events behind it, of a run that was killed, are left out.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, output: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("loop.tensorboard: needs tensorboard: pip install 'flashvec[tensorboard]'") from None
        self.writer = SummaryWriter(str(output / FOLDER), purge_step=step + 1 if step else None)

    def add(self, line: Mapping[str, Any]) -> None:
        """One line of the log, each of its numbers a curve."""
        for name, value in line.items():
            if name not in NO_CURVES:
                self.writer.add_scalar(name, value, int(line["step"]))

    def close(self) -> None:
        """Everything is written."""
        self.writer.close()
