"""Requests of many clients, embedded together: what waits is taken in turns, a budget of tokens at a time.

A request larger than the budget is cut, and what is left of it goes to the back of the queue: it delays small ones by
one round, not by all of its own. One thread embeds, so the event loop stays free.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

Embed = Callable[[list[str], int | None], np.ndarray]


class Busy(RuntimeError):
    """Too many tokens wait already; `retry_after_s` is when some will have gone."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"too many texts wait already, try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


@dataclass(eq=False)
class _Request:
    texts: Sequence[str]
    counts: np.ndarray
    dimensions: int | None
    done: "asyncio.Future[np.ndarray]"
    taken: int = 0  # texts of it that are embedded or about to be
    vectors: list[np.ndarray] = field(default_factory=list)


@dataclass(frozen=True)
class Round:
    """What was embedded in one go, for metrics."""

    requests: int
    texts: int
    tokens: int
    seconds: float


class Batcher:
    """Embeds requests together; used inside one event loop.

    Args:
        embed: vectors [n, d] of texts, cut to some dimensions where that is not None; called in one thread of its own.
        batch_tokens: of one round, and at least one text.
        max_waiting_tokens: beyond which a request is turned away; a single one is taken whatever its size.
        max_waiting_s: likewise, by how fast the last full rounds were.
        on_round: told after each round.
    """

    def __init__(
        self,
        embed: Embed,
        *,
        batch_tokens: int,
        max_waiting_tokens: int,
        max_waiting_s: float = math.inf,
        on_round: Callable[[Round], None] = lambda done: None,
    ) -> None:
        self.embed, self.on_round = embed, on_round
        self.batch_tokens = batch_tokens
        self.max_waiting_tokens, self.max_waiting_s = max_waiting_tokens, max_waiting_s
        self.waiting: deque[_Request] = deque()
        self.waiting_tokens = 0
        self.tokens_per_s = 0.0  # smoothed
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="flashvec-embed")
        self.work = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    async def submit(self, texts: Sequence[str], counts: np.ndarray, dimensions: int | None) -> np.ndarray:
        """Vectors [n, d] of texts of `counts` tokens each.

        Raises:
            Busy: too much waits.
            Exception: whatever embedding these texts raised; other requests are not touched by it.
        """
        tokens = int(counts.sum())
        too_many = self.waiting_tokens + tokens > self.max_waiting_tokens
        too_long = self.waiting_tokens + tokens > self.tokens_per_s * self.max_waiting_s > 0
        if self.waiting and (too_many or too_long):
            raise Busy(self.retry_after())
        if self.task is None:
            self.task = asyncio.create_task(self._run())
        request = _Request(texts, counts, dimensions, asyncio.get_running_loop().create_future())
        self.waiting.append(request)
        self.waiting_tokens += tokens
        self.work.set()
        try:
            return await request.done
        finally:
            if request in self.waiting:  # the client has gone: others must not be turned away for its texts
                self.waiting.remove(request)
                self.waiting_tokens -= int(request.counts[request.taken :].sum())

    async def close(self) -> None:
        """Stop; requests that still wait are cancelled."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        for request in self.waiting:
            request.done.cancel()
        self.waiting.clear()
        self.thread.shutdown()

    def retry_after(self) -> int:
        """Seconds, 1 to 60, after which some of what waits will have gone."""
        excess = self.waiting_tokens if self.tokens_per_s == 0 else self.waiting_tokens / self.tokens_per_s
        return int(np.clip(excess, 1, 60))

    async def _run(self) -> None:
        while True:
            await self.work.wait()
            pieces = self._take()
            if not pieces:
                self.work.clear()
                continue
            await self._round(pieces)

    def _take(self) -> list[tuple[_Request, slice]]:
        """The next round: pieces of waiting requests that want the same dimensions, in turn, within the budget."""
        pieces: list[tuple[_Request, slice]] = []
        room, others = self.batch_tokens, list[_Request]()
        while self.waiting and room > 0:
            request = self.waiting.popleft()
            if request.done.done():  # the client has gone, or another piece of it failed
                self.waiting_tokens -= int(request.counts[request.taken :].sum())
                continue
            if pieces and request.dimensions != pieces[0][0].dimensions:
                others.append(request)
                continue
            sums = np.cumsum(request.counts[request.taken :])
            fitting = int(np.searchsorted(sums, room, side="right"))
            if not fitting and pieces:
                others.append(request)
                break
            stop = request.taken + max(1, fitting)
            pieces.append((request, slice(request.taken, stop)))
            tokens = int(request.counts[request.taken : stop].sum())
            room, request.taken = room - tokens, stop
            self.waiting_tokens -= tokens
            if stop < len(request.texts):
                break  # the budget is spent on it: it goes to the back
        cut = [request for request, piece in pieces[-1:] if piece.stop < len(request.texts)]
        self.waiting = deque([*others, *self.waiting, *cut])
        return pieces

    async def _round(self, pieces: list[tuple[_Request, slice]]) -> None:
        started = time.perf_counter()
        try:
            vectors = await self._embed(pieces)
        except Exception as error:  # what it is goes to the request it belongs to
            if len(pieces) == 1:
                _fail(pieces[0][0], error)
                return
            for alone in pieces:
                await self._round([alone])
            return
        seconds = time.perf_counter() - started
        texts = sum(piece.stop - piece.start for _, piece in pieces)
        tokens = sum(int(request.counts[piece].sum()) for request, piece in pieces)
        if 2 * tokens >= self.batch_tokens:  # where requests wait rounds are full; a small one's time is overhead
            rate = tokens / max(seconds, 1e-9)
            self.tokens_per_s = rate if not self.tokens_per_s else 0.8 * self.tokens_per_s + 0.2 * rate
        at = 0
        for request, piece in pieces:
            count = piece.stop - piece.start
            request.vectors.append(vectors[at : at + count])
            at += count
            if piece.stop == len(request.texts) and not request.done.done():
                request.done.set_result(np.concatenate(request.vectors))
        self.on_round(Round(len(pieces), texts, tokens, seconds))

    async def _embed(self, pieces: list[tuple[_Request, slice]]) -> np.ndarray:
        texts = [text for request, piece in pieces for text in request.texts[piece]]
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.thread, self.embed, texts, pieces[0][0].dimensions)


def _fail(request: _Request, error: Exception) -> None:
    if not request.done.done():
        request.done.set_exception(error)
