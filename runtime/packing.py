"""Texts into packs: sorted by length, filled up to a token budget, so that nothing is ever padded to a neighbour."""

from collections.abc import Iterator, Sequence

import numpy as np


def pack(lengths: Sequence[int] | np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Cut texts into packs of at most `budget` tokens, longest first.

    Longest first, because the first pack then needs the most memory: what does not fit fails at once. Equal lengths
    stay together (attention runs them in one call), in the order they came.

    Args:
        lengths: tokens of each text, at least 1.
        budget: tokens a pack may hold; a longer text is a pack of its own.

    Yields:
        Index arrays into `lengths`; together they hold each index once.
    """
    lengths = np.asarray(lengths)
    order = longest_first(lengths)
    start = 0
    while start < len(order):
        count = fitting(lengths[order[start : start + budget]], budget)
        yield order[start : start + count]
        start += count


def longest_first(lengths: np.ndarray) -> np.ndarray:
    """int64 [n]: the texts by falling length, equal ones in the order they came."""
    return np.argsort(-lengths, kind="stable")


def fitting(lengths: np.ndarray, budget: int) -> int:
    """How many of the first of these texts (at least one token each) a pack of `budget` tokens takes; at least one."""
    return max(1, int(np.searchsorted(np.cumsum(lengths[:budget]), budget, side="right")))
