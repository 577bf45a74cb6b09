"""Exact nearest neighbours over a job's output, block by block, with nothing but the block and the best in memory."""

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flashvec.runtime.corpus.manifest import is_done
from flashvec.runtime.corpus.plan import Plan, PlanError, read_plan
from flashvec.runtime.corpus.readers import read_rows
from flashvec.runtime.corpus.reuse import as_matrix, part_vectors
from flashvec.runtime.corpus.sources import SourceError, describe_change
from flashvec.runtime.corpus.storage import Storage
from flashvec.runtime.corpus.vectors import embed_settings
from flashvec.runtime.corpus.writers import part_names
from flashvec.runtime.drop_in import QUERY_PROMPTS, first_prompt
from flashvec.runtime.pooling import dequantize
from flashvec.runtime.whitening import fit_whitening

BLOCK_ROWS = 16_384
FITTED_ROWS = 8192  # that a whitening is fitted to

logger = logging.getLogger("flashvec")


class Hit(NamedTuple):
    """A row near the query."""

    score: float  # cosine; with binary vectors the share of equal signs
    file: str
    row: int
    id: Any  # None where the job has no ids
    text: str | None  # of the whole row; None where the input is gone or has changed
    chunk: int | None = None  # of the row, where chunks have rows of their own


def search_job(
    storage: Storage, queries: np.ndarray, top: int, whitening: float | None = None
) -> list[list[tuple[float, int, int]]]:
    """The nearest rows of each query, best first; equal scores in the order of rows.

    Args:
        queries: fp32 [q, d], unnormalised or not.
        top: rows for each.
        whitening: power of a whitening fitted to some of the job's vectors (`runtime/whitening.py`), for cosines after
            it; default the cosines of the vectors as they are.

    Returns:
        Score, shard and row in its part.

    Raises:
        PlanError: no job in the folder.
        ValueError: queries of another size, or vectors that cannot be whitened.
    """
    plan = job_plan(storage)
    if queries.shape[1] != plan.dim:
        raise ValueError(f"the query has {queries.shape[1]} dimensions, the job's vectors have {plan.dim}")
    unit = _unit(queries)
    done = list(finished_shards(storage, plan))
    head = None if whitening is None else fit_whitening(_sample(storage, plan, done), whitening)
    unit = _through(head, unit)
    scores = np.full((len(queries), 0), 0.0, np.float32)
    places = np.zeros((len(queries), 0, 2), np.int64)
    for shard in done:
        for start, block in vector_blocks(storage, plan, shard):
            is_binary = plan.settings.precision == "binary"
            found = _signs(unit, block) if is_binary else _cosines(unit, _through(head, comparable(block, plan)))
            scores = np.concatenate([scores, found.astype(np.float32)], 1)
            rows = np.stack([np.full(len(block), shard), np.arange(start, start + len(block))], 1)
            places = np.concatenate([places, np.broadcast_to(rows, (len(queries), *rows.shape))], 1)
            best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
            scores = np.take_along_axis(scores, best, 1)
            places = np.take_along_axis(places, best[:, :, None], 1)
    return [
        [(float(score), int(shard), int(row)) for score, (shard, row) in zip(s, p, strict=True)]
        for s, p in zip(scores, places, strict=True)
    ]


def _sample(storage: Storage, plan: Plan, shards: Sequence[int]) -> np.ndarray:
    """Vectors from all over the finished shards, fp32, of unit length: the first ones of each."""
    if plan.settings.precision == "binary":
        raise ValueError(
            "the job's vectors are binary: they have no axes to fit. Embed with a whitened encoder instead"
        )
    share = -(-FITTED_ROWS // max(1, len(shards)))
    rows = [np.zeros((0, plan.dim), np.float32)]
    for shard in shards[:FITTED_ROWS]:
        rows += [comparable(block[:share], plan) for _, block in islice(vector_blocks(storage, plan, shard), 1)]
    return np.concatenate(rows)


def _through(head: tuple[np.ndarray, np.ndarray] | None, unit: np.ndarray) -> np.ndarray:
    """Unit vectors through a whitening, unit vectors again."""
    if head is None:
        return unit
    weight, bias = head
    # In fp64 and rounded, so that equal vectors stay equal: a product's last bits depend on where a row lies in it.
    mapped: np.ndarray = (unit.astype(np.float64) @ weight.T.astype(np.float64) + bias).astype(np.float32)
    return _unit(mapped)


def describe_hits(storage: Storage, found: list[tuple[float, int, int]]) -> list[Hit]:
    """Where hits came from, with their text where the input is as it was."""
    plan = job_plan(storage)
    hits = []
    for score, shard, row in found:
        with storage.open(part_names(plan, shard)[-1]) as file:
            known = (("id", "id" in plan.columns.names), ("chunk", plan.settings.chunks == "rows"))
            columns = ["file", "row", *(name for name, is_there in known if is_there)]
            facts = pq.read_table(file, columns=columns).slice(row, 1).to_pylist()[0]
        text = _text(plan, facts["file"], facts["row"])
        uri = plan.sources[facts["file"]].uri
        hits.append(Hit(score, uri, facts["row"], facts.get("id"), text, facts.get("chunk")))
    return hits


def embed_query(storage: Storage, query: str, instruction: str | None = None, prompt_name: str | None = None) -> Any:
    """The query's vector [1, d] by the job's model; its prompt is the model's for queries, where it has one.

    Raises:
        PlanError: no job in the folder, or its model is another one by now.
    """
    from flashvec.runtime.corpus.machine import model_facts
    from flashvec.runtime.encoder import Encoder

    plan = job_plan(storage)
    encoder = Encoder.load(**plan.model.loading)
    different = list(plan.model.differences(model_facts(encoder, {})))
    if different:
        raise PlanError(f"{storage.location}: {'; '.join(different)}: queries need the model that made the vectors")
    if instruction is None and prompt_name is None:
        prompt_name = first_prompt(encoder.spec.prompts, QUERY_PROMPTS)
        instruction = "" if prompt_name is None else None  # not the model's default, as sentence-transformers has it
    settings = {**embed_settings(plan.settings), "instruction": instruction, "prompt_name": prompt_name}
    return encoder.embed([query], **settings)


def finished_shards(storage: Storage, plan: Plan) -> dict[int, int]:
    """Rows of each shard that is done; notes if some are not."""
    entries = {shard: is_done(storage, shard) for shard in range(len(plan.shards))}
    done = {shard: entry.rows for shard, entry in entries.items() if entry is not None}
    if missing := len(entries) - len(done):
        logger.warning("%d of %d shards are not finished: their rows are not looked at", missing, len(entries))
    return done


def job_plan(storage: Storage) -> Plan:
    """The plan of the job in a folder.

    Raises:
        PlanError: no job there.
    """
    plan = read_plan(storage)
    if plan is None:
        raise PlanError(f"{storage.location}: no plan.json there, so no job to search")
    return plan


def vector_blocks(storage: Storage, plan: Plan, shard: int) -> Iterator[tuple[int, np.ndarray]]:
    """A finished shard's vectors as they are stored, in blocks [n, d], each with the number of its first row."""
    if plan.settings.format == "npy":
        vectors = part_vectors(storage, plan, shard)
        for start in range(0, len(vectors), BLOCK_ROWS):
            yield start, vectors[start : start + BLOCK_ROWS]
        return
    with storage.open(part_names(plan, shard)[0]) as file:
        start = 0
        for batch in pq.ParquetFile(file).iter_batches(BLOCK_ROWS, columns=["vector"]):
            block = as_matrix(pa.chunked_array([batch.column(0)]), plan)
            yield start, block
            start += len(block)


def comparable(block: np.ndarray, plan: Plan) -> np.ndarray:
    """A block as fp32 rows of unit length."""
    if plan.settings.precision == "int8":
        assert plan.int8_ranges is not None
        low, high = plan.int8_ranges
        return _unit(dequantize(block, (low[: plan.dim], high[: plan.dim])))
    return _unit(block.astype(np.float32))


def _cosines(queries: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Of unit vectors; not by a matrix product, whose last bits would put equal vectors in another order."""
    cosines: np.ndarray = np.einsum("qd,nd->qn", queries, block)
    return cosines


def _signs(queries: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Share of dimensions whose signs agree."""
    bits = np.packbits(queries > 0, axis=-1)
    different = np.stack([np.bitwise_count(block ^ query).sum(1) for query in bits])
    share: np.ndarray = 1 - different / (8 * block.shape[1])
    return share


def _unit(x: np.ndarray) -> np.ndarray:
    unit: np.ndarray = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return unit


def _text(plan: Plan, file: int, row: int) -> str | None:
    source = plan.sources[file]
    try:
        if describe_change(source) is not None:
            return None
        rows = next(iter(read_rows(file, source, row, row + 1, plan.settings)), None)
        return None if rows is None or not len(rows) else rows.texts[0]
    except SourceError:
        return None
