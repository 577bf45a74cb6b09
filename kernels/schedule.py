"""Where each sequence lies in a packed batch: built once a batch, read by every layer.

A batch is one flat tensor of `T` rows. Its first `cu_seqlens[B]` rows are the tokens of `B` sequences, end to end; the
rest are zero rows that fill the batch up to a row count measured to be safe (`runtime/row_counts.py`).

On the CPU, neighbours of equal length form one group: a group is a plain [count, length, ...] view of the flat
tensor, so attention needs neither padding nor a mask, and a sequence meets the same arithmetic in every batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """`count` neighbouring sequences of `length` tokens, the first starting at row `start`."""

    start: int
    count: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.count * self.length


@dataclass(frozen=True)
class Schedule:
    """One batch's geometry. `cu_seqlens` is int32 [B + 1], `positions` int64 [T] (0 on filling rows)."""

    cu_seqlens: Tensor
    positions: Tensor
    groups: tuple[Group, ...]
    num_tokens: int
    max_length: int


def build_schedule(lengths: Sequence[int], num_rows: int | None = None, device: str | torch.device = "cpu") -> Schedule:
    """Geometry of sequences of these lengths laid end to end.

    Args:
        lengths: tokens of each sequence, at least 1. Sorted lengths give the fewest groups.
        num_rows: rows of the flat tensor, at least sum(lengths); default just that.
        device: where `cu_seqlens` and `positions` live.

    Raises:
        ValueError: a length below 1, or too few rows.
    """
    if min(lengths, default=1) < 1:
        raise ValueError(f"a sequence has at least one token, got lengths {list(lengths)}")
    num_tokens = sum(lengths)
    num_rows = num_tokens if num_rows is None else num_rows
    if num_rows < num_tokens:
        raise ValueError(f"num_rows is {num_rows}, the sequences hold {num_tokens} tokens")

    groups, start = [], 0
    positions = torch.zeros(num_rows, dtype=torch.int64)
    for length, same in groupby(lengths):
        group = Group(start, len(list(same)), length)
        positions[start : group.stop] = torch.arange(length).repeat(group.count)
        groups.append(group)
        start = group.stop
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Schedule(
        cu_seqlens=cu_seqlens.to(device),
        positions=positions.to(device),
        groups=tuple(groups),
        num_tokens=num_tokens,
        max_length=max(lengths, default=0),
    )
