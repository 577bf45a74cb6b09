"""Files of scored pairs of texts, to train on (CoSENT) and to evaluate by (STS).

.csv   the STS benchmark's own columns, tab-separated: genre, file, year, number, score, text, text
.txt   SICK's: a header that names sentence_A, sentence_B and relatedness_score
.tsv   a header that names score, sentence1 and sentence2
.jsonl objects with sentence1, sentence2 and score
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flashvec.training.data import DataError

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
        DataError: as `scored_rows`; fewer than two pairs, or all of one score.
    """
    rows = list(scored_rows(path))
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
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise DataError(f"{path.name}: {path.stat().st_size} bytes, more than a set of pairs can have")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # other line ends may stand in a text
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: not UTF-8 ({error.reason})") from None
    numbered = [(number, line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f"{path.name}: holds no line")
    read = _json_row if path.suffix == ".jsonl" else _table_row(numbered, path.name)
    for number, line in numbered:
        try:
            left, right, score = read(line)
            yield ScoredRow(number, str(left), str(right), _finite(score))
        except (ValueError, IndexError, KeyError, TypeError):
            raise DataError(f"{path.name} line {number}: expected two texts and a score") from None


def _finite(score: str | float) -> float:
    if not math.isfinite(number := float(score)):
        raise ValueError("not a number to rank by")
    return number


def _json_row(line: str) -> tuple[str, str, float]:
    values = json.loads(line)
    left, right = values["sentence1"], values["sentence2"]
    if not isinstance(left, str) or not isinstance(right, str):
        raise TypeError("no text")
    return left, right, values["score"]


def _table_row(numbered: list[tuple[int, str]], name: str) -> Callable[[str], tuple[str, str, str]]:
    """How a row is read; takes the header, where there is one, off the lines."""
    header = numbered[0][1].split("\t")
    for left, right, score in HEADERS:
        if {left, right, score} <= set(header):
            del numbered[0]
            places = header.index(left), header.index(right), header.index(score)
            return lambda line: tuple(line.split("\t")[place] for place in places)  # type: ignore[return-value]
    if len(header) < STSB_COLUMNS:
        raise DataError(
            f"{name} line 1: {len(header)} columns parted by tabs, and no header with {', '.join(HEADERS[1])}"
        )
    return lambda line: (line.split("\t")[5], line.split("\t")[6], line.split("\t")[4])
