"""Tensors that a backward makes again instead of keeping them: cheap ones, such as a norm beside what was normed.

A product with a low-rank update keeps its input for the update's gradient. Where that input is a norm, or an activation
of rows that are kept anyway, making it anew costs one pass over them and spares the graph a third of its memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_watchers: list[Callable[[Tensor], Any]] = []


@contextmanager
def remade(x: Tensor, make: Callable[[], Tensor] | None) -> Iterator[None]:
    """Within it, a graph that would keep `x` keeps `make` instead, which gives it again; None changes nothing.

    `make` must hold detached tensors that are kept anyway. Must not be used within a checkpointed function, whose own
    way of keeping tensors it replaces.
    """
    if make is None:
        yield
        return
    where = (x.data_ptr(), x.shape, x.stride(), x.dtype)

    def pack(kept: Tensor) -> Tensor | Callable[[], Tensor]:
        if (kept.data_ptr(), kept.shape, kept.stride(), kept.dtype) == where:
            return make
        for watch in _watchers:
            watch(kept)
        return kept

    def unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return kept()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


@contextmanager
def watched(watch: Callable[[Tensor], Any]) -> Iterator[None]:
    """Within it, `watch` sees every tensor that a graph keeps, those inside `remade` as well."""
    _watchers.append(watch)
    try:
        with torch.autograd.graph.saved_tensors_hooks(_seen_by(watch), lambda x: x):
            yield
    finally:
        _watchers.remove(watch)


def _seen_by(watch: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    def pack(kept: Tensor) -> Tensor:
        watch(kept)
        return kept

    return pack
