"""Retrieval on files: nDCG@10 and recall of a corpus searched by cosine.

a folder    BEIR's: corpus.jsonl (_id, title, text), queries.jsonl (_id, text), qrels/test.tsv (query, corpus, score)
*.ALL       SMART's (CISI, Cranfield, ...): .I .T .W records, with .QRY and .REL beside it
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashvec.runtime.whitening import fit_whitening
from flashvec.training.data import DataError

logger = logging.getLogger("flashvec")

MAX_FILE_BYTES = 1 << 34
BLOCK_SCORES = 1 << 24
SPLITS = ("test", "dev", "train")
HEADERS = ("query-id", "query_id", "queryid", "query", "qid")  # of a first line that names its columns
Embed = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Collection:
    """Documents and queries by name, and how relevant which document is to which query."""

    documents: dict[str, str]
    queries: dict[str, str]
    relevance: dict[str, dict[str, float]]


def read_collection(path: Path) -> Collection:
    """A BEIR folder, or a SMART collection by its .ALL file.

    Raises:
        DataError: a file that is missing or damaged; names file and line.
    """
    collection = _read_beir(path) if path.is_dir() else _read_smart(path)
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


def _read_beir(folder: Path) -> Collection:
    documents = {}
    for where, row in _json_lines(folder / "corpus.jsonl"):
        documents[_text(row, "_id", where)] = f"{row.get('title') or ''} {row.get('text') or ''}".strip()
    queries = {
        _text(row, "_id", where): _text(row, "text", where) for where, row in _json_lines(folder / "queries.jsonl")
    }
    for split in SPLITS:
        judgements = folder / "qrels" / f"{split}.tsv"
        if judgements.is_file():
            return Collection(documents, queries, _read_judgements(judgements))
    raise DataError(f"{folder.name}: has no qrels/test.tsv")


def _read_judgements(path: Path) -> dict[str, dict[str, float]]:
    relevance: dict[str, dict[str, float]] = {}
    for number, line in enumerate(_lines(path), 1):
        parts = line.split("\t")
        if not line.strip() or (number == 1 and parts[0].strip().lower() in HEADERS):
            continue
        try:
            query, document, score = parts[0], parts[-2], float(parts[-1])
        except (IndexError, ValueError):
            raise DataError(f"{path.name} line {number}: expected query, document and score") from None
        relevance.setdefault(query, {})[document] = score
    return relevance


def _read_smart(path: Path) -> Collection:
    others = [path.with_suffix(suffix) for suffix in (".QRY", ".REL")]
    if path.suffix != ".ALL" or not all(other.is_file() for other in (path, *others)):
        raise DataError(
            f"{path.name}: give a BEIR folder, or the .ALL file of a collection with .QRY and .REL beside it"
        )
    relevance: dict[str, dict[str, float]] = {}
    for number, line in enumerate(_lines(others[1]), 1):
        if parts := line.split():
            if len(parts) < 2:
                raise DataError(f"{others[1].name} line {number}: expected a query and a document")
            relevance.setdefault(parts[0], {})[parts[1]] = 1.0
    return Collection(_smart_records(path), _smart_records(others[0]), relevance)


def _smart_records(path: Path) -> dict[str, str]:
    """Title and text of each record."""
    found = {}
    for record in re.split(r"^\.I\s+", _read(path), flags=re.M)[1:]:
        name, _, rest = record.partition("\n")
        fields = re.split(r"^\.([A-Z])\s*$", rest, flags=re.M)
        parts = [text for field, text in zip(fields[1::2], fields[2::2], strict=True) if field in "TW"]
        found[name.strip()] = " ".join(" ".join(parts).split())
    if not found:
        raise DataError(f"{path.name}: holds no record (.I ...)")
    return found


def _json_lines(path: Path) -> list[tuple[str, dict[str, object]]]:
    rows = []
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise DataError(f"{path.name} line {number}: expected a JSON object")
            rows.append((f"{path.name} line {number}", row))
    return rows


def _text(row: dict[str, object], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str | int):
        raise DataError(f"{where}: {key} is missing or no text")
    return str(value)


def _lines(path: Path) -> list[str]:
    """Split at line feeds alone: JSON strings may hold the other characters that end a line elsewhere."""
    return [line.removesuffix("\r") for line in _read(path).split("\n")]


def _read(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise DataError(f"{path.name}: {path.stat().st_size} bytes, more than is read")
    return path.read_bytes().decode("utf-8", "replace")  # read_text would make a line feed of a carriage return


# --- measures ---------------------------------------------------------------------------------------------------


def retrieval_score(
    embed_queries: Embed,
    embed_documents: Embed,
    collection: Collection,
    depth: int = 10,
    *,
    whitening: float | None = None,
) -> dict[str, float]:
    """`vector_score` of texts: of all documents, and of the queries that are judged."""
    documents = embed_documents(list(collection.documents.values()))
    queries = embed_queries([collection.queries[query] for query in judged_queries(collection)])
    return vector_score(queries, documents, collection, depth, whitening=whitening)


def vector_score(
    queries_QD: np.ndarray,
    documents_ND: np.ndarray,
    collection: Collection,
    depth: int = 10,
    *,
    whitening: float | None = None,
) -> dict[str, float]:
    """`ranking_score` of cosines.

    Args:
        queries_QD: vectors of `judged_queries`.
        documents_ND: vectors of the documents, as pooled: `whitening` reads lengths too.
        whitening: power of a whitening fitted to the documents (`runtime/whitening.py`), as `Encoder.whiten` would.
    """
    if whitening is not None:
        weight, bias = fit_whitening(documents_ND, whitening)
        queries_QD, documents_ND = queries_QD @ weight.T + bias, documents_ND @ weight.T + bias
    queries, documents = _unit(queries_QD), _unit(documents_ND)
    rows = max(1, BLOCK_SCORES // len(documents))
    blocks = (queries[start : start + rows] @ documents.T for start in range(0, len(queries), rows))
    return ranking_score((row for block in blocks for row in block), collection, depth)


def judged_queries(collection: Collection) -> list[str]:
    """Names of the queries that have a relevant document."""
    return [q for q, found in collection.relevance.items() if any(score > 0 for score in found.values())]


def ranking_score(scores: Iterable[np.ndarray], collection: Collection, depth: int = 10) -> dict[str, float]:
    """Means over the queries that have a relevant document.

    Args:
        scores: one row for each of `judged_queries`: how well each document fits it, in the collection's order.

    Returns:
        `ndcg` at `depth` (gain = the judgement), `recall` at 100, times 100, and `queries`.
    """
    names = list(collection.documents)
    judged = judged_queries(collection)
    gains, recalls = [], []
    for query, row in zip(judged, scores, strict=True):
        most = max(depth, 100)
        order = [i for i in np.argsort(-row, kind="stable")[: most + 1] if not _is_query(collection, query, names[i])]
        relevant = collection.relevance[query]
        gains.append(ndcg([relevant.get(names[i], 0.0) for i in order[:depth]], list(relevant.values()), depth))
        known = {document for document, score in relevant.items() if score > 0}
        recalls.append(len(known & {names[i] for i in order[:100]}) / len(known))
    return {
        f"ndcg@{depth}": round(100 * float(np.mean(gains)), 4),
        "recall@100": round(100 * float(np.mean(recalls)), 4),
        "queries": len(judged),
        "documents": len(names),
    }


def _is_query(collection: Collection, query: str, document: str) -> bool:
    """Is a document the query itself (as in ArguAna): BEIR's measures leave it out. Names alone may agree by chance."""
    return query == document and collection.documents[document].endswith(collection.queries[query])


def ndcg(found: Sequence[float], all_gains: Sequence[float], depth: int) -> float:
    """Discounted gain of a ranking over that of the best one."""
    discounts = 1 / np.log2(np.arange(2, depth + 2))
    best = np.sort(np.maximum(all_gains, 0))[::-1][:depth]
    ideal = float((best * discounts[: len(best)]).sum())
    return float((np.maximum(found, 0) * discounts[: len(found)]).sum()) / ideal if ideal else 0.0


def _unit(vectors: np.ndarray) -> np.ndarray:
    x = np.asarray(vectors, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
