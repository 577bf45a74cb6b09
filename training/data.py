"""Training texts from files, and which of them a step sees.

    .txt     one text a line; empty lines are passed over
    a folder stands for its .jsonl files
    .jsonl   objects with a key "text" (texts), or pairs in one of the forms that people have:
             {query | anchor | sentence1 | text1, positive | pos | sentence2 | text2, negative | neg | negative_1 ...}
             with "score" (or "label", a fraction) for graded pairs and "instruction" for the query; pos and neg may be
             lists: a pair for each pos, every one with all neg
    .csv .tsv .txt   scored pairs as they are handed round (`scored_pairs.py`): STS-B, SICK

A step's rows are a function of seed and step alone: every epoch is a permutation of its own, so that a resumed run
goes on with the rows an uninterrupted one would have seen, and every process knows all of them.
"""

import difflib
import hashlib
import json
import logging
import math
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

logger = logging.getLogger("flashvec")

MAX_LINE_BYTES = 1 << 24
QUERY_KEYS = ("query", "anchor", "sentence1", "text1")
POSITIVE_KEYS = ("positive", "pos", "sentence2", "text2")
SCORED_FILES = (".csv", ".tsv", ".txt")
NEGATIVE_KEYS = ("negative", "negatives", "neg")
PAIR_KEYS = (*QUERY_KEYS, *POSITIVE_KEYS, *NEGATIVE_KEYS, "score", "label", "instruction")


class DataError(ValueError):
    """A training file that cannot be used; names file and line."""


@dataclass(frozen=True)
class Pair:
    """A query, its match, and what does not match it; or, with a score, two texts that are alike to that degree."""

    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    score: float | None = None
    instruction: str | None = None
    source: int = 0  # number of its file: a batch holds pairs of one file
    where: str = ""  # file and line, for errors


class _Line(NamedTuple):
    where: str
    text: str


def read_texts(paths: Sequence[str], key: str = "texts") -> list[str]:
    """All texts of some files, in order.

    Raises:
        DataError: no file, a file that is missing or of another kind, a line that is damaged; names file and line.
    """
    return list(_all(paths, key, _texts_of))


def text_files(paths: Sequence[str]) -> list[Path]:
    """Files as they are named, and of a folder its .jsonl files, by their names."""
    named = [Path(name).expanduser() for name in paths]
    return [file for path in named for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]


def read_pairs(paths: Sequence[str], instructions: Mapping[str, Sequence[str]] | None = None) -> list[Pair]:
    """All pairs of some files, .jsonl or of scored pairs, in order.

    Args:
        instructions: by a file's name without .jsonl, taken in turns by its lines that have none of their own.

    Raises:
        DataError: as `read_texts`; also pairs of which only some have scores, or an empty text.
    """
    pairs: list[Pair] = []
    for number, path in enumerate(existing_files(paths, "pairs")):
        if path.suffix == ".jsonl":
            own = _pairs_of(path, number)
        elif path.suffix in SCORED_FILES:
            own = _scored_pairs(path, number)
        else:
            raise DataError(f"{path.name}: pairs come in .jsonl files, scored ones in {', '.join(SCORED_FILES)}, too")
        if turns := (instructions or {}).get(path.stem):
            own = [
                pair if pair.instruction is not None else replace(pair, instruction=turns[i % len(turns)])
                for i, pair in enumerate(own)
            ]
        pairs += own
    if len({pair.score is None for pair in pairs}) > 1:
        raise DataError("pairs: some lines have a score and some have none; train on them separately")
    if not pairs:
        raise DataError(f"pairs: {', '.join(Path(p).name for p in paths)} hold no line")
    return pairs


def _all(paths: Sequence[str], key: str, read: Callable[[Path], Iterator[str]]) -> Iterator[str]:
    found = False
    for path in existing_files(paths, key):
        for text in read(path):
            found = True
            yield text
    if not found:
        raise DataError(f"{key}: {', '.join(Path(p).name for p in paths)} hold no text")


def existing_files(paths: Sequence[str], key: str) -> Iterator[Path]:
    """`text_files`, of which there must be some.

    Args:
        key: the setting that names them, for errors.

    Raises:
        DataError: no file, one that is missing, a folder without any.
    """
    if not paths:
        raise DataError(f"{key} is empty: name the files to train on ({key}=[a.txt, b.jsonl])")
    for name in paths:
        files = text_files([name])
        if not files:
            raise DataError(f"{key}: {name}: a folder without .jsonl files")
        for file in files:
            if not file.is_file():
                raise DataError(f"{key}: {name}: no such file")
            yield file


def check_file(path: Path, max_bytes: int, kind: str) -> None:
    """A file to read whole: there, and no larger than its kind can be.

    Args:
        kind: what it is, in the plural.

    Raises:
        DataError: missing, a folder, or too large.
    """
    if path.is_dir():
        raise DataError(f"{path}: a folder; name the file of {kind} in it")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if (size := path.stat().st_size) > max_bytes:
        raise DataError(f"{path.name}: {size} bytes, more than {kind} can have")


def _texts_of(path: Path) -> Iterator[str]:
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(f"{path.name}: give .txt (one text a line) or .jsonl files")
    for line in _lines(path):
        if path.suffix == ".txt":
            yield line.text
            continue
        text = _object(line).get("text")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f'{line.where}: "text" is missing, empty or no text')
        _check_text(text, line.where)
        yield text


def _lines(path: Path) -> Iterator[_Line]:
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path.name} line {number}"
            if len(raw) > MAX_LINE_BYTES:
                raise DataError(f"{where}: longer than {MAX_LINE_BYTES} bytes")
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
            if text:
                yield _Line(where, text)


def _object(line: _Line) -> dict[str, Any]:
    try:
        values = json.loads(line.text)
    except (ValueError, RecursionError):
        raise DataError(f"{line.where}: not valid JSON") from None
    if not isinstance(values, dict):
        raise DataError(f"{line.where}: expected a JSON object")
    return values


def _pairs_of(path: Path, source: int) -> list[Pair]:
    """Pairs of a .jsonl file. What else its lines hold is passed over, with a word where it looks like a slip."""
    pairs: list[Pair] = []
    first: dict[str, str] = {}  # each key, and where it stands first
    for line in _lines(path):
        values = _object(line)
        for key in values:
            first.setdefault(key, line.where)
        pairs += _pairs(values, source, line.where)
    for key, where in first.items():
        meant = difflib.get_close_matches(key.lower(), PAIR_KEYS, n=1, cutoff=0.8)
        if meant and key not in PAIR_KEYS and "_" not in key:  # negative_1 is read, positive_id is no slip
            logger.warning("%s: key %r is not read; is %r meant?", where, key, meant[0])
    return pairs


def _pairs(values: dict[str, Any], source: int, where: str) -> list[Pair]:
    """A pair for each of a line's positives."""
    query = _texts_under(values, QUERY_KEYS, where)
    positive = _texts_under(values, POSITIVE_KEYS, where)
    for found, keys in ((query, QUERY_KEYS), (positive, POSITIVE_KEYS)):
        if not found:
            raise DataError(f"{where}: has none of {', '.join(keys)}")
    if len(query) > 1:
        raise DataError(f"{where}: has {len(query)} queries; give each a line of its own")
    negatives = _texts_under(values, NEGATIVE_KEYS, where)
    numbered = sorted(key for key, value in values.items() if key.startswith("negative_") and value is not None)
    negatives += [values[key] for key in numbered]  # null where a table has columns for more
    score, instruction = score_of(values, where), values.get("instruction")
    if instruction is not None and not isinstance(instruction, str):
        raise DataError(f"{where}: instruction is not a text")
    if score is not None and negatives:
        raise DataError(f"{where}: has a score and negatives: a scored pair is two texts")
    if not all(isinstance(text, str) and text.strip() for text in (*query, *positive, *negatives)):
        raise DataError(f"{where}: a text is empty or no text")
    for text in (*query, *positive, *negatives, instruction or ""):
        _check_text(text, where)
    return [Pair(query[0], text, tuple(negatives), score, instruction, source, where) for text in positive]


def score_of(values: dict[str, Any], where: str) -> float | None:
    """How alike a line's two texts are, by its own measure; None where it does not say.

    Raises:
        DataError: no number, or a class.
    """
    score: Any = values.get("score", values.get("label"))
    if "score" not in values and isinstance(score, int):  # as natural language inference has them
        raise DataError(f"{where}: label is {score}, a class: keep the lines of pairs that match, without it")
    if score is not None and (
        isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) < math.inf
    ):
        raise DataError(f"{where}: score is not a number")
    return score


def _scored_pairs(path: Path, source: int) -> list[Pair]:
    """STS-B's, SICK's and other tables, as they are evaluated by."""
    from flashvec.training.scored_pairs import scored_rows  # which raises this module's error

    pairs = []
    for row in scored_rows(path):
        where = f"{path.name} line {row.line}"
        if not (row.left.strip() and row.right.strip()):
            raise DataError(f"{where}: a text is empty")
        pairs.append(Pair(row.left, row.right, score=row.score, source=source, where=where))
    return pairs


def _check_text(text: str, where: str) -> None:
    """JSON can hold what no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: holds half of a surrogate pair, {text[error.start]!a}: no character") from None


def _texts_under(values: dict[str, Any], keys: Sequence[str], where: str) -> list[Any]:
    found = [values[key] for key in keys if values.get(key) is not None]
    if len(found) > 1:
        raise DataError(f"{where}: has more than one of {', '.join(keys)}")
    return list(found[0]) if found and isinstance(found[0], list) else found


# --- which rows a step sees ------------------------------------------------------------------------------------


@lru_cache(maxsize=2)  # asked for at every step
def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [num_rows], not to be written to: a permutation of its own for every epoch."""
    order = np.random.default_rng([seed, epoch]).permutation(num_rows)
    order.flags.writeable = False
    return order


def rows_of_step(num_rows: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """int64 [batch_size]: rows of one step; an epoch's last rows that fill no batch are left out.

    Raises:
        DataError: fewer rows than a batch.
    """
    per_epoch = num_rows // batch_size
    if not per_epoch:
        raise DataError(f"batch_size is {batch_size}, the files hold {num_rows} rows: take a smaller batch")
    epoch, place = divmod(step, per_epoch)
    return epoch_order(num_rows, seed, epoch)[place * batch_size : (place + 1) * batch_size]


def run_starts(sources: np.ndarray, length: int) -> np.ndarray:
    """Where runs of at most `length` rows of one file start, for files whose rows lie together."""
    _, firsts = np.unique(sources, return_index=True)
    ends = [*firsts[1:].tolist(), len(sources)]
    return np.concatenate([np.arange(first, end, length) for first, end in zip(firsts, ends, strict=True)])


class SourceBatches:
    """Batches of rows of one file each, without a text twice in a batch, in an order drawn for every epoch.

    Args:
        sources: int [n]: number of each row's file.
        names: what must not meet in a batch, a set for each row: a copy would be taken for a wrong answer.
        files: the files' names, for errors.
        groups: rows that are drawn together, every row in one group; default each alone.

    Raises:
        DataError: a file fills no batch: nothing of it would ever be seen.
    """

    def __init__(
        self,
        sources: np.ndarray,
        names: Sequence[frozenset[int]],
        batch_size: int,
        seed: int,
        *,
        files: Sequence[str] = (),
        groups: Sequence[np.ndarray] | None = None,
    ) -> None:
        self.sources, self.names, self.batch_size, self.seed = sources, names, batch_size, seed
        self._groups = np.arange(len(sources))[:, None] if groups is None else groups
        self._epoch, self._batches = -1, [np.zeros(0, np.int64)]
        batches = self._of_epoch(0)
        self.per_epoch = len(batches)
        seen = {int(sources[batch[0]]) for batch in batches}
        for source in np.unique(sources).tolist():
            if source not in seen:
                name = Path(files[source]).name if source < len(files) else f"file {source + 1}"
                raise DataError(
                    f"batch_size is {batch_size}, and {name} does not hold as many rows with different texts "
                    f"({int((sources == source).sum())} rows): take a smaller batch, or join it with another file"
                )

    def rows(self, step: int) -> np.ndarray:
        """int64 [batch_size]."""
        epoch, place = divmod(step, self.per_epoch)
        batches = self._of_epoch(epoch)
        if not batches:
            raise DataError(f"batch_size is {self.batch_size}: epoch {epoch + 1} fills no batch; take a smaller one")
        return batches[place % len(batches)]

    def _of_epoch(self, epoch: int) -> list[np.ndarray]:
        if epoch != self._epoch:
            order = self._order(epoch)
            batches: list[list[int]] = []
            for source in np.unique(self.sources):
                batches += self._deal(order[self.sources[order] == source].tolist())
            mixed = np.random.default_rng([self.seed, epoch, 1]).permutation(len(batches))
            self._epoch, self._batches = epoch, [np.array(batches[i], np.int64) for i in mixed]
        return self._batches

    def _order(self, epoch: int) -> np.ndarray:
        """Every row once, groups in an order of the epoch's own."""
        return np.concatenate([self._groups[i] for i in epoch_order(len(self._groups), self.seed, epoch)])

    def _deal(self, rows: list[int]) -> list[list[int]]:
        """Full batches; a row that meets its own text waits for the next one."""
        batches: list[list[int]] = []
        waiting = deque(rows)
        while len(waiting) >= self.batch_size:
            batch: list[int] = []
            seen: set[int] = set()
            passed_over: list[int] = []
            while waiting and len(batch) < self.batch_size:
                row = waiting.popleft()
                if seen.isdisjoint(self.names[row]):
                    batch.append(row)
                    seen |= self.names[row]
                else:
                    passed_over.append(row)
            if len(batch) < self.batch_size:
                break
            batches.append(batch)
            waiting.extendleft(reversed(passed_over))
        return batches


def text_hash(text: str) -> int:
    """63 bits that name a text, whatever its case, spacing and form of characters."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return int.from_bytes(hashlib.blake2b(plain.encode("utf-8", "replace"), digest_size=8).digest(), "big") >> 1
