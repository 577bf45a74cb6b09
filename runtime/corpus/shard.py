"""`run_shard`: the unit of every job, on one machine or many. The same plan and number give the same bytes.

Reading runs ahead on one thread and writing follows on another; between them at most a few windows wait.
"""

import errno
import fcntl
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from flashvec.runtime.ahead import ahead
from flashvec.runtime.corpus.manifest import (
    ERRORS,
    MANIFESTS,
    Entry,
    FileFacts,
    errors_name,
    is_done,
    manifest_name,
)
from flashvec.runtime.corpus.plan import Plan
from flashvec.runtime.corpus.storage import Staged, Storage
from flashvec.runtime.corpus.vectors import KnownVectors, TextEncoder, Vectors
from flashvec.runtime.corpus.windows import Window, read_windows
from flashvec.runtime.corpus.writers import PartWriter, facts_schema, part_names

LOCKS = "_locks"
TELL_EVERY_S = 2.0  # of a window that is being worked on
LOCK_WAIT_S = 60.0  # for a process that is being stopped to let go of a shard
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # Lustre and NFS may be mounted without: as behind a URI then


class TooManyErrors(ValueError):
    """More rows without a vector than the job's limit."""


class ShardInUse(RuntimeError):
    """Another process works on this shard."""


class Step(NamedTuple):
    """A window is done, or a part of it: what it held and where its time went."""

    rows: int
    tokens: int
    read_s: float  # the model waited for rows
    embed_s: float
    write_s: float  # the model waited for the writer


class _Telling:
    """While the model works on a window, says now and then how far it is: on a CPU one takes minutes."""

    def __init__(self, encoder: TextEncoder, num_rows: int, on_step: Callable[[Step], None]) -> None:
        self.encoder, self.num_rows, self.on_step = encoder, num_rows, on_step
        self.told = Step(0, 0, 0.0, 0.0, 0.0)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="flashvec-teller", daemon=True)

    def __enter__(self) -> "_Telling":
        self._before, self._clock = self._counts(), time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def rest(self, num_rows: int, read_s: float, embed_s: float, write_s: float) -> Step:
        """What was not told yet, once the window is done."""
        tokens = self._counts()[1] - self._before[1]
        told = self.told
        return Step(num_rows - told.rows, tokens - told.tokens, read_s, max(0.0, embed_s - told.embed_s), write_s)

    def _tell(self) -> None:
        with suppress(OSError):  # nobody listens any more: the window's own step says so
            while not self._done.wait(TELL_EVERY_S):
                texts, tokens = (now - before for now, before in zip(self._counts(), self._before, strict=True))
                rows, seconds, told = min(texts, self.num_rows), time.perf_counter() - self._clock, self.told
                if tokens > told.tokens:
                    self.on_step(Step(rows - told.rows, tokens - told.tokens, 0.0, seconds - told.embed_s, 0.0))
                    self.told = Step(rows, tokens, 0.0, seconds, 0.0)

    def _counts(self) -> tuple[int, int]:
        return getattr(self.encoder, "num_texts_run", 0), getattr(self.encoder, "num_tokens_run", 0)


def run_shard(
    plan: Plan,
    shard: int,
    encoder: TextEncoder,
    storage: Storage,
    *,
    known: KnownVectors | None = None,
    max_errors: int | None = None,
    machine: dict[str, Any] | None = None,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Entry:
    """Embed one shard; does nothing where it is done already.

    Args:
        plan: the job's.
        shard: its number.
        encoder: the plan's model, loaded.
        storage: the job's folder.
        known: vectors of the job that the plan reuses.
        max_errors: rows without a vector beyond which to stop.
        machine: facts of this machine, kept in the manifest where the plan allows several kinds.
        on_step: told after every window, and of one that takes longer every `TELL_EVERY_S`, by another thread.

    Returns:
        The shard's manifest, which is in the folder when this returns, after all other files.

    Raises:
        SourceError: an input is gone, damaged or changed; nothing of the shard is kept.
        TooManyErrors: more bad rows than `max_errors`.
        ShardInUse: another process holds the shard.
    """
    if not 0 <= shard < len(plan.shards):
        raise ValueError(f"shard is {shard}, the plan has {len(plan.shards)}: 0 to {len(plan.shards) - 1}")
    done = is_done(storage, shard)
    if done is not None:
        return done
    storage.make(MANIFESTS, ERRORS, LOCKS)
    with _lock(storage, shard):
        done = is_done(storage, shard)
        if done is not None:
            return done
        own = {*part_names(plan, shard), f"{shard:05d}.json", f"{shard:05d}.jsonl"}
        for folder in ("", MANIFESTS, ERRORS):
            storage.sweep(folder, own.__contains__)
        try:
            entry = _run(plan, shard, encoder, storage, known, max_errors, on_step)
            if plan.mixed_machines:
                entry = replace(entry, machine=machine)
            storage.write(manifest_name(shard), entry.to_json())
        except OSError as error:
            if error.errno is None or error.filename is not None:
                raise
            raise OSError(error.errno, error.strerror, storage.staging) from None  # a failed write names no place
        return entry


def _run(
    plan: Plan,
    shard: int,
    encoder: TextEncoder,
    storage: Storage,
    known: KnownVectors | None,
    max_errors: int | None,
    on_step: Callable[[Step], None],
) -> Entry:
    vectors = Vectors(plan, encoder, known)
    found: Counter[str] = Counter()
    totals = dict.fromkeys(("rows_read", "duplicates", "reused", "truncated"), 0)
    part = PartWriter(plan, storage, shard)
    errors = _ErrorFile(storage, shard)
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="flashvec-writer") as thread:
            writing: Future[Any] = thread.submit(int)
            clock = time.perf_counter()
            with closing(ahead(read_windows(plan, plan.shards[shard].pieces))) as windows:
                for window in windows:
                    read_s, clock = _lap(clock)
                    countable = window.num_read if plan.settings.long != "chunk" else 0  # a chunk is no row
                    with _Telling(encoder, countable, on_step) as told:
                        window, hashes, own, counts = vectors.make(window)
                    embed_s, clock = _lap(clock)
                    writing.result()  # at most one window waits to be written
                    writing = thread.submit(_write, plan, part, errors, window, hashes, own)
                    write_s, clock = _lap(clock)
                    for name, count in (("rows_read", window.num_read), *asdict(counts).items()):
                        totals[name] += count
                    found.update(reason.code for reason in window.bad.values())
                    if max_errors is not None and found.total() > max_errors:
                        raise TooManyErrors(too_many(found, max_errors))
                    on_step(told.rest(window.num_read, read_s, embed_s, write_s))
            writing.result()
        files = part.finish()
        files += errors.finish()
    finally:
        part.discard()
        errors.discard()
        pa.default_memory_pool().release_unused()  # or what one shard took at its largest stays with the process
    return Entry(
        shard=shard,
        rows=part.num_rows,
        errors=errors.count,
        vectors_xxh3=part.digest.hexdigest(),
        files=files,
        rows_read=totals["rows_read"],
        duplicates=totals["duplicates"],
        reused=totals["reused"],
        truncated=totals["truncated"],
    )


def too_many(found: Mapping[str, int], limit: int) -> str:
    """The message of `TooManyErrors`, with the reasons and how often each came."""
    listed = ", ".join(f"{code} {count}" for code, count in sorted(found.items()))
    return (
        f"more than {limit} rows without a vector ({listed}), which is all that max_errors (--max-errors) "
        f"allows: mend the input, or go on with a higher limit; finished shards are kept"
    )


class _ErrorFile:
    """`_errors/00000.jsonl`, begun with the first bad row."""

    def __init__(self, storage: Storage, shard: int) -> None:
        self.storage, self.name = storage, errors_name(shard)
        self.staged: Staged | None = None
        self.count = 0

    def add(self, window: Window) -> None:
        for i in sorted(window.bad):
            reason = window.bad[i]
            row = {"file": int(window.files[i]), "row": int(window.places[i])}
            if window.chunks is not None:
                row["chunk"] = int(window.chunks[i])
            if self.staged is None:
                self.staged = self.storage.stage(self.name)
            line = json.dumps({**row, "code": reason.code, "message": reason.message}) + "\n"
            self.staged.file.write(line.encode())
            self.count += 1

    def finish(self) -> tuple[FileFacts, ...]:
        if self.staged is None:
            return ()
        size, value = self.staged.digest()
        self.staged.commit()
        return (FileFacts(self.name, size, value),)

    def discard(self) -> None:
        if self.staged is not None:
            self.staged.discard()


def _write(
    plan: Plan, part: PartWriter, errors: _ErrorFile, window: Window, hashes: list[bytes], vectors: np.ndarray
) -> None:
    good = np.array([i for i in range(len(window.texts)) if i not in window.bad], dtype=np.int64)
    arrays: list[Any] = [pa.array(window.files[good]), pa.array(window.places[good])]
    if plan.settings.chunks == "rows":
        chunks = np.zeros(len(window.texts), np.int32) if window.chunks is None else window.chunks
        arrays.append(pa.array(chunks[good]))
    arrays.append(pa.array(hashes, pa.binary(16)))
    if window.columns.num_columns:
        arrays += window.columns.take(pa.array(good)).columns
    part.write(pa.table(arrays, schema=facts_schema(plan)), vectors)
    errors.add(window)


def _lap(since: float) -> tuple[float, float]:
    now = time.perf_counter()
    return now - since, now


@contextmanager
def _lock(storage: Storage, shard: int) -> Iterator[None]:
    """Hold a shard among the processes of this machine; behind a URI two of them would write the same bytes."""
    if storage.root is None:
        yield
        return
    with open_lock(storage.root / LOCKS / f"{shard:05d}", LOCK_WAIT_S, f"shard {shard} is in work by another process"):
        yield


@contextmanager
def open_lock(path: Path, wait_s: float, message: str) -> Iterator[None]:
    """Hold an exclusive lock that ends with the process, however it ends.

    Raises:
        ShardInUse: with `message`, where another process holds it for longer than `wait_s`.
    """
    until = time.monotonic() + wait_s
    while (handle := _try_lock(path)) is None:
        if time.monotonic() >= until:
            raise ShardInUse(message)
        time.sleep(0.05)
    try:
        yield
    finally:
        os.close(handle)


def _try_lock(path: Path) -> int | None:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(handle)
            if isinstance(error, BlockingIOError):
                return None  # held by another process
            raise
    if os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path)):
        return handle
    os.close(handle)  # its file was dropped when a job was finished
    return None
