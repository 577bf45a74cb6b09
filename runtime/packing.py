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
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        totals = np.cumsum(lengths[order[start : start + budget]])  # a text has at least one token
        count = max(1, int(np.searchsorted(totals, budget, side="right")))
        yield order[start : start + count]
        start += count
