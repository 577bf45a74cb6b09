"""Tensors that a backward makes again instead of keeping them: cheap ones, such as a norm beside what was normed.

A product with a low-rank update keeps its input for the update's gradient. Where that input is a norm, or an activation
of rows that are kept anyway, making it anew costs one pass over them and spares the graph a third of its memory. A
weight of which each process holds a part can be gathered once more.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

_watchers: list[Callable[[Tensor], Any]] = []
_remade: list["_Remade"] = []


class _Remade(NamedTuple):
    """What tells a tensor that is made again: it is not held itself."""

    pointer: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    is_contiguous: bool
    make: Callable[[], Tensor]


@contextmanager
def remade(x: Tensor, make: Callable[[], Tensor] | None) -> Iterator[None]:
    """Within it, a graph that would keep `x` keeps `make` instead, which gives it again; None changes nothing.

    So it does for a view of all of `x` where that is contiguous. Several may be nested. `make` must hold detached
    tensors that are kept anyway. Must not be used within a checkpointed function, whose own way of keeping tensors it
    replaces.
    """
    if make is None:
        yield
        return
    _remade.append(_Remade(x.data_ptr(), x.dtype, x.shape, x.stride(), x.is_contiguous(), make))
    try:
        with torch.autograd.graph.saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _remade.pop()


def _pack(kept: Tensor) -> Tensor | Callable[[], Tensor]:
    for x in _remade:
        if (kept.data_ptr(), kept.dtype) != (x.pointer, x.dtype):
            continue
        if (kept.shape, kept.stride()) == (x.shape, x.stride):
            return x.make
        if x.is_contiguous and kept.numel() == x.shape.numel():
            return partial(_view, x.make, kept.shape, kept.stride())
    for watch in _watchers:
        watch(kept)
    return kept


def _view(make: Callable[[], Tensor], shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    return make().contiguous().as_strided(shape, stride)


def _unpack(kept: Tensor | Callable[[], Tensor]) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    with torch.no_grad():
        return kept()


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
