"""One step of a loss over a whole batch's vectors, in micro-batches, under a memory budget.

    1. every micro-batch is encoded; the last `num_kept` of them keep their graphs, the others drop theirs
    2. the loss of all vectors gives each vector its gradient
    3. kept graphs are run backward, the last first, which frees them; the others are encoded again, with a graph

All kept is ordinary training (4 FLOPs a parameter and token with a frozen base), none kept is GradCache (Gao et al.
2021; 6 FLOPs, memory of one micro-batch), and anything between costs between. The gradient is the same: masks are
keyed by identity, so that a second pass drops what the first one dropped. On a CPU it is the same to the bit, however
many are kept: micro-batches add to it in one order.
"""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from flashvec.training.encode import row_plan
from flashvec.training.memory import SHARE_OF_FREE, free_bytes, graph_bytes
from flashvec.training.model import Model

Encode = Callable[[np.ndarray], Tensor]  # rows of the batch -> their vectors [n, D]
Loss = Callable[[Tensor], Tensor]  # all vectors -> a scalar


def backward_through(
    encode: Encode,
    packs: Sequence[np.ndarray],
    num_rows: int,
    loss_of: Loss,
    *,
    num_kept: int,
    exchange: Callable[[Tensor], Tensor] = lambda vectors: vectors,
) -> tuple[Tensor, Tensor]:
    """Leave the loss's gradient in the parameters that `encode` reads.

    Args:
        encode: deterministic: the same rows give the same vectors.
        packs: the micro-batches of this process; together with those of the others they hold each row once.
        num_rows: of the whole batch, of all processes.
        loss_of: the loss of the whole batch; every process computes all of it.
        num_kept: micro-batches whose graphs are kept, at most all.
        exchange: makes the whole batch's vectors of this process's ones, which are zero in the others' rows.

    Returns:
        The loss, detached, and its gradient in the vectors [num_rows, D].
    """
    own: Tensor | None = None
    kept: list[tuple[np.ndarray, Tensor]] = []
    for number, pack in enumerate(packs):
        # With a graph in any case: without one the CPU takes faster forms, whose vectors differ in their last bits.
        z = encode(pack)
        if own is None:
            own = z.new_zeros(num_rows, z.shape[1])
        own[pack] = z.detach()
        if number >= len(packs) - num_kept:
            kept.append((pack, z))
        del z  # else its graph, where it is not kept, would live beside the next one
    if own is None:
        raise ValueError("packs is empty: every process takes part with at least one row")
    vectors = exchange(own).requires_grad_()
    loss = loss_of(vectors)
    loss.backward()
    gradient = vectors.grad
    assert gradient is not None
    while kept:
        pack, z = kept.pop()
        z.backward(gradient[pack])
    # In the order in which kept graphs would run: how many were kept must not show in the bits of the sum.
    for pack in reversed(packs[: max(0, len(packs) - num_kept)]):
        encode(pack).backward(gradient[pack])
    return loss.detach(), gradient


class Retention:
    """Decides how many micro-batches keep their graphs: as many as a budget of bytes allows.

    Args:
        budget_gib: for graphs; None takes half of what is free before the first step.
        agree: makes one number of all processes' ones, where they must keep as many.
    """

    def __init__(self, budget_gib: float | None, agree: Callable[[int], int] = int) -> None:
        self.budget_gib, self.agree = budget_gib, agree
        self._bytes_per_row: float | None = None
        self._budget_bytes = 0.0

    def num_kept(self, model: Model, encode: Encode, packs: Sequence[np.ndarray], lengths: np.ndarray) -> int:
        """Of the last micro-batches. What a row's graph holds is measured on the smallest of the first call."""
        if not packs:
            return 0
        if self._bytes_per_row is None:
            known = [*model.trainable.parameters().values(), *model.weights()]
            held = graph_bytes(lambda: encode(packs[-1]), known)
            self._bytes_per_row = held / self._rows(model, lengths[packs[-1]])
            free = free_bytes(model.decoder.device) * SHARE_OF_FREE
            self._budget_bytes = free if self.budget_gib is None else self.budget_gib * 2**30
        kept, total = 0, 0.0
        for pack in reversed(packs):
            total += self._rows(model, lengths[pack]) * self._bytes_per_row
            if total > self._budget_bytes:
                break
            kept += 1
        return self.agree(kept)

    def _rows(self, model: Model, lengths: np.ndarray) -> int:
        return sum(row_plan(model.decoder, int(lengths.sum())))
