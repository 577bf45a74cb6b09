"""What a caller may give as texts: any ordered run of str, checked row by row, never repaired in silence."""

import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np

_SURROGATE = re.compile("[\ud800-\udfff]")
_MISSING_TYPES = (
    "NoneType",
    "NAType",
    "NaTType",
)  # None, pandas.NA, pandas.NaT; matched by name: pandas is optional


class TextWarning(UserWarning):
    """Texts were changed before embedding; the message says how many and how."""


class TruncationWarning(UserWarning):
    """Texts were longer than the model reads; the message says how many, and so does `num_texts`."""

    num_texts = 0

    @classmethod
    def of(cls, num_texts: int, num_all: int, limit: int, document_limit: int | None = None) -> "TruncationWarning":
        """Of texts cut to `limit` tokens, with LLM2Vec's own rules by words to `document_limit` before that."""
        limits = f"max_length={limit}"
        if document_limit is not None:
            limits = f"doc_max_length={document_limit} or {limits}"
        warning = cls(f"{num_texts} of {num_all} texts were longer than {limits} tokens and were cut")
        warning.num_texts = num_texts
        return warning


def as_texts(texts: Any, argument: str = "texts", first: int = 0) -> tuple[list[str], bool]:
    """Turn what a caller gave into a list of plain `str`.

    Halves of surrogate pairs (left by a wrong decoding; no tokenizer takes them) become U+FFFD one for one, so
    that character offsets stay valid, with one `TextWarning` that counts them.

    Args:
        texts: one str, or an ordered iterable of str: list, tuple, generator, numpy array [n], pandas Series,
            pyarrow array, a dataset's column.
        argument: the caller's name for it, used in messages.
        first: number of the first row in messages; more than 0 for a part of a stream.

    Returns:
        The texts, and whether a single str was given.

    Raises:
        TypeError: not str or an ordered iterable of str; the message names the row, its type and the cure.
        ValueError: an array of two or more dimensions.
    """
    if isinstance(texts, str):
        return _replace_surrogates([str.__str__(texts)], argument), True
    rows = _rows(texts, argument)
    for row, text in enumerate(rows):
        if type(text) is not str:
            if not isinstance(text, str):
                raise TypeError(_bad_row(text, f"{argument}[{first + row}]"))
            rows[row] = str.__str__(text)  # of numpy.str_ and enums, whose own str may be a name
    return _replace_surrogates(rows, argument), False


def as_instructions(instruction: Any, n: int) -> list[str] | None:
    """One instruction per text, from one for all, one per text, or None.

    Raises:
        TypeError: as `as_texts`.
        ValueError: a list whose length is not `n`.
    """
    if instruction is None:
        return None
    found, single = as_texts(instruction, "instruction")
    if single:
        return found * n
    if len(found) != n:
        entries = "1 entry" if len(found) == 1 else f"{len(found)} entries"
        texts = "1 text" if n == 1 else f"{n} texts"
        raise ValueError(f"instruction has {entries} for {texts}: give one string for all, or one per text")
    return found


def callers_level() -> int:
    """`stacklevel` of a warning for the line that called this package, by whatever of its methods."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("flashvec."):
        level, frame = level + 1, frame.f_back
    return level


def check_whole(name: str, value: Any) -> None:
    """Refuse what counts nothing.

    Raises:
        TypeError: no whole number; names the argument.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is {value!r}; expected a whole number")


def check_names(name: str, value: Any, *kinds: type) -> None:
    """Refuse what is neither one of `kinds` nor a list of them.

    Raises:
        TypeError: names the argument.
    """
    given = [value] if isinstance(value, kinds) else value
    if not isinstance(given, Sequence) or not all(isinstance(each, kinds) for each in given):
        raise TypeError(f"{name} is {repr(value)[:80]}; expected a name or a list of names")


def check_truth(name: str, value: Any) -> None:
    """Refuse what is neither True nor False: the text "no" counts as true.

    Raises:
        TypeError: names the argument.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} is {repr(value)[:80]}; expected True or False")


def check_path(path: str | os.PathLike[str]) -> None:
    """Refuse a name that tokenizers, safetensors and Arrow cannot be given: before the work, not after it.

    Raises:
        ValueError: bytes that are no text in the encoding of file names.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        shown, encoding = os.fsencode(path).decode(errors="replace"), sys.getfilesystemencoding()
        cure = "rename it" if encoding == "utf-8" else "rename it, or set PYTHONUTF8=1"
        raise ValueError(f"{shown}: its name is not {encoding}: {cure}") from None


def check_ordered(texts: Any, argument: str = "texts") -> None:
    """Refuse what is no ordered, one-dimensional iterable, without taking anything from it.

    Raises:
        TypeError, ValueError: as `as_texts`.
    """
    kind = type(texts).__name__
    if texts is None:
        raise TypeError(f"{argument} is None: give a str or a list of str")
    if isinstance(texts, bytes | bytearray | memoryview):
        raise TypeError(f"{argument} is {kind}: decode it first, e.g. {argument}.decode('utf-8')")
    if isinstance(texts, set | frozenset):
        raise TypeError(f"{argument} is a {kind}, which has no order: give a list, e.g. sorted({argument})")
    if isinstance(texts, Mapping):
        raise TypeError(f"{argument} is a {kind}: give its texts as a list, e.g. list({argument}.values())")
    if hasattr(texts, "columns") or hasattr(texts, "column_names"):
        raise TypeError(f"{argument} is a table ({kind}): give one column of it, e.g. {argument}['text']")
    dimensions = getattr(texts, "ndim", 1)
    if isinstance(dimensions, int) and dimensions != 1:
        raise ValueError(f"{argument} has {dimensions} dimensions ({kind}): give one, e.g. {argument}.ravel()")
    if not isinstance(texts, Iterable):
        raise TypeError(f"{argument} is {kind}: give a str or a list of str")


def elements(texts: Any, step: int) -> Iterator[Any]:
    """The elements of an ordered iterable, one by one; pyarrow's, whose elements are no str, `step` at a time."""
    if not callable(getattr(texts, "to_pylist", None)):
        return iter(texts)
    return (text for start in range(0, len(texts), step) for text in texts.slice(start, step).to_pylist())


def _rows(texts: Any, argument: str) -> list[Any]:
    """The elements of an ordered, one-dimensional iterable, in a new list."""
    check_ordered(texts, argument)
    for method in ("to_pylist", "tolist"):  # pyarrow; numpy and pandas: far faster than element by element
        if callable(getattr(texts, method, None)):
            return list(getattr(texts, method)())
    return list(texts)


def _bad_row(value: Any, name: str) -> str:
    kind = type(value).__name__
    if kind in _MISSING_TYPES or (isinstance(value, float) and value != value):
        what = "nan" if isinstance(value, float) else str(value)
        return f"{name} is {what}, a missing value: drop the row, or give '' for an empty text"
    if isinstance(value, bytes | bytearray):
        return f"{name} is {kind}: decode it first, e.g. value.decode('utf-8')"
    if isinstance(value, list | tuple):
        return (
            f"{name} is a {kind}: give one str per text (flatten nested lists; of [instruction, text] pairs, "
            "give the instructions as instruction=)"
        )
    if isinstance(value, Mapping):
        return f"{name} is a {kind}: give one of its fields, e.g. row['text']"
    if isinstance(value, int | float):
        return f"{name} is {kind} ({value!r}): give a str, e.g. str(value)"
    return f"{name} is {kind}: give a str"


def _replace_surrogates(rows: list[str], argument: str) -> list[str]:
    num_replaced = num_rows = 0
    for row, text in enumerate(rows):
        if text.isascii():
            continue
        try:
            text.encode()  # several times faster than the pattern, and nearly every text passes
        except UnicodeEncodeError:
            rows[row], replaced = _SURROGATE.subn("\ufffd", text)
            num_replaced, num_rows = num_replaced + replaced, num_rows + 1
    if num_replaced:
        warnings.warn(
            f"{num_replaced} surrogate code points in {num_rows} of {len(rows)} rows of {argument} were "
            "replaced by U+FFFD: they are halves of characters, left by a wrong decoding",
            TextWarning,
            stacklevel=callers_level(),
        )
    return rows
