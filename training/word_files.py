"""Sentences of tagged words from files.

.conllu        CoNLL-U: a word's form, and UPOS or a column of choice; chunks are cut from its trees (`chunks.py`);
               multiword tokens and empty nodes are passed over
anything else  CoNLL columns: the word first, its tags after it, split by tabs or else by spaces; an empty line ends a
               sentence, -DOCSTART- lines are passed over
"""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

from flashvec.training.chunks import Node, chunk_tags
from flashvec.training.data import DataError, check_file

Row = TypeVar("Row")

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
        column: where the tags are: a number, a line's first column being 1, or one of CoNLL-U's names. Default: by
            the number of columns where it is that of CoNLL-2003 or CoNLL-2000, else the last; in CoNLL-U UPOS, or
            chunks of its trees.
        max_sentences: read no further than this.

    Raises:
        DataError: a file that is missing or too large, a line of another form, a column that is not there; names
            file and line.
    """
    if task not in TASKS:
        raise DataError(f"task is {task!r}; known are {', '.join(TASKS)}")
    check_file(path, MAX_FILE_BYTES, "tagged sentences")
    is_conllu = path.suffix == ".conllu"
    if is_conllu and task == "chunk" and column is None:
        sentences = (_of_trees(rows) for rows in _sentences(path, _read_node))
    else:
        read = _read_conllu(task, column) if is_conllu else _read_columns(task, column)
        sentences = (_of_words(words) for words in _sentences(path, read))
    found = list(islice(sentences, max_sentences))
    if not found:
        raise DataError(f"{path.name}: holds no sentence")
    return found


class _Word(NamedTuple):
    """A word, its tag and the place it was read from."""

    where: str
    word: str
    tag: str
    is_first: bool = False  # of a sentence, as it says itself


def _of_words(words: list[_Word]) -> TaggedSentence:
    if late := [word.where for word in words[1:] if word.is_first]:
        raise DataError(f"{late[0]}: word 1 within a sentence; an empty line ends a sentence")
    return TaggedSentence([word.word for word in words], [word.tag for word in words])


NOTHING = ""  # read from a line that holds no word and ends nothing


def _sentences(path: Path, read: Callable[[str, str], Row | str]) -> Iterator[list[Row]]:
    """Each sentence's rows: what `read(line, where)` makes of its lines; an empty line ends one."""
    number = 0
    rows: list[Row] = []
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = read(line.rstrip("\r\n"), f"{path.name} line {number}")
                    if not isinstance(row, str):
                        rows.append(row)
                elif rows:
                    yield rows
                    rows = []
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: not UTF-8 after line {number} ({error.reason})") from None
    if rows:
        yield rows


def _conllu_fields(line: str, where: str) -> list[str] | None:
    """The columns of a word; None for what is none."""
    if line.startswith("#"):
        return None
    fields = line.split("\t")
    if len(fields) != len(CONLLU_COLUMNS):
        raise DataError(f"{where}: {len(fields)} columns; CoNLL-U has {len(CONLLU_COLUMNS)}, split by tabs")
    if not fields[0].isdecimal():
        if fields[0].replace("-", "", 1).replace(".", "", 1).isdecimal():
            return None
        raise DataError(f"{where}: starts with {fields[0][:40]!r}, not with the number of a word")
    return fields


def _read_conllu(task: str, column: str | None) -> Callable[[str, str], _Word | str]:
    def read(line: str, where: str) -> _Word | str:
        fields = _conllu_fields(line, where)
        if fields is None:
            return NOTHING
        if column is None and task != "pos":
            raise DataError(f"{where}: CoNLL-U has no column of its own for {task} tags; say which one holds them")
        name = column or "upos"
        if name.lower() in CONLLU_COLUMNS:
            place = CONLLU_COLUMNS.index(name.lower())
        else:
            place = _place(name, len(fields), where, f"{', '.join(CONLLU_COLUMNS)} or ")
        return _word(fields[1], fields[place], task, where)._replace(is_first=int(fields[0]) == 1)

    return read


class _Line(NamedTuple):
    """A word of a tree, the number it gives itself, and the place it was read from."""

    where: str
    number: int
    node: Node


def _read_node(line: str, where: str) -> _Line | str:
    fields = _conllu_fields(line, where)
    if fields is None:
        return NOTHING
    if not fields[1].strip():
        raise DataError(f"{where}: a tag without its word")
    if bare := [CONLLU_COLUMNS[i] for i in (3, 6, 7) if fields[i].strip() in ("", "_")]:
        raise DataError(f"{where}: no {bare[0]}; chunks are cut from trees, which have upos, head and deprel")
    if not (fields[6].isdecimal() and fields[6].isascii()):
        raise DataError(f"{where}: depends on {fields[6][:40]!r}, not on the number of a word")
    return _Line(where, int(fields[0]), Node(fields[1].strip(), fields[3], int(fields[6]), fields[7]))


def _of_trees(lines: list[_Line]) -> TaggedSentence:
    for place, line in enumerate(lines, 1):
        if line.number != place:
            raise DataError(f"{line.where}: word {line.number} where {place} is next; an empty line ends a sentence")
        if line.node.head > len(lines):
            raise DataError(f"{line.where}: depends on word {line.node.head} of {len(lines)}")
    return TaggedSentence([line.node.word for line in lines], chunk_tags([line.node for line in lines]))


def _read_columns(task: str, column: str | None) -> Callable[[str, str], _Word | str]:
    num_columns = 0

    def read(line: str, where: str) -> _Word | str:
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
        return _word(fields[0], fields[place], task, where)

    return read


def _place(column: str, num_columns: int, where: str, names: str = "") -> int:
    if not column.isdecimal() or not 2 <= int(column) <= num_columns:
        raise DataError(f"{where}: no column {column!r} of tags; expected {names}a number from 2 to {num_columns}")
    return int(column) - 1


def _word(word: str, tag: str, task: str, where: str) -> _Word:
    word, tag = word.strip(), tag.strip()
    if not word or tag in ("", "_"):
        raise DataError(f"{where}: a {'word without its tag' if word else 'tag without its word'}")
    if task != "pos" and tag != "O" and not (tag[:2] in ("B-", "I-") and len(tag) > 2):
        raise DataError(
            f"{where}: the {task} tag {tag[:40]!r} is not O, B-kind or I-kind; do the tags stand elsewhere?"
        )
    return _Word(where, word, tag)
