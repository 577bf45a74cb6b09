"""Hard negatives: for each query the closest texts that are not its answer.

A candidate close to the query is a good negative only if it is no answer that nobody marked. What scores nearly as high
as the positive is left out (positive-aware mining, NV-Retriever, Moreira et al. 2024): above `share` times the
positive's cosine, or within `margin` of it.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from flashvec.runtime.encoder import Encoder
from flashvec.training.data import Pair, text_hash
from flashvec.training.files import whole

BLOCK_SCORES = 1 << 24  # cosines held at a time


def mine(
    encoder: Encoder,
    pairs: Sequence[Pair],
    *,
    corpus: Sequence[str] = (),
    num_negatives: int = 4,
    share: float | None = 0.95,
    margin: float | None = None,
    skip: int = 0,
    instruction: str | None = None,
) -> list[Pair]:
    """Pairs with negatives found among the positives of all pairs, or in a corpus.

    Args:
        encoder: whose cosines decide.
        pairs: queries and positives; negatives that they have are replaced.
        corpus: where to look; default the positives.
        num_negatives: for each query; fewer where no more are left.
        share: of the positive's cosine, above which a candidate is left out; None leaves none out by it.
        margin: a candidate closer to the positive's cosine than this is left out; None leaves none out by it.
        skip: closest candidates, of those that are left, to pass over.
        instruction: before queries that have none of their own.

    Raises:
        ValueError: numbers out of range, pairs with scores, or nothing to choose from.
    """
    if num_negatives < 1 or skip < 0:
        raise ValueError(f"num_negatives is {num_negatives} and skip {skip}; expected at least 1, and 0")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"share is {share}, expected a number above 0, up to 1")
    if margin is not None and not 0 <= margin < math.inf:
        raise ValueError(f"margin is {margin}, expected at least 0")
    if scored := [pair for pair in pairs if pair.score is not None]:
        raise ValueError(f"{scored[0].where or 'pairs'}: a pair with a score; mine for matches alone")
    by_hash = {text_hash(text): text for text in (corpus or [pair.positive for pair in pairs])}
    names, candidates = np.array(list(by_hash), np.int64), list(by_hash.values())
    if len(candidates) < 2:
        raise ValueError(f"there are {len(candidates)} different candidates: nothing to choose from")
    # As in training, where a pair's own instruction stands before its query.
    asked = [pair.instruction if pair.instruction is not None else instruction or "" for pair in pairs]
    queries = encoder.embed([pair.query for pair in pairs], instruction=asked if any(asked) else None, normalize=True)
    answers = [text_hash(pair.positive) for pair in pairs]
    by_hash |= {name: pair.positive for name, pair in zip(answers, pairs, strict=True) if name not in by_hash}
    every = encoder.embed(list(by_hash.values()), normalize=True)  # candidates, then answers that are none
    place = {name: i for i, name in enumerate(by_hash)}
    positives, vectors = every[[place[name] for name in answers]], every[: len(candidates)]
    own = _names_of_answers(pairs)
    found: list[Pair] = []
    rows = max(1, BLOCK_SCORES // len(candidates))
    for start in range(0, len(pairs), rows):
        here = slice(start, start + rows)
        cosines = queries[here] @ vectors.T
        limits = _limits((queries[here] * positives[here]).sum(1), share, margin)
        for pair, row, limit in zip(pairs[here], cosines, limits, strict=True):
            answered = own[text_hash(pair.query)]
            nearest = _nearest(np.where(row <= limit, row, -np.inf), skip + num_negatives + len(answered))
            order = nearest[~np.isin(names[nearest], list(answered))][skip : skip + num_negatives]
            negatives = tuple(candidates[i] for i in order)
            found.append(replace(pair, negatives=negatives))
    return found


def _nearest(cosines: np.ndarray, count: int) -> np.ndarray:
    """Places of the highest cosines in falling order: at least `count`, or all that are finite."""
    if count < len(cosines):
        least = np.partition(cosines, -count)[-count]
        places = np.flatnonzero((cosines >= least) & (cosines > -np.inf))
    else:
        places = np.flatnonzero(cosines > -np.inf)
    return places[np.argsort(-cosines[places], kind="stable")]


def _limits(cosines: np.ndarray, share: float | None, margin: float | None) -> np.ndarray:
    """The highest cosine that a negative of each query may have."""
    limits = np.full_like(cosines, np.inf)
    if share is not None:  # of a negative cosine a share would be higher than it
        limits = np.minimum(limits, np.where(cosines > 0, cosines * share, cosines))
    return limits if margin is None else np.minimum(limits, cosines - margin)


def _names_of_answers(pairs: Sequence[Pair]) -> dict[int, set[int]]:
    """What no query may be given as a negative: itself, and the positives of all pairs that ask the same."""
    own: dict[int, set[int]] = {}
    for pair in pairs:
        query = text_hash(pair.query)
        own.setdefault(query, {query}).add(text_hash(pair.positive))
    return own


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """One JSON object a line, as `read_pairs` takes them; the file is there whole or not at all."""
    with whole(path) as partial, partial.open("w", encoding="utf-8") as file:
        for pair in pairs:
            row = {"query": pair.query, "positive": pair.positive, "negatives": list(pair.negatives)}
            if pair.instruction is not None:
                row["instruction"] = pair.instruction
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
