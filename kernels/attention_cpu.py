"""Attention on the CPU: torch's own kernel over groups of sequences of exactly equal length, without padding.

Shape letters as in `kernels/attention.py`: T = packed tokens, H = query heads, G = kv heads, K = head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flashvec.kernels.backend import as_given
from flashvec.kernels.schedule import Group, Schedule

QUERY_BLOCK = 1024  # rows of queries per call where scores or masks are held in memory: bounds them to 1024 * n
Reach = tuple[int | None, int | None]  # keys seen to the left and right of a query, itself not counted; None: all
MIN_HEAD_SIZE = 16  # below it the library's small products depend on how a thread's buffer happens to be aligned


def visible(
    query_start: int, query_stop: int, key_start: int, key_stop: int, reach: Reach, device: torch.device
) -> Tensor | None:
    """Which keys each query sees: bool [queries, keys], or None where every query sees every key."""
    left, right = reach
    hides_left = left is not None and query_stop - 1 - left > key_start
    hides_right = right is not None and query_start + right < key_stop - 1
    if not hides_left and not hides_right:
        return None
    query = torch.arange(query_start, query_stop, device=device)[:, None]
    key = torch.arange(key_start, key_stop, device=device)
    seen = torch.ones(query_stop - query_start, key_stop - key_start, dtype=torch.bool, device=device)
    if left is not None:
        seen &= key >= query - left
    if right is not None:
        seen &= key <= query + right
    return seen


@as_given
def attention_cpu(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    schedule: Schedule,
    *,
    scale: float,
    reach: Reach,
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
        padded = attention_cpu(q_THK, k_TGK, v_TGK, schedule, scale=scale, reach=reach, softcap=softcap)
        return padded[..., :K].contiguous()
    left, right = reach
    out_THK = q_THK.new_empty(T, H, K)
    out_THK[schedule.num_tokens :] = 0
    for group in schedule.groups:
        rows = slice(group.start, group.stop)
        q, k, v = (x[rows].unflatten(0, (group.count, group.length)).transpose(1, 2) for x in (q_THK, k_TGK, v_TGK))
        out = out_THK[rows].view(group.count, group.length, H, K)
        farthest = group.length - 1
        if softcap is not None:
            for i in range(group.count):
                _softcapped(q[i], k[i], v[i], out[i], scale, reach, softcap)
        elif (left is None or farthest <= left) and (right is None or farthest <= right or right == 0):
            causal = right == 0 and group.length > 1
            result = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=H != G)
            out.copy_(result.transpose(1, 2))
        else:
            _windowed(q, k, v, out, group, scale, reach)
    return out_THK


def _windowed(q: Tensor, k: Tensor, v: Tensor, out: Tensor, group: Group, scale: float, reach: Reach) -> None:
    """Blocks of queries against the keys within their reach: work and mask grow with n * window, not n²."""
    n = group.length
    left, right = reach
    for start in range(0, n, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, n)
        first = 0 if left is None else max(0, start - left)
        last = n if right is None else min(n, stop + right)
        result = F.scaled_dot_product_attention(
            q[:, :, start:stop],
            k[:, :, first:last],
            v[:, :, first:last],
            attn_mask=visible(start, stop, first, last, reach, q.device),
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        out[:, start:stop] = result.transpose(1, 2)


def _softcapped(
    q_HnK: Tensor, k_GnK: Tensor, v_GnK: Tensor, out_nHK: Tensor, scale: float, reach: Reach, softcap: float
) -> None:
    """One sequence with tanh on its scores, fp32, a block of queries at a time."""
    heads_per_group = q_HnK.shape[0] // k_GnK.shape[0]
    k_HnK, v_HnK = (x.float().repeat_interleave(heads_per_group, 0) for x in (k_GnK, v_GnK))
    n = q_HnK.shape[1]
    for start in range(0, n, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, n)
        scores = q_HnK[:, start:stop].float() @ k_HnK.transpose(1, 2)
        scores = scores.mul_(scale / softcap).tanh_().mul_(softcap)
        seen = visible(start, stop, 0, n, reach, q_HnK.device)
        if seen is not None:
            scores.masked_fill_(~seen, float("-inf"))
        out_nHK[start:stop] = (scores.softmax(-1) @ v_HnK).transpose(0, 1)
