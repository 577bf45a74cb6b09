"""Whitening: vectors made to tell the texts of one collection apart, by what these have in common.

Texts of one subject have vectors that lie close together: most of what they hold is the subject. A linear layer,
fitted to the vectors x of some of the texts, takes that back:

    y = c (x - m) U diag(v + s mean(v))^-p

    m, v, U   the mean, the variances along the principal axes, and these axes, the largest variance first
    p         power: 0 takes the mean off and turns, 1/2 makes all axes weigh the same (Su et al. 2021, "Whitening
              Sentence Representations for Better Semantics and Faster Retrieval")
    s         smoothing: axes that few texts have anything on are not blown up
    c         such that the vectors keep their variance

What many texts share weighs less, as common words do in BM25. Neither labels nor queries are needed.
"""

from numbers import Real

import numpy as np

POWER = 0.25
SMOOTHING = 0.5  # of the mean variance
MAX_POWER = 0.5
BLOCK_ROWS = 1 << 14


def check_power(power: float) -> None:
    """Before work is done that needs it.

    Raises:
        TypeError, ValueError: no number, or out of range.
    """
    if isinstance(power, bool) or not isinstance(power, Real):
        raise TypeError(f"power is {repr(power)[:80]}; expected a number")
    if not 0 <= power <= MAX_POWER:
        raise ValueError(f"power is {power}, expected 0 (the mean alone) to {MAX_POWER} (all axes alike)")


def check_finite(vectors_ND: np.ndarray, what: str) -> None:
    """Before anything is fitted to vectors: one that is not finite would take the place of all others.

    Args:
        what: is fitted, for the message.

    Raises:
        ValueError: some are not finite; says how many.
    """
    lost = int((~np.isfinite(vectors_ND).all(1)).sum())
    if lost:
        raise ValueError(f"{what}: {lost} of {len(vectors_ND)} texts have no finite vector: leave them out")


def fit_whitening(vectors_ND: np.ndarray, power: float = POWER) -> tuple[np.ndarray, np.ndarray]:
    """The layer y = x Wᵀ + b for vectors like these.

    Args:
        vectors_ND: [n, d], of some hundreds of texts or more.
        power: p above.

    Returns:
        W fp32 [d, d], its rows by falling variance, so that y may be cut to its leading dimensions; b fp32 [d].

    Raises:
        ValueError: a power out of range, fewer than two vectors, vectors that are not finite or all alike.
    """
    check_power(power)
    check_finite(vectors_ND, "whitening")
    count = len(vectors_ND)
    if count < 2:
        raise ValueError(f"whitening needs two texts at least, better some hundreds; here are {count}")
    mean_D = vectors_ND.mean(0, dtype=np.float64)
    covariance_DD = np.zeros((len(mean_D), len(mean_D)))
    for start in range(0, count, BLOCK_ROWS):  # in fp64, without a copy of all
        centred = vectors_ND[start : start + BLOCK_ROWS] - mean_D
        covariance_DD += centred.T @ centred / count
    variances_D, axes_DD = np.linalg.eigh(covariance_DD)
    variances_D, axes_DD = variances_D[::-1].clip(min=0), axes_DD[:, ::-1]
    if not variances_D.sum() > np.square(mean_D).sum() * np.finfo(np.float32).eps ** 2:
        raise ValueError("whitening: the texts' vectors are all alike: give texts that differ")
    scales_D = (variances_D + SMOOTHING * variances_D.mean()) ** -power
    scales_D *= np.sqrt(variances_D.sum() / (variances_D * scales_D**2).sum())
    weight_DD = (axes_DD * scales_D).T
    return weight_DD.astype(np.float32), (-weight_DD @ mean_D).astype(np.float32)
