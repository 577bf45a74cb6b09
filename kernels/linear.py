"""Matrix product of packed tokens with a weight, at row counts that give the same bits.

    out = x @ weight.T + bias

A matrix library picks its blocking by the number of rows, and another blocking may sum in another order: the same
row then gets other last bits. `row_plan` cuts the rows into counts measured to agree (`runtime/row_counts.py`).

Shape letters: T = rows, N = output features, C = input features. Cost 2*T*N*C FLOPs.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flashvec.kernels.backend import as_given
from flashvec.kernels.precision import widen


def linear_reference(x_TC: Tensor, weight_NC: Tensor, bias_N: Tensor | None = None) -> Tensor:
    bias = None if bias_N is None else widen(bias_N)
    return F.linear(widen(x_TC), widen(weight_NC), bias).to(x_TC.dtype)


@as_given
def linear(
    x_TC: Tensor, weight_NC: Tensor, bias_N: Tensor | None = None, row_plan: Sequence[int] | None = None
) -> Tensor:
    """Multiply every row by the weight.

    Args:
        x_TC: [T, C] fp32, bf16 or fp16.
        weight_NC: [N, C], same dtype.
        bias_N: [N] or None, same dtype.
        row_plan: row counts that sum to T, run one product each; default one product of T rows.

    Returns:
        [T, N] in the dtype of `x_TC`; the library accumulates in fp32.

    Raises:
        ValueError: a plan that does not cover the rows.
    """
    if row_plan is None or len(row_plan) == 1:
        return F.linear(x_TC, weight_NC, bias_N)
    if sum(row_plan) != x_TC.shape[0]:
        raise ValueError(f"row_plan covers {sum(row_plan)} rows, x_TC has {x_TC.shape[0]}")
    out_TN = x_TC.new_empty(x_TC.shape[0], weight_NC.shape[0])
    start = 0
    for rows in row_plan:
        torch.ops.aten.linear.out(x_TC[start : start + rows], weight_NC, bias_N, out=out_TN[start : start + rows])
        start += rows
    return out_TN
