"""Where commands print. What they print are words of files and users: shown as they are, and never obeyed.

"[INST]" is no markup, ":cat:" no picture, and a control character, by which a name or a text could move a terminal's
cursor, set its title or begin a line of its own in a log, is shown by its number.
"""

import logging
import unicodedata
from typing import Any

from rich.console import Console
from rich.text import Text


def printable(text: str) -> str:
    """A text as one line that is safe to show: control characters and halves of surrogate pairs as escapes."""
    if text.isprintable():
        return text
    return "".join(f"{c!r}"[1:-1] if c != "\t" and unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


class PlainConsole(Console):
    """A console for strings and tables of strings, each string `printable`; long lines stay whole."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, soft_wrap=True, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


class PlainFormatter(logging.Formatter):
    """A log record's message as a note of one line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return f"note: {printable(record.getMessage())}"


stdout = PlainConsole()
stderr = PlainConsole(stderr=True)
