"""Files of scored pairs of texts, to train on (CoSENT) and to evaluate by (STS).

.csv   the STS benchmark's own columns, tab-separated: genre, file, year, number, score, text, text;
       or parted by commas under a header as below
.txt   SICK's: a header that names sentence_A, sentence_B and relatedness_score
.tsv   a header that names score, sentence1 and sentence2
.jsonl objects with sentence1, sentence2 and score (or label), or under the names that `data.py` has for the two
"""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flashvec.training.data import POSITIVE_KEYS, QUERY_KEYS, DataError, check_file, score_of

STSB_COLUMNS = 7
HEADERS = (("sentence_A", "sentence_B", "relatedness_score"), ("sentence1", "sentence2", "score"))
MAX_FILE_BYTES = 1 << 30


class ScoredPairs(NamedTuple):
    """Two columns of texts and their scores, fp64 [n]."""

    left: list[str]
    right: list[str]
    scores: np.ndarray


class ScoredRow(NamedTuple):
    """One pair, and the line that it stands in, the first being 1."""

    line: int
    left: str
    right: str
    score: float


def read_scored_pairs(path: Path) -> ScoredPairs:
    """A file to evaluate by.

    Raises:
        DataError: as `scored_rows`; an empty text, fewer than two pairs, or all of one score.
    """
    rows = list(scored_rows(path))
    for row in rows:
        if not row.left.strip() or not row.right.strip():
            raise DataError(f"{path.name} line {row.line}: a text is empty")
    if len(rows) < 2:
        raise DataError(f"{path.name}: {len(rows)} pairs; a correlation needs two")
    if len({row.score for row in rows}) == 1:
        raise DataError(f"{path.name}: all scores are {rows[0].score:g}: nothing correlates with them")
    return ScoredPairs([row.left for row in rows], [row.right for row in rows], np.array([row.score for row in rows]))


def scored_rows(path: Path) -> Iterator[ScoredRow]:
    """The pairs of a file, in order.

    Raises:
        DataError: missing, empty, of an unknown form, or a line without two texts and a score; names file and line.
    """
    text = _read(path)
    numbered = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not numbered:
        raise DataError(f"{path.name}: holds no line")
    if path.suffix != ".jsonl" and (places := _places(numbered[0][1].replace('"', "").split(","))):
        yield from _comma_rows(text, places, path.name)
        return
    read = _json_row if path.suffix == ".jsonl" else _table_row(numbered, path.name)
    for number, line in numbered:
        where = f"{path.name} line {number}"
        try:
            yield _row(number, read(line, where))
        except DataError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, RecursionError):
            raise DataError(f"{where}: expected two texts and a score") from None


def _read(path: Path) -> str:
    check_file(path, MAX_FILE_BYTES, "scored pairs")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: not UTF-8 ({error.reason})") from None


def _row(line: int, values: Sequence[str | float]) -> ScoredRow:
    left, right, score = values
    if not math.isfinite(number := float(score)):
        raise ValueError("not a number to rank by")
    return ScoredRow(line, str(left), str(right), number)


def _places(header: list[str]) -> list[int] | None:
    """Where two texts and their score stand under a header; None if it names none."""
    for names in HEADERS:
        if set(names) <= set(header):
            return [header.index(name) for name in names]
    return None


def _comma_rows(text: str, places: list[int], name: str) -> Iterator[ScoredRow]:
    """Rows parted by commas; a text in quotes may hold commas and line ends."""
    rows, first = csv.reader(io.StringIO(text, newline=""), strict=True), 1
    width = 0  # of the header, which comes first
    try:
        for row in rows:
            if width and row and len(row) != width:
                raise DataError(
                    f"{name} line {first}: {len(row)} columns, the header has {width}: a text that holds commas stands "
                    "in quotes"
                )
            if width and row:
                yield _row(first, [row[place] for place in places])
            width = width or len(row)
            first = rows.line_num + 1
    except DataError:
        raise
    except (csv.Error, ValueError, IndexError):
        raise DataError(f"{name} line {first}: expected two texts and a score, parted by commas") from None


def _json_row(line: str, where: str) -> tuple[str, str, float]:
    values = json.loads(line)
    given = [[values[key] for key in keys if key in values] for keys in (QUERY_KEYS, POSITIVE_KEYS)]
    (left,), (right,) = given
    if not isinstance(left, str) or not isinstance(right, str):
        raise TypeError("no text")
    if (score := score_of(values, where)) is None:
        raise TypeError("no score")
    return left, right, score


def _table_row(numbered: list[tuple[int, str]], name: str) -> Callable[[str, str], tuple[str, str, str]]:
    """How a row is read; takes the header, where there is one, off the lines."""
    header = numbered[0][1].split("\t")
    if places := _places(header):
        del numbered[0]
        return lambda line, _: _cells(line, len(header), places)
    if len(header) < STSB_COLUMNS:
        raise DataError(
            f"{name} line 1: {len(header)} columns parted by tabs, and no header with {', '.join(HEADERS[1])}, "
            "by tabs or commas"
        )
    return lambda line, _: (line.split("\t")[5], line.split("\t")[6], line.split("\t")[4])


def _cells(line: str, width: int, places: list[int]) -> tuple[str, str, str]:
    """Two texts and a score. A line of more columns than the header would be read shifted."""
    cells = line.split("\t")
    if len(cells) != width:
        raise ValueError("columns that the header does not name")
    left, right, score = (cells[place] for place in places)
    return left, right, score
