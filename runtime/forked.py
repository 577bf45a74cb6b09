"""A process that was forked from one with an encoder has its weights, but none of torch's threads.

OpenMP counts on threads that are not there: the first product on several of them waits for ever. On one it runs.
"""

import os
import warnings

import torch

from flashvec.runtime.texts import callers_level

_first_used_in: int | None = None  # the process in which an encoder was first loaded or run; forked ones inherit it


def use_threads_that_exist() -> None:
    """Before an encoder is loaded or run: one thread, with a warning, where torch's others are in another process."""
    global _first_used_in
    if _first_used_in is None:
        _first_used_in = os.getpid()
    if _first_used_in != os.getpid() and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        warnings.warn(
            "this process was forked from one with an encoder, and torch's threads stayed there: it runs on one thread "
            "(for more, start it by multiprocessing's 'spawn' and load the encoder in it)",
            RuntimeWarning,
            stacklevel=callers_level(),
        )
