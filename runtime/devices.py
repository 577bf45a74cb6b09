"""Which devices an encoder runs on, and one encoder over several of them."""

import warnings
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashvec.runtime.decoder import Decoder
from flashvec.runtime.encoder import Encoder
from flashvec.runtime.engine import default_budget
from flashvec.runtime.non_finite import NonFiniteWarning
from flashvec.runtime.parts import SpanVectors, TokenVectors
from flashvec.runtime.progress import Progress
from flashvec.runtime.spec import ModelSpec
from flashvec.runtime.texts import TruncationWarning, callers_level
from flashvec.runtime.windows import WINDOW, RunSettings
from flashvec.runtime.worker_pool import Chunk, Notes, WorkerPool

CHARS_PER_TOKEN = 4  # for sharing out only: a wrong guess makes a chunk a little long or short
LARGEST_CHUNK = 16  # budgets of tokens: long enough that its last, half-filled pack does not count
SHARE = 2  # a chunk is at most this part of what is left for each device, so that all finish at about the same time


class SpreadEncoder(Encoder):
    """An encoder with one process for each of several devices; `Encoder.load(model, device="all")` makes it.

    Texts are dealt out in runs of about equal token counts to whichever process is free, and results come back in
    order. Each process tokenises its own texts. Use it as a context manager, or `close` it; it ends with the program
    too.

    What an encoder on one device can do and this cannot: `output="torch"` gives a tensor on the CPU; `decoder`,
    `save` and `whiten` are refused, since the weights are elsewhere.
    """

    def __init__(
        self, spec: ModelSpec, tokenizer: Any, devices: Sequence[torch.device], arguments: dict[str, Any]
    ) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.devices = tuple(devices)
        self._pool = WorkerPool([str(device) for device in devices], arguments)
        self._finalizer = weakref.finalize(self, self._pool.close)

    def close(self) -> None:
        """End the processes. The encoder cannot be used after it."""
        self._finalizer()

    @property
    def decoder(self) -> Decoder:
        raise AttributeError("an encoder on several devices has no decoder here: its weights are in its processes")

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")  # where results are

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self._pool.dtype)

    def __repr__(self) -> str:
        alone = super().__repr__().removesuffix(" on cpu)")
        return f"{alone} on {', '.join(map(str, self.devices))})"

    def save(self, folder: Any, *, overwrite: bool = False) -> None:
        raise ValueError("an encoder on several devices does not hold its weights: load it on one device to save it")

    def whiten(self, texts: Any, **settings: Any) -> None:
        raise ValueError("an encoder on several devices cannot be whitened: do it on one, save it, and load the folder")

    def embed_iter(self, texts: Any, *, window: int | None = None, **settings: Any) -> Any:
        """As `Encoder.embed_iter`; the window grows with the number of devices."""
        return super().embed_iter(texts, window=WINDOW * len(self.devices) if window is None else window, **settings)

    # --- what is done elsewhere -------------------------------------------------------------------------

    def _embed_rows(
        self,
        rows: list[str],
        instructions: list[str] | None,
        run: RunSettings,
        normalize: bool | None,
        truncate_dim: int | None,
        on_device: bool,
    ) -> Tensor:
        vectors = np.empty((len(rows), truncate_dim or self.spec.embedding_size), np.float32)
        keywords = {"normalize": normalize, "truncate_dim": truncate_dim, "on_device": False}
        self._spread("_embed_rows", rows, instructions, run, keywords, into=vectors)
        return torch.from_numpy(vectors)

    def _tokens_of_rows(
        self, rows: list[str], instructions: list[str] | None, run: RunSettings, normalize: bool
    ) -> list[TokenVectors]:
        parts = self._spread("_tokens_of_rows", rows, instructions, run, {"normalize": normalize})
        return [vectors for part in parts for vectors in part]

    def _spans_of_rows(
        self,
        rows: list[str],
        instructions: list[str] | None,
        run: RunSettings,
        normalize: bool | None,
        spans: Sequence[Sequence[tuple[int, int]]],
        shift: int = 0,
    ) -> SpanVectors:
        keywords = {"normalize": normalize, "shift": shift}
        parts = self._spread("_spans_of_rows", rows, instructions, run, keywords, spans=spans)
        documents = [np.zeros((0, self.spec.embedding_size), np.float32), *(part.documents for part in parts)]
        return SpanVectors(
            np.concatenate(documents),
            [vectors for part in parts for vectors in part.spans],
            [vectors for part in parts for vectors in part.tokens],
        )

    def _spread(
        self,
        method: str,
        rows: list[str],
        instructions: list[str] | None,
        run: RunSettings,
        keywords: dict[str, Any],
        spans: Sequence[Any] | None = None,
        into: np.ndarray | None = None,
    ) -> list[Any]:
        """The method's results for runs of the rows, in order."""
        limit = self.spec.max_length if run.max_length is None else run.max_length
        quiet = {**asdict(run), "show_progress": False}
        chunks = []
        for start, stop in share_out(rows, instructions, limit, len(self.devices), default_budget(self.devices[0])):
            own = {"rows": rows[start:stop], "run": quiet, **keywords}
            own["instructions"] = None if instructions is None else instructions[start:stop]
            if spans is not None:
                own["spans"] = spans[start:stop]
            chunks.append(Chunk(start, stop, own))
        results: dict[int, Any] = {}
        notes: list[tuple[int, Notes]] = []
        with Progress(len(rows), run.show_progress) as progress:

            def receive(chunk: Chunk, value: Any, own: Notes) -> None:
                results[chunk.start] = value
                notes.append((chunk.start, own))
                progress.advance(chunk.stop - chunk.start, 0)

            self._pool.run(method, chunks, self.spec, receive, into)
        _warn(notes, len(rows), limit, self.spec.document_limit)
        return [results[start] for start in sorted(results)]


def _warn(notes: Sequence[tuple[int, Notes]], num_texts: int, limit: int, document_limit: int | None) -> None:
    num_truncated = sum(own.num_truncated for _, own in notes)
    non_finite = sorted(start + row for start, own in notes for row in own.non_finite)
    if num_truncated:
        warning = TruncationWarning.of(num_truncated, num_texts, limit, document_limit)
        warnings.warn(warning, stacklevel=callers_level())
    if non_finite:
        warnings.warn(NonFiniteWarning.of(non_finite, num_texts), stacklevel=callers_level())


def share_out(
    rows: Sequence[str], instructions: Sequence[str] | None, limit: int, num_devices: int, budget: int
) -> list[tuple[int, int]]:
    """Runs of texts to hand out one by one: large ones first, smaller ones towards the end.

    Args:
        limit: tokens a text may have.
        budget: tokens of a pack; no run is planned smaller.

    Returns:
        First text and one past the last of each run; together they hold every text once, in order.
    """
    sizes = np.array([len(row) for row in rows], dtype=np.int64)
    if instructions is not None:
        sizes += [len(instruction) for instruction in instructions]
    ends = np.cumsum(np.minimum(sizes // CHARS_PER_TOKEN + 1, limit))
    runs, start, done = [], 0, 0
    while start < len(rows):
        left = int(ends[-1]) - done
        wanted = min(max(left // (SHARE * num_devices), budget), LARGEST_CHUNK * budget)
        stop = max(start + 1, int(np.searchsorted(ends, done + wanted, side="right")))
        runs.append((start, stop))
        start, done = stop, int(ends[stop - 1])
    return runs
