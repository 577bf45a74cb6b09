"""Attention over packed sequences, each attending to itself alone.

    out = softmax(cap(q kᵀ * scale) + mask) v        cap(s) = softcap * tanh(s / softcap), when set

`q` has H heads, `k` and `v` have G (H a multiple of G): query head h reads key head h // (H / G). Query i sees the keys
from i - left to i + right: everything by default, nothing to the right when causal, a window where one is given.

On a GPU one program owns a tile: some tokens of one sequence, times the query heads that share a kv head, read from the
batch's tile list (`kernels/schedule.py`). It walks the sequence's keys once with a running maximum (FlashAttention);
short sequences (up to 64 or 128 tokens, as a target's registers allow) fit one tile of keys and need no walk. Queries,
of heads up to 128 elements, can be normalised and rotated as they are loaded; keys, which every tile of a sequence
reads again, are rotated once by a pass of their own. Plain calls on Hopper take `kernels/attention_hopper.py`.

Shape letters: T = packed tokens, H = query heads, G = kv heads, K = head size, n = a sequence's tokens.
Cost 4*n²*K FLOPs a head, 2*(2 + 2*G/H)*n*K bytes in 16 bits: bound by memory below some 300 tokens on an H100.
Sources: Vaswani et al. 2017; grouped heads Ainslie et al. 2023; soft-cap Gemma 2; the running maximum Milakov and
Gimelshein 2018, Dao et al. 2022.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from flashvec.kernels.attention_bwd import backward_tiles
from flashvec.kernels.attention_cpu import Reach, attention_cpu, visible
from flashvec.kernels.attention_cpu_training import attention_cpu_training
from flashvec.kernels.attention_fwd import attention_op, forward_tiles
from flashvec.kernels.backend import as_given, implementation, needs_gradient
from flashvec.kernels.checks import check_eps, check_positive, check_weight
from flashvec.kernels.dropout import Dropout, fold_reference, keep_reference
from flashvec.kernels.norm_rope import norm_rope
from flashvec.kernels.precision import widen
from flashvec.kernels.rope import rope
from flashvec.kernels.schedule import Queries, Schedule

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # the last by the reference alone
MAX_HEAD_SIZE = 256
MAX_ROTATED_HEAD = 128  # larger heads are rotated by a pass of their own
FARTHEST = 1 << 30  # that a kernel's window reaches: past any sequence, and a token's number more still fits 32 bits


@dataclass(frozen=True)
class Rotation:
    """RoPE of queries and keys inside attention, with the head norms of Qwen3 and Gemma 3 before it where given.

    `cos_TK`, `sin_TK`: fp32 [T, K / 2], one row per row of the batch. `query_norm_K`, `key_norm_K`: [K] or both None.
    """

    cos_TK: Tensor
    sin_TK: Tensor
    query_norm_K: Tensor | None = None
    key_norm_K: Tensor | None = None
    norm_eps: float = 0.0
    norm_offset: float = 0.0


# --- reference: the definition, one sequence after the other, scores written out -------------------------


@as_given
def attention_reference(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    schedule: Schedule,
    *,
    scale: float,
    causal: bool = False,
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [T, H, K] in the dtype of `q_THK` and log-sum-exp of the scores [H, T]; fp32 or wider inside."""
    num_heads, reach = q_THK.shape[1], _reach(causal, window)
    outs, lses = [], []
    for sequence, (start, stop) in enumerate(pairwise(schedule.cu_seqlens.tolist())):
        q, k, v = (widen(x[start:stop]).transpose(0, 1) for x in (q_THK, k_TGK, v_TGK))
        k, v = (x.repeat_interleave(num_heads // k_TGK.shape[1], 0) for x in (k, v))
        scores = q @ k.transpose(1, 2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        see = visible(0, stop - start, 0, stop - start, reach, q.device)
        if see is not None:
            scores = scores.masked_fill(~see, float("-inf"))
        probabilities = scores.softmax(-1)
        if dropout is not None and dropout.p:
            keep = _keep_reference(dropout, schedule, sequence, stop - start, num_heads)
            probabilities = probabilities * keep * dropout.scale
        outs.append((probabilities @ v).transpose(0, 1))
        lses.append(scores.logsumexp(-1))
    filling = len(q_THK) - sum(len(o) for o in outs)
    wide = widen(q_THK[:0])
    nothing = sum(widen(x[:0]).sum() for x in (q_THK, k_TGK, v_TGK))  # 0, with a gradient even without sequences
    out_THK = torch.cat([*outs, wide.new_zeros(filling, *q_THK.shape[1:]) + nothing]).to(q_THK.dtype)
    return out_THK, torch.cat([*lses, wide.new_zeros(num_heads, filling) + nothing], 1)


def _keep_reference(dropout: Dropout, schedule: Schedule, sequence: int, length: int, num_heads: int) -> Tensor:
    assert schedule.identities is not None
    device = schedule.identities.device
    key = fold_reference(dropout.key(), schedule.identities[sequence])
    key = fold_reference(key, torch.arange(num_heads, dtype=torch.int32, device=device)[:, None])
    key = fold_reference(key, torch.arange(length, dtype=torch.int32, device=device))
    return keep_reference(key, length, dropout.threshold)


# --- public -----------------------------------------------------------------------------------------------


def attention(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    schedule: Schedule,
    *,
    scale: float,
    causal: bool = False,
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    rotation: Rotation | None = None,
    dropout: Dropout | None = None,
    queries: Queries | None = None,
) -> Tensor:
    """Attend within each packed sequence.

    Args:
        q_THK: [T, H, K] fp32, bf16 or fp16 (fp64 runs the reference); any row stride (a slice of a merged product is
            fine), K at most 256.
        k_TGK, v_TGK: [T, G, K], same dtype.
        schedule: of this batch; rows past its tokens are filling and come back as zeros.
        scale: multiplies the scores; a positive number.
        causal: hide later tokens.
        window: farthest visible distance in tokens to each side, or (left, right); None sees all.
        softcap: bound on the absolute scores; None leaves them.
        rotation: normalise and rotate queries and keys first; None takes them as they are.
        dropout: of the attention probabilities, keyed by the schedule's identities, head and positions.
        queries: only these tokens of the sequences attend, to all the keys they see; `q_THK` then holds their R rows.

    Returns:
        [T, H, K] ([R, H, K] with `queries`), dtype of `q_THK`, contiguous. Scores and sums are fp32. Differentiable in
        q, k and v; with head norms in `rotation` in their weights too.

    Raises:
        TypeError: `schedule` is no `Schedule`.
        ValueError: shapes, dtypes or devices that do not fit together, one head norm without the other, a head size
            over 256, a negative window, a window that looks right of a causal mask, a scale or softcap that is not
            positive and finite or wants a gradient, dropout without identities, queries of another schedule.
        RuntimeError: inside torch.compile with a schedule that attention has not run with before, forward, and with a
            gradient if one is wanted: its tile lists are made then. On a CPU a gradient or dropout breaks the graph,
            which `fullgraph=True` refuses.

    Error: a sequence's result does not depend on what else is in the batch; repeated runs agree bit for bit.
    """
    reach = _reach(causal, window)
    _check(q_THK, k_TGK, v_TGK, schedule, scale, softcap, queries)
    if rotation is not None:
        _check_norms(q_THK, rotation)
    if dropout is not None and dropout.p and schedule.identities is None:
        raise ValueError("dropout needs build_schedule(..., identities=...): its masks are keyed by them")
    run = "torch" if q_THK.dtype == torch.float64 else implementation(q_THK)
    if rotation is not None and (run != "triton" or _rotates_before(q_THK, k_TGK, v_TGK, rotation)):
        q_THK, k_TGK = rotate(q_THK, k_TGK, rotation, queries)
        rotation = None
    if queries is not None and run == "triton" and needs_gradient(q_THK, k_TGK, v_TGK):  # given for whole sequences
        out_THK = attention(
            _whole(q_THK, k_TGK, queries),
            k_TGK,
            v_TGK,
            schedule,
            scale=scale,
            causal=causal,
            window=window,
            softcap=softcap,
            rotation=rotation,
            dropout=dropout,
        )
        return _asked_for(out_THK, queries)
    if run == "triton":
        return _attention_triton(q_THK, k_TGK, v_TGK, schedule, scale, reach, softcap, rotation, dropout, queries)
    if queries is not None:  # a row's result does not depend on other rows: attend with all, keep the asked-for
        q_THK = _whole(q_THK, k_TGK, queries)
    if run == "cpu" and (needs_gradient(q_THK, k_TGK, v_TGK) or (dropout and dropout.p)):
        out_THK = attention_cpu_training(
            q_THK, k_TGK, v_TGK, schedule, scale=scale, reach=reach, softcap=softcap, dropout=dropout
        )
    elif run == "cpu":
        out_THK = attention_cpu(q_THK, k_TGK, v_TGK, schedule, scale=scale, reach=reach, softcap=softcap)
    else:
        out_THK, _ = attention_reference(
            q_THK, k_TGK, v_TGK, schedule, scale=scale, causal=causal, window=window, softcap=softcap, dropout=dropout
        )
    return out_THK if queries is None else _asked_for(out_THK, queries)


def _whole(q_RHK: Tensor, k_TGK: Tensor, queries: Queries) -> Tensor:
    """Selected queries among the rows of the batch, zeros elsewhere."""
    asked = slice(queries.num_tokens)  # the rows past it are filling: they name a row that may be asked for, too
    whole_THK = q_RHK.new_zeros(len(k_TGK), *q_RHK.shape[1:])
    return whole_THK.index_copy(0, queries.rows[asked], q_RHK[asked])


def _asked_for(out_THK: Tensor, queries: Queries) -> Tensor:
    out_RHK = out_THK[queries.rows]
    out_RHK[queries.num_tokens :] = 0
    return out_RHK


def rotate(q_THK: Tensor, k_TGK: Tensor, rotation: Rotation, queries: Queries | None = None) -> tuple[Tensor, Tensor]:
    """Queries and keys normalised and rotated, in passes of their own."""
    q_THK = _rotate(q_THK, rotation.query_norm_K, _query_tables(rotation, queries), rotation)
    return q_THK, _rotate(k_TGK, rotation.key_norm_K, (rotation.cos_TK, rotation.sin_TK), rotation)


def _rotate(x: Tensor, weight_K: Tensor | None, tables: tuple[Tensor, Tensor], rotation: Rotation) -> Tensor:
    if weight_K is None:
        return rope(x, *tables)
    return norm_rope(x, *tables, weight_K, rotation.norm_eps, rotation.norm_offset)


def _query_tables(rotation: Rotation, queries: Queries | None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the query rows."""
    if queries is None:
        return rotation.cos_TK, rotation.sin_TK
    return rotation.cos_TK[queries.rows], rotation.sin_TK[queries.rows]


def _rotates_before(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, rotation: Rotation) -> bool:
    """Heads are rotated by a pass of their own where doing it inside attention would cost registers it lacks.

    That is where there are head norms and any gradient is wanted, and in large heads: beside a tile of 256 columns the
    partner of each element spills 1,200 bytes, or takes tiles that compute every score twice.
    """
    norms = rotation.query_norm_K, rotation.key_norm_K
    return q_THK.shape[2] > MAX_ROTATED_HEAD or (norms[0] is not None and needs_gradient(q_THK, k_TGK, v_TGK, *norms))


def _reach(causal: bool, window: int | tuple[int, int] | None) -> Reach:
    sides = window if isinstance(window, tuple) else (window, window)
    if len(sides) != 2 or not all(side is None or (type(side) is int and side >= 0) for side in sides):
        raise ValueError(f"window counts tokens to each side, a whole number or a tuple of two, got {window!r}")
    left, right = sides
    if causal and isinstance(window, tuple) and right:
        raise ValueError(f"causal attention sees nothing to the right, but window is {window}; use ({left}, 0)")
    return left, 0 if causal else right


def _check(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    schedule: Schedule,
    scale: float,
    softcap: float | None,
    queries: Queries | None,
) -> None:
    if not isinstance(schedule, Schedule):
        made = "build_schedule(lengths, device=...) makes one, of cu_seqlens build_schedule(cu_seqlens.diff().tolist())"
        raise TypeError(f"schedule is {type(schedule).__name__}: {made}")
    tensors = {"q_THK": q_THK, "k_TGK": k_TGK, "v_TGK": v_TGK}
    for name, x in tensors.items():
        rows = len(schedule.positions) if queries is None or name != "q_THK" else len(queries.rows)
        if x.ndim != 3 or x.shape[2] != q_THK.shape[-1] or len(x) != rows:
            shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in tensors.items())
            raise ValueError(f"{name} does not fit a batch of {rows} rows: {shapes}")
        if x.dtype not in DTYPES or x.dtype != q_THK.dtype:
            raise ValueError(f"{name} is {x.dtype}, expected one of {DTYPES}, the same for all; q_THK is {q_THK.dtype}")
        if x.device != schedule.cu_seqlens.device:
            raise ValueError(f"{name} is on {x.device}, the schedule on {schedule.cu_seqlens.device}")
        if x.shape[2] > 1 and x.stride(2) != 1:
            raise ValueError(f"{name}'s heads must be contiguous, its strides are {x.stride()}")
    H, G = q_THK.shape[1], k_TGK.shape[1]
    if k_TGK.shape != v_TGK.shape or G == 0 or H == 0 or H % G:
        raise ValueError(f"q {tuple(q_THK.shape)}, k {tuple(k_TGK.shape)} and v {tuple(v_TGK.shape)} do not fit")
    if q_THK.shape[2] > MAX_HEAD_SIZE:
        raise ValueError(f"head size is {q_THK.shape[2]}, at most {MAX_HEAD_SIZE} is supported")
    check_positive("scale", scale)
    if softcap is not None:
        check_positive("softcap", softcap, " or None")
    if queries is not None and queries.lengths is not schedule.lengths and queries.lengths != schedule.lengths:
        raise ValueError(f"queries are of texts of {queries.lengths} tokens, the schedule of {schedule.lengths}")


def _check_norms(q_THK: Tensor, rotation: Rotation) -> None:
    check_eps(rotation.norm_eps)
    if (rotation.query_norm_K is None) != (rotation.key_norm_K is None):
        raise ValueError("rotation has one of query_norm_K and key_norm_K, expected both or neither")
    for name in ("query_norm_K", "key_norm_K"):
        weight_K = getattr(rotation, name)
        if weight_K is not None:
            check_weight(name, weight_K, q_THK)


def _attention_triton(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    schedule: Schedule,
    scale: float,
    reach: Reach,
    softcap: float | None,
    rotation: Rotation | None,
    dropout: Dropout | None,
    queries: Queries | None,
) -> Tensor:
    num_tokens = schedule.num_tokens if queries is None else queries.num_tokens
    cos_TK = sin_TK = query_norm_K = rotated_TGK = None
    norm_eps = norm_offset = 0.0
    if rotation is not None:
        cos_TK, sin_TK = _query_tables(rotation, queries)
        norm_eps, norm_offset = rotation.norm_eps, rotation.norm_offset
        query_norm_K = None if rotation.query_norm_K is None else rotation.query_norm_K.contiguous()
        # The op turns the gradient of these keys back itself: no pass, and no node, of its own.
        tables = rotation.cos_TK, rotation.sin_TK
        rotated_TGK = _rotate(k_TGK.detach(), rotation.key_norm_K, tables, rotation)
    left, right = (-1 if side is None else min(side, FARTHEST) for side in reach)
    threshold, key, identities = 0, (0, 0), None
    if dropout is not None and dropout.p:
        threshold, key, identities = dropout.threshold, dropout.key(), schedule.identities
    of: Schedule | Queries = schedule if queries is None else queries
    options = max(left, right) >= 0, softcap is not None, threshold > 0
    tiles = forward_tiles(q_THK, k_TGK, v_TGK, of, rotation is not None, *options)
    later_tiles: list[Tensor] = []  # the backward has no schedule at hand
    if needs_gradient(q_THK, k_TGK, v_TGK):
        later_tiles = backward_tiles(q_THK, k_TGK, v_TGK, schedule, rotation is not None, *options)
    out_THK, _ = attention_op(
        *(q_THK, k_TGK, v_TGK, rotated_TGK, tiles, later_tiles),
        0 if schedule.is_static else num_tokens,  # a captured batch zeroes all: the next one may be shorter
        *(cos_TK, sin_TK, query_norm_K, norm_eps, norm_offset),
        *(identities, None if queries is None else queries.shift_stop),
        *(scale, left, right, softcap or 0.0, threshold, *key),
    )
    return out_THK
