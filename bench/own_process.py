"""Embedders in processes of their own: texts go out, vectors come back, through pipes."""

import json
import os
import select
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

LONGEST_CALL_S = 600.0  # what takes longer is not waited for
MEMORY_GIB = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 3 / 2**30  # several of them wait, full, for one


class ProcessEndedError(Exception):
    """Says how, or the process's last word."""


class OwnProcess:
    """A process of `bench/embed_worker.py`, started by the first call, and by the next one where it has ended.

    Args:
        command: an interpreter and how it starts the worker.
        settings: for the worker: variant, model, and what that needs.
        longest_call_s: seconds to wait for one call's vectors.
        memory_gib: memory that it may take, mapped files aside; beyond it, it fails as where there is none left.
    """

    peak_mib = 0.0  # resident memory at most during the last call; of the first one, since the start

    def __init__(
        self,
        command: Sequence[str | Path],
        settings: dict[str, Any],
        longest_call_s: float = LONGEST_CALL_S,
        memory_gib: float = MEMORY_GIB,
    ) -> None:
        self.longest_call_s, self.memory_gib = longest_call_s, memory_gib
        self.command, self.settings = list(command), settings
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 (no pipe: one that nobody reads fills up; closed with it)
        self.process: subprocess.Popen[bytes] | None = None

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors [n, d], fp32, of unit length.

        Raises:
            ProcessEndedError: it did, or took longer than allowed, which ends it.
        """
        if self.process is None:
            self.process = self._start()
        to, back = self.process.stdin, self.process.stdout
        assert to is not None and back is not None
        try:
            to.write(json.dumps(list(texts)).encode() + b"\n")
            to.flush()
        except BrokenPipeError:
            pass  # said below
        if not select.select([back], [], [], self.longest_call_s)[0]:
            self.close()
            raise ProcessEndedError(f"{len(texts)} texts took more than {self.longest_call_s:.0f} s")
        first = back.readline()
        if not first:
            status = self.process.wait()
            self.close()
            raise ProcessEndedError(self._last_word(status))
        header = json.loads(first)
        self.peak_mib = header["peak_mib"]
        rows, size = header["shape"]
        vectors = np.frombuffer(back.read(4 * rows * size), np.float32).reshape(rows, size)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def _start(self) -> subprocess.Popen[bytes]:
        settings = {"threads": torch.get_num_threads(), "memory_gib": self.memory_gib, **self.settings}
        self.said.truncate(0)
        return subprocess.Popen(
            [*self.command, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"},
        )

    def _last_word(self, status: int) -> str:
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if status > 0 and lines else f"its process ended with status {status}"

    def close(self) -> None:
        """Ends the process; the next call starts another."""
        if self.process is not None:
            self.process.kill()  # it holds nothing that could be lost
            self.process.communicate()
            self.process = None
