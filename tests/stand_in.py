"""A stand-in for an encoder and for its worker process: vectors made of a hash, at once, without torch.

Run as a script it is a worker. `load` may hold `delay_s`, seconds a text takes, and `dies_on`, a text that ends the
process as the system does when memory runs out.
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from flashvec.runtime.corpus.local import LocalFleet
from flashvec.runtime.corpus.plan import ModelFacts
from flashvec.runtime.corpus.settings import JobSettings
from flashvec.runtime.corpus.worker import ShardRunner, serve

DIM = 16
COMMAND = (sys.executable, str(Path(__file__).resolve()))
NOT_FINITE = "this text overflows"


class StandIn:
    """Same text and prompt, same vector."""

    def __init__(self, load: dict[str, Any] | None = None) -> None:
        self.delay_s = (load or {}).get("delay_s", 0.0)
        self.dies_on = (load or {}).get("dies_on")
        self.num_texts = 0  # embedded so far

    def embed(self, texts: Sequence[str], **settings: Any) -> np.ndarray:
        self.num_texts += len(texts)
        if self.dies_on in texts:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.delay_s * len(texts))
        prompt = settings.get("instruction") or ""
        seeds = [xxhash.xxh3_128_digest((prompt + text).encode()) for text in texts]
        vectors = np.frombuffer(b"".join(seeds), np.uint8).reshape(-1, DIM).astype(np.float32) - 127.5
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors[[text == NOT_FINITE for text in texts]] = np.nan
        return vectors[:, : settings.get("truncate_dim")]


def facts(load: dict[str, Any], **changed: Any) -> ModelFacts:
    """What a worker says of the stand-in."""
    values = {"weights": "w", "tokenizer": "t", "spec": "s", "machine": {"device": "none"}, **changed}
    return ModelFacts(load=load, dim=DIM, **values)


def stand_in_fleet(num_workers: int = 1) -> Any:
    """For `embed_corpus(fleet=...)`."""
    return lambda load: LocalFleet(load, [None] * num_workers, COMMAND)


def embed_with_stand_in(inputs: Any, out: Path, **settings: Any) -> Any:
    """`embed_corpus` with the stand-in; job arguments and settings mixed."""
    from flashvec.runtime.corpus.job import embed_corpus

    own = {"load", "max_errors", "unique_ids", "reuse", "mixed_machines", "on_event", "plan_only"}
    job = {name: settings.pop(name) for name in own & set(settings)}
    fleet = stand_in_fleet(settings.pop("num_workers", 1))
    return embed_corpus(inputs, out, model="stand-in", settings=JobSettings(**settings), fleet=fleet, **job)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, for comparing whole jobs."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


if __name__ == "__main__":
    serve(lambda load: ShardRunner(StandIn(load), facts(load, **load.get("facts", {}))))
