"""What the runtime asks of a GPU: copies that wait for nothing, marks in its queue, recorded work, free memory.

All that a run asks of `torch.cuda` stands here; where a model goes is `placement.py`'s. The engine works with any
object of this shape, so tests run every decision around it on the CPU, with work that is recorded, memory that runs out
and copies that arrive late.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

Work = Callable[[], tuple[Tensor, ...]]


class Mark(Protocol):
    """A point in the device's queue."""

    def wait(self) -> None:
        """Return once the device has passed it."""


class Recording(NamedTuple):
    """Work that can be repeated as one launch: `replay` fills `outputs` from what its inputs hold by then."""

    replay: Callable[[], None]
    outputs: tuple[Tensor, ...]


class Accelerator(Protocol):
    """A device whose queue the host fills without waiting."""

    def send(self, values: np.ndarray, into: Tensor | None = None) -> Tensor:
        """Queue a copy to the device, into a new tensor or a given one; `values` may be changed at once."""

    def fetch(self, x: Tensor) -> Tensor:
        """Queue a copy to the host; its values are there once a later mark has been waited for."""

    def mark(self) -> Mark:
        """A mark after everything queued so far."""

    def follow(self, mark: Mark) -> None:
        """What is queued from now on, on whatever stream, runs after a mark."""

    def record(self, work: Work) -> Recording:
        """Run work once to warm up, then record it.

        Raises:
            RuntimeError: it cannot be recorded.
        """

    def release(self) -> None:
        """Give memory that is held but not used back to the device."""

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the device."""


class _CudaMark:
    def __init__(self, device: torch.device) -> None:
        self.event, self.stream = torch.cuda.Event(), torch.cuda.current_stream(device)
        self.event.record(self.stream)

    def wait(self) -> None:
        self.event.synchronize()


class Cuda:
    """An NVIDIA or AMD GPU through torch.

    Pinned memory comes from torch's caching host allocator: it keeps a block until the copies that use it are done, so
    a handful of blocks go round, and nothing here has to say which of them is free.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None  # memory that all recordings share: they never run at once
        self._stream: torch.cuda.Stream | None = None

    def send(self, values: np.ndarray, into: Tensor | None = None) -> Tensor:
        pinned = torch.empty(values.shape, dtype=torch.from_numpy(values[:0]).dtype, device="cpu", pin_memory=True)
        pinned.numpy()[...] = values
        if into is None:
            return pinned.to(self.device, non_blocking=True)
        return into.copy_(pinned, non_blocking=True)

    def fetch(self, x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True).copy_(x, non_blocking=True)

    def mark(self) -> Mark:
        return _CudaMark(self.device)

    def follow(self, mark: Mark) -> None:
        assert isinstance(mark, _CudaMark)
        stream = torch.cuda.current_stream(self.device)
        if stream != mark.stream:
            stream.wait_event(mark.event)

    def record(self, work: Work) -> Recording:
        with torch.cuda.device(self.device):
            if self._stream is None:
                self._stream = torch.cuda.Stream(self.device)
                self._pool = torch.cuda.graph_pool_handle()
            # What the first run on a stream sets up (a matrix library's workspace) must not be set up while recording.
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                work()
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
            try:
                # Only this thread's calls are held to a recording's rules: others may be pinning memory meanwhile.
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    outputs = work()
            finally:  # a recording that cannot be ended leaves its stream behind
                torch.cuda.set_stream(before)
        return Recording(graph.replay, outputs)

    def release(self) -> None:
        with torch.cuda.device(self.device):
            torch.cuda.empty_cache()

    def memory(self) -> tuple[int, int]:
        return torch.cuda.mem_get_info(self.device)
