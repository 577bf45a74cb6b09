"""Linear layer with a low-rank update (LoRA), for all the projections that one merged product computes.

    y[:, p] = x W_pᵀ + bias_p + scale_p * drop(x) A_pᵀ B_pᵀ           for each projection p

`W` and the bias are frozen. Projections that read the same input (query, key, value; gate, up) are one product: `A` is
stacked, each projection has its own rows of `W` and `B` and its own columns of `y`; all see one dropout mask.

Shape letters: T = packed tokens, C = input features, N = output features of all projections, P = projections, R = rank.
Cost beyond the product with W: 2*T*R*(P*C + N) FLOPs; bytes, which bound it: `x` once more (T*C), and T*N twice.
Of the latter only one half is a pass of its own. The update is written first, by a kernel that reads next to nothing,
and the product with W adds itself to it: its epilogue reads T*N under the cover of its arithmetic. The other order, a
pass that adds the update to a finished product, reads and writes T*N in the open, and rounds the product before the
sum. Backward does the same for the input's gradient (T*C). Appending B to the columns of W would save the T*N
altogether, for a second copy of every weight or weights stored with room behind each row; not done.

Source: Hu et al. 2021. PEFT draws a mask for each projection; one for their common input keeps each projection's
distribution, and costs a draw instead of three. Masks are `dropout.py`'s, keyed by sequence identity and position:
packing does not change them. Backward draws them again on a GPU; on a CPU, where drawing costs more than all else that
a dropout does, the graph keeps the dropped input instead of the input, and reads the mask from it.
"""

from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashvec.kernels.backend import define_op, implementation
from flashvec.kernels.checks import INTEGERS, check_constant
from flashvec.kernels.dropout import (
    Dropout,
    draws_cpu,
    drop_as_cpu,
    dropped_copy_cpu,
    fold_reference,
    keep_reference,
)
from flashvec.kernels.low_rank import MAX_PROJECTIONS, expand, reduce, row_keys, shrink
from flashvec.kernels.precision import widen

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_RANK = 128
ROWS_CPU = 2048  # rows of masked copies held at a time, and of halves summed before one rounding


# --- reference ---------------------------------------------------------------------------------------


def lora_reference(
    x_TC: Tensor,
    weight_NC: Tensor,
    bias_N: Tensor | None,
    a_PRC: Tensor,
    b_NR: Tensor,
    splits: Sequence[int],
    scales: Sequence[float],
    keys_2T: Tensor | None = None,
    threshold: int = 0,
) -> Tensor:
    x = widen(x_TC)
    out = F.linear(x, widen(weight_NC), None if bias_N is None else widen(bias_N)).split(list(splits), 1)
    dropped = x
    if keys_2T is not None:
        dropped = x * keep_reference((keys_2T[0], keys_2T[1]), x.shape[1], threshold) * (256 / (256 - threshold))
    parts = []
    for p, (a_RC, b_nR) in enumerate(zip(a_PRC, b_NR.split(list(splits)), strict=True)):
        parts.append(out[p] + scales[p] * (dropped @ widen(a_RC).T @ widen(b_nR).T))
    return torch.cat(parts, 1).to(x_TC.dtype)


def _keys(identities_T: Tensor, positions_T: Tensor, words: Sequence[int]) -> Tensor:
    if implementation(identities_T) == "triton":
        return row_keys(identities_T, positions_T, words)
    key = fold_reference((words[0], words[1]), identities_T.to(torch.int32))
    return torch.stack(fold_reference(key, positions_T.to(torch.int32)))


_lora_keys = define_op(
    "lora_keys(Tensor identities, Tensor positions, int[] words) -> Tensor",
    _keys,
    lambda identities, positions, words: identities.new_empty(2, identities.shape[0], dtype=torch.int32),
)


# --- the processor -----------------------------------------------------------------------------------


def _dropped(x: Tensor, keys: Tensor, threshold: int) -> Tensor:
    """A copy of x with zeros where it is dropped; on a CPU `_drop_as` sees in it what was."""
    if x.device.type == "cpu":
        return dropped_copy_cpu(x, draws_cpu((keys[0], keys[1]), x.shape[1], x.dtype), threshold)
    return x * keep_reference((keys[0], keys[1]), x.shape[1], threshold)  # a GPU without Triton


def _drop_as(dx: Tensor, dropped: Tensor, keys: Tensor, threshold: int) -> Tensor:
    """Zero in a gradient, in place, what was dropped."""
    if dx.device.type == "cpu":
        return drop_as_cpu(dx, dropped)
    return dx.mul_(keep_reference((keys[0], keys[1]), dx.shape[1], threshold))


def _sum_cpu(h: Tensor, x: Tensor) -> Tensor:
    """hᵀ x in fp32; halves are summed in fp32 within a chunk of rows and rounded once for each.

    The thin matrix first: the other way round the library takes up to a third longer.
    """
    if len(x) <= ROWS_CPU:
        return (h.T @ x).float()
    total = x.new_zeros(h.shape[1], x.shape[1], dtype=torch.float32)
    for rows in _chunks(len(x)):
        total += h[rows].T @ x[rows]
    return total


def _scale_parts(h: Tensor, factors: Sequence[float]) -> None:
    """h [T, P, R] times its projection's factor, in place: in one pass where they are alike, as they mostly are."""
    if len(set(factors)) == 1:
        h.mul_(factors[0])
        return
    for h_p, factor in zip(h.unbind(1), factors, strict=True):
        h_p.mul_(factor)


def _chunks(T: int) -> Iterator[slice]:
    return (slice(start, min(start + ROWS_CPU, T)) for start in range(0, T, ROWS_CPU))


# --- ops ---------------------------------------------------------------------------------------------


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    splits: Sequence[int],
    scales: Sequence[float],
    keys: Tensor | None,
    threshold: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [T, N], and what backward needs: scaled h = drop(x) Aᵀ [T, P, R], and drop(x), which Triton's makes again."""
    a, b = a.to(x.dtype), b.to(x.dtype)
    factors = [scale * 256 / (256 - threshold) for scale in scales]
    dropped = x.new_empty(0)
    if implementation(x) == "triton":
        h = shrink(x, a, splits, factors, keys, threshold)
        y = expand(h, b, splits, bias, None, 0)
    else:
        if keys is not None:
            dropped = _dropped(x, keys, threshold)
        h = torch.mm(x if keys is None else dropped, a.flatten(0, 1).T).unflatten(1, a.shape[:2])
        _scale_parts(h, factors)
        y = x.new_empty(x.shape[0], weight.shape[0])
        for p, (y_p, b_p) in enumerate(zip(y.split(list(splits), 1), b.split(list(splits)), strict=True)):
            torch.mm(h[:, p], b_p.T, out=y_p)
        if bias is not None:
            y += bias
    return y.addmm_(x, weight.T), h, dropped


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    h: Tensor,
    splits: Sequence[int],
    scales: Sequence[float],
    keys: Tensor | None,
    threshold: int,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, A and B; an empty tensor for each that is not wanted.

    `x` is the forward's `dropped` where there is one.
    """
    a_half, b_half = a.to(x.dtype), b.to(x.dtype)
    factors = [scale * 256 / (256 - threshold) for scale in scales]
    dx, da, db = x.new_empty(0), a.new_empty(0), b.new_empty(0)
    if implementation(x) == "triton":
        g = shrink(dy, b_half, splits, factors, None, 0) if wants[0] or wants[1] else h
        if wants[0]:
            dx = expand(g, a_half, splits, None, keys, threshold).addmm_(dy, weight)
        if wants[1]:
            da = reduce(x, g, a, splits, keys, threshold)
        if wants[2]:
            db = reduce(dy, h, b, splits, None, 0)
        return dx, da, db
    dys = dy.split(list(splits), 1)
    if wants[0] or wants[1]:
        parts = zip(dys, b_half.split(list(splits)), strict=True)
        g = x.new_empty(x.shape[0], *a.shape[:2])
        for p, (dy_p, b_p) in enumerate(parts):
            torch.mm(dy_p, b_p, out=g[:, p])
        _scale_parts(g, factors)
        if wants[1]:
            da = _sum_cpu(g.flatten(1), x).view(a.shape).to(a.dtype)
        if wants[0]:
            dx = torch.mm(g.flatten(1), a_half.flatten(0, 1))
            if keys is not None:
                _drop_as(dx, x, keys, threshold)
            dx.addmm_(dy, weight)
    if wants[2]:
        db = torch.cat([_sum_cpu(h[:, p], dy_p) for p, dy_p in enumerate(dys)], 1).T.to(b.dtype).contiguous()
    return dx, da, db


def _setup_context(ctx, inputs, output):
    x, weight, _, a, b, ctx.splits, ctx.scales, keys, ctx.threshold = inputs
    _, h, dropped = output
    ctx.save_for_backward(x if keys is None or implementation(x) == "triton" else dropped, weight, a, b, h, keys)


def _autograd(ctx, dy, *_):
    x, weight, a, b, h, keys = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wants = [needs[0], needs[3], needs[4]]
    grads = _lora_bwd(dy.contiguous(), x, weight, a, b, h, ctx.splits, ctx.scales, keys, ctx.threshold, wants)
    dx, da, db = (grad if wanted else None for grad, wanted in zip(grads, wants, strict=True))
    return dx, None, None, da, db, None, None, None, None


_SHARED = "int[] splits, float[] scales, Tensor? keys, int threshold"
_lora_bwd = define_op(
    "lora_bwd(Tensor dy, Tensor x, Tensor weight, Tensor a, Tensor b, Tensor h, "
    f"{_SHARED}, bool[] wants) -> (Tensor, Tensor, Tensor)",
    _backward,
    lambda dy, x, weight, a, b, h, splits, scales, keys, threshold, wants: tuple(
        t.new_empty(t.shape if wanted else 0) for t, wanted in zip((x, a, b), wants, strict=True)
    ),
)
_lora = define_op(
    f"lora(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, {_SHARED}) -> (Tensor, Tensor, Tensor)",
    _forward,
    lambda x, weight, bias, a, b, splits, scales, keys, threshold: (
        x.new_empty(x.shape[0], weight.shape[0]),
        x.new_empty(x.shape[0], *a.shape[:2]),
        x.new_empty(0 if keys is None or implementation(x) == "triton" else x.shape),
    ),
    setup_context=_setup_context,
    backward=_autograd,
)


# --- public ------------------------------------------------------------------------------------------


def lora(
    x_TC: Tensor,
    weight_NC: Tensor,
    a_PRC: Tensor,
    b_NR: Tensor,
    *,
    scales: float | Sequence[float],
    splits: Sequence[int] | None = None,
    bias_N: Tensor | None = None,
    dropout: Dropout | None = None,
    identities_T: Tensor | None = None,
    positions_T: Tensor | None = None,
    keys_2T: Tensor | None = None,
) -> Tensor:
    """Multiply every row by a frozen weight and its trainable low-rank update.

    Args:
        x_TC: [T, C] fp32, bf16 or fp16, rows contiguous in themselves.
        weight_NC: [N, C], same dtype, frozen: the rows of all P projections, one under another.
        a_PRC: [P, R, C], dtype of `x_TC` or fp32 (computed with in the dtype of `x_TC`); P at most 3, R at most 128.
            Projections of lower rank are filled up with zero rows.
        b_NR: [N, R], dtype of `a_PRC`.
        scales: alpha / R, or another factor; one for each projection or one for all.
        splits: rows of `weight_NC` of each projection; needed for more than one.
        bias_N: [N], same dtype, frozen.
        dropout: of the update's input, one mask for all projections.
        identities_T: int [T], the identity of each row's sequence (`Schedule.identity_of_rows`); for dropout.
        positions_T: int [T], each row's position in its sequence; for dropout.
        keys_2T: int32 [2, T] of `mask_keys` or `mask_keys_of_sites`, in their place.

    Returns:
        [T, N] in the dtype of `x_TC`. Differentiable in `x_TC`, `a_PRC` and `b_NR`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a weight or a scale that wants a gradient,
            dropout without keys.

    Error: sums are fp32. x Aᵀ and the update are rounded to the dtype before they go on; gradients of A and B are
        fp32 sums over fixed blocks of rows, without atomics: equal bits on repetition.
    """
    P = a_PRC.shape[0]
    splits = [weight_NC.shape[0]] if splits is None else list(splits)
    scales = _scales(scales, P)
    _check(x_TC, weight_NC, a_PRC, b_NR, scales, splits, bias_N)
    keys, threshold = None, 0
    if dropout is not None and dropout.p > 0:
        keys, threshold = _keys_given(x_TC, dropout, identities_T, positions_T, keys_2T), dropout.threshold
    bias_N = None if bias_N is None else bias_N.contiguous()
    return _lora(x_TC, weight_NC, bias_N, a_PRC, b_NR, splits, scales, keys, threshold)[0]


def mask_keys(dropout: Dropout, identities_T: Tensor, positions_T: Tensor) -> Tensor:
    """The two words of each row's dropout key: int32 [2, T]."""
    return _lora_keys(identities_T.contiguous(), positions_T.contiguous(), list(dropout.key()))


def mask_keys_of_sites(
    dropout: Dropout, sites: Sequence[int], identities_T: Tensor, positions_T: Tensor
) -> Sequence[Tensor]:
    """`mask_keys` of `dropout.at(site)` for each site, together: of a CPU's few rows calls are all it costs.

    Returns:
        One int32 [2, T] for each of S sites, views of 8 S T bytes.
    """
    words_2S1 = torch.tensor([dropout.at(site).key() for site in sites], dtype=torch.int32).T[..., None]
    words_2S1 = words_2S1.to(identities_T.device)
    keys = fold_reference((words_2S1[0], words_2S1[1]), identities_T.to(torch.int32))
    return torch.stack(fold_reference(keys, positions_T.to(torch.int32)), 1).unbind()


def _keys_given(
    x: Tensor, dropout: Dropout, identities: Tensor | None, positions: Tensor | None, keys: Tensor | None
) -> Tensor:
    if keys is not None:
        if keys.dtype != torch.int32 or keys.shape != (2, len(x)) or keys.device != x.device:
            found = f"{keys.dtype} {tuple(keys.shape)} on {keys.device}"
            raise ValueError(f"keys_2T is {found}, expected int32 {(2, len(x))} on {x.device} as x_TC")
        return keys
    if identities is None or positions is None:
        raise ValueError("dropout needs identities_T and positions_T, or keys_2T: its masks are keyed by them")
    if identities.shape != x.shape[:1] or positions.shape != x.shape[:1]:
        found = f"{tuple(identities.shape)} and {tuple(positions.shape)}"
        raise ValueError(f"identities_T and positions_T are {found}, x_TC has {x.shape[0]} rows")
    for name, words in (("identities_T", identities), ("positions_T", positions)):
        if words.dtype not in INTEGERS or words.device != x.device:
            raise ValueError(
                f"{name} is {words.dtype} on {words.device}, expected int32 or int64 on {x.device} as x_TC"
            )
    return mask_keys(dropout, identities, positions)


def _scales(scales: float | Sequence[float], P: int) -> list[float]:
    check_constant("scales", scales)
    each: Any = scales.tolist() if isinstance(scales, Tensor) else scales
    each = [each] * P if isinstance(each, Real) else list(each)
    if not all(isinstance(scale, Real) for scale in each):
        raise ValueError(f"scales are {scales!r}, expected a number, or one for each projection")
    return [float(scale) for scale in each]


def _check(
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Sequence[float],
    splits: Sequence[int],
    bias: Tensor | None,
) -> None:
    if x.dtype not in DTYPES or weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise ValueError(
            f"x_TC is {x.dtype} and weight_NC {weight.dtype}, expected one of {DTYPES} for both and bias_N"
        )
    if a.dtype != b.dtype or a.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"a_PRC is {a.dtype} and b_NR {b.dtype}, expected both {x.dtype} or both fp32")
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or (x.numel() and x.stride(1) != 1):
        raise ValueError(f"x_TC {tuple(x.shape)}, strides {x.stride()}, does not fit weight_NC {tuple(weight.shape)}")
    N, C = weight.shape
    if a.ndim != 3 or b.ndim != 2 or a.shape[2] != C or b.shape != (N, a.shape[1]):
        raise ValueError(f"a_PRC {tuple(a.shape)} and b_NR {tuple(b.shape)} do not fit weight_NC {(N, C)}")
    P, R, _ = a.shape
    if not 1 <= P <= MAX_PROJECTIONS or not 1 <= R <= MAX_RANK:
        raise ValueError(f"a_PRC is {tuple(a.shape)}: at most {MAX_PROJECTIONS} projections, of rank 1 to {MAX_RANK}")
    if len(splits) != P or len(scales) != P or sum(splits) != N or min(splits) < 1:
        raise ValueError(f"splits {splits} and scales {scales} do not fit {P} projections of {N} rows together")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias_N is {tuple(bias.shape)}, weight_NC has {N} rows")
    tensors = {"weight_NC": weight, "a_PRC": a, "b_NR": b, "bias_N": bias}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x_TC on {x.device}")
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("weight_NC or bias_N wants a gradient: the base of a low-rank update is frozen")
