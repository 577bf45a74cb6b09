"""Matrix product of packed tokens with a weight, at row counts that give the same bits.

    out = x @ weight.T + bias

A matrix library picks its blocking by the number of rows, and another blocking may sum in another order: the same
row then gets other last bits. `row_plan` cuts the rows into counts measured to agree (`runtime/row_counts.py`).

On a CPU a library reads a weight in blocks, and brings it into them again in every product. Of few rows that takes
longer than the product. `pack` does it once: the weight then lies in blocks, and in no other form.

Shape letters: T = rows, N = output features, C = input features. Cost 2*T*N*C FLOPs.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flashvec.kernels.backend import as_given, needs_gradient
from flashvec.kernels.precision import widen

PACKED_DTYPES = (torch.float32, torch.bfloat16)
PACKED_FOR = 2048  # rows that the library is told to expect; fewer run as fast


def linear_reference(x_TC: Tensor, weight_NC: Tensor, bias_N: Tensor | None = None) -> Tensor:
    bias = None if bias_N is None else widen(bias_N)
    return F.linear(widen(x_TC), widen(unpacked(weight_NC)), bias).to(x_TC.dtype)


@as_given
def linear(
    x_TC: Tensor, weight_NC: Tensor, bias_N: Tensor | None = None, row_plan: Sequence[int] | None = None
) -> Tensor:
    """Multiply every row by the weight.

    Args:
        x_TC: [T, C] fp32, bf16 or fp16.
        weight_NC: [N, C], same dtype; or what `pack` makes of it.
        bias_N: [N] or None, same dtype.
        row_plan: row counts that sum to T, run one product each; default one product of T rows.

    Returns:
        [T, N] in the dtype of `x_TC`; the library accumulates in fp32.

    Raises:
        ValueError: a plan that does not cover the rows.
    """
    if weight_NC.is_mkldnn and needs_gradient(x_TC, bias_N):  # the packed product has none
        weight_NC = unpacked(weight_NC)
    if row_plan is None or len(row_plan) == 1:
        return _product(x_TC, weight_NC, bias_N)
    if sum(row_plan) != x_TC.shape[0]:
        raise ValueError(f"row_plan covers {sum(row_plan)} rows, x_TC has {x_TC.shape[0]}")
    if weight_NC.is_mkldnn:
        return torch.cat([_product(x, weight_NC, bias_N) for x in x_TC.split(list(row_plan))])
    out_TN = x_TC.new_empty(x_TC.shape[0], weight_NC.shape[0])
    start = 0
    for rows in row_plan:
        torch.ops.aten.linear.out(x_TC[start : start + rows], weight_NC, bias_N, out=out_TN[start : start + rows])
        start += rows
    return out_TN


def _product(x_TC: Tensor, weight_NC: Tensor, bias_N: Tensor | None) -> Tensor:
    if weight_NC.is_mkldnn:  # oneDNN's tensors, as torch calls them
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x_TC, weight_NC, bias_N, "none", [], "")
        return found
    return F.linear(x_TC, weight_NC, bias_N)


def can_pack(weight_NC: Tensor) -> bool:
    """True if this torch can pack the weight: on a CPU, with oneDNN, fp32 or bf16."""
    has_op = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if weight_NC.dtype == torch.bfloat16:
        has_op = has_op and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return has_op and weight_NC.device.type == "cpu" and weight_NC.dtype in PACKED_DTYPES


def pack(weight_NC: Tensor) -> Tensor:
    """The weight in the blocks that products read, of the same numbers, shape, dtype and size.

    It has no rows that could be cut out of it, and no gradient: `linear` takes it, `unpacked` gives it back.
    """
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NC.detach(), PACKED_FOR)
    return found


def unpacked(weight_NC: Tensor) -> Tensor:
    """A plain [N, C] weight: itself, or a copy of the numbers of a packed one."""
    return weight_NC.to_dense() if weight_NC.is_mkldnn else weight_NC
