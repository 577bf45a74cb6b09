"""An order of texts in which those of one topic stand together.

Topics are found by words alone: latent semantic analysis (Deerwester et al. 1990) of how often texts have a word, times
its rarity; then the texts are halved again and again, along the direction in which they differ most (Boley 1998,
"Principal Direction Divisive Partitioning"), moved to where two means part them. Halves are cut so that groups come
out at one size: a batch is to hold one of them.
"""

import math
from array import array
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from flashvec.training.data import Pair
from flashvec.training.overlap import WordOverlap, stems

DIMENSIONS = 100
LEAST_TEXTS = 3  # that have a word, for it to count
ROUNDS = 8  # of power iteration, and of two means


def topic_order(texts: Sequence[str], size: int, seed: int = 0) -> np.ndarray:
    """int64 [n]: every text once, in groups of one topic; groups side by side are alike, too.

    Args:
        texts: of a few words or more: what has no word that others have is of no topic.
        size: texts of a group; the last group holds what is left.
        seed: of the order within groups.
    """
    if size < 1:
        raise ValueError(f"size is {size}, expected at least 1")
    rng = np.random.default_rng(seed)
    groups = group_vectors(topic_vectors(texts), size)
    return np.concatenate([rng.permutation(group) for group in groups]) if groups else np.zeros(0, np.int64)


def pairs_by_topic(pairs: Sequence[Pair], size: int, seed: int = 0) -> list[Pair]:
    """Pairs in the order of their topics: what asks and what answers together say it."""
    return [pairs[i] for i in topic_order([f"{pair.query} {pair.positive}" for pair in pairs], size, seed)]


def topic_vectors(texts: Sequence[str]) -> np.ndarray:
    """fp32 [n, up to DIMENSIONS] of length 1: the words that a text has, along the axes in which all texts differ most.

    A word that a text has c times weighs (1 + log c) times its rarity (`WordOverlap`), by which common ones count
    nothing. Texts without a word that counts are zeros.
    """
    overlap = WordOverlap(texts)
    rarities = {w: r for w, f in overlap.frequencies.items() if f >= LEAST_TEXTS and (r := overlap.rarity(w))}
    place = {word: i for i, word in enumerate(rarities)}
    columns, weights, sizes = array("q"), array("f"), []
    for text in texts:
        own = {word: count for word, count in Counter(stems(text)).items() if word in place}
        columns.extend(place[word] for word in own)
        weights.extend((1 + math.log(count)) * rarities[word] for word, count in own.items())
        sizes.append(len(own))
    if not columns:
        return np.zeros((len(texts), 1), np.float32)
    entries = torch.from_numpy(np.stack([np.repeat(np.arange(len(texts)), sizes), np.frombuffer(columns, np.int64)]))
    with torch.sparse.check_sparse_tensor_invariants(enable=False):  # torch 2.11 warns where it is not said so
        words_NW = torch.sparse_coo_tensor(entries, torch.tensor(weights), (len(texts), len(place)))
    with torch.random.fork_rng(devices=[]):  # it draws from torch's own generator
        torch.manual_seed(0)
        left, scale, _ = torch.svd_lowrank(words_NW.coalesce(), q=min(DIMENSIONS, *words_NW.shape))
    return _unit((left * scale).numpy())


def group_vectors(vectors_ND: np.ndarray, size: int) -> list[np.ndarray]:
    """Rows in groups of `size`, the last one of what is left; groups side by side were parted last."""
    unit_ND = _unit(vectors_ND - vectors_ND.mean(0)) if len(vectors_ND) else vectors_ND
    groups: list[np.ndarray] = []
    pending = [np.arange(len(unit_ND))] if len(unit_ND) else []
    while pending:
        rows = pending.pop()
        if len(rows) <= size:
            groups.append(rows)
            continue
        side = _sides(unit_ND[rows])
        order = rows[np.argsort(-side, kind="stable")]
        whole_groups = min(max(round(int((side > 0).sum()) / size), 1), (len(rows) - 1) // size)
        pending += [order[whole_groups * size :], order[: whole_groups * size]]
    return groups


def _sides(x_ND: np.ndarray) -> np.ndarray:
    """How far each row lies on the one side of the plane that parts them in two."""
    centred = x_ND - x_ND.mean(0)
    direction = centred[np.square(centred).sum(1).argmax()]
    for _ in range(ROUNDS):
        direction = _unit((centred.T @ (centred @ direction))[None])[0]
    side = centred @ direction
    for _ in range(ROUNDS):
        first = side > 0
        if first.all() or not first.any():
            break
        a, b = x_ND[first].mean(0), x_ND[~first].mean(0)
        side = x_ND @ (a - b) - (a @ a - b @ b) / 2
    return side


def _unit(x_ND: np.ndarray) -> np.ndarray:
    return x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), np.finfo(np.float32).tiny)
