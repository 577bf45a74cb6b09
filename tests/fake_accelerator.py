"""A stand-in for a GPU on CPU tensors: as late, as forgetful and as full as a real one may be."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashvec.kernels.attention import Rotation, attention_reference, rotate
from flashvec.kernels.schedule import Schedule
from flashvec.runtime.accelerator import Recording


class _Mark:
    def __init__(self, owner: "FakeAccelerator", number: int) -> None:
        self.owner, self.number = owner, number

    def wait(self) -> None:
        self.owner.events.append("wait")
        with self.owner.lock:
            while self.owner.delivered < self.number:
                self.owner.deliver()


class FakeAccelerator:
    """Copies to the host hold NaN until a later mark was waited for; recordings share the memory of their results.

    Attributes:
        events: what was asked, in order: send, fetch, mark, follow, wait, record, replay, release.
        refuses: an error that `record` raises.
    """

    def __init__(self) -> None:
        self.events: list[str] = []
        self.refuses: Exception | None = None
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.delivered = 0
        self.lock = threading.Lock()
        self.recordings: list[tuple[Tensor, ...]] = []

    def send(self, values: np.ndarray, into: Tensor | None = None) -> Tensor:
        self.events.append("send")
        sent = torch.from_numpy(values.copy())
        return sent if into is None else into.copy_(sent)

    def fetch(self, x: Tensor) -> Tensor:
        self.events.append("fetch")
        late = torch.full_like(x, float("nan"))
        self.copies.append((late, x.clone()))
        return late

    def deliver(self) -> None:
        late, value = self.copies[self.delivered]
        late.copy_(value)
        self.delivered += 1

    def mark(self) -> _Mark:
        self.events.append("mark")
        return _Mark(self, len(self.copies))

    def follow(self, mark: _Mark) -> None:
        self.events.append("follow")

    def record(self, work: Callable[[], tuple[Tensor, ...]]) -> Recording:
        self.events.append("record")
        if self.refuses is not None:
            raise self.refuses
        outputs = tuple(x.clone() for x in work())
        self.recordings.append(outputs)

        def replay() -> None:
            self.events.append("replay")
            for others in self.recordings:
                for x in others:
                    x.fill_(float("nan") if x.is_floating_point() else -1)
            for x, new in zip(outputs, work(), strict=True):
                x.copy_(new)

        return Recording(replay, outputs)

    def release(self) -> None:
        self.events.append("release")

    def memory(self) -> tuple[int, int]:
        return 3 * 2**30 // 2, 80 * 2**30

    def count(self, event: str) -> int:
        return self.events.count(event)


def full_above(forward: Callable[..., Any], limit: Callable[[], int]) -> Callable[..., Any]:
    """A decoder's `forward` on a device whose memory holds packs of at most `limit()` tokens."""

    def guarded(self: Any, ids_T: Tensor, schedule: Any, *rest: Any, **keywords: Any) -> Any:
        if int((ids_T >= 0).sum()) > limit():
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return forward(self, ids_T, schedule, *rest, **keywords)

    return guarded


def attention_by_definition(
    q: Tensor, k: Tensor, v: Tensor, schedule: Schedule, *, rotation: Rotation | None, queries: None, **facts: Any
) -> Tensor:
    """`attention` from the tensors of its schedule alone, as a recorded kernel has them."""
    if rotation is not None:
        q, k = rotate(q, k, rotation)
    return attention_reference(q, k, v, schedule, **facts)[0]
