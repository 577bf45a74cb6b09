"""What commands print of names and texts that are not their own."""

import io
import logging

import pytest
from rich.table import Table

from flashvec.runtime.console import PlainConsole, PlainFormatter, printable

TITLE = "\x1b]0;another title\x07"  # of the terminal's window, set


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Ein Hund, 犬, \u200d🐕\u200d🦺\tund [mehr]", "Ein Hund, 犬, \u200d🐕\u200d🦺\tund [mehr]"),
        (f"a{TITLE}b", r"a\x1b]0;another title\x07b"),
        ("a\nflashvec: forged", r"a\nflashvec: forged"),
        ("a\x9b2Jb\x7f\r", r"a\x9b2Jb\x7f\r"),
        ("name-\udcff.txt", r"name-\udcff.txt"),
    ],
)
def test_control_characters_are_shown_and_nothing_else_changes(text, shown):
    assert printable(text) == shown


def test_strings_and_tables_of_strings_are_printed_so():
    out = io.StringIO()
    console = PlainConsole(file=out)
    table = Table(show_header=False, box=None)
    table.add_row("name", f"x{TITLE}")
    console.print(table, highlight=False, soft_wrap=False)
    console.print(f"y{TITLE}", highlight=False)
    assert r"x\x1b]0;" in out.getvalue() and r"y\x1b]0;" in out.getvalue() and "\x1b" not in out.getvalue()


def test_notes_of_the_log_are_one_line_each():
    record = logging.LogRecord("flashvec", logging.WARNING, "", 0, "%s: cut", (f"a\n{TITLE}",), None)
    assert PlainFormatter().format(record) == r"note: a\n\x1b]0;another title\x07: cut"
