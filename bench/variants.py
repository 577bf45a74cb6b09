"""What is compared: ours and each peer of the same model, every one in a process of its own.

In one process they would share thread pools, allocators and caches, and each would run as the others leave it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from flashvec.bench.own_process import LONGEST_CALL_S, MEMORY_GIB, OwnProcess
from flashvec.bench.peers import LLM2VEC, Way, ways

OURS = "flashvec"


@dataclass(frozen=True)
class Subject:
    """The model that all of them run.

    Args:
        model: folder or GGUF file.
        gguf: the same model's file for llama.cpp.
        max_length: tokens of a text; None takes the model's.
        longest_call_s: seconds after which a call's vectors are not waited for.
        memory_gib: memory that each of them may take.
    """

    model: str
    gguf: Path | None = None
    max_length: int | None = None
    longest_call_s: float = LONGEST_CALL_S
    memory_gib: float = MEMORY_GIB

    def peers(self, dtype: str) -> dict[str, Way]:
        """Each peer's name, and what it needs; dtype "float32" or "bfloat16" for those that have a choice."""
        return ways(self.model, dtype, self.gguf, self.max_length)

    def process(self, variant: str, dtype: str, workers: int = 1) -> OwnProcess:
        """Ours, by a name that begins with `OURS`, or a peer; started by its first call.

        Args:
            variant: name.
            dtype: as in `peers`; of ours, too.
            workers: packs that ours runs at the same time.
        """
        if variant in (peers := self.peers(dtype)) and peers[variant].package == LLM2VEC:
            process: OwnProcess = peers[variant].open()
            process.longest_call_s, process.memory_gib = self.longest_call_s, self.memory_gib
            return process
        settings = {
            "variant": variant,
            "model": self.model,
            "dtype": dtype,
            "gguf": self.gguf and str(self.gguf),
            "max_length": self.max_length,
            "workers": workers,
        }
        command = [sys.executable, "-m", "flashvec.bench.embed_worker"]
        return OwnProcess(command, settings, self.longest_call_s, self.memory_gib)
