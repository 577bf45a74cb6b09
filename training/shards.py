"""A frozen base that does not fit one device: every process keeps a part of each product's weight.

    forward     a product's whole weight is gathered from all processes, used, and dropped
    backward    gathered once more for the input's gradient: a graph keeps no weight (`runtime/remade.py`)

So a device holds the base's size over the number of processes, the whole of one product, embeddings, norms, biases and
updates. The price is 2 gathers of the base for a micro-batch whose graph is kept, 3 for one that is encoded again, not
hidden behind arithmetic. It is what FSDP2
(PyTorch's `fully_shard`) does for modules; weights that are frozen need no gradients summed, which leaves the gather.

Every process must ask for the same weights in the same order: all run as many micro-batches (`World.evened`), and
keep as many graphs.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from flashvec.runtime.decoder import PRODUCTS, Layer
from flashvec.training.distributed import World


class _Part(NamedTuple):
    own: Tensor  # uint8 [bytes]: as long in every process, the last one's filled up
    shape: torch.Size
    dtype: torch.dtype


class Shards:
    """The products of all layers, in parts; a decoder's `parts`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._parts: dict[tuple[int, str], _Part] = {}

    def take(self, number: int, layer: Layer) -> Layer:
        """Keep this process's part of a layer's products; returns the layer with their shapes alone."""
        shapes = {}
        for name in PRODUCTS:
            weight = getattr(layer, name)
            whole = weight.contiguous().view(torch.uint8).flatten()
            size = -(-len(whole) // self.world.size)
            own = torch.zeros(size, dtype=torch.uint8, device=whole.device)
            mine = whole[self.world.rank * size :][:size]
            own[: len(mine)] = mine
            self._parts[number, name] = _Part(own, weight.shape, weight.dtype)
            shapes[name] = torch.empty_like(weight, device="meta")
        return replace(layer, **shapes)

    def whole(self, number: int, product: str) -> Tensor:
        """A weight; every process must ask for it."""
        part = self._parts[number, product]
        size = part.shape.numel() * part.dtype.itemsize
        return self.world.gather(part.own)[:size].view(part.dtype).view(part.shape)

    def held_bytes(self) -> int:
        """Of this process."""
        return sum(part.own.nbytes for part in self._parts.values())
