"""Runs tokenised texts through the decoder, pack by pack.

On the CPU a pack is run and handed over, one after the other or on several workers. On a GPU the host fills the
device's queue and never waits for a pack it has just queued: inputs go as one pinned copy, results come back the same
way a few packs later, small packs run as recorded graphs, and packs shrink when memory runs out.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from flashvec.kernels.backend import runs_triton
from flashvec.kernels.schedule import TileClass
from flashvec.runtime.accelerator import Accelerator, Cuda, Mark
from flashvec.runtime.batches import TokenRows, device_batch, host_batch
from flashvec.runtime.decoder import Decoder
from flashvec.runtime.graphs import Graphs
from flashvec.runtime.memory import Ladder, does_not_fit, fits, host_memory
from flashvec.runtime.packing import fitting, longest_first, pack
from flashvec.runtime.program import Program

TOKEN_BUDGET_CPU = 2048  # where bf16 and fp32 products reach their best rate; more only costs memory
TOKEN_BUDGET_CUDA = 16_384
QUEUED_PACKS = 3  # on a GPU: two keep it busy while the host reads the third one's results

R = TypeVar("R")


@dataclass(frozen=True)
class Ran:
    """Texts that ran together, and what a program made of them.

    `outputs` are the program's, on the host unless they were to stay on the device; their first dimension counts these
    texts, or their tokens.
    """

    indices: np.ndarray  # int64 [B] positions of these texts in the call's list
    num_tokens: int
    outputs: tuple[Tensor, ...]


def default_budget(device: torch.device) -> int:
    """Tokens per pack where the caller sets none."""
    return TOKEN_BUDGET_CUDA if device.type == "cuda" else TOKEN_BUDGET_CPU


class Engine:
    """Runs programs on one decoder; keeps what outlives a call: graphs and what is known about memory.

    Args:
        accelerator: how to reach the decoder's device; default `Cuda` on CUDA, none on the CPU.
        graphs: record small packs; default where the kernels are Triton's, whose launches depend on sizes alone.
    """

    def __init__(self, decoder: Decoder, accelerator: Accelerator | None = None, graphs: bool | None = None) -> None:
        device = decoder.device
        self.decoder = decoder
        self.accelerator = Cuda(device) if accelerator is None and device.type == "cuda" else accelerator
        self.ladder = Ladder()
        self.graphs: Graphs | None = None
        if self.accelerator is not None and (runs_triton(device) if graphs is None else graphs):
            self.graphs = Graphs(decoder, self.accelerator)
        self._classes: dict[TileClass, None] = {}  # tile lists that kernels have asked for, in that order
        # Of the device's queue: buffers that a graph reads are written just before it, by any thread, on any stream.
        self._lock = threading.Lock()
        self._last_mark: Mark | None = None

    def run(
        self, rows: TokenRows, budget: int, program: Program, workers: int = 1, on_device: bool = False
    ) -> Iterator[Ran]:
        """Run texts in packs of similar length.

        Args:
            rows: texts of at least one token each.
            budget: tokens per pack.
            program: what to make of each pack.
            workers: packs that run at the same time, each on one thread, over the same weights (CPU). One pack on all
                threads waits for the slowest of them at every operation; single-threaded packs never wait.
            on_device: leave outputs on the device.

        Yields:
            One `Ran` after the other; together they hold every text once. A text's rows have the same bits whatever
            the budget and its neighbours (CPU).

        Raises:
            torch.OutOfMemoryError: a text does not fit on its own; the message names its length and the cure.
        """
        if self.accelerator is not None:
            return self._run_queued(self.accelerator, rows, budget, program, on_device)
        if workers > 1:
            packs = list(pack(rows.lengths, budget))
            return _run_on_workers(lambda indices: self._run_here(rows, program, indices), packs, workers)
        return self._run_fitting(rows.lengths, budget, lambda indices: self._run_here(rows, program, indices))

    def _run_here(self, rows: TokenRows, program: Program, indices: np.ndarray) -> Ran:
        own = rows.take(indices)
        batch = host_batch(own, self.decoder.row_plan(len(own.ids)))
        return Ran(indices, len(own.ids), _own(program, own, program.run(self.decoder, batch)))

    def _run_fitting(self, lengths: np.ndarray, budget: int, run_pack: Callable[[np.ndarray], R]) -> Iterator[R]:
        """Packs longest first, as large as the budget and the memory allow."""
        order = longest_first(lengths)
        start, alone_again = 0, False
        while start < len(order):
            now = self.ladder.budget(budget)
            count = fitting(lengths[order[start : start + now]], now)
            indices = order[start : start + count]
            fitted, ran = fits(partial(run_pack, indices))
            if fitted:
                start, alone_again = start + count, False
                self.ladder.succeeded(budget, int(lengths[indices].sum()))
                yield ran
                continue
            self.make_room()
            num_tokens = int(lengths[indices].sum())
            if count > 1:
                self.ladder.failed(num_tokens)
            elif alone_again:
                memory = host_memory() if self.accelerator is None else self.accelerator.memory()
                raise torch.OutOfMemoryError(does_not_fit(num_tokens, memory, self.decoder.device, self.decoder.dtype))
            alone_again = count == 1

    def make_room(self) -> None:
        """Give back what only speed needs."""
        with self._lock:
            if self.graphs is not None:
                self.graphs.clear()
            if self.accelerator is not None:
                self.accelerator.release()

    def _run_queued(
        self, accelerator: Accelerator, rows: TokenRows, budget: int, program: Program, on_device: bool
    ) -> Iterator[Ran]:
        """Packs of a device: a result is handed over once `QUEUED_PACKS` are under way."""

        def run_pack(indices: np.ndarray) -> tuple[Ran, Mark]:
            own = rows.take(indices)
            with self._lock:
                if self._last_mark is not None:
                    accelerator.follow(self._last_mark)
                outputs = _own(program, own, self._queue(accelerator, own, program))
                if not on_device:
                    outputs = tuple(accelerator.fetch(x) for x in outputs)
                self._last_mark = accelerator.mark()
                return Ran(indices, len(own.ids), outputs), self._last_mark

        under_way: deque[tuple[Ran, Mark]] = deque()
        for queued in self._run_fitting(rows.lengths, budget, run_pack):
            under_way.append(queued)
            if len(under_way) == QUEUED_PACKS:
                yield _arrived(*under_way.popleft())
        while under_way:
            yield _arrived(*under_way.popleft())

    def _queue(self, accelerator: Accelerator, rows: TokenRows, program: Program) -> tuple[Tensor, ...]:
        plan = self.decoder.row_plan(len(rows.ids))
        if self.graphs is not None and self.graphs.take(sum(plan)):
            return self.graphs.run(program, rows, sum(plan), tuple(self._classes))
        batch = device_batch(rows, plan, tuple(self._classes), accelerator)
        outputs = program.run(self.decoder, batch)
        self._classes.update(dict.fromkeys(batch.schedule.tile_lists))
        return outputs


def _own(program: Program, rows: TokenRows, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A program's outputs without what filling rows and texts gave."""
    sizes = {"texts": len(rows.lengths), "rows": len(rows.ids)}
    return tuple(x[: sizes[count]] for x, count in zip(outputs, program.counts, strict=True))


def _arrived(ran: Ran, mark: Mark) -> Ran:
    mark.wait()
    return ran


def _run_on_workers(run_pack: Callable[[np.ndarray], Ran], packs: list[np.ndarray], workers: int) -> Iterator[Ran]:
    """Packs in order, `workers` of them under way; at most one finished pack per worker waits in memory."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            under_way = deque(pool.submit(run_pack, indices) for indices in packs[: 2 * workers])
            for indices in packs[2 * workers :]:
                yield under_way.popleft().result()
                under_way.append(pool.submit(run_pack, indices))
            while under_way:
                yield under_way.popleft().result()
        finally:
            torch.set_num_threads(threads)  # a worker's own setting is also the process's default
