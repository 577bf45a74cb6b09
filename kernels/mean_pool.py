"""Final norm and pooling: token rows of the last layer become one vector per span of tokens.

    x[t] = x[t] + delta[t]                  or x[t] + rms_norm(delta[t], post_norm_weight), where there is a delta
    out[s] = pool(rms_norm(x[t]) for t in range(spans[s, 0], spans[s, 1]))[:truncate_dim]
    out[s] = out[s] / |out[s]|              where asked for

`pool` is mean, weighted_mean (weights grow with the position: k, k + 1, ...), mean_sqrt_len (sum / sqrt(count)), max,
last or cls (the span's last and first row). Spans may nest, overlap or leave rows out.

Shape letters: T = packed tokens, D = hidden size, S = spans. Memory-bound: a span's rows are read once, and nothing of
size [T, D] is written. `kernels/mean_pool_fwd.py` says how spans are shared out on a GPU.

Source: LLM2Vec (BehnamGhader et al. 2024), SGPT for the weighted mean (Muennighoff 2022).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flashvec.kernels.backend import implementation, needs_gradient
from flashvec.kernels.checks import INTEGERS, check_eps, check_rows, check_spans, check_weight, may_look
from flashvec.kernels.mean_pool_fwd import mean_pool_op
from flashvec.kernels.pool_spans import MODES, ONE_ROW, SHORTEST
from flashvec.kernels.precision import widen
from flashvec.kernels.rms_norm import rms_norm_reference


def mean_pool_reference(
    x_TD: Tensor,
    spans_S2: Tensor,
    norm_weight_D: Tensor,
    eps: float,
    *,
    norm_offset: float = 0.0,
    mode: str = "mean",
    first_weights_S: Tensor | None = None,
    delta_TD: Tensor | None = None,
    post_norm_weight_D: Tensor | None = None,
    truncate_dim: int | None = None,
    normalize: bool = False,
) -> Tensor:
    def normed(rows_R: Tensor) -> Tensor:
        x_RD = widen(x_TD[rows_R])
        if delta_TD is not None:
            delta_RD = delta_TD[rows_R]
            if post_norm_weight_D is not None:
                delta_RD = rms_norm_reference(delta_RD, post_norm_weight_D, eps, norm_offset, x_RD.dtype)
            x_RD = x_RD + delta_RD
        return rms_norm_reference(x_RD, norm_weight_D, eps, norm_offset)

    start_S, stop_S = spans_S2.to(torch.int64).unbind(1)
    if mode in ONE_ROW:
        out_SD = normed(stop_S - 1 if mode == "last" else start_S)
    else:
        out_SD = _pool_reference(normed, start_S, stop_S - start_S, mode, first_weights_S)
    out_SD = out_SD[:, :truncate_dim]
    return F.normalize(out_SD, dim=-1, eps=SHORTEST) if normalize else out_SD


def _pool_reference(
    normed: Callable[[Tensor], Tensor], start_S: Tensor, count_S: Tensor, mode: str, first_weights_S: Tensor | None
) -> Tensor:
    span_R = torch.repeat_interleave(count_S)  # which span owns row r of the gathered rows
    rank_R = torch.arange(len(span_R), device=start_S.device) - (count_S.cumsum(0) - count_S)[span_R]
    y_RD = normed(start_S[span_R] + rank_R)
    out_SD = y_RD.new_zeros(len(start_S), y_RD.shape[1])
    if mode == "max":
        index_RD = span_R[:, None].expand_as(y_RD)
        return out_SD.scatter_reduce_(0, index_RD, y_RD, "amax", include_self=False)

    total_S = count_S.to(y_RD.dtype)
    if mode == "mean_sqrt_len":
        total_S = total_S.sqrt()
    if mode == "weighted_mean":
        first_S = torch.ones_like(start_S) if first_weights_S is None else first_weights_S
        weight_R = (first_S[span_R] + rank_R).to(y_RD.dtype)
        y_RD = y_RD * weight_R[:, None]
        total_S = total_S.new_zeros(len(start_S)).index_add_(0, span_R, weight_R)
    # index_add_ walks the rows in order on the CPU: a span's sum does not depend on its neighbours.
    return out_SD.index_add_(0, span_R, y_RD) / total_S[:, None]


# --- public ---------------------------------------------------------------------------------------------


def mean_pool(
    x_TD: Tensor,
    spans_S2: Tensor,
    norm_weight_D: Tensor,
    eps: float,
    *,
    norm_offset: float = 0.0,
    mode: str = "mean",
    first_weights_S: Tensor | None = None,
    delta_TD: Tensor | None = None,
    post_norm_weight_D: Tensor | None = None,
    truncate_dim: int | None = None,
    normalize: bool = False,
    longest: int | None = None,
) -> Tensor:
    """Normalise token rows and pool them over spans.

    Args:
        x_TD: [T, D] fp32, bf16 or fp16 (fp64 runs the reference): the residual stream after the last layer, or before
            its last addition where `delta_TD` is given. Any row stride.
        spans_S2: [S, 2] int32 or int64, contiguous, same device: first row and one past the last of each span, never
            empty; in any order.
        norm_weight_D: [D] weight of the final RMSNorm.
        eps, norm_offset: of that norm (and the one before the addition), see `rms_norm`.
        mode: one of `MODES`.
        first_weights_S: [S] integers, weighted_mean only: the weight of each span's first row; default 1.
        delta_TD: [T, D] fp32, bf16 or fp16: added to the residual stream first.
        post_norm_weight_D: [D] weight of a norm of `delta_TD` before it is added, or None for no such norm.
        truncate_dim: columns to keep of each vector; default D.
        normalize: divide each vector by its Euclidean length, after the cut.
        longest: rows of the longest span, where the host knows it, so that a GPU runs no programs for chunks that no
            span has; default T. Too small a value costs speed and the bits' independence of the batch, nothing else.

    Returns:
        fp32 [S, truncate_dim]: norm and sums in fp32, never rounded to a narrower dtype. Differentiable in x_TD,
        delta_TD and both weights; spans that overlap add up.

    Raises:
        ValueError: an unknown mode, a wrong shape, layout, dtype or device; on the CPU also a span that is empty or
            reaches past the rows. On a GPU looking would wait: these give values of no meaning there.

    Error: fp32 summation in an order that depends on the span's length alone; the same span gives the same bits in
        any batch. Bitwise deterministic, forward and backward. On a GPU, mode max has a backward through the
        reference only, which writes the rows of all spans.
    """
    _check(x_TD, spans_S2, norm_weight_D, mode, first_weights_S, delta_TD, post_norm_weight_D, truncate_dim, eps)
    if may_look(spans_S2):
        check_spans(spans_S2, len(x_TD))
    has_grad = needs_gradient(x_TD, delta_TD, norm_weight_D, post_norm_weight_D)
    if implementation(x_TD) != "triton" or x_TD.dtype == torch.float64 or (mode == "max" and has_grad):
        return mean_pool_reference(
            x_TD,
            spans_S2,
            norm_weight_D,
            eps,
            norm_offset=norm_offset,
            mode=mode,
            first_weights_S=first_weights_S,
            delta_TD=delta_TD,
            post_norm_weight_D=post_norm_weight_D,
            truncate_dim=truncate_dim,
            normalize=normalize,
        )
    return mean_pool_op(
        x_TD,
        delta_TD,
        None if post_norm_weight_D is None else post_norm_weight_D.contiguous(),
        norm_weight_D.contiguous(),
        spans_S2,
        first_weights_S.contiguous() if first_weights_S is not None and mode == "weighted_mean" else None,
        eps,
        norm_offset,
        mode,
        truncate_dim or x_TD.shape[1],
        normalize,
        x_TD.shape[0] if longest is None else longest,
    )[0]


def _check(
    x_TD: Tensor,
    spans_S2: Tensor,
    norm_weight_D: Tensor,
    mode: str,
    first_weights_S: Tensor | None,
    delta_TD: Tensor | None,
    post_norm_weight_D: Tensor | None,
    truncate_dim: int | None,
    eps: float,
) -> None:
    if mode not in MODES:
        raise ValueError(f"pooling mode is {mode!r}, known are {', '.join(MODES)}")
    if spans_S2.ndim != 2 or spans_S2.shape[1] != 2 or not spans_S2.is_contiguous():
        raise ValueError(
            f"spans_S2 must be contiguous [S, 2], got {tuple(spans_S2.shape)}, strides {spans_S2.stride()}"
        )
    if first_weights_S is not None and first_weights_S.shape != spans_S2.shape[:1]:
        raise ValueError(f"first_weights_S is {tuple(first_weights_S.shape)}, there are {len(spans_S2)} spans")
    for name, x in (("spans_S2", spans_S2), ("first_weights_S", first_weights_S)):
        if x is not None and (x.dtype not in INTEGERS or x.device != x_TD.device):
            raise ValueError(f"{name} is {x.dtype} on {x.device}, expected int32 or int64 on {x_TD.device} as x_TD")
    if x_TD.ndim != 2:
        raise ValueError(f"x_TD must be [T, D], got {tuple(x_TD.shape)}")
    check_rows("x_TD", x_TD)
    check_eps(eps)
    check_weight("norm_weight_D", norm_weight_D, x_TD)
    if delta_TD is not None:
        if delta_TD.shape != x_TD.shape or delta_TD.device != x_TD.device:
            raise ValueError(
                f"delta_TD is {tuple(delta_TD.shape)} on {delta_TD.device}, x_TD {tuple(x_TD.shape)} on {x_TD.device}"
            )
        check_rows("delta_TD", delta_TD)
    if post_norm_weight_D is not None:
        if delta_TD is None:
            raise ValueError("post_norm_weight_D norms delta_TD, which is None")
        check_weight("post_norm_weight_D", post_norm_weight_D, x_TD)
    if truncate_dim is not None and not 0 < truncate_dim <= x_TD.shape[1]:
        raise ValueError(f"truncate_dim is {truncate_dim}, vectors have {x_TD.shape[1]} elements")
