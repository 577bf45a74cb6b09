"""Which texts came out as NaN or infinity, found without waiting for the device."""

import logging
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flashvec.runtime.program import Count
from flashvec.runtime.texts import callers_level
from flashvec.runtime.windows import Done

logger = logging.getLogger("flashvec")

SHOWN = 10  # row numbers in a message


class NonFiniteWarning(UserWarning):
    """Some vectors hold NaN or infinity even in float32; `rows` are their numbers in the call's list."""

    rows: tuple[int, ...] = ()

    @classmethod
    def of(cls, rows: Sequence[int], num_all: int) -> "NonFiniteWarning":
        warning = cls(
            f"the vectors of {len(rows)} of {num_all} texts hold NaN or infinity even in float32: rows "
            f"{_listed(rows)}; the model cannot read these texts"
        )
        warning.rows = tuple(rows)
        return warning


class NonFiniteRows:
    """Collects which texts' results are not finite; results on a device are looked at there, and read once at the end.

    Args:
        counts: of the program that makes the results.
    """

    def __init__(self, counts: Sequence[Count]) -> None:
        self.counts = counts
        self._numbers: list[np.ndarray] = []
        self._flags: list[Tensor] = []  # bool [B]: all of a text's values are finite

    def look_at(self, done: Done) -> None:
        """Note a pack's results."""
        finite = None
        for x, count in zip(done.ran.outputs, self.counts, strict=True):
            flags = x.isfinite().all(1)
            if count == "rows":
                lengths = torch.from_numpy(done.window.rows.lengths[done.ran.indices].astype(np.int64))
                flags = torch.stack([part.all() for part in flags.split(lengths.tolist())])
            finite = flags if finite is None else finite & flags
        if finite is not None:
            self._numbers.append(done.rows)
            self._flags.append(finite)

    def rows(self) -> np.ndarray:
        """int64: numbers of the texts that are not finite, rising."""
        if not self._flags:
            return np.zeros(0, np.int64)
        finite = torch.cat(self._flags).cpu().numpy()
        return np.sort(np.concatenate(self._numbers)[~finite])


def report(rows: np.ndarray, still: np.ndarray, num_texts: int, dtype: torch.dtype) -> None:
    """Say which texts were run again, and warn about those that are not finite even so."""
    name = str(dtype).removeprefix("torch.")
    logger.warning(
        "%d of %d texts overflowed in %s and were run again in float32: rows %s",
        len(rows), num_texts, name, _listed(rows),
    )  # fmt: skip
    if len(still):
        warnings.warn(NonFiniteWarning.of(still.tolist(), num_texts), stacklevel=callers_level())


def _listed(rows: Sequence[int] | np.ndarray) -> str:
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return ", ".join(str(row) for row in rows[:SHOWN]) + more
