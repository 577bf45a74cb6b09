"""Vectors of an earlier job, found by the hash of prompt and text: a growing corpus pays for what is new."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flashvec.runtime.corpus.manifest import SUCCESS_FILE, is_done
from flashvec.runtime.corpus.plan import ModelFacts, Plan, PlanError, read_plan
from flashvec.runtime.corpus.settings import JobSettings
from flashvec.runtime.corpus.storage import Storage, digest
from flashvec.runtime.corpus.writers import part_names

SAME = ("instruction", "prompt_name", "max_length", "long", "chunks", "dims", "precision", "normalize")
OPEN_PARTS = 2  # of the earlier job: a corpus that grew asks for them in order


class Changes(NamedTuple):
    """What differs between two jobs' rows; told apart by id, or without one by text alone."""

    added: int
    edited: int
    deleted: int


def earlier_plan(location: str, settings: JobSettings, model: ModelFacts) -> Plan:
    """The plan of a finished job whose vectors are those that this job would make.

    Raises:
        PlanError: no such job, an unfinished one, or one that made other vectors; names what differs.
    """
    storage = Storage(location)
    plan = read_plan(storage)
    if plan is None or storage.size(SUCCESS_FILE) is None:
        raise PlanError(f"reuse: {location} holds no finished job")
    different = [text for text in plan.settings.differences(settings) if text.split(" ")[0] in SAME]
    different += list(plan.model.differences(model))
    different += list(plan.model.machine_differences(model.machine))
    if different:
        raise PlanError(f"reuse: {location} holds other vectors: {'; '.join(different)}")
    return plan


class EarlierVectors:
    """Vectors of a finished job by hash. Holds 24 bytes for each of its rows, and two of its parts."""

    def __init__(self, location: str) -> None:
        self.storage = Storage(location)
        plan = read_plan(self.storage)
        if plan is None:
            raise PlanError(f"reuse: {location} holds no job any more")
        self.plan: Plan = plan
        hashes, shards, rows = [], [], []
        # Before the index is made: a part that is written anew meanwhile is then found out.
        self._sums = {shard: self._sum(shard) for shard in range(len(plan.shards))}
        for shard, table in _facts(self.storage, plan, ["hash"]):
            values = b"".join(table["hash"].to_pylist())
            hashes.append(np.frombuffer(values, ">u8").reshape(-1, 2).astype(np.uint64))
            shards.append(np.full(len(table), shard, np.uint32))
            rows.append(np.arange(len(table), dtype=np.uint32))
        high_low = np.concatenate([np.zeros((0, 2), np.uint64), *hashes])
        order = np.lexsort((high_low[:, 1], high_low[:, 0]))
        self.high, self.low = high_low[order, 0], high_low[order, 1]
        self.shards = np.concatenate([np.zeros(0, np.uint32), *shards])[order]
        self.rows = np.concatenate([np.zeros(0, np.uint32), *rows])[order]
        self._part = lru_cache(OPEN_PARTS)(self._read_part)

    def find(self, hashes: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Which of the hashes are known (bool [n]), and the vectors of those, in order."""
        wanted = np.frombuffer(b"".join(hashes), ">u8").reshape(-1, 2).astype(np.uint64)
        at = np.searchsorted(self.high, wanted[:, 0])
        known = np.zeros(len(hashes), dtype=bool)
        for i in range(len(hashes)):  # equal upper halves of different texts: never seen, and settled here
            while at[i] < len(self.high) and self.high[at[i]] == wanted[i, 0]:
                if self.low[at[i]] == wanted[i, 1]:
                    known[i] = True
                    break
                at[i] += 1
        at = at[known]
        kind = self.plan.vector_type()
        vectors = np.empty((len(at), kind.list_size), kind.value_type.to_pandas_dtype())
        for shard in np.unique(self.shards[at]):
            own = self.shards[at] == shard
            vectors[own] = self._part(int(shard))[self.rows[at[own]]]
        return known, vectors

    def _read_part(self, shard: int) -> np.ndarray:
        name = part_names(self.plan, shard)[0]
        with self.storage.open(name) as file:
            if digest(file) != self._sums[shard]:
                raise PlanError(f"reuse: {self.storage.location}: {name} is not as its job wrote it: make it again")
        return part_vectors(self.storage, self.plan, shard)

    def _sum(self, shard: int) -> str:
        """A part's checksum by its manifest; "" without one, which is no part's."""
        entry, name = is_done(self.storage, shard), part_names(self.plan, shard)[0]
        files = entry.files if entry is not None else ()
        return next((facts.xxh3 for facts in files if facts.name == name), "")


def part_vectors(storage: Storage, plan: Plan, shard: int) -> np.ndarray:
    """All vectors of a finished shard [n, d], memory-mapped where the part is a local .npy."""
    name = part_names(plan, shard)[0]
    if plan.settings.format == "npy":
        if storage.root is not None:
            mapped: np.ndarray = np.load(storage.root / name, mmap_mode="r", allow_pickle=False)
            return mapped
        with storage.open(name) as file:
            loaded: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
            return loaded
    with storage.open(name) as file:
        column = pq.read_table(file, columns=["vector"])["vector"]
        return as_matrix(column, plan)


def as_matrix(column: Any, plan: Plan) -> np.ndarray:
    """A column of vectors as [n, d]."""
    kind = plan.vector_type()
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    values = np.concatenate([np.zeros(0, kind.value_type.to_pandas_dtype()), *chunks])
    return values.reshape(-1, kind.list_size)


def find_changes(before: Storage, after: Storage) -> Changes:
    """Rows added and deleted from one finished job to another, and ids whose text changed; holds 16 bytes for each row.

    By id where both have one; an id of several rows, as chunks have it, counts as edited once. Else by text: then
    nothing is edited, and a text that comes more often, or less, counts as rows added or deleted.

    Raises:
        PlanError, OSError: a job that is not there whole.
    """
    plans = [read_plan(storage) for storage in (before, after)]
    has_id = all(plan is not None and "id" in plan.columns.names for plan in plans)
    old, new = _identities(before, has_id), _identities(after, has_id)
    if not has_id:
        _, which = np.unique(np.concatenate([old[:, 0], new[:, 0]]), return_inverse=True)
        more = np.bincount(which, np.repeat([-1, 1], [len(old), len(new)]))  # copies of each text than before
        return Changes(int(more.clip(min=0).sum()), 0, int(-more.clip(max=0).sum()))
    kept = np.isin(new[:, 0], old[:, 0])
    (ids_old, texts_old), (ids_new, texts_new) = _by_id(old), _by_id(new)
    _, places_new, places_old = np.intersect1d(ids_new, ids_old, assume_unique=True, return_indices=True)
    edited = int((texts_new[places_new] != texts_old[places_old]).sum())
    deleted = int((~np.isin(old[:, 0], new[:, 0])).sum())
    return Changes(int((~kept).sum()), edited, deleted)


def _by_id(found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each id once, and what all its rows' texts together are: their hashes' sum."""
    if not len(found):
        return found[:, 0], found[:, 1]
    ordered = found[np.argsort(found[:, 0], kind="stable")]
    ids, starts = np.unique(ordered[:, 0], return_index=True)
    return ids, np.add.reduceat(ordered[:, 1], starts)


def _identities(storage: Storage, has_id: bool) -> np.ndarray:
    """uint64 [n, 2]: a hash of the id (without one, of the text) and a hash of the text."""
    import xxhash

    plan = read_plan(storage)
    if plan is None:
        raise PlanError(f"{storage.location} holds no job")
    found = [np.zeros((0, 2), np.uint64)]
    for _, table in _facts(storage, plan, ["id", "hash"] if has_id else ["hash"]):
        texts = [int.from_bytes(value[:8], "big") for value in table["hash"].to_pylist()]
        keys = texts
        if has_id:
            keys = [xxhash.xxh3_64_intdigest(str(value).encode()) for value in table["id"].to_pylist()]
        found.append(np.stack([np.array(keys, np.uint64), np.array(texts, np.uint64)], 1))
    return np.concatenate(found)


def _facts(storage: Storage, plan: Plan, columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
    """Some columns of every part, part by part."""
    for shard in range(len(plan.shards)):
        with storage.open(part_names(plan, shard)[-1]) as file:
            yield shard, pq.read_table(file, columns=columns)
