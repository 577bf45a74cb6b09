"""What `as_texts` takes, what it refuses and in which words, and what it does to broken characters."""

import warnings
from collections import deque
from enum import Enum
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from flashvec.runtime.texts import TextWarning, as_instructions, as_texts


@pytest.mark.parametrize("text", ["", "a", "é", np.str_("a")])
def test_one_text(text: str) -> None:
    rows, single = as_texts(text)
    assert rows == [str(text)] and type(rows[0]) is str and single


class Task(str, Enum):  # noqa: UP042 - a StrEnum's str is its text
    """Its own str is its member's name."""

    QUERY = "query: "


def test_enums_are_their_text() -> None:
    assert as_texts(Task.QUERY) == (["query: "], True) and as_texts(["a", Task.QUERY]) == (["a", "query: "], False)
    assert as_instructions(Task.QUERY, 1) == ["query: "]


class Column:
    """A sequence as data set libraries hand out: length, items by number, nothing else."""

    def __init__(self, rows: list[str]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> str:
        return self.rows[row]

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        iter,
        deque,
        Column,
        lambda rows: (row for row in rows),
        lambda rows: map(str, rows),
        lambda rows: dict.fromkeys(rows).keys(),
        np.array,
        lambda rows: np.array(rows, dtype=object),
        lambda rows: [np.str_(row) for row in rows],
        pd.Series,
        lambda rows: pd.Series(rows, index=[5, 3, 1], dtype=object),
        lambda rows: pd.DataFrame({"text": rows})["text"],
        pa.array,
        lambda rows: pa.chunked_array([rows[:1], rows[1:]]),
        lambda rows: pa.table({"text": rows})["text"],
    ],
)
def test_ordered_iterables(make: Any) -> None:
    expected = ["b", "", "äöü 😀"]
    rows, single = as_texts(make(expected))
    assert rows == expected and not single
    assert all(type(row) is str for row in rows)


@pytest.mark.parametrize(
    "empty", [[], (), iter([]), np.array([]), np.array([], dtype=object), pd.Series([], dtype=str)]
)
def test_no_texts(empty: Any) -> None:
    assert as_texts(empty) == ([], False)


def test_the_callers_list_is_left_alone() -> None:
    given = ["a", "\ud800", np.str_("b")]
    with pytest.warns(TextWarning):
        rows, _ = as_texts(given)
    assert given[1] == "\ud800" and type(given[2]) is np.str_
    assert rows == ["a", "\ufffd", "b"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (None, "texts is None: give a str or a list of str"),
        (3, "texts is int: give a str"),
        (b"ab", r"texts is bytes: decode it first, e.g. texts.decode\('utf-8'\)"),
        (bytearray(b"ab"), "texts is bytearray: decode"),
        ({"a", "b"}, r"texts is a set, which has no order: .*sorted\(texts\)"),
        (frozenset("ab"), "texts is a frozenset"),
        ({"id": "text"}, r"texts is a dict: .*list\(texts.values\(\)\)"),
        (pd.DataFrame({"text": ["a"]}), r"texts is a table \(DataFrame\): give one column of it, e.g. texts\['text'\]"),
        (pa.table({"text": ["a"]}), r"texts is a table \(Table\)"),
        (["a", None], r"texts\[1\] is None, a missing value: drop the row, or give ''"),
        (pd.Series(["a", None], dtype=object), r"texts\[1\] is None, a missing value"),
        (pd.Series(["a", None], dtype="str"), r"texts\[1\] is nan, a missing value"),
        (pd.Series(["a", None], dtype="string"), r"texts\[1\] is <NA>, a missing value"),
        (["a", float("nan")], r"texts\[1\] is nan, a missing value"),
        (pd.Series(["a", pd.NaT], dtype=object), r"texts\[1\] is NaT, a missing value"),
        (pa.array(["a", None]), r"texts\[1\] is None, a missing value"),
        (["a", 7], r"texts\[1\] is int \(7\): give a str, e.g. str\(value\)"),
        ([True], r"texts\[0\] is bool \(True\)"),
        (np.arange(3), r"texts\[0\] is int \(0\)"),
        (["a", b"b"], r"texts\[1\] is bytes: decode it first"),
        (np.array([b"a"]), r"texts\[0\] is bytes: decode"),
        ([["query", "text"]], r"texts\[0\] is a list: .*instruction="),
        ([("query", "text")], r"texts\[0\] is a tuple"),
        (["a", {"text": "b"}], r"texts\[1\] is a dict: give one of its fields, e.g. row\['text'\]"),
        ([object()], r"texts\[0\] is object: give a str"),
    ],
)
def test_refused_with_the_row_and_the_cure(texts: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        as_texts(texts)


def test_refused_dimensions() -> None:
    with pytest.raises(ValueError, match="texts has 2 dimensions"):
        as_texts(np.array([["a", "b"]]))
    with pytest.raises(ValueError, match="texts has 0 dimensions"):
        as_texts(np.array("a"))


def test_the_argument_is_named() -> None:
    with pytest.raises(TypeError, match=r"^documents\[0\] is int"):
        as_texts([1], "documents")
    with pytest.raises(TypeError, match=r"^texts\[9\] is None"):
        as_texts(["a", None], first=8)


def test_surrogates_become_replacement_characters_with_one_warning() -> None:
    def embed(texts: Any) -> list[str]:
        return as_texts(texts)[0]

    with pytest.warns(TextWarning, match="4 surrogate code points in 2 of 3 rows of texts") as caught:
        rows = embed(["x\ud800y", "fine 😀", "\udfff\ud83d\ude00"])
    assert rows == ["x\ufffdy", "fine 😀", "\ufffd" * 3]
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(TextWarning, match="1 surrogate"):
        assert as_texts("\udc00") == (["\ufffd"], True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_texts(["\x00", "\uffff", "\U0010ffff", "e\u0301"])


def test_instructions() -> None:
    assert as_instructions(None, 3) is None
    assert as_instructions("query: ", 2) == ["query: ", "query: "]
    assert as_instructions("query: ", 0) == []
    assert as_instructions(("a", np.str_("b")), 2) == ["a", "b"]
    with pytest.raises(ValueError, match="instruction has 3 entries for 5 texts: give one string for all, or one per"):
        as_instructions(["a", "b", "c"], 5)
    with pytest.raises(ValueError, match="instruction has 1 entry for 0 texts"):
        as_instructions(["a"], 0)
    with pytest.raises(TypeError, match=r"instruction\[1\] is None"):
        as_instructions(["a", None], 2)
    with pytest.raises(TypeError, match="instruction is int"):
        as_instructions(3, 2)
