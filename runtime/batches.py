"""A pack of texts as tensors: on a GPU one transfer, all of it views of one int32 buffer.

    ids | cu_seqlens | positions | spans | tile list | tile list | ...

Every field starts at a multiple of 128 bytes: Triton compiles a kernel for pointers divisible by 16 and once more for
others, and a tile is loaded as 16 bytes at once.

Shape letters: T = rows, B = sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from flashvec.kernels.schedule import (
    Schedule,
    TileClass,
    build_groups,
    build_places,
    build_schedule,
    build_static_tiles,
    build_tiles,
)
from flashvec.runtime.accelerator import Accelerator

ALIGNMENT = 32  # int32 values: 128 bytes
NO_TOKEN = -1  # the id of a filling row


@dataclass(frozen=True)
class TokenRows:
    """Texts as tokens, end to end.

    `ids` int32 [sum(lengths)], `lengths` int32 [n], `spans` int64 [n, 2]: first token and one past the last of what a
    text's vector is made of, counted from its own first.
    """

    ids: np.ndarray
    lengths: np.ndarray
    spans: np.ndarray

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [n + 1]: the first token of each text, and the end."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])

    def take(self, indices: np.ndarray) -> "TokenRows":
        """Some of the texts, in this order."""
        ids = [self.ids[self.starts[i] : self.starts[i + 1]] for i in indices]
        return TokenRows(np.concatenate(ids), self.lengths[indices], self.spans[indices])


@dataclass(frozen=True)
class Batch:
    """What a decoder is run on.

    `ids_T` int [num_tokens] (`schedule.is_static`: [T], `NO_TOKEN` on filling rows), `row_plan` the rows of each matrix
    product, `spans_B2` int [B, 2] as in `TokenRows`, `host_spans` the same on the host (None where batches come and go
    in the same buffers).
    """

    ids_T: Tensor
    schedule: Schedule
    row_plan: tuple[int, ...]
    spans_B2: Tensor
    host_spans: np.ndarray | None = None


def host_batch(rows: TokenRows, row_plan: tuple[int, ...]) -> Batch:
    """A batch on the CPU."""
    schedule = build_schedule(rows.lengths.tolist(), sum(row_plan))
    return Batch(torch.from_numpy(rows.ids), schedule, row_plan, torch.from_numpy(rows.spans), rows.spans)


def device_batch(
    rows: TokenRows, row_plan: tuple[int, ...], classes: Sequence[TileClass], accelerator: Accelerator
) -> Batch:
    """A batch on a device, sent in one copy.

    Args:
        classes: tile lists to send along; others are sent when a kernel asks for them.
    """
    lengths = rows.lengths.tolist()
    tiles = [build_tiles(lengths, tile_class) for tile_class in classes]
    values, places = _join(rows, sum(row_plan), tiles)
    buffer = accelerator.send(values)
    ids_T, cu_seqlens, positions, spans, *tile_lists = (buffer[place] for place in places)
    schedule = Schedule(
        cu_seqlens=cu_seqlens,
        positions=positions,
        groups=build_groups(lengths),
        num_tokens=len(rows.ids),
        max_length=max(lengths),
        lengths=tuple(lengths),
        tile_lists=_by_class(classes, tile_lists),
    )
    return Batch(ids_T, schedule, row_plan, spans.view(-1, 2), rows.spans)


class StaticBatch:
    """Buffers on a device that every batch of some bucket can be written into, for work that is recorded once.

    What the host knows of the schedule holds for all such batches: `num_tokens` and `max_length` are its rows, there
    are no groups, and `lengths` are only those of the batch it was made for.
    """

    def __init__(
        self,
        rows: TokenRows,
        num_rows: int,
        num_sequences: int,
        classes: Sequence[TileClass],
        accelerator: Accelerator,
    ) -> None:
        self.num_rows, self.num_sequences, self.classes = num_rows, num_sequences, tuple(classes)
        self.accelerator = accelerator
        filled = self._filled(rows)
        values, places = self._join(filled)
        self.buffer = accelerator.send(values)
        ids_T, cu_seqlens, positions, spans, *tile_lists = (self.buffer[place] for place in places)
        schedule = Schedule(
            cu_seqlens=cu_seqlens,
            positions=positions,
            groups=(),
            num_tokens=num_rows,
            max_length=num_rows,
            lengths=tuple(filled.lengths.tolist()),
            is_static=True,
            tile_lists=_by_class(classes, tile_lists),
        )
        self.batch = Batch(ids_T, schedule, (num_rows,), spans.view(-1, 2))

    def write(self, rows: TokenRows) -> None:
        """Replace the batch by another one: at most `num_rows` tokens in at most `num_sequences` texts."""
        self.accelerator.send(self._join(self._filled(rows))[0], into=self.buffer)

    def _filled(self, rows: TokenRows) -> TokenRows:
        """With empty sequences up to `num_sequences`, and ids up to `num_rows`."""
        missing = self.num_sequences - len(rows.lengths)
        ids = np.full(self.num_rows, NO_TOKEN, np.int32)
        ids[: len(rows.ids)] = rows.ids
        return TokenRows(ids, np.pad(rows.lengths, (0, missing)), np.pad(rows.spans, ((0, missing), (0, 0))))

    def _join(self, filled: TokenRows) -> tuple[np.ndarray, list[slice]]:
        tiles = [build_static_tiles(filled.lengths.tolist(), c, self.num_rows) for c in self.classes]
        return _join(filled, self.num_rows, tiles)


def _join(rows: TokenRows, num_rows: int, tiles: Sequence[np.ndarray]) -> tuple[np.ndarray, list[slice]]:
    """All of a batch in one int32 array, and where each field lies in it."""
    fields = [rows.ids, *build_places(rows.lengths, num_rows), rows.spans, *tiles]
    places, start = [], 0
    for field in fields:
        places.append(slice(start, start + field.size))
        start += -(-field.size // ALIGNMENT) * ALIGNMENT
    values = np.zeros(start, np.int32)
    for field, place in zip(fields, places, strict=True):
        values[place] = field.ravel()
    return values, places


def _by_class(classes: Sequence[TileClass], tile_lists: Sequence[Tensor]) -> dict[TileClass, Tensor]:
    return {tile_class: tiles.view(-1, 4) for tile_class, tiles in zip(classes, tile_lists, strict=True)}
