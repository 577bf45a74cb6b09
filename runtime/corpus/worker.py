"""A process that holds the model and runs shards: `python -m flashvec.runtime.corpus.worker`.

It takes one JSON object a line on its input and answers on its output, and ends when its input does: with the process
that started it. Nothing is unpickled and no vector passes between processes.

    {"load": {...}}                                         {"event": "ready", "facts": {...}}
    {"ask": "ranges", "texts": [...], "settings": {...}}    {"event": "answer", ...}
    {"job": folder, "shard": i, "max_errors": n}            {"event": "step", ...} and {"event": "done", "entry": {...}}
                                                            or {"event": "failed", "kind": name, "message": text}
"""

import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import IO, Any

import numpy as np

from flashvec.runtime.corpus.plan import ModelFacts, Plan, PlanError, check_same, read_plan
from flashvec.runtime.corpus.settings import JobSettings, settings_from_dict
from flashvec.runtime.corpus.shard import Step, run_shard
from flashvec.runtime.corpus.storage import Storage
from flashvec.runtime.corpus.vectors import KnownVectors, TextEncoder, embed_but_failing, embed_texts


class ShardRunner:
    """A loaded model that runs shards of any plan made for it.

    Args:
        encoder: loaded.
        facts: of it and this machine.
    """

    def __init__(self, encoder: TextEncoder, facts: ModelFacts) -> None:
        self.encoder, self.facts = encoder, facts
        self._job: tuple[str, Plan, KnownVectors | None] | None = None

    @classmethod
    def load(cls, arguments: dict[str, Any]) -> "ShardRunner":
        """Load an `Encoder`.

        Args:
            arguments: of `Encoder.load`.
        """
        import torch

        from flashvec.runtime.corpus.machine import model_facts
        from flashvec.runtime.encoder import Encoder
        from flashvec.runtime.placement import choose_devices

        device = arguments.get("device")
        if device == "all":
            raise ValueError("device is 'all', and one shard runs on one device: give cpu, cuda, cuda:1 and so on")
        if device is not None and choose_devices(device)[0].type == "cuda":
            torch.cuda.set_device(device)  # or every worker would also open the first GPU
        encoder = Encoder.load(**arguments)
        kept = {name: value for name, value in arguments.items() if name != "device" and value is not None}
        return cls(encoder, model_facts(encoder, kept))

    def run(
        self, job: str, shard: int, max_errors: int | None, on_step: Callable[[Step], None] = lambda step: None
    ) -> dict[str, Any]:
        """Run one shard of the job in a folder; its manifest as plain values."""
        if self._job is None or self._job[0] != job:
            storage = Storage(job)
            plan = read_plan(storage)
            if plan is None:
                raise PlanError(f"{job}: no plan.json there")
            check_same(plan, self.facts)
            known: KnownVectors | None = None
            if plan.reuse is not None:
                from flashvec.runtime.corpus.reuse import EarlierVectors, earlier_plan

                earlier = earlier_plan(plan.reuse, plan.settings, plan.model)  # it may have been made anew since
                if earlier.int8_ranges != plan.int8_ranges:
                    raise PlanError(f"reuse: {plan.reuse} was made anew, under other int8 ranges: begin this job anew")
                known = EarlierVectors(plan.reuse)
            self._job = (job, plan, known)
        _, plan, known = self._job
        entry = run_shard(
            plan,
            shard,
            self.encoder,
            Storage(job),
            known=known,
            max_errors=max_errors,
            machine=self.facts.machine,
            on_step=on_step,
        )
        return asdict(entry)

    def ranges(self, texts: list[str], settings: JobSettings) -> dict[str, Any]:
        """Per dimension minimum and maximum over some texts."""
        found, *_ = embed_but_failing(lambda texts: embed_texts(self.encoder, texts, settings), texts)
        # What has no vector, or none of numbers, is a row's own error, later.
        vectors = np.concatenate([x[np.isfinite(x).all(1)] for x in found]) if found else np.empty((0, 0))
        if len(vectors) < 2:
            raise ValueError("precision 'int8' measures ranges on a sample, of which fewer than two vectors are finite")
        return {"ranges": [vectors.min(0).tolist(), vectors.max(0).tolist()]}

    def speed(self, texts: list[str], settings: JobSettings) -> dict[str, Any]:
        """Tokens of some texts, and the seconds that their vectors take.

        Raises:
            ValueError: what the model refuses of the settings; a job asks this first, for that alone.
        """
        if settings.long == "chunk":  # a prompt that leaves no room is seen by what cuts, not by what embeds
            from flashvec.runtime.corpus.chunks import chunk_texts

            chunk_texts(self.encoder, texts[0], settings)
        before = getattr(self.encoder, "num_tokens_run", 0)
        start = time.perf_counter()
        embed_texts(self.encoder, texts, settings)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": getattr(self.encoder, "num_tokens_run", 0) - before}


def serve(load: Callable[[dict[str, Any]], ShardRunner]) -> None:
    """Answer until the input ends.

    Args:
        load: makes the runner from the first message's arguments.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to decide on
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not get between the messages
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, inbox), daemon=True).start()
    send = _Sender(answers)
    logging.getLogger("flashvec").addHandler(send)
    try:
        runner = load(inbox.get()["load"])
        send("ready", facts=asdict(runner.facts))
    except Exception as error:
        send("failed", **describe_error(error))
        return
    while True:
        message = inbox.get()
        try:
            if "ask" in message:
                answer = getattr(runner, message["ask"])(message["texts"], settings_from_dict(message["settings"]))
                send("answer", **answer)
                continue
            shard = message["shard"]
            entry = runner.run(message["job"], shard, message["max_errors"], partial(_step, send, shard))
            send("done", shard=shard, entry=entry)
        except Exception as error:
            send("failed", shard=message.get("shard"), **describe_error(error))


def _step(send: "_Sender", shard: int, step: Step) -> None:
    send("step", shard=shard, **step._asdict())


class _Sender(logging.Handler):
    """Messages to the parent; log records of this package go as such too."""

    def __init__(self, file: IO[str]) -> None:
        super().__init__(logging.WARNING)
        self.file = file
        self._writing = threading.Lock()  # steps come from another thread

    def __call__(self, event: str, **values: Any) -> None:
        line = json.dumps({"event": event, **values}) + "\n"
        with self._writing:
            self.file.write(line)

    def emit(self, record: logging.LogRecord) -> None:
        self("note", text=record.getMessage())


def describe_error(error: Exception) -> dict[str, str]:
    """An error as plain values: its kind, and one line for a person."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f": {error.filename}" if error.filename else "")
    known = isinstance(error, ValueError | OSError | TypeError | MemoryError | RuntimeError)
    return {"kind": type(error).__name__, "message": text if known else f"{type(error).__name__}: {text}"}


def _read(file: IO[bytes], inbox: "queue.SimpleQueue[Any]") -> None:
    for line in file:
        inbox.put(json.loads(line))
    os._exit(0)  # the parent has closed the pipe, or is gone


if __name__ == "__main__":
    serve(ShardRunner.load)
