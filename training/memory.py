"""Memory: what is free and used, and how much a graph keeps.

That is measured on one micro-batch, so that it holds for every family and setting.
"""

import os
import resource
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashvec.runtime.memory import host_memory
from flashvec.runtime.remade import watched

SHARE_OF_FREE = 0.5  # of the memory that is free before the first step, for graphs


def graph_bytes(run: Callable[[], Any], known: Iterable[Tensor] = ()) -> int:
    """Bytes that live between `run` and its backward, each storage once.

    Args:
        run: a forward pass; its result is dropped.
        known: tensors that live anyway (weights, parameters).
    """
    lives_anyway = {x.untyped_storage().data_ptr() for x in known}
    found: dict[int, tuple[int, Tensor]] = {}

    def note(x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage.data_ptr() not in lives_anyway:
            found[storage.data_ptr()] = (storage.nbytes(), x)  # held, so that no address is given out twice

    with watched(note):
        result = run()
    total = sum(size for size, _ in found.values())
    del result
    return total


def used_bytes(device: torch.device) -> int:
    """Memory that this process uses: the most it has allocated on a GPU, on a CPU its resident pages."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:  # no Linux: the most it has used
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def free_bytes(device: torch.device) -> int:
    """Memory that is free now, where the decoder runs, for this process: those of one machine share the CPU's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return host_memory()[0] // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
