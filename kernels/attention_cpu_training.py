"""Attention on the CPU where it has a gradient or drops probabilities: batched products over sequences of equal length.

torch's own CPU kernel knows no dropout, and the reference's gradient, sequence by sequence, writes a tensor of the
whole batch for every one of them. Here neighbours of equal length are one batched product, nothing is padded, a
gradient is written where it belongs, and scores are made again in the backward instead of being kept: between the two
passes only q, k and v live. A block of scores is bounded, so that long texts and many short ones need the same memory.

Shape letters: T = packed tokens, H = query heads, G = kv heads, K = head size; in a block c = sequences, n = their
tokens, m = their queries of this block. Rows of a block's matrices run over a kv head's query heads, then over queries.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashvec.kernels.attention_cpu import Reach, visible
from flashvec.kernels.dropout import Dropout, draws_cpu, drop_cpu, fold_reference
from flashvec.kernels.schedule import Schedule

BLOCK_SCORES = 1 << 22  # elements of a block of scores: 16 MB of fp32, several of which live at once
DRAWN = 64  # probabilities of a row that are drawn for together, whether a text has so many or not
RUN_ROWS = 1 << 15  # rows of so many whose draws neighbouring blocks share: 8 MB


class _Settings(NamedTuple):
    scale: float
    reach: Reach
    softcap: float | None
    dropout: Dropout | None  # None where nothing is dropped


class _Block(NamedTuple):
    """Queries `first` to `stop` of neighbouring sequences of `length` tokens, the first at row `start`."""

    start: int
    num_sequences: int
    length: int
    first: int
    stop: int
    sequences: slice  # among those that have tokens

    def rows(self, x_TXK: Tensor) -> Tensor:
        """The sequences' rows as [c, n, X, K]."""
        count, n = self.num_sequences, self.length
        return x_TXK[self.start : self.start + count * n].unflatten(0, (count, n))


def attention_cpu_training(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    schedule: Schedule,
    *,
    scale: float,
    reach: Reach,
    softcap: float | None,
    dropout: Dropout | None,
) -> Tensor:
    """As `attention`, differentiable in q, k and v: [T, H, K] in the dtype of `q_THK`, fp32 inside."""
    dropped = dropout if dropout is not None and dropout.p else None
    return _Attention.apply(q_THK, k_TGK, v_TGK, schedule, _Settings(scale, reach, softcap, dropped))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, schedule: Schedule, settings: _Settings
    ) -> Tensor:
        # A copy of v: as a part of the merged product it would keep q and k alive, of which the rotated ones are kept.
        ctx.save_for_backward(q_THK, k_TGK, v_TGK.contiguous())
        ctx.schedule, ctx.settings = schedule, settings
        out_THK = q_THK.new_empty(q_THK.shape)
        out_THK[schedule.num_tokens :] = 0
        for block, draws in _blocks_and_draws(schedule, q_THK.shape[1], settings.dropout):
            q, k, v = _queries(block, q_THK, k_TGK.shape[1]), _keys(block, k_TGK), _keys(block, v_TGK)
            p, _ = _probabilities(block, q, k, settings)
            if draws is not None:
                _drop(p, draws, settings, out=p)
            _put_queries(block, out_THK, torch.bmm(p, v), 1.0 if settings.dropout is None else settings.dropout.scale)
        return out_THK

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dout_THK,) = grads
        q_THK, k_TGK, v_TGK = ctx.saved_tensors
        schedule, settings = ctx.schedule, ctx.settings
        kept_scale = 1.0 if settings.dropout is None else settings.dropout.scale
        scale = settings.scale * kept_scale  # scores' gradients are linear in the probabilities' ones
        dq_THK, dk_TGK, dv_TGK = (x.new_empty(x.shape) for x in (q_THK, k_TGK, v_TGK))
        for x in (dq_THK, dk_TGK, dv_TGK):
            x[schedule.num_tokens :] = 0
        dk = dv = None
        for block, draws in _blocks_and_draws(schedule, q_THK.shape[1], settings.dropout):
            q, k, v = _queries(block, q_THK, k_TGK.shape[1]), _keys(block, k_TGK), _keys(block, v_TGK)
            dout = _queries(block, dout_THK, k_TGK.shape[1])
            p, slope = _probabilities(block, q, k, settings)
            dp = torch.bmm(dout, v.transpose(1, 2))
            thinned = p
            if draws is not None:
                thinned = _drop(p, draws, settings, out=torch.empty_like(p))
                _drop(dp, draws, settings, out=dp)
            ds = torch._softmax_backward_data(dp, p, -1, torch.float32)
            if slope is not None:
                ds.mul_(slope)
            is_first, is_last = block.first == 0, block.stop == block.length
            more_v, more_k = torch.bmm(thinned.transpose(1, 2), dout), torch.bmm(ds.transpose(1, 2), q)
            dv, dk = (more_v, more_k) if is_first or dv is None or dk is None else (dv.add_(more_v), dk.add_(more_k))
            _put_queries(block, dq_THK, torch.bmm(ds, k), scale)
            if is_last:
                _put_keys(block, dk_TGK, dk.mul_(scale))
                _put_keys(block, dv_TGK, dv if kept_scale == 1.0 else dv.mul_(kept_scale))
        return dq_THK, dk_TGK, dv_TGK, None, None


def _blocks(schedule: Schedule, num_heads: int, least_columns: int = 1) -> Iterator[_Block]:
    """What is multiplied at once; all blocks of a run of sequences follow each other, first queries first.

    A block has `BLOCK_SCORES` elements at most, counting rows of scores as at least `least_columns` long.
    """
    start = sequence = 0
    for n, same in groupby(n for n in schedule.lengths if n):
        left = len(list(same))
        while left:
            count = min(left, max(1, BLOCK_SCORES // (num_heads * n * max(n, least_columns))))
            step = n if count > 1 else max(1, min(n, BLOCK_SCORES // (num_heads * max(n, least_columns))))
            for first in range(0, n, step):
                sequences = slice(sequence, sequence + count)
                yield _Block(start, count, n, first, min(first + step, n), sequences)
            start, sequence, left = start + count * n, sequence + count, left - count


def _queries(block: _Block, x_THK: Tensor, num_kv_heads: int) -> Tensor:
    """fp32 [c G, (H / G) m, K]: the block's queries, those that share keys under one another."""
    x = block.rows(x_THK)[:, block.first : block.stop].unflatten(2, (num_kv_heads, -1))
    return x.permute(0, 2, 3, 1, 4).float().reshape(block.num_sequences * num_kv_heads, -1, x_THK.shape[2])


def _put_queries(block: _Block, out_THK: Tensor, x: Tensor, scale: float) -> None:
    """The inverse of `_queries`."""
    num_queries = block.stop - block.first
    place = block.rows(out_THK)[:, block.first : block.stop]
    x = x.view(block.num_sequences, -1, num_queries, x.shape[-1]).transpose(1, 2)
    place.copy_(x if scale == 1.0 else x * scale)


def _keys(block: _Block, x_TGK: Tensor) -> Tensor:
    """fp32 [c G, n, K]."""
    return block.rows(x_TGK).transpose(1, 2).float().reshape(-1, block.length, x_TGK.shape[2])


def _put_keys(block: _Block, out_TGK: Tensor, x: Tensor) -> None:
    """The inverse of `_keys`."""
    block.rows(out_TGK).copy_(x.view(block.num_sequences, -1, block.length, x.shape[-1]).transpose(1, 2))


def _probabilities(block: _Block, q: Tensor, k: Tensor, settings: _Settings) -> tuple[Tensor, Tensor | None]:
    """Softmax of the scores, fp32 [c G, (H / G) m, n], and the soft-cap's derivative where there is one."""
    scores = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=settings.scale)
    slope = None
    if settings.softcap is not None:
        share = scores.div_(settings.softcap).tanh_()
        slope = 1 - share.square()
        scores = share.mul_(settings.softcap)
    see = visible(block.first, block.stop, 0, block.length, settings.reach, q.device)
    if see is not None:
        scores.view(-1, block.stop - block.first, block.length).masked_fill_(~see, float("-inf"))
    return torch.softmax(scores, -1), slope


# --- dropout ------------------------------------------------------------------------------------------


def _drop(p: Tensor, draws: Tensor, settings: _Settings, out: Tensor) -> Tensor:
    assert settings.dropout is not None
    drop_cpu(p.view(draws.shape), draws, settings.dropout.threshold, out=out.view(draws.shape))
    return out


def _blocks_and_draws(
    schedule: Schedule, num_heads: int, dropout: Dropout | None
) -> Iterator[tuple[_Block, Tensor | None]]:
    """Every block with what decides over its probabilities, int32 [c, H, m, n], if some are dropped.

    Neighbouring blocks draw together: of short texts a block alone has less to draw than the calls cost.
    """
    if dropout is None:
        yield from ((block, None) for block in _blocks(schedule, num_heads))
        return
    blocks = _blocks(schedule, num_heads, DRAWN)
    assert schedule.identities is not None
    identities = schedule.identities
    if min(schedule.lengths) == 0:
        identities = identities[torch.tensor(schedule.lengths) > 0]
    for run in _runs(blocks, num_heads):
        width = max(block.length for block in run)
        draws = draws_cpu(_row_keys(run, identities, dropout, num_heads), width, torch.float32)
        start = 0
        for block in run:
            shape = (block.num_sequences, num_heads, block.stop - block.first, block.length)
            stop = start + prod(shape[:3])
            yield block, draws[start:stop, : block.length].unflatten(0, shape[:3])
            start = stop


def _runs(blocks: Iterable[_Block], num_heads: int) -> Iterator[list[_Block]]:
    """Neighbouring blocks of whole sequences whose rows need as many draws; others alone."""
    run: list[_Block] = []
    size, kind = 0, None
    for block in blocks:
        num_queries, draws = block.stop - block.first, -(-block.length // DRAWN)
        own = block.num_sequences * num_heads * num_queries * draws
        own_kind = draws if num_queries == block.length else None
        if run and (own_kind is None or own_kind != kind or size + own > RUN_ROWS):
            yield run
            run, size = [], 0
        run.append(block)
        size, kind = size + own, own_kind
    if run:
        yield run


def _row_keys(run: list[_Block], identities: Tensor, dropout: Dropout, num_heads: int) -> tuple[Tensor, Tensor]:
    """Keys of a run's rows in their order: each is named by sequence, head and query."""
    own = identities[run[0].sequences.start : run[-1].sequences.stop]
    key = fold_reference(dropout.key(), own)
    key = fold_reference((key[0][:, None], key[1][:, None]), torch.arange(num_heads, dtype=torch.int32))
    queries = torch.tensor([block.stop - block.first for block in run for _ in range(block.num_sequences)])
    counts = queries.repeat_interleave(num_heads)
    heads = torch.repeat_interleave(counts)
    positions = torch.arange(len(heads)) - (counts.cumsum(0) - counts)[heads] + run[0].first
    return fold_reference((key[0].flatten()[heads], key[1].flatten()[heads]), positions.to(torch.int32))
