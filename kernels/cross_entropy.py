"""Cross entropy of a linear head, over chosen rows only, without the logits.

    z = scale * (h[row] Wᵀ + bias),  z = softcap * tanh(z / softcap) if set
    loss = log(sum over v of exp(z_v)) - z_target

    dz = softmax(z) - 1[target],  times 1 - (z / softcap)² if set;  dh[row] = dloss scale dz W,  dW = dzᵀ dloss scale h

A masked language model predicts a fifth of its tokens: only their rows are read and multiplied, and the [R, V] logits
exist as tiles. Forward keeps the running log-sum-exp of each row; backward makes the tiles again, as panels of
`panel.py`, and multiplies them. The head is frozen in low-rank training: W's gradient is computed only where asked for.

Shape letters: T = packed tokens, D = hidden size, V = vocabulary, R = chosen rows.
Cost 2*R*V*D FLOPs forward, 4*R*V*D backward, 2*R*V*D more for W's gradient; bound by them.
Memory beside inputs and gradients: R*D fp32 and one panel of 64 MB, against R*V.
Source: online log-sum-exp, Milakov and Gimelshein 2018; for this loss, Wijmans et al. 2024.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from flashvec.kernels.backend import define_op, implementation
from flashvec.kernels.checks import INTEGERS, check_constant, check_positive, check_range, may_look
from flashvec.kernels.cross_entropy_tiles import row_losses, weights
from flashvec.kernels.panel import (
    GAIN,
    PANEL_ELEMENTS,
    PANEL_ELEMENTS_CPU,
    panel_product,
    panel_width,
)
from flashvec.kernels.precision import widen

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# --- reference ---------------------------------------------------------------------------------------


def cross_entropy_reference(
    h_TD: Tensor,
    weight_VD: Tensor,
    rows_R: Tensor,
    targets_R: Tensor,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    logits = F.linear(widen(h_TD)[rows_R], widen(weight_VD), None if bias_V is None else widen(bias_V)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets_R.long(), reduction="none")


# --- panels of logits on the CPU -----------------------------------------------------------------------


def _logits_cpu(
    h_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, softcap: float, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Logits in fp32, from a product in the dtype of its factors, and the derivative of the soft-cap in them."""
    logits = F.linear(h_RD, weight_VD, bias_V).float()
    logits = logits if scale == 1 else logits.mul_(scale)
    if not softcap:
        return logits, None
    share = logits.div_(softcap).tanh_()
    return share * softcap, 1 - share.square()


def _row_losses_cpu(
    h: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, bias: Tensor | None, softcap: float, scale: float
) -> tuple[Tensor, Tensor]:
    V, R = weight.shape[0], rows.shape[0]
    h_RD, goal = h[rows], targets.long()
    hit = h.new_full((R,), float("nan"), dtype=torch.float32)  # stays so where a target lies outside
    partial = []
    width = panel_width(R, V, 256, PANEL_ELEMENTS_CPU)
    for first in range(0, V, width):
        here = slice(first, min(first + width, V))
        logits, _ = _logits_cpu(h_RD, weight[here], None if bias is None else bias[here], softcap, scale)
        (held,) = ((goal >= here.start) & (goal < here.stop)).nonzero(as_tuple=True)
        hit[held] = logits[held, goal[held] - first]
        partial.append(logits.logsumexp(1))
    lse = torch.stack(partial).logsumexp(0)
    return lse - hit, lse


def _weights_cpu(
    here: slice, h_RD: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, lse: Tensor,
    softcap: float, scale: float,
) -> Tensor:  # fmt: skip
    logits, slope = _logits_cpu(h_RD, weight[here], None if bias is None else bias[here], softcap, scale)
    dz = logits.sub_(lse[:, None]).exp_()
    (held,) = ((targets >= here.start) & (targets < here.stop)).nonzero(as_tuple=True)
    dz[held, targets[held].long() - here.start] -= 1
    return dz if slope is None else dz.mul_(slope)


# --- ops ---------------------------------------------------------------------------------------------


def _forward(
    h: Tensor, weight: Tensor, rows: Tensor, targets: Tensor, bias: Tensor | None, softcap: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of each row, fp32. `softcap` 0 is none."""
    run = row_losses if implementation(h) == "triton" else _row_losses_cpu
    return run(h, weight, rows, targets, bias, softcap, scale)


def _backward(
    dloss: Tensor,
    h: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    softcap: float,
    scale: float,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of h, W and bias; an empty tensor for each that is not wanted."""
    (T, D), V, R, on_gpu = h.shape, weight.shape[0], rows.shape[0], implementation(h) == "triton"
    written = read = rows.long()
    if on_gpu:  # nobody has looked at the values: a row or target outside pulls at nothing
        inside = (rows >= 0) & (rows < T) & (targets >= 0) & (targets < V)
        targets, lse = torch.where(inside, targets, -1), torch.where(inside, lse, float("inf"))
        written, read = torch.where(inside, written, T), torch.where(inside, read, 0)
    # A weight that all rows share, as a mean's, multiplies the result; several multiply h, none of them by more than 1.
    coefficient = dloss * scale
    is_shared = R > 0 and dloss.stride(0) == 0
    largest = coefficient[:1] if is_shared else F.pad(coefficient.abs(), (0, 1)).max().view(1)
    factor = None if is_shared else torch.where(largest > 0, coefficient / largest, 0.0)
    gain = GAIN if on_gpu and h.dtype == torch.float16 else 1.0
    sum_RD = h.new_zeros(R, D, dtype=torch.float32)
    dweight = weight.new_empty(weight.shape if wants[1] else 0)
    dbias = weight.new_empty(V if wants[2] else 0)
    width = panel_width(R, V, 256, PANEL_ELEMENTS if on_gpu else PANEL_ELEMENTS_CPU)
    panel = h.new_empty(R, width if on_gpu else 0)
    h_RD = h if on_gpu else h[rows]
    for first in range(0, V, width):
        here = slice(first, min(first + width, V))
        if on_gpu:
            dz = weights(here, h, weight, rows, targets, bias, lse, softcap, scale, panel, gain)
        else:
            dz = _weights_cpu(here, h_RD, weight, targets, bias, lse, softcap, scale)
        if wants[0]:
            panel_product(dz, weight[here], sum_RD, add=True)
        if wants[1]:
            chosen = read if on_gpu else None
            panel_product(dz.T, h_RD, dweight[here], rows_K=chosen, factor_K=factor, scale=largest / gain)
        if wants[2]:
            ones = h.new_ones(R, 1)
            panel_product(dz.T, ones, dbias[here, None], factor_K=factor, scale=largest / gain)
    dh = h.new_zeros(0)
    if wants[0]:  # one row more, for what lies outside
        sum_RD *= (coefficient / gain)[:, None]
        dh = h.new_zeros(T + 1, D).index_copy_(0, written, sum_RD.to(h.dtype))[:T]
    return dh, dweight, dbias


def _setup_context(ctx, inputs, output):
    h, weight, rows, targets, bias, ctx.softcap, ctx.scale = inputs
    ctx.save_for_backward(h, weight, rows, targets, bias, output[1])


def _autograd(ctx, dloss, _):
    needs = ctx.needs_input_grad
    wants = [needs[0], needs[1], needs[4]]
    grads = _cross_entropy_bwd(dloss, *ctx.saved_tensors, ctx.softcap, ctx.scale, wants)
    dh, dweight, dbias = (grad if wanted else None for grad, wanted in zip(grads, wants, strict=True))
    return dh, dweight, None, None, dbias, None, None


_HEAD = "Tensor h, Tensor weight, Tensor rows, Tensor targets, Tensor? bias"
_cross_entropy_bwd = define_op(
    f"cross_entropy_bwd(Tensor dloss, {_HEAD}, Tensor lse, float softcap, float scale, bool[] wants)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda dloss, h, weight, rows, targets, bias, lse, softcap, scale, wants: (
        h.new_empty(h.shape if wants[0] else 0),
        weight.new_empty(weight.shape if wants[1] else 0),
        weight.new_empty(weight.shape[0] if wants[2] else 0),
    ),
)
_cross_entropy = define_op(
    f"cross_entropy({_HEAD}, float softcap, float scale) -> (Tensor, Tensor)",
    _forward,
    lambda h, weight, rows, targets, bias, softcap, scale: tuple(
        h.new_empty(rows.shape, dtype=torch.float32) for _ in range(2)
    ),
    setup_context=_setup_context,
    backward=_autograd,
)


# --- public ------------------------------------------------------------------------------------------


def cross_entropy(
    h_TD: Tensor,
    weight_VD: Tensor,
    rows_R: Tensor,
    targets_R: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """Cross entropy of a head's predictions at chosen rows.

    Args:
        h_TD: [T, D] fp32, bf16 or fp16: states after the final norm, rows contiguous in themselves.
        weight_VD: [V, D], same dtype, rows contiguous in themselves.
        rows_R: int32 or int64 [R], distinct: where predictions are read. For masked tokens that is the position before.
        targets_R: int32 or int64 [R]: what should be predicted there.
        bias_V: [V] or None, same dtype.
        softcap: bound on the absolute logits, after `scale`; None leaves them.
        scale: multiplies the logits.
        reduction: mean over the rows, sum, or none. Several micro-batches of one step: sum, over the step's own count.

    Returns:
        fp32, a scalar, or [R] for none. Differentiable in `h_TD`, `weight_VD` and `bias_V`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a scale or softcap that is infinite or wants a
            gradient, which neither has, a mean over no rows; on the CPU also a row or a target out of range, and a row
            chosen twice. On a GPU, where looking would wait, these give a loss of NaN; those out of range have no
            gradient there.

    Error: on a GPU logits, sums and losses are fp32, and the softmax's weights are rounded to the dtype before they are
        multiplied. On a CPU logits are rounded to the dtype. No atomics: equal bits on repetition.
    """
    _check(h_TD, weight_VD, rows_R, targets_R, bias_V, softcap, scale, reduction)
    if may_look(h_TD):
        _check_values(h_TD.shape[0], weight_VD.shape[0], rows_R, targets_R)
    rows_R, targets_R = rows_R.contiguous(), targets_R.contiguous()
    bias_V = None if bias_V is None else bias_V.contiguous()
    loss_R, _ = _cross_entropy(h_TD, weight_VD, rows_R, targets_R, bias_V, softcap or 0.0, float(scale))
    return {"mean": loss_R.mean, "sum": loss_R.sum, "none": lambda: loss_R}[reduction]()


def _check(
    h: Tensor,
    weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float,
    reduction: str,
) -> None:
    floats = [x for x in (h, weight, bias) if x is not None]
    if h.dtype not in DTYPES or any(x.dtype != h.dtype for x in floats):
        raise ValueError(f"dtypes of h_TD, weight_VD, bias_V are {[x.dtype for x in floats]}, expected one of {DTYPES}")
    if h.ndim != 2 or weight.ndim != 2 or h.shape[1] != weight.shape[1] or not weight.shape[0]:
        raise ValueError(f"h_TD {tuple(h.shape)} does not fit weight_VD {tuple(weight.shape)}")
    if (h.numel() and h.stride(1) != 1) or weight.stride(1) != 1:
        raise ValueError(f"rows must be contiguous, strides are {h.stride()} and {weight.stride()}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias_V is {tuple(bias.shape)}, weight_VD has {weight.shape[0]} rows")
    if rows.ndim != 1 or rows.shape != targets.shape:
        raise ValueError(f"rows_R is {tuple(rows.shape)} and targets_R {tuple(targets.shape)}, expected both [R]")
    if rows.dtype not in INTEGERS or targets.dtype not in INTEGERS:
        raise ValueError(f"rows_R is {rows.dtype} and targets_R {targets.dtype}, expected int32 or int64")
    if any(x.device != h.device for x in (*floats, rows, targets)):
        raise ValueError(f"devices differ: {[str(x.device) for x in (*floats, rows, targets)]}")
    if softcap is not None:
        check_positive("softcap", softcap, " or None")
    check_constant("scale", scale)
    if not abs(scale) < float("inf"):
        raise ValueError(f"scale is {scale}, expected a finite number")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}, expected mean, sum or none")
    if len(rows) and not len(h):
        raise ValueError(f"rows_R names {len(rows)} rows, h_TD has none")
    if reduction == "mean" and not len(rows):
        raise ValueError("rows_R is empty: there is no mean over no rows")


def _check_values(T: int, V: int, rows: Tensor, targets: Tensor) -> None:
    if not len(rows):
        return
    check_range("rows_R", rows, T)
    check_range("targets_R", targets, V)
    counts = rows.bincount(minlength=T)
    if counts.max() > 1:
        raise ValueError(f"rows_R holds {int(counts.argmax())} more than once, expected distinct rows")
