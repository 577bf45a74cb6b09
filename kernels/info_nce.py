"""InfoNCE over cosine similarities, tile by tile: the matrix of scores is never held.

    loss[i] = log sum_j exp(s[i, j]) - s[i, p(i)]          s[i, j] = cos(q_i, c_j) / temperature

p(i) is the column of query i's positive. A candidate j other than it can be left out of the sum: where its text is
the positive's (equal ids), or where it is so close that it is likely a match too: cos(q_i, c_j) > cos(q_i, c_p(i)) +
margin. Vectors are normalised here, as they come from pooling.

Several Matryoshka prefixes cost one product: the dot product is summed in the order of the columns and read off at
each prefix's end, scaled by that prefix's own lengths of q_i and c_j.

The loss is summed over scores less the positive's: where nothing else counts it is exactly 0. Backward recomputes each
tile of scores from it (`kernels/info_nce_tiles.py`).

Shape letters: B = queries, M = documents (candidates), D = vector size, P = prefixes.
Cost 2*B*M*D FLOPs forward, 8*B*M*D backward; memory grows with B + M. Sources: van den Oord et al. 2018; Kusupati et
al. 2022 (Matryoshka); the margin is that of Qwen3-Embedding (Zhang et al. 2025).
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from flashvec.kernels.backend import define_op, implementation
from flashvec.kernels.checks import INTEGERS, check_positive, check_range, may_look
from flashvec.kernels.info_nce_tiles import gradient_tiles, loss_tiles
from flashvec.kernels.precision import widen

NO_MARGIN = float("inf")


# --- reference ----------------------------------------------------------------------------------------


def info_nce_reference(
    queries_BD: Tensor,
    documents_MD: Tensor,
    positives_B: Tensor,
    temperature: float,
    *,
    document_ids_M: Tensor | None = None,
    margin: float | None = None,
    prefixes: Sequence[int] | None = None,
) -> Tensor:
    """All scores at once: [P, B] with `prefixes`, else [B], in fp32 or wider."""
    q, c = widen(queries_BD), widen(documents_MD)
    losses = []
    for size in prefixes or [q.shape[1]]:
        cosines_BM = _unit(q[:, :size]) @ _unit(c[:, :size]).T
        scores_BM = (cosines_BM - cosines_BM.gather(1, positives_B[:, None].long())) / temperature
        hidden_BM = _hidden(cosines_BM, positives_B, document_ids_M, NO_MARGIN if margin is None else margin)
        losses.append(scores_BM.masked_fill(hidden_BM, float("-inf")).logsumexp(1))
    return torch.stack(losses) if prefixes else losses[0]


def _unit(x: Tensor) -> Tensor:
    """Rows at unit length; a zero row stays zero."""
    return x * _reciprocal(x.square().sum(1, keepdim=True))


def _reciprocal(squares: Tensor) -> Tensor:
    return torch.where(squares > 0, squares, 1.0).rsqrt() * (squares > 0)


def _hidden(cosines_BM: Tensor, positives_B: Tensor, document_ids_M: Tensor | None, margin: float) -> Tensor:
    """Candidates left out, never the positive."""
    positive = positives_B[:, None].long()
    limit_B1 = cosines_BM.detach().gather(1, positive) + margin
    hidden_BM = cosines_BM > limit_B1
    if document_ids_M is not None:
        hidden_BM |= document_ids_M == document_ids_M[positive]
    return hidden_BM.scatter(1, positive, False)


# --- ops --------------------------------------------------------------------------------------------------


def _lengths(x_ND: Tensor, prefixes: Sequence[int]) -> Tensor:
    """Reciprocal length of each row's prefixes: fp32 [P, N]; 0 for a zero row."""
    squares = widen(x_ND).square()
    return torch.stack([_reciprocal(squares[:, :size].sum(1)) for size in prefixes])


def _positive_cosines(
    q_BD: Tensor, c_MD: Tensor, positives_B: Tensor, q_PB: Tensor, c_PM: Tensor, prefixes: Sequence[int]
) -> Tensor:
    """Each query's cosine to its positive: fp32 [P, B]."""
    products_BD = widen(q_BD) * widen(c_MD[positives_B])
    dots = torch.stack([products_BD[:, :size].sum(1) for size in prefixes])
    return dots * q_PB * c_PM[:, positives_B]


def _forward(
    q_BD: Tensor,
    c_MD: Tensor,
    positives_B: Tensor,
    ids_M: Tensor | None,
    temperature: float,
    margin: float,
    prefixes: Sequence[int],
) -> Tensor:
    """Loss: fp32 [P, B]."""
    if implementation(q_BD) != "triton":
        return _loss_torch(q_BD, c_MD, positives_B, ids_M, temperature, margin, prefixes)
    q_PB, c_PM = _lengths(q_BD, prefixes), _lengths(c_MD, prefixes)
    exact_PB = _positive_cosines(q_BD, c_MD, positives_B, q_PB, c_PM, prefixes)
    return loss_tiles(q_BD, c_MD, q_PB, c_PM, positives_B, exact_PB, ids_M, temperature, margin, prefixes)


def _backward(
    dloss_PB: Tensor,
    q_BD: Tensor,
    c_MD: Tensor,
    positives_B: Tensor,
    ids_M: Tensor | None,
    loss_PB: Tensor,
    temperature: float,
    margin: float,
    prefixes: Sequence[int],
) -> tuple[Tensor, Tensor]:
    if implementation(q_BD) != "triton":
        return _backward_torch(dloss_PB, q_BD, c_MD, positives_B, ids_M, loss_PB, temperature, margin, prefixes)
    q_PB, c_PM = _lengths(q_BD, prefixes), _lengths(c_MD, prefixes)
    exact_PB = _positive_cosines(q_BD, c_MD, positives_B, q_PB, c_PM, prefixes)
    facts = positives_B, exact_PB, loss_PB, dloss_PB, ids_M, temperature, margin, prefixes
    return gradient_tiles(q_BD, c_MD, True, q_PB, c_PM, *facts), gradient_tiles(c_MD, q_BD, False, c_PM, q_PB, *facts)


# --- the same by torch, a block of queries at a time ------------------------------------------------------

ROWS_TORCH = 1024  # queries whose scores are held at once


def _tiles_torch(
    q: Tensor, c: Tensor, positives: Tensor, ids: Tensor | None, temperature: float, margin: float, size: int
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Blocks of queries: their rows, unit queries, unit documents, scores less the positive's (-inf where left out)."""
    unit_c = _unit(widen(c[:, :size]))
    for start in range(0, len(q) or 1, ROWS_TORCH):  # at least one: whoever sums over blocks needs unit documents
        rows = slice(start, start + ROWS_TORCH)
        unit_q = _unit(widen(q[rows, :size]))
        cosines = unit_q @ unit_c.T
        hidden = _hidden(cosines, positives[rows], ids, margin)
        scores = (cosines - cosines.gather(1, positives[rows, None].long())) / temperature
        yield rows, unit_q, unit_c, scores.masked_fill_(hidden, float("-inf"))


def _loss_torch(
    q: Tensor,
    c: Tensor,
    positives: Tensor,
    ids: Tensor | None,
    temperature: float,
    margin: float,
    prefixes: Sequence[int],
) -> Tensor:
    loss = q.new_empty(len(prefixes), len(q), dtype=torch.float32)
    for m, size in enumerate(prefixes):
        for rows, *_, scores in _tiles_torch(q, c, positives, ids, temperature, margin, size):
            loss[m, rows] = scores.logsumexp(1)
    return loss


def _backward_torch(
    dloss: Tensor,
    q: Tensor,
    c: Tensor,
    positives: Tensor,
    ids: Tensor | None,
    loss: Tensor,
    temperature: float,
    margin: float,
    prefixes: Sequence[int],
) -> tuple[Tensor, Tensor]:
    dq, dc = torch.zeros_like(widen(q)), torch.zeros_like(widen(c))
    for m, size in enumerate(prefixes):
        q_reciprocal, c_reciprocal = (_reciprocal(widen(x[:, :size]).square().sum(1, keepdim=True)) for x in (q, c))
        pulled = torch.zeros_like(dc[:, :size])
        for rows, unit_q, unit_c, scores in _tiles_torch(q, c, positives, ids, temperature, margin, size):
            w = torch.exp(scores - loss[m, rows, None])
            w[torch.arange(len(w), device=w.device), positives[rows]] -= 1.0
            w *= dloss[m, rows, None] / temperature
            pull = w @ unit_c
            dq[rows, :size] += (pull - (pull * unit_q).sum(1, keepdim=True) * unit_q) * q_reciprocal[rows]
            pulled += w.T @ unit_q
        dc[:, :size] += (pulled - (pulled * unit_c).sum(1, keepdim=True) * unit_c) * c_reciprocal
    return dq.to(q.dtype), dc.to(c.dtype)


def _fake(q, c, positives, ids, temperature, margin, prefixes):
    return q.new_empty(len(prefixes), q.shape[0], dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    q, c, positives, ids, *ctx.numbers = inputs
    ctx.save_for_backward(q, c, positives, ids, output)


def _autograd(ctx, dloss):
    q, c, positives, ids, loss = ctx.saved_tensors
    dq, dc = _info_nce_bwd(dloss.contiguous(), q, c, positives, ids, loss, *ctx.numbers)
    return dq, dc, None, None, None, None, None


_info_nce_bwd = define_op(
    "info_nce_bwd(Tensor dloss, Tensor q, Tensor c, Tensor positives, Tensor? ids, Tensor loss, float temperature, "
    "float margin, int[] prefixes) -> (Tensor, Tensor)",
    _backward,
    lambda dloss, q, c, *rest: (torch.empty_like(q), torch.empty_like(c)),
)
_info_nce = define_op(
    "info_nce(Tensor q, Tensor c, Tensor positives, Tensor? ids, float temperature, float margin, int[] prefixes) "
    "-> Tensor",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_autograd,
)


# --- public -----------------------------------------------------------------------------------------------


def info_nce(
    queries_BD: Tensor,
    documents_MD: Tensor,
    positives_B: Tensor,
    temperature: float,
    *,
    document_ids_M: Tensor | None = None,
    margin: float | None = None,
    prefixes: Sequence[int] | None = None,
) -> Tensor:
    """Contrast each query's document with all others.

    Args:
        queries_BD: [B, D] fp32, bf16 or fp16 (fp64 runs the reference), contiguous. They are normalised here; lengths
            from 1e-18 to 1e18, or 0.
        documents_MD: [M, D], same dtype: positives and hard negatives, of this process or gathered from all.
        positives_B: int32 or int64 [B]: each query's document. On a GPU values are trusted: checking them would wait.
        temperature: divides the cosines; positive. It has no gradient: to learn it, scale what the loss is made of.
        document_ids_M: integers [M] that name texts: candidates with the positive's id are left out. Queries put among
            the documents (a query-query term) are kept from themselves by their positive's id.
        margin: candidates with a cosine above the positive's plus this are left out; None keeps all.
        prefixes: leading columns to contrast by, ascending, for Matryoshka training; None: all columns.

    Returns:
        fp32 [B], or [P, B] with `prefixes`: the loss of each query. Differentiable in queries and documents; which
        candidates are left out is not.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, a temperature or prefixes out of range, a
            temperature that wants a gradient; on the CPU also a positive that is no document.

    Error: dot products, sums and gradients are accumulated in fp32, gradients rounded once. Bitwise deterministic.
    """
    _check(queries_BD, documents_MD, positives_B, temperature, document_ids_M, margin, prefixes)
    if may_look(positives_B):
        check_range("positives_B", positives_B, len(documents_MD))
    sizes = list(prefixes) if prefixes is not None else [queries_BD.shape[1]]
    if queries_BD.dtype == torch.float64:
        return info_nce_reference(
            *(queries_BD, documents_MD, positives_B, temperature),
            document_ids_M=document_ids_M,
            margin=margin,
            prefixes=prefixes,
        )
    limit = NO_MARGIN if margin is None else margin
    ids_M = None if document_ids_M is None else document_ids_M.contiguous()
    loss_PB = _info_nce(queries_BD, documents_MD, positives_B.contiguous(), ids_M, temperature, limit, sizes)
    return loss_PB if prefixes is not None else loss_PB[0]


def _check(
    q: Tensor,
    c: Tensor,
    positives: Tensor,
    temperature: float,
    ids: Tensor | None,
    margin: float | None,
    prefixes: Sequence[int] | None,
) -> None:
    if q.ndim != 2 or c.ndim != 2 or q.shape[1] != c.shape[1] or q.dtype != c.dtype:
        raise ValueError(f"queries {tuple(q.shape)} {q.dtype} and documents {tuple(c.shape)} {c.dtype} do not fit")
    if not q.is_floating_point() or not q.is_contiguous() or not c.is_contiguous():
        found = f"{q.dtype}, strides {q.stride()} and {c.stride()}"
        raise ValueError(f"queries and documents must be contiguous floats, got {found}")
    if positives.shape != q.shape[:1] or positives.dtype not in INTEGERS:  # torch takes bool and uint8 for a mask
        found = f"{tuple(positives.shape)} {positives.dtype}"
        raise ValueError(f"positives_B is {found}, expected {len(q)} integers, int32 or int64")
    if ids is not None and (ids.shape != c.shape[:1] or ids.is_floating_point()):
        raise ValueError(f"document_ids_M is {tuple(ids.shape)} {ids.dtype}, expected {len(c)} integers")
    for name, x in (("documents_MD", c), ("positives_B", positives), ("document_ids_M", ids)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, queries_BD on {q.device}")
    check_positive("temperature", temperature)
    if margin is not None and not margin >= 0:
        raise ValueError(f"margin is {margin}, expected at least 0: below it a positive would hide itself")
    if prefixes is not None:
        rising = all(a < b for a, b in pairwise(prefixes))
        if not prefixes or not rising or prefixes[0] < 1 or prefixes[-1] > q.shape[1]:
            raise ValueError(f"prefixes are {list(prefixes)}, expected rising sizes from 1 to {q.shape[1]}")
