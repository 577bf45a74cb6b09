"""Retrieval by cosine: nDCG@10 and recall of a judged collection (`collection_files.py` reads them)."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from flashvec.runtime.drop_in import DOCUMENT_PROMPTS, QUERY_PROMPTS, first_prompt
from flashvec.runtime.whitening import check_power, fit_whitening
from flashvec.training.collection_files import Collection

BLOCK_SCORES = 1 << 24
Embed = Callable[[Sequence[str]], np.ndarray]


def search_prompts(prompts: Iterable[str], instruction: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """What `Encoder.embed` is told for queries, and for documents, so that both are read as they will be searched.

    Args:
        prompts: names of the model's own, of which queries and documents get theirs, as by `encode_query`.
        instruction: before queries instead.
    """

    def of(names: Sequence[str]) -> dict[str, str]:
        name = first_prompt(prompts, names)
        return {"instruction": ""} if name is None else {"prompt_name": name}

    return of(QUERY_PROMPTS) if instruction is None else {"instruction": instruction}, of(DOCUMENT_PROMPTS)


def retrieval_score(
    embed_queries: Embed,
    embed_documents: Embed,
    collection: Collection,
    depth: int = 10,
    *,
    whitening: float | None = None,
) -> dict[str, float]:
    """`vector_score` of texts: of all documents, and of the queries that are judged."""
    if whitening is not None:
        check_power(whitening)
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
