"""Attention over packed sequences, each attending to itself alone.

    out = softmax(cap(q kᵀ * scale) + mask) v        cap(s) = softcap * tanh(s / softcap), when set

`q` has H heads, `k` and `v` have G (H a multiple of G): query head h reads key head h // (H / G).
Mask: full or causal, and optionally a window: key j is seen from query i if i - j <= window and j - i <= window.

Shape letters: T = packed tokens, H = query heads, G = kv heads, K = head size, n = a sequence's tokens.
Cost 4*n²*K FLOPs a head. Source: Vaswani et al. 2017; grouped heads Ainslie et al. 2023; soft-cap Gemma 2.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from flashvec.kernels.backend import implementation
from flashvec.kernels.precision import widen
from flashvec.kernels.schedule import Group, Schedule

QUERY_BLOCK = 1024  # rows of queries per call where scores or masks are held in memory: bounds them to 1024 * n
MIN_HEAD_SIZE = 16  # below it the library's small products depend on how a thread's buffer happens to be aligned


def attention_reference(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    schedule: Schedule,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """One sequence after the other, in fp32 or wider, scores written out."""
    out_THK = torch.zeros_like(q_THK)
    heads_per_group = q_THK.shape[1] // k_TGK.shape[1]
    offsets = schedule.cu_seqlens.tolist()
    for start, stop in pairwise(offsets):
        q, k, v = (widen(x[start:stop]).transpose(0, 1) for x in (q_THK, k_TGK, v_TGK))
        k, v = (x.repeat_interleave(heads_per_group, 0) for x in (k, v))
        scores = q @ k.transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        visible = _visible(0, stop - start, 0, stop - start, causal, window, q.device)
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        out_THK[start:stop] = (scores.softmax(-1) @ v).transpose(0, 1).to(out_THK.dtype)
    return out_THK


def _visible(
    q_start: int, q_stop: int, k_start: int, k_stop: int, causal: bool, window: int | None, device: torch.device
) -> Tensor | None:
    """Which keys each query sees: bool [queries, keys], or None where every query sees every key."""
    reach = max(q_stop - 1 - k_start, k_stop - 1 - q_start)
    if not causal and (window is None or reach <= window):
        return None
    query = torch.arange(q_start, q_stop, device=device)[:, None]
    key = torch.arange(k_start, k_stop, device=device)
    visible = query >= key if causal else torch.ones_like(query >= key)
    if window is not None:
        visible &= (query - key).abs() <= window
    return visible


def _attention_grouped(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    schedule: Schedule,
    *,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Sequences of equal length in one call each, unpadded: a view in, a view out, no mask where none is needed.

    Every shape that reaches the library depends on the length of a sequence alone, apart from the batch dimension,
    over which the library only distributes work. Soft-capped scores go through plain products, whose batch form
    is not free of that dependence: they run one sequence at a time.
    """
    T, H, K = q_THK.shape
    G = k_TGK.shape[1]
    if K < MIN_HEAD_SIZE:  # zero columns change no score and no sum
        q_THK, k_TGK, v_TGK = (F.pad(x, (0, MIN_HEAD_SIZE - K)) for x in (q_THK, k_TGK, v_TGK))
        padded = _attention_grouped(
            q_THK, k_TGK, v_TGK, schedule, scale=scale, causal=causal, window=window, softcap=softcap
        )
        return padded[..., :K].contiguous()
    out_THK = q_THK.new_empty(T, H, K)
    out_THK[schedule.num_tokens :] = 0
    for group in schedule.groups:
        rows = slice(group.start, group.stop)
        q, k, v = (x[rows].unflatten(0, (group.count, group.length)).transpose(1, 2) for x in (q_THK, k_TGK, v_TGK))
        out = out_THK[rows].view(group.count, group.length, H, K)
        if softcap is not None:
            for i in range(group.count):
                _softcapped(q[i], k[i], v[i], out[i], scale, causal, window, softcap)
        elif window is None or group.length <= window + 1:
            result = F.scaled_dot_product_attention(
                q, k, v, is_causal=causal and group.length > 1, scale=scale, enable_gqa=H != G
            )
            out.copy_(result.transpose(1, 2))
        else:
            _windowed(q, k, v, out, group, scale, causal, window)
    return out_THK


def _windowed(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, group: Group, scale: float, causal: bool, window: int
) -> None:
    """Blocks of queries against the keys within their reach: work and mask grow with n * window, not n²."""
    n = group.length
    for start in range(0, n, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, n)
        first, last = max(0, start - window), stop if causal else min(n, stop + window)
        result = F.scaled_dot_product_attention(
            q[:, :, start:stop],
            k[:, :, first:last],
            v[:, :, first:last],
            attn_mask=_visible(start, stop, first, last, causal, window, q.device),
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        out[:, start:stop] = result.transpose(1, 2)


def _softcapped(
    q_HnK: Tensor,
    k_GnK: Tensor,
    v_GnK: Tensor,
    out_nHK: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float,
) -> None:
    """One sequence with tanh on its scores, fp32, a block of queries at a time."""
    heads_per_group = q_HnK.shape[0] // k_GnK.shape[0]
    k_HnK, v_HnK = (x.float().repeat_interleave(heads_per_group, 0) for x in (k_GnK, v_GnK))
    n = q_HnK.shape[1]
    for start in range(0, n, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, n)
        scores = q_HnK[:, start:stop].float() @ k_HnK.transpose(1, 2)
        scores = scores.mul_(scale / softcap).tanh_().mul_(softcap)
        visible = _visible(start, stop, 0, n, causal, window, q_HnK.device)
        if visible is not None:
            scores.masked_fill_(~visible, float("-inf"))
        out_nHK[start:stop] = (scores.softmax(-1) @ v_HnK).transpose(0, 1)


def attention(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    schedule: Schedule,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend within each packed sequence.

    Args:
        q_THK: [T, H, K] fp32, bf16 or fp16; any row stride.
        k_TGK, v_TGK: [T, G, K], same dtype.
        schedule: of this batch; rows past its tokens are filling and come back as zeros.
        scale: multiplies the scores.
        causal: hide later tokens.
        window: farthest visible distance in tokens, on each allowed side; None sees all.
        softcap: bound on the absolute scores; None leaves them.

    Returns:
        [T, H, K], dtype of `q_THK`, contiguous. Scores and sums are fp32.

    Raises:
        ValueError: head counts or shapes that do not fit together, a negative window.

    Error: a sequence's result does not depend on what else is in the batch.
    """
    if q_THK.shape[1] % k_TGK.shape[1] or k_TGK.shape != v_TGK.shape or q_THK.shape[::2] != k_TGK.shape[::2]:
        raise ValueError(f"q {tuple(q_THK.shape)}, k {tuple(k_TGK.shape)} and v {tuple(v_TGK.shape)} do not fit")
    if window is not None and window < 0:
        raise ValueError(f"window counts tokens to each side, got {window}")
    # Equal-length groups serve every device until the Triton kernels take over on CUDA. Training differentiates through
    # the reference; the groups' form works in place.
    implementation(q_THK)
    in_place = not (torch.is_grad_enabled() and any(x.requires_grad for x in (q_THK, k_TGK, v_TGK)))
    run = _attention_grouped if in_place else attention_reference
    return run(q_THK, k_TGK, v_TGK, schedule, scale=scale, causal=causal, window=window, softcap=softcap)
