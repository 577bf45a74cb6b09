"""A decoder in fp32 over weights that stay narrow: each layer is widened when its turn comes, and dropped after it.

Activations of some models overflow fp16 (beyond 65,504 from a few tokens on); the texts it happens to are run again
here. That costs one layer of fp32 weights in memory, not a second model.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, overload

import torch
from torch import Tensor

from flashvec.kernels.linear import unpacked
from flashvec.runtime.decoder import Decoder, Layer
from flashvec.runtime.row_counts import RowCounts


class _WideLayers(Sequence[Layer]):
    """Layers that are converted when they are read."""

    def __init__(self, narrow: Sequence[Layer]) -> None:
        self.narrow = narrow

    def __len__(self) -> int:
        return len(self.narrow)

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> "_WideLayers": ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _WideLayers(self.narrow[index])
        layer = self.narrow[index]
        values = {field.name: getattr(layer, field.name) for field in fields(layer)}
        return replace(layer, **{name: unpacked(x).float() for name, x in values.items() if isinstance(x, Tensor)})


class _WideDecoder(Decoder):
    @property
    def dtype(self) -> torch.dtype:
        return torch.float32


def widened(decoder: Decoder) -> Decoder:
    """The same decoder computing in fp32; it shares all of its weights."""
    wide = _WideDecoder.__new__(_WideDecoder)
    layers = _WideLayers(decoder.layers)
    vars(wide).update(vars(decoder), layers=layers)
    if decoder.device.type == "cpu":
        first = layers[0]
        wide.row_counts = RowCounts([first.qkv, first.out, first.gate_up, first.down])
    return wide
