"""Where each sequence lies in a packed batch: built once a batch, read by every layer, forward and backward.

A batch is one flat tensor of `T` rows. Its first `cu_seqlens[B]` rows are the tokens of `B` sequences, end to end; the
rest are zero rows that fill the batch up to a fixed row count.

On the CPU, neighbours of equal length form one group: a group is a plain [count, length, ...] view of the flat
tensor, so attention needs neither padding nor a mask, and a sequence meets the same arithmetic in every batch.

On a GPU, attention runs over a list of tiles: four numbers for each program, which name the sequence and the tokens of
it that the program owns. No program searches for its sequence, none is launched for padding, and the longest sequences
start first. How a sequence is cut depends on its own length alone, so its bits do not depend on its batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import index
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

FILL, FILL_LEAST = 8, 16  # a CPU's vectors of fp32: eight numbers or sixteen, and torch's softmax wants one in full
NO_SEQUENCE = -1  # in a tile's last column: a filling tile, whose program returns at once


@dataclass(frozen=True)
class Group:
    """`count` neighbouring sequences of `length` tokens, the first starting at row `start`."""

    start: int
    count: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.count * self.length


class TileClass(NamedTuple):
    """Which sequences a kernel takes and how it cuts them.

    Sequences of more than `shorter` and at most `longest` tokens (None: any), in tiles of `tokens` tokens.
    """

    tokens: int
    shorter: int = 0
    longest: int | None = None


class HeadOrder(NamedTuple):
    """Of each sequence, its heads one after the other, a head's tokens together, filled up (`filled_length`).

    int64 each: which row of [num_tokens, num_heads] stands at each place of that order (any on filling places), at
    which place each row stands, and which places fill.
    """

    rows: Tensor
    places: Tensor
    filling: Tensor


def filled_length(n: int) -> int:
    """Tokens that a sequence of n takes where a CPU's products run fastest: a multiple of 8, at least 16; 0 of 0."""
    return max(FILL_LEAST, -(-n // FILL) * FILL) if n else 0


@dataclass(frozen=True)
class Schedule:
    """One batch's geometry.

    `cu_seqlens` is int32 [B + 1], `positions` int64 [T] (0 on filling rows), `identities` int32 [B] or None: what names
    a sequence in dropout's keys. With `is_static` every tile list is as long as any batch of these rows and sequences
    could need: its tensors may be overwritten in place by another batch's, as a CUDA graph wants.
    """

    cu_seqlens: Tensor
    positions: Tensor
    groups: tuple[Group, ...]
    num_tokens: int
    max_length: int
    lengths: tuple[int, ...]
    identities: Tensor | None = None
    is_static: bool = False
    tile_lists: dict[TileClass, Tensor] = field(default_factory=dict, compare=False, repr=False)
    head_orders: dict[int, HeadOrder] = field(default_factory=dict, compare=False, repr=False)
    head_blocks: dict[tuple[int, ...], list[Any]] = field(default_factory=dict, compare=False, repr=False)  # of a CPU
    head_runs: dict[tuple[int, ...], list[Any]] = field(default_factory=dict, compare=False, repr=False)  # of those

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    def tiles(self, tile_class: TileClass) -> Tensor:
        """The tile list of a class, made when first asked for.

        Returns:
            int32 [tiles, 4] on the schedule's device: first row of the sequence, its length, first token of the tile
            (counted from the sequence's own), index of the sequence (`NO_SEQUENCE`: nothing to do).

        Raises:
            RuntimeError: inside torch.compile, of a list that nobody asked for before; see `attention`.
        """
        found = self.tile_lists.get(tile_class)
        if found is None:
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    "a compiled region cannot make tile lists: run attention once with this schedule before"
                )
            if self.is_static:
                tiles = build_static_tiles(self.lengths, tile_class, len(self.positions))
            else:
                tiles = build_tiles(self.lengths, tile_class)
            found = torch.from_numpy(tiles).to(self.cu_seqlens.device, non_blocking=True)
            self.tile_lists[tile_class] = found
        return found

    def head_order(self, num_heads: int) -> HeadOrder:
        """The order in which a sequence's heads lie one after the other; made when first asked for."""
        found = self.head_orders.get(num_heads)
        if found is None:
            length = np.asarray(self.lengths, dtype=np.int64)
            filled = np.array([filled_length(n) for n in self.lengths], dtype=np.int64)
            first, start, own = np.repeat([np.cumsum(length) - length, np.cumsum(filled) - filled, filled], length, 1)
            token = np.arange(self.num_tokens) - first
            places = ((start * num_heads + token)[:, None] + own[:, None] * np.arange(num_heads)).ravel()
            rows = np.zeros(filled.sum() * num_heads, np.int64)
            is_filling = np.ones(len(rows), bool)
            rows[places], is_filling[places] = np.arange(len(places)), False
            device = self.cu_seqlens.device
            found = HeadOrder(*(torch.from_numpy(x).to(device) for x in (rows, places, np.flatnonzero(is_filling))))
            self.head_orders[num_heads] = found
        return found

    def identity_of_rows(self) -> Tensor:
        """int32 [T]: the identity of each row's sequence, 0 on filling rows."""
        if self.identities is None:
            raise ValueError("dropout needs build_schedule(..., identities=...): its masks are keyed by them")
        rows = torch.zeros(len(self.positions), dtype=torch.int32, device=self.identities.device)
        lengths = self.cu_seqlens.diff().to(torch.int64)
        rows[: self.num_tokens] = torch.repeat_interleave(self.identities, lengths, output_size=self.num_tokens)
        return rows


@dataclass(frozen=True)
class Queries:
    """Some tokens of each sequence, one span of it, laid end to end: the rows whose output a last layer needs.

    `rows` is int64 [R]: where these tokens lie among the batch's rows. `shift_stop` is int32 [B, 2]: what is added to a
    token's number to give its row among the R, and the first token past the span.
    """

    rows: Tensor
    shift_stop: Tensor
    spans: np.ndarray
    num_tokens: int
    lengths: tuple[int, ...]  # of the whole sequences
    tile_lists: dict[TileClass, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def tiles(self, tile_class: TileClass) -> Tensor:
        """As `Schedule.tiles`, over the spans' tokens; a class still means the whole sequence's length."""
        found = self.tile_lists.get(tile_class)
        if found is None:
            tiles = build_tiles(self.lengths, tile_class, self.spans)
            found = torch.from_numpy(tiles).to(self.rows.device, non_blocking=True)
            self.tile_lists[tile_class] = found
        return found


def select_queries(schedule: Schedule, spans: np.ndarray, num_rows: int | None = None) -> Queries:
    """Keep one span of tokens of each sequence.

    Args:
        schedule: of the batch.
        spans: integers [B, 2]: first token and one past the last, counted from the sequence's own first token.
        num_rows: rows of the result, at least the spans' tokens; the rest repeat the batch's first row.

    Raises:
        ValueError: a span outside its sequence, or too few rows.
    """
    spans = np.asarray(spans, dtype=np.int64)
    length = np.asarray(schedule.lengths, dtype=np.int64)
    if spans.shape != (len(length), 2) or (spans[:, 0] < 0).any() or (spans[:, 1] > length).any():
        raise ValueError(f"spans {spans.tolist()} do not lie in sequences of {length.tolist()} tokens")
    count = np.maximum(spans[:, 1] - spans[:, 0], 0)
    total = int(count.sum())
    num_rows = total if num_rows is None else num_rows
    if num_rows < total:
        raise ValueError(f"num_rows is {num_rows}, the spans hold {total} tokens")
    own_start, batch_start = np.cumsum(count) - count, np.cumsum(length) - length
    rows = np.zeros(num_rows, dtype=np.int64)
    rows[:total] = np.arange(total) + np.repeat(batch_start + spans[:, 0] - own_start, count)
    shift_stop = np.stack([own_start - spans[:, 0], spans[:, 1]], 1).astype(np.int32)
    device = schedule.cu_seqlens.device
    return Queries(
        rows=torch.from_numpy(rows).to(device, non_blocking=True),
        shift_stop=torch.from_numpy(shift_stop).to(device, non_blocking=True),
        spans=spans,
        num_tokens=total,
        lengths=schedule.lengths,
    )


def build_tiles(lengths: Sequence[int], tile_class: TileClass, spans: np.ndarray | None = None) -> np.ndarray:
    """The tiles of one class, longest sequences first, a sequence's own tiles side by side: int32 [tiles, 4].

    With `spans`, tiles cover these tokens of each sequence alone.
    """
    length = np.asarray(lengths, dtype=np.int64)
    begin, stop = (np.zeros_like(length), length) if spans is None else (spans[:, 0], spans[:, 1])
    longest = length.max(initial=0) if tile_class.longest is None else tile_class.longest
    sequence = np.flatnonzero((length > tile_class.shorter) & (length <= longest))
    sequence = sequence[np.argsort(-length[sequence], kind="stable")]
    count = np.maximum(-(-(stop - begin)[sequence] // tile_class.tokens), 0)
    owner = np.repeat(sequence, count)
    tile = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    start = np.cumsum(length) - length
    first = begin[owner] + tile * tile_class.tokens
    return np.stack([start[owner], length[owner], first, owner], 1).astype(np.int32)


def build_static_tiles(lengths: Sequence[int], tile_class: TileClass, num_rows: int) -> np.ndarray:
    """`build_tiles`, filled up to as many tiles as any batch of these rows and this many sequences could need."""
    tiles = build_tiles(lengths, tile_class)
    most = -(-num_rows // tile_class.tokens) + len(lengths)
    filling = np.full((most - len(tiles), 4), (0, 0, 0, NO_SEQUENCE), np.int32)
    return np.concatenate([tiles, filling])


def build_groups(lengths: Sequence[int]) -> tuple[Group, ...]:
    """Neighbours of equal length, for the forms that run on plain views."""
    groups, start = [], 0
    for n, same in groupby(lengths):
        group = Group(start, len(list(same)), n)
        if n:
            groups.append(group)
        start = group.stop
    return tuple(groups)


def build_places(lengths: Sequence[int] | np.ndarray, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """`cu_seqlens` (int32 [B + 1]) and `positions` (int64 [num_rows]) of a batch, on the host."""
    length = np.asarray(lengths, dtype=np.int64)
    stops = np.cumsum(length)
    num_tokens = int(stops[-1]) if len(stops) else 0
    positions = np.zeros(num_rows, dtype=np.int64)
    positions[:num_tokens] = np.arange(num_tokens) - np.repeat(stops - length, length)
    return np.concatenate([[0], stops]).astype(np.int32), positions


def build_schedule(
    lengths: Sequence[int],
    num_rows: int | None = None,
    device: str | torch.device = "cpu",
    *,
    identities: Sequence[int] | Tensor | None = None,
    is_static: bool = False,
) -> Schedule:
    """Geometry of sequences of these lengths laid end to end.

    Args:
        lengths: tokens of each sequence, whole numbers; 0 is a sequence without rows. Sorted lengths give the fewest
            groups.
        num_rows: rows of the flat tensor, at least sum(lengths); default just that.
        device: where the tensors live.
        identities: that fit int32, one per sequence, for dropout; equal ones share their masks, so that two views of
            one text need two.
        is_static: see `Schedule`.

    Raises:
        ValueError: a length that is negative or no whole number, too few rows, or identities that do not match.
    """
    try:
        lengths = [index(n) for n in lengths]
    except TypeError:
        raise ValueError(f"lengths are {lengths}, expected whole numbers") from None
    if min(lengths, default=0) < 0:
        raise ValueError(f"a length is negative: {lengths}")
    num_tokens = sum(lengths)
    num_rows = num_tokens if num_rows is None else num_rows
    if num_rows < num_tokens:
        raise ValueError(f"num_rows is {num_rows}, the sequences hold {num_tokens} tokens")
    if identities is not None:
        given = torch.as_tensor(identities)
        identities = given.to(torch.int32)
        if given.device.type == "cpu" and (identities != given).any():  # on a GPU looking would wait
            raise ValueError(f"identities are {given.tolist()}, expected whole numbers that fit int32")
        if identities.shape != (len(lengths),):
            raise ValueError(f"identities has shape {tuple(identities.shape)}, there are {len(lengths)} sequences")
        identities = identities.to(device).contiguous()

    cu_seqlens, positions = build_places(lengths, num_rows)
    return Schedule(
        cu_seqlens=torch.from_numpy(cu_seqlens).to(device, non_blocking=True),
        positions=torch.from_numpy(positions).to(device, non_blocking=True),
        groups=build_groups(lengths),
        num_tokens=num_tokens,
        max_length=max(lengths, default=0),
        lengths=tuple(lengths),
        identities=identities,
        is_static=is_static,
    )
