"""A corpus job's vectors in a FAISS index. Needs the extra `faiss`: pip install 'flashvec[faiss]'.

index = index_job("vectors", factory="IVF1024,PQ32")
hits = index.search(enc.encode_query(["how do I bake bread?"]), top=10)
"""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

try:
    import faiss
except ImportError as error:
    raise ImportError(f"this integration needs {error.name}: pip install 'flashvec[faiss]'") from None

from flashvec.runtime.corpus.plan import Plan
from flashvec.runtime.corpus.search import Hit, comparable, describe_hits, finished_shards, job_plan, vector_blocks
from flashvec.runtime.corpus.storage import Storage

TRAIN_ROWS = 100_000  # what FAISS asks for at most for some thousand cells (39 to 256 a cell)


class JobIndex:
    """An index and where its rows came from; `index` is FAISS's own, row after row in the job's order.

    Vectors are unit length and compared by inner product, that is by cosine; a job's int8 vectors are brought back to
    their ranges. Binary ones are compared by the number of equal signs.
    """

    def __init__(self, storage: Storage, plan: Plan, index: Any, shards: dict[int, int]) -> None:
        self.index = index
        self._storage, self._plan = storage, plan
        self._shards, self._ends = list(shards), list(accumulate(shards.values()))

    def search(self, queries: np.ndarray, top: int) -> list[list[Hit]]:
        """The nearest rows of each query, best first, as `flashvec search` gives them.

        Args:
            queries: fp32 [q, d] or [d], of the job's model, unnormalised or not.
            top: rows for each; fewer where the index finds fewer.

        Raises:
            ValueError: another width than the job's.
        """
        queries = np.atleast_2d(np.asarray(queries, np.float32))
        if queries.ndim != 2 or queries.shape[1] != self._plan.dim:
            raise ValueError(f"queries have shape {list(queries.shape)}, the job's vectors {self._plan.dim} dimensions")
        if self._plan.settings.precision == "binary":
            bits = np.packbits(queries > 0, axis=-1)
            distances, found = self.index.search(bits, top)
            scores = 1 - distances / (8 * bits.shape[1])
        else:
            norms = np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-12)
            scores, found = self.index.search(queries / norms, top)
        return [
            describe_hits(
                self._storage, [(float(s), *self._place(int(i))) for s, i in zip(*row, strict=True) if i >= 0]
            )
            for row in zip(scores, found, strict=True)
        ]

    def _place(self, i: int) -> tuple[int, int]:
        """Shard and row in its part of the index's row."""
        at = bisect_right(self._ends, i)
        return self._shards[at], i - (self._ends[at - 1] if at else 0)


def index_job(folder: str | Path, *, factory: str | None = None, train_rows: int = TRAIN_ROWS) -> JobIndex:
    """Build an index over the finished shards of a job, block by block.

    Args:
        folder: a job's folder or URI.
        factory: FAISS's description of an index, for example "HNSW32" or "IVF1024,PQ32"; default "Flat", exact
            (of binary vectors "BFlat").
        train_rows: an index that is trained sees about so many rows, spread evenly over the job.

    Raises:
        PlanError: no job there.
        ValueError: no finished shard, or train_rows below 1.
        RuntimeError: FAISS's own, for a description it does not know or too few rows to train on.
    """
    if train_rows < 1:
        raise ValueError(f"train_rows is {train_rows}; expected at least 1")
    storage = Storage(folder)
    plan = job_plan(storage)
    shards = finished_shards(storage, plan)
    num_rows = sum(shards.values())
    if not num_rows:
        raise ValueError(f"{storage.location}: no shard of this job is finished, or none has a row")
    index: Any  # faiss.Index, or faiss.IndexBinary, which is none
    if plan.settings.precision == "binary":
        width = 8 * -(-plan.dim // 8)
        index = faiss.index_binary_factory(width, factory or "BFlat")
    else:
        index = faiss.index_factory(plan.dim, factory or "Flat", faiss.METRIC_INNER_PRODUCT)
    if not index.is_trained:
        step = -(-num_rows // train_rows)
        index.train(np.concatenate([block[::step] for block in _blocks(storage, plan, shards)]))
    for block in _blocks(storage, plan, shards):
        index.add(block)
    return JobIndex(storage, plan, index, shards)


def _blocks(storage: Storage, plan: Plan, shards: dict[int, int]) -> Iterator[np.ndarray]:
    for shard in shards:
        for _, block in vector_blocks(storage, plan, shard):
            yield np.ascontiguousarray(block if plan.settings.precision == "binary" else comparable(block, plan))
