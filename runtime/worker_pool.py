"""Processes that each hold the model on one device, and hand back what they are asked for.

The parent deals out work: every process has a pipe of its own, gets the next chunk when it has finished one, and holds
one more in reserve so that it never waits. There is no shared lock that a process could take to its grave. What goes
through the pipes are plain Python values and numpy arrays, between processes of one program; arrays go as raw bytes,
straight into their place in the result.
"""

import multiprocessing
import os
import queue
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashvec.runtime.checkpoint.source import CheckpointError
from flashvec.runtime.spec import ModelSpec, spec_from_dict
from flashvec.runtime.windows import RunSettings

IN_HAND = 2  # chunks a process holds: the one it works on and the next
JOIN_S = 5.0
ERRORS: dict[str, type[Exception]] = {
    error.__name__: error
    for error in (ValueError, TypeError, KeyError, CheckpointError, MemoryError, torch.OutOfMemoryError)
}


@dataclass(frozen=True)
class Chunk:
    """Texts `start` to `stop` of a call, and the arguments of the encoder's method for them."""

    start: int
    stop: int
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Notes:
    """What a process would have warned about."""

    num_truncated: int = 0
    non_finite: tuple[int, ...] = ()  # numbers within the chunk


@dataclass(eq=False)
class _Worker:
    device: str
    process: Any
    pipe: Connection
    in_hand: deque[tuple[int, Chunk]] = field(default_factory=deque)  # job and chunk, in the order they were sent
    spec: ModelSpec | None = None  # the one it works by

    def describe(self) -> str:
        return f"the worker on {self.device} (process {self.process.pid})"


class WorkerPool:
    """One process for each device; all are loading when this returns, and ready when it does.

    Args:
        devices: names of devices; one may come more than once.
        arguments: of `Encoder.load`, plain values.

    Raises:
        RuntimeError: a process ended before it was ready.
        Exception: what `Encoder.load` raised there.
    """

    def __init__(self, devices: Sequence[str], arguments: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")  # a process that has used CUDA cannot be forked
        threads = max(1, (os.cpu_count() or 1) // max(1, len(devices)))
        self.workers: list[_Worker] = []
        self.dtype = ""
        self.closed: str | None = None  # why no more work is taken
        self._lock = threading.Lock()
        self._job = 0
        self._in_message = False
        for device in devices:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, {**arguments, "device": device}, threads), daemon=True
            )
            process.start()
            theirs.close()  # so that its end closes when the process does
            self.workers.append(_Worker(device, process, ours))
        try:
            for worker in self.workers:
                self.dtype = self._ready(worker)
        except BaseException:
            self.close()
            raise

    def run(
        self,
        method: str,
        chunks: Sequence[Chunk],
        spec: ModelSpec,
        receive: Callable[[Chunk, Any, Notes], None],
        into: np.ndarray | None = None,
    ) -> None:
        """Have an encoder's method called for every chunk.

        Args:
            method: its name.
            chunks: in the order they should be begun.
            spec: what the encoders are to follow from now on.
            receive: called for every chunk as it is done, in any order.
            into: array whose rows a method's array is written to; `receive` then gets None.

        Raises:
            Exception: what the method raised; other chunks of this call are given up.
            RuntimeError: a process died. The pool is closed then.
        """
        with self._lock:
            if self.closed is not None:
                raise RuntimeError(f"this encoder's processes are closed: {self.closed}")
            self._job += 1
            waiting, left = deque(chunks), len(chunks)
            try:
                while left:
                    self._deal(method, waiting, spec)
                    for worker in self._answering():
                        left -= self._take(worker, receive, into)
            except BaseException as error:
                # Half a message may be in a pipe: what follows could not be read.
                if self._in_message:
                    self._close(f"{type(error).__name__} while a message was under way")
                raise

    def close(self) -> None:
        """End the processes."""
        self._close("close() was called")

    # --- the parent's side ------------------------------------------------------------------------------

    def _deal(self, method: str, waiting: deque[Chunk], spec: ModelSpec) -> None:
        """One chunk for everybody before anybody gets a second."""
        while waiting:
            worker = min(self.workers, key=lambda w: len(w.in_hand))
            if len(worker.in_hand) == IN_HAND:
                return
            self._send(worker, method, waiting.popleft(), spec)

    def _send(self, worker: _Worker, method: str, chunk: Chunk, spec: ModelSpec) -> None:
        values = None if worker.spec is spec else spec.to_dict()
        self._in_message = True
        try:
            worker.pipe.send((method, chunk.arguments, values))
        except OSError:
            self._lost(worker)
        self._in_message = False
        worker.spec = spec
        worker.in_hand.append((self._job, chunk))

    def _answering(self) -> list[_Worker]:
        """Processes with a message; waits for one.

        Raises:
            RuntimeError: one died and left none.
        """
        pipes = {worker.pipe: worker for worker in self.workers}
        ends = {worker.process.sentinel: worker for worker in self.workers}
        ready = wait([*pipes, *ends])
        answering = [pipes[pipe] for pipe in ready if isinstance(pipe, Connection)]
        if not answering:
            self._lost(ends[next(end for end in ready if isinstance(end, int))])
        return answering

    def _take(self, worker: _Worker, receive: Callable[..., None], into: np.ndarray | None) -> int:
        """Read one answer; 1 if it is to the call that runs now, 0 if to one that was given up."""
        self._in_message = True
        try:
            kind, value, notes = worker.pipe.recv()
            job, chunk = worker.in_hand.popleft()
            is_own = job == self._job
            if kind == "array":
                rows = into[chunk.start : chunk.stop] if is_own and into is not None else np.empty(*value)
                if rows.nbytes:
                    worker.pipe.recv_bytes_into(rows.data.cast("B"))
                value = None
        except (EOFError, OSError):
            self._lost(worker)
        self._in_message = False
        if not is_own:
            return 0
        if kind == "error":
            name, text = value
            error = ERRORS.get(name)
            raise error(f"{text} (on {worker.device})") if error else RuntimeError(f"{name} on {worker.device}: {text}")
        receive(chunk, value, Notes(**notes))
        return 1

    def _ready(self, worker: _Worker) -> str:
        """The dtype it loaded the model in."""
        try:
            kind, value, _ = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join(JOIN_S)
            raise RuntimeError(
                f"{worker.describe()} ended with exit code {worker.process.exitcode} before the model was loaded; what "
                "it wrote to stderr says why. A script that loads an encoder on several devices must do so under "
                "`if __name__ == '__main__':`"
            ) from None
        if kind == "error":
            name, text = value
            raise ERRORS.get(name, RuntimeError)(f"{text} (on {worker.device})")
        return value

    def _lost(self, worker: _Worker) -> None:
        worker.process.join(JOIN_S)
        code = worker.process.exitcode
        killed = ", killed by the system if memory ran out" if code == -signal.SIGKILL else ""
        reason = f"{worker.describe()} ended with exit code {code}{killed}"
        self._close(reason)
        raise RuntimeError(f"{reason} while embedding; load the encoder again")

    def _close(self, reason: str) -> None:
        if self.closed is not None:
            return
        self.closed = reason
        for worker in self.workers:
            worker.pipe.close()  # tells the process to end
        for worker in self.workers:
            worker.process.join(JOIN_S)
            if worker.process.is_alive():
                worker.process.terminate()
                worker.process.join(JOIN_S)


# --- the process's side -------------------------------------------------------------------------------


def _work(pipe: Connection, arguments: dict[str, Any], threads: int) -> None:
    """Load the model and answer until the parent closes the pipe."""
    import logging

    from flashvec.runtime.encoder import Encoder

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to decide on
    logging.getLogger("flashvec").setLevel(logging.ERROR)  # the parent says what there is to say, once
    try:
        if torch.device(arguments["device"]).type == "cuda":
            torch.cuda.set_device(arguments["device"])  # or every process would also open the first GPU
        else:
            torch.set_num_threads(threads)
        encoder = Encoder.load(**arguments)
    except Exception as error:
        pipe.send(("error", (type(error).__name__, str(error)), {}))
        return
    pipe.send(("ready", str(encoder.dtype).removeprefix("torch."), {}))
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(pipe, inbox), daemon=True).start()
    while True:
        method, keywords, spec = inbox.get()
        if spec is not None:
            encoder.spec = spec_from_dict(spec)
        _answer(pipe, encoder, method, keywords)


def _read(pipe: Connection, inbox: "queue.SimpleQueue[Any]") -> None:
    """Take messages as they come, so that the parent never waits to send one; its end is ours."""
    while True:
        try:
            inbox.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(0)  # the parent has closed the pipe, or is gone


def _answer(pipe: Connection, encoder: Any, method: str, keywords: dict[str, Any]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            value = getattr(encoder, method)(**{**keywords, "run": RunSettings(**keywords["run"])})
        except Exception as error:
            pipe.send(("error", (type(error).__name__, str(error)), {}))
            return
    notes = asdict(
        Notes(
            sum(getattr(w.message, "num_texts", 0) for w in caught),
            tuple(row for w in caught for row in getattr(w.message, "rows", ())),
        )
    )
    if isinstance(value, Tensor):
        array = value.numpy()
        pipe.send(("array", (array.shape, array.dtype.name), notes))
        if array.nbytes:
            pipe.send_bytes(array.data.cast("B"))
    else:
        pipe.send(("value", value, notes))
