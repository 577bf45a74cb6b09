"""Judged collections from files: documents, queries, and which document is relevant to which query.

BEIR's    a folder of corpus.jsonl (_id, title, text), queries.jsonl (_id, text), qrels/test.tsv (query, corpus, score);
          without judgements of test those of dev, or of train, with a warning
SMART's   CISI, Medline, Cranfield, CACM and their like as they are handed round: .I .T .W records in two files, and a
          table of judgements
"""

import json
import logging
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flashvec.training.data import DataError, check_file

logger = logging.getLogger("flashvec")

MAX_FILE_BYTES = 1 << 34
SPLITS = ("test", "dev", "train")
HEADERS = ("query-id", "query_id", "queryid", "query", "qid")  # of a first line that names its columns
SMART_DOCUMENTS = r"(.+)\.all(\.\d+)?"  # MED.ALL, cacm.all, cran.all.1400
SMART_QUERIES = r"(.+)\.qry|query\.text"
SMART_JUDGEMENTS = r"(.+)\.rel|(.+)qrel|qrels\.text"
Relevance = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Collection:
    """Documents and queries by name, and how relevant which document is to which query."""

    documents: dict[str, str]
    queries: dict[str, str]
    relevance: Relevance


def read_collection(path: Path) -> Collection:
    """A BEIR folder; or a SMART collection by its folder or its documents (*.ALL), the other two files beside them.

    Of a SMART collection all that is judged relevant counts alike, as 1: the grades that some have run either way. Its
    queries go by their place where the judgements number them so (Cranfield).

    Raises:
        DataError: a file that is missing or damaged; names file and line.
    """
    is_beir = path.is_dir() and ((path / "corpus.jsonl").exists() or not _named(path, SMART_DOCUMENTS))
    collection = _read_beir(path) if is_beir else _read_smart(path)
    judged = {query for query, found in collection.relevance.items() if any(score > 0 for score in found.values())}
    missing = sorted(judged - collection.queries.keys())
    if missing:
        raise DataError(
            f"{path.name}: judgements name {len(missing)} queries that are not there, {missing[0]} among them"
        )
    if not judged:
        raise DataError(f"{path.name}: no query has a relevant document")
    wanted = {id for query in judged for id, score in collection.relevance[query].items() if score > 0}
    if lost := sorted(wanted - collection.documents.keys()):
        found = f"{len(lost)} of {len(wanted)} relevant documents are not there, {lost[0]!r} among them"
        if len(lost) == len(wanted):
            raise DataError(f"{path.name}: {found}: are the judgements of another collection?")
        logger.warning("%s: %s: no ranking can find them", path.name, found)
    return collection


# --- BEIR's -----------------------------------------------------------------------------------------------------


def _read_beir(folder: Path) -> Collection:
    documents: dict[str, str] = {}
    for where, row in _json_lines(folder / "corpus.jsonl"):
        if "text" not in row:  # under another name it would be an empty document, in silence
            raise DataError(f"{where}: text is missing")
        text = " ".join(_text(row, key, where) for key in ("title", "text") if row.get(key)).strip()
        _put(documents, _text(row, "_id", where), text, where)
    queries: dict[str, str] = {}
    for where, row in _json_lines(folder / "queries.jsonl"):
        _put(queries, _text(row, "_id", where), _text(row, "text", where), where)
    for split in SPLITS:
        judgements = folder / "qrels" / f"{split}.tsv"
        if judgements.is_file():
            if split != SPLITS[0]:
                logger.warning("%s has no qrels/%s.tsv: judged by %s.tsv", folder.name, SPLITS[0], split)
            return Collection(documents, queries, _read_judgements(judgements))
    raise DataError(f"{folder.name}: has no qrels/test.tsv")


def _read_judgements(path: Path) -> Relevance:
    relevance: Relevance = {}
    contradicted = 0
    for number, line in enumerate(_lines(path), 1):
        parts = line.split("\t")
        if not line.strip() or (number == 1 and parts[0].strip().lower() in HEADERS):
            continue
        try:
            query, document, score = parts[0], parts[-2], _finite(parts[-1])
        except (IndexError, ValueError):
            raise DataError(f"{path.name} line {number}: expected query, document and score, by tabs") from None
        found = relevance.setdefault(query, {})
        contradicted += found.get(document, score) != score
        found[document] = score
    if contradicted:
        logger.warning("%s: %d lines judge a document anew and otherwise: the last one counts", path.name, contradicted)
    return relevance


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise DataError(f"{path.name} line {number}: expected a JSON object")
            yield f"{path.name} line {number}", row


def _text(row: dict[str, object], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str | int):
        raise DataError(f"{where}: {key} is missing or no text")
    return str(value)


# --- SMART's ----------------------------------------------------------------------------------------------------


def _read_smart(path: Path) -> Collection:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    is_documents = path.is_file() and re.fullmatch(SMART_DOCUMENTS, path.name, re.I)
    folder = path if path.is_dir() else path.parent
    found = [[path] if is_documents else _named(folder, SMART_DOCUMENTS)]
    if is_documents or path.is_dir():
        found += [_named(folder, pattern, of=found[0][0]) for pattern in (SMART_QUERIES, SMART_JUDGEMENTS)]
    if [len(files) for files in found] != [1, 1, 1]:
        raise DataError(
            f"{path.name}: give a BEIR folder, or the .ALL file of a SMART collection, or its folder, with its queries "
            f"(.QRY, query.text) and judgements (.REL, ...qrel, qrels.text) beside it, one of each"
        )
    texts, queries = _smart_records(found[0][0]), _smart_records(found[1][0])
    relevance = _smart_judgements(found[2][0])
    if not relevance.keys() <= queries.keys() and _are_places(relevance, len(queries)):
        logger.warning("%s: its judgements go by a query's place, 1 to %d, and not by .I", path.name, len(queries))
        queries = {str(place): text for place, text in enumerate(queries.values(), 1)}
    return Collection(texts, queries, relevance)


def _named(folder: Path, pattern: str, of: Path | None = None) -> list[Path]:
    """Files of a folder by name; where there are several, those that begin as the documents do."""
    found = sorted(file for file in folder.iterdir() if re.fullmatch(pattern, file.name, re.I) and file.is_file())
    if of is not None and len(found) > 1:
        stem = of.name.partition(".")[0].lower()
        found = [file for file in found if re.split(r"\.|qrel", file.name.lower())[0] == stem]
    return found


def _smart_records(path: Path) -> dict[str, str]:
    """Title and text of each record."""
    found: dict[str, str] = {}
    for record in re.split(r"^\.I\s+", "\n".join(_lines(path)), flags=re.M)[1:]:
        name, _, rest = record.partition("\n")
        fields = re.split(r"^\.([A-Z])\s*$", rest, flags=re.M)
        parts = [text for field, text in zip(fields[1::2], fields[2::2], strict=True) if field in "TW"]
        _put(found, _number(name), " ".join(" ".join(parts).split()), path.name)
    if not found:
        raise DataError(f"{path.name}: holds no record (.I ...)")
    return found


def _smart_judgements(path: Path) -> Relevance:
    """Lines of query and document, of which two columns may follow; with a grade; or TREC's, a 0 between them."""
    rows = []
    for number, line in enumerate(_lines(path), 1):
        if parts := line.split():
            if len(parts) < 2:
                raise DataError(f"{path.name} line {number}: expected a query and a document")
            rows.append((number, parts))
    is_trec = all(len(parts) == 4 and parts[1] in ("0", "Q0") for _, parts in rows)
    relevance: Relevance = {}
    for number, parts in rows:
        query, document = _number(parts[0]), _number(parts[2 if is_trec else 1])
        try:
            is_relevant = _finite(parts[-1]) > 0 if is_trec or len(parts) == 3 else True
        except ValueError:
            raise DataError(f"{path.name} line {number}: {parts[-1]!r} is no grade") from None
        relevance.setdefault(query, {})[document] = float(is_relevant)
    return relevance


def _finite(value: str) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(value)
    return number


def _number(name: str) -> str:
    """A name without the zeros that some of a collection's files write before it."""
    return name.strip().lstrip("0") or "0"


def _are_places(names: Iterable[str], count: int) -> bool:
    return all(re.fullmatch(r"[0-9]{1,9}", name) and 1 <= int(name) <= count for name in names)


# --- both -------------------------------------------------------------------------------------------------------


def _put(texts: dict[str, str], name: str, text: str, where: str) -> None:
    if texts.setdefault(name, text) != text:
        raise DataError(f"{where}: {name!r} names two texts")


def _lines(path: Path) -> Iterator[str]:
    """Split at line feeds alone: JSON strings may hold the other characters that end a line elsewhere.

    A mark of UTF-8 before the first is left out. SMART's files are older than UTF-8: what is none is told, and read as
    a mark of its own.
    """
    check_file(path, MAX_FILE_BYTES, "a collection's texts")
    encoding = "utf-8-sig"  # of the first line
    damaged: list[int] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode(encoding)
            except UnicodeDecodeError:
                text = line.decode(encoding, "replace")
                damaged.append(number)
            yield text.removesuffix("\n").removesuffix("\r")
            encoding = "utf-8"
    if damaged:
        logger.warning("%s: %d lines are not UTF-8, line %d first", path.name, len(damaged), damaged[0])
