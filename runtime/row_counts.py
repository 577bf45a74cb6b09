"""Row counts at which matrix products give a row the same bits.

A text's vector must not depend on what else is in its batch, but a matrix library picks its blocking, and so the
order of its sums, by the number of rows. So products run only at row counts from `LADDER` that were measured to give
every row the bits it has in the largest one. `row_counts.json` holds what was measured, by instruction set and
shape; a shape, machine or thread count it does not know is measured when a row count is first needed (one layer's
products, once). Weights that are packed (`kernels/linear.py`) run by other kernels and have a table of their own.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from flashvec.kernels.backend import instruction_set
from flashvec.kernels.linear import can_pack, linear

LADDER = (*range(16, 128, 16), *range(128, 512, 32), *range(512, 2049, 128))
LARGEST = LADDER[-1]
PADDING_WORTH = 1.25  # up to this factor of extra zero rows beat several smaller products
TABLED_THREADS = (1, 2)  # the table was measured with these; a library may share rows out otherwise among more
TABLE = Path(__file__).parent / "row_counts.json"


def shape_key(weight: Tensor) -> str:
    """How `row_counts.json` names a product: output features × input features."""
    return f"{weight.shape[0]}x{weight.shape[1]}"


@cache
def _table() -> dict[str, dict[str, dict[str, list[int]]]]:
    """instruction set and torch version -> dtype -> shape -> row counts of the ladder that do NOT agree."""
    return json.loads(TABLE.read_text())["disagree"] if TABLE.exists() else {}


def machine_key(packed: bool = False) -> str:
    """What the table's facts hold for: the instruction set, and the library that comes with this torch."""
    major, minor = torch.__version__.split(".")[:2]
    return f"{instruction_set()} torch-{major}.{minor}{' packed' if packed else ''}"


def pays_to_pack(weight_NC: Tensor) -> bool:
    """True where packed weights of this dtype were measured: to be faster, as exact, and to give rows equal bits."""
    return _dtype(weight_NC) in _table().get(machine_key(packed=True), {}) and can_pack(weight_NC)


def _dtype(weight_NC: Tensor) -> str:
    return str(weight_NC.dtype).removeprefix("torch.")


def measure(weight_NC: Tensor, counts: Sequence[int] = LADDER) -> list[int]:
    """The row counts at which a row's product differs from its product among `LARGEST` rows.

    Args:
        weight_NC: [N, C] fp32, bf16 or fp16 on the CPU, plain or packed.
        counts: row counts to try.

    Returns:
        Those of `counts` where any bit of any row differed, on one random input, at its start and shifted.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(LARGEST, weight_NC.shape[1], generator=generator, device="cpu").to(weight_NC.dtype)
    truth = linear(x, weight_NC)
    differing = []
    for rows in counts:
        starts = {0, (LARGEST - rows) // 2, LARGEST - rows} if rows < LARGEST else {0}
        if any(not torch.equal(linear(x[i : i + rows], weight_NC), truth[i : i + rows]) for i in starts):
            differing.append(rows)
    return differing


class RowCounts:
    """The row counts safe for a set of weights that see the same rows (the products of a decoder)."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = {(shape_key(w), w.dtype): w for w in weights}
        self.known: dict[tuple[int, int], bool] = {}

    def agrees(self, rows: int) -> bool:
        """True if every product gives its rows the same bits at this count; measured once if not tabled."""
        key = (rows, torch.get_num_threads())
        if key not in self.known:
            self.known[key] = all(self._agrees(shape, w, rows) for (shape, _), w in self.weights.items())
        return self.known[key]

    def _agrees(self, shape: str, weight: Tensor, rows: int) -> bool:
        tabled = _table().get(machine_key(weight.is_mkldnn), {}).get(_dtype(weight), {})
        if shape in tabled and torch.get_num_threads() in TABLED_THREADS:
            return rows not in tabled[shape]
        return not measure(weight, (rows,))

    def plan(self, num_rows: int) -> tuple[int, ...]:
        """Safe row counts that together cover `num_rows` rows; their sum says how many zero rows to add."""
        counts: list[int] = []
        while num_rows > 0:
            above = next((rows for rows in LADDER if rows >= num_rows and self.agrees(rows)), None)
            below = next((rows for rows in reversed(LADDER) if rows <= num_rows and self.agrees(rows)), None)
            if above is not None and (below is None or above <= PADDING_WORTH * num_rows):
                counts.append(above)
                break
            if below is None:  # nothing agrees with anything: the largest count, always the same, is safe
                below = LARGEST
            counts.append(below)
            num_rows -= below
        return tuple(counts)
