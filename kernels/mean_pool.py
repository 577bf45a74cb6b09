"""Final norm and pooling: token rows of the last layer become one vector per span of tokens.

    out[s] = pool(rms_norm(x[t]) for t in range(spans[s, 0], spans[s, 1]))

`pool` is mean, weighted_mean (weights grow with the position: k, k + 1, ...), mean_sqrt_len (sum / sqrt(count)), max,
last or cls (the span's last and first row). Spans may nest, overlap or leave rows out.

Shape letters: T = packed tokens, D = hidden size, S = spans. Memory-bound.
Source: LLM2Vec (BehnamGhader et al. 2024), SGPT for the weighted mean (Muennighoff 2022).
"""

import torch
from torch import Tensor

from flashvec.kernels.rms_norm import rms_norm

MODES = ("mean", "weighted_mean", "mean_sqrt_len", "max", "last", "cls")


def mean_pool_reference(
    x_TD: Tensor,
    spans_S2: Tensor,
    norm_weight_D: Tensor,
    eps: float,
    *,
    norm_offset: float = 0.0,
    mode: str = "mean",
    first_weights_S: Tensor | None = None,
) -> Tensor:
    start_S, stop_S = spans_S2.to(torch.int64).unbind(1)
    if mode in ("last", "cls"):
        rows_S = stop_S - 1 if mode == "last" else start_S
        return rms_norm(x_TD[rows_S], norm_weight_D, eps, norm_offset, torch.float32)

    count_S = stop_S - start_S
    span_R = torch.repeat_interleave(count_S)  # which span owns row r of the gathered rows
    rank_R = torch.arange(len(span_R), device=x_TD.device) - (count_S.cumsum(0) - count_S)[span_R]
    y_RD = rms_norm(x_TD[start_S[span_R] + rank_R], norm_weight_D, eps, norm_offset, torch.float32)
    out_SD = y_RD.new_zeros(len(spans_S2), x_TD.shape[1])
    if mode == "max":
        index_RD = span_R[:, None].expand_as(y_RD)
        return out_SD.scatter_reduce_(0, index_RD, y_RD, "amax", include_self=False)

    total_S = count_S.float()
    if mode == "mean_sqrt_len":
        total_S = total_S.sqrt()
    if mode == "weighted_mean":
        first_S = torch.ones_like(start_S) if first_weights_S is None else first_weights_S
        weight_R = (first_S[span_R] + rank_R).float()
        y_RD = y_RD * weight_R[:, None]
        total_S = total_S.new_zeros(len(spans_S2)).index_add_(0, span_R, weight_R)
    # index_add_ walks the rows in order on the CPU: a span's sum does not depend on its neighbours.
    return out_SD.index_add_(0, span_R, y_RD) / total_S[:, None]


def mean_pool(
    x_TD: Tensor,
    spans_S2: Tensor,
    norm_weight_D: Tensor,
    eps: float,
    *,
    norm_offset: float = 0.0,
    mode: str = "mean",
    first_weights_S: Tensor | None = None,
) -> Tensor:
    """Normalise token rows and pool them over spans.

    Args:
        x_TD: [T, D] fp32, bf16 or fp16: the residual stream after the last layer.
        spans_S2: [S, 2] integers, same device: first row and one past the last of each span, never empty.
        norm_weight_D: [D] weight of the final RMSNorm.
        eps, norm_offset: of that norm, see `rms_norm`.
        mode: one of `MODES`.
        first_weights_S: [S] integers, weighted_mean only: the weight of each span's first row; default 1.

    Returns:
        fp32 [S, D]: norm and sums in fp32, never rounded to a narrower dtype.

    Raises:
        ValueError: an unknown mode or a wrong shape. The values of `spans_S2` are trusted: checking them would wait
            for a GPU.

    Error: fp32 summation in row order; the same span gives the same bits in any batch (CPU).
    """
    if mode not in MODES:
        raise ValueError(f"pooling mode is {mode!r}, known are {', '.join(MODES)}")
    if spans_S2.ndim != 2 or spans_S2.shape[1] != 2:
        raise ValueError(f"spans_S2 must be [S, 2], got {tuple(spans_S2.shape)}")
    return mean_pool_reference(
        x_TD,
        spans_S2,
        norm_weight_D,
        eps,
        norm_offset=norm_offset,
        mode=mode,
        first_weights_S=first_weights_S,
    )
