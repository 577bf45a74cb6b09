"""Sentences of tagged words from files.

.conllu        CoNLL-U: a word's form, and UPOS or a column of choice; multiword tokens and empty nodes are passed over
anything else  CoNLL columns: the word first, its tags after it, split by tabs or else by spaces; an empty line ends a
               sentence, -DOCSTART- lines are passed over
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from flashvec.training.data import DataError

MAX_FILE_BYTES = 1 << 30
TASKS = ("pos", "ner", "chunk")
CONLLU_COLUMNS = ("id", "form", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
# Where a file of so many columns has a task's tags: CoNLL-2003's order, CoNLL-2000's. Others have them last.
KNOWN_ORDERS = {4: {"pos": 1, "chunk": 2, "ner": 3}, 3: {"pos": 1, "chunk": 2}}


class TaggedSentence(NamedTuple):
    """Words and the tag of each."""

    words: list[str]
    tags: list[str]


def read_tagged(
    path: Path, task: str, *, column: str | None = None, max_sentences: int | None = None
) -> list[TaggedSentence]:
    """Sentences of a file, in order; never none, and none of them empty.

    Args:
        task: pos, ner or chunk; tags of the last two are O, B-kind or I-kind.
        column: where the tags are: a number, the word's own column being 1, or one of CoNLL-U's names. Default: by
            the number of columns where it is that of CoNLL-2003 or CoNLL-2000, else the last; in CoNLL-U UPOS.
        max_sentences: read no further than this.

    Raises:
        DataError: a file that is missing or too large, a line of another form, a column that is not there; names
            file and line.
    """
    if task not in TASKS:
        raise DataError(f"task is {task!r}; known are {', '.join(TASKS)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise DataError(f"{path.name}: {path.stat().st_size} bytes, more than a set of tagged sentences can have")
    sentences: list[TaggedSentence] = []
    current = TaggedSentence([], [])
    for where, fields in _rows(path, _read_conllu if path.suffix == ".conllu" else _read_columns(), task, column):
        if fields is not None:
            word, tag = fields
            _check_tag(tag, task, where)
            current.words.append(word)
            current.tags.append(tag)
        elif current.words:
            sentences.append(current)
            current = TaggedSentence([], [])
            if len(sentences) == max_sentences:
                return sentences
    if current.words:
        sentences.append(current)
    if not sentences:
        raise DataError(f"{path.name}: holds no sentence")
    return sentences


Row = tuple[str, str] | None  # None ends a sentence
ReadLine = Callable[[str, str, str, str | None], Row | str]  # a str: the line holds no word and ends nothing
NOTHING = ""


def _rows(path: Path, read: ReadLine, task: str, column: str | None) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                where = f"{path.name} line {number}"
                row = read(line.rstrip("\r\n"), where, task, column) if line.strip() else None
                if not isinstance(row, str):
                    yield where, row
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: not UTF-8 after line {number} ({error.reason})") from None


def _read_conllu(line: str, where: str, task: str, column: str | None) -> Row | str:
    if line.startswith("#"):
        return NOTHING
    fields = line.split("\t")
    if len(fields) != len(CONLLU_COLUMNS):
        raise DataError(f"{where}: {len(fields)} columns; CoNLL-U has {len(CONLLU_COLUMNS)}, split by tabs")
    if not fields[0].isdecimal():
        if fields[0].replace("-", "", 1).replace(".", "", 1).isdecimal():
            return NOTHING
        raise DataError(f"{where}: starts with {fields[0][:40]!r}, not with the number of a word")
    if column is None and task != "pos":
        raise DataError(f"{where}: CoNLL-U has no column of its own for {task} tags; say which one holds them")
    name = column or "upos"
    if name.lower() in CONLLU_COLUMNS:
        place = CONLLU_COLUMNS.index(name.lower())
    else:
        place = _place(name, len(fields), where, f"{', '.join(CONLLU_COLUMNS)} or ")
    return _word_and_tag(fields[1], fields[place], where)


def _read_columns() -> ReadLine:
    num_columns = 0

    def read(line: str, where: str, task: str, column: str | None) -> Row | str:
        nonlocal num_columns
        if line.startswith("-DOCSTART-"):
            return NOTHING
        fields = line.split("\t") if "\t" in line else line.split()
        if len(fields) < 2:
            raise DataError(f"{where}: expected a word and its tag, split by a tab or spaces")
        num_columns = num_columns or len(fields)
        if len(fields) != num_columns:
            raise DataError(f"{where}: {len(fields)} columns, the lines before have {num_columns}")
        if column is None:
            place = KNOWN_ORDERS.get(num_columns, {}).get(task, num_columns - 1)
        else:
            place = _place(column, num_columns, where)
        return _word_and_tag(fields[0], fields[place], where)

    return read


def _place(column: str, num_columns: int, where: str, names: str = "") -> int:
    if not column.isdecimal() or not 2 <= int(column) <= num_columns:
        raise DataError(f"{where}: no column {column!r} of tags; expected {names}a number from 2 to {num_columns}")
    return int(column) - 1


def _word_and_tag(word: str, tag: str, where: str) -> tuple[str, str]:
    if not word.strip() or tag.strip() in ("", "_"):
        raise DataError(f"{where}: a {'word without its tag' if word.strip() else 'tag without its word'}")
    return word.strip(), tag.strip()


def _check_tag(tag: str, task: str, where: str) -> None:
    if task != "pos" and tag != "O" and not (tag[:2] in ("B-", "I-") and len(tag) > 2):
        raise DataError(f"{where}: the {task} tag {tag!r} is not O, B-kind or I-kind; do the tags stand elsewhere?")
