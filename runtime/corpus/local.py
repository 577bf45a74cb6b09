"""Workers on this machine: one process for each GPU, or one on the CPU, started again when they die.

The supervisor never touches a device. A worker gets one shard at a time over its input and is stopped by the end of it.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import IO, Any

from flashvec.runtime.corpus.plan import ModelFacts
from flashvec.runtime.corpus.settings import JobSettings

STRIKES = 3  # workers that a shard may cost before it is set aside
STOP_S = 5.0
TAIL = 2000  # bytes of a dead worker's last words that are shown
COMMAND = (sys.executable, "-m", "flashvec.runtime.corpus.worker")

Event = dict[str, Any]


class WorkerError(RuntimeError):
    """A worker that could not do its work; the message is its own."""


class _Worker:
    """One process, and what it is at."""

    def __init__(self, command: Sequence[str], load: dict[str, Any]) -> None:
        self.load = load
        self.stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed by stop()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr, bufsize=0
        )
        self.shard: int | None = None
        self.is_ready = False
        self.buffer = b""
        self.send({"load": load})

    def send(self, message: Event) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died; its output says so next
            left = memoryview(json.dumps(message).encode() + b"\n")
            while left:
                left = left[self.process.stdin.write(left) or 0 :]

    def receive(self) -> list[Event] | None:
        """Messages that have come; None once it has died."""
        assert self.process.stdout is not None
        block = os.read(self.process.stdout.fileno(), 1 << 16)
        if not block:
            return None
        *lines, self.buffer = (self.buffer + block).split(b"\n")
        return [json.loads(line) for line in lines]

    def last_words(self) -> str:
        """How it ended, and the end of what it wrote to stderr."""
        code = self.process.wait()
        self.stderr.seek(0, os.SEEK_END)
        self.stderr.seek(max(self.stderr.tell() - TAIL, 0))
        words = self.stderr.read().decode(errors="replace").strip()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        how += " (is memory short?)" if code == -signal.SIGKILL else ""
        return f"process {self.process.pid} {how}" + (f": {words.splitlines()[-1]}" if words else "")

    def stop(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.stderr.close()


class LocalFleet:
    """Workers of one job; a context manager.

    Args:
        load: arguments of `Encoder.load`.
        devices: one for each worker; None: where `Encoder.load` would put the model.
        command: what a worker is; tests have their own.
    """

    def __init__(
        self, load: dict[str, Any], devices: Sequence[str | None] = (None,), command: Sequence[str] = COMMAND
    ) -> None:
        self.load, self.command = load, command
        self.devices = list(devices)
        self.selector = selectors.DefaultSelector()
        self.workers: list[_Worker] = []
        self.notes: list[str] = []
        self.failed_starts = 0

    def __enter__(self) -> "LocalFleet":
        for device in self.devices:
            self._start({**self.load, "device": device})
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.workers:
            self.selector.unregister(worker.process.stdout)  # type: ignore[arg-type]
            worker.stop()
        self.workers = []
        self.selector.close()

    def facts(self) -> ModelFacts:
        """Facts of the model and machine, once the first worker has loaded it.

        Raises:
            WorkerError: loading failed.
        """
        while True:
            for worker, message in self._messages():
                if message["event"] == "ready":
                    worker.is_ready = True
                    return ModelFacts(**message["facts"])
                self._unexpected(worker, message)

    def ask(self, question: str, texts: list[str], settings: JobSettings) -> Event:
        """A worker's answer about some texts: "ranges" or "speed"."""
        asked = next(worker for worker in self.workers if worker.is_ready)
        asked.send({"ask": question, "texts": texts, "settings": settings.to_dict()})
        while True:
            for worker, message in self._messages():
                if message["event"] == "answer":
                    return message
                if message["event"] == "ready":
                    worker.is_ready = True
                self._unexpected(worker, message)

    def run(self, job: str, shards: Sequence[int], errors_left: "ErrorBudget") -> Iterator[Event]:
        """Run shards, the next one on whichever worker is free.

        Yields:
            step, done, retry, set_aside and note events.

        Raises:
            WorkerError: what a worker could not do; others are stopped.
        """
        waiting, strikes, left = deque(shards), Counter[int](), len(shards)
        while left:
            for worker in self.workers:
                if worker.is_ready and worker.shard is None and waiting:
                    worker.shard = waiting.popleft()
                    worker.send({"job": job, "shard": worker.shard, "max_errors": errors_left.left})
            for worker, message in self._messages():
                shard = worker.shard
                if message["event"] == "ready":
                    worker.is_ready = True
                elif message["event"] == "done":
                    worker.shard, left = None, left - 1
                    yield {**message, "pid": worker.process.pid}
                elif message["event"] == "died":
                    if shard is None:
                        continue
                    strikes[shard] += 1
                    if strikes[shard] < STRIKES:
                        waiting.appendleft(shard)
                        yield {"event": "retry", "shard": shard, "message": message["message"]}
                    else:
                        left -= 1
                        yield {"event": "set_aside", "shard": shard, "message": message["message"]}
                elif message["event"] == "failed":
                    raise WorkerError(
                        f"shard {shard}: {message['message']}" if shard is not None else message["message"]
                    )
                else:
                    yield message

    def _start(self, load: dict[str, Any]) -> None:
        worker = _Worker(self.command, load)
        self.workers.append(worker)
        self.selector.register(worker.process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]

    def _messages(self) -> Iterator[tuple[_Worker, Event]]:
        """What comes next from the workers; a dead one is replaced and comes as `died`."""
        for key, _ in self.selector.select():
            worker = key.data
            messages = worker.receive()
            if messages is not None:
                for message in messages:
                    yield worker, message
                continue
            words = worker.last_words()
            self.selector.unregister(worker.process.stdout)
            self.workers.remove(worker)
            worker.stop()
            self.failed_starts = 0 if worker.is_ready else self.failed_starts + 1
            if self.failed_starts == STRIKES or not (worker.is_ready or "by signal" in words):
                raise WorkerError(f"a worker ended before the model was loaded: {words}")
            self._start(worker.load)
            yield worker, {"event": "died", "message": words}

    def _unexpected(self, worker: _Worker, message: Event) -> None:
        """Before the shards are dealt out: notes are kept, failures end it."""
        if message["event"] == "note":
            self.notes.append(message["text"])
        elif message["event"] == "died":
            raise WorkerError(f"a worker ended before the first shard: {message['message']}")
        elif message["event"] == "failed":
            raise WorkerError(message["message"])


class ErrorBudget:
    """Rows without a vector that a job may still have; None: any number."""

    def __init__(self, limit: int | None, used: int) -> None:
        self.limit, self.used = limit, used

    @property
    def left(self) -> int | None:
        return None if self.limit is None else max(self.limit - self.used, 0)
