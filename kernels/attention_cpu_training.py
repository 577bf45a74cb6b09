"""Attention on the CPU where it has a gradient or drops probabilities: batched products over sequences of like length.

torch's own CPU kernel knows no dropout, and the reference's gradient, sequence by sequence, writes a tensor of the
whole batch for every one of them. Here neighbours whose lengths round up to the same multiple of eight are one batched
product and a gradient is written where it belongs. Between the two passes q, k and v live, and of short texts the
probabilities, which take about as much; those of longer ones are made again. A block of scores is bounded, so that
long texts and many short ones need the same memory.

Of short texts a call costs more than its arithmetic: so the whole batch is brought once into the order that products
read (fp32; of each sequence, a head's tokens together), every block is a view of that, and only products, softmax
and dropout are called for each. Filling up to eight costs nothing: the libraries take a vector at a time, and what is
left over one number at a time. Filled keys are hidden; filled queries give rows that nobody reads and whose gradient
is zero.

Shape letters: T = packed tokens, H = query heads, G = kv heads, K = head size; in a block c = sequences, n = their
tokens, filled up, m = their queries of this block. Rows of a block's matrices run over a kv head's query heads, then
over queries.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashvec.kernels.attention_cpu import Reach, visible
from flashvec.kernels.backend import as_given
from flashvec.kernels.dropout import Dropout, draws_cpu, drop_cpu, fold_reference
from flashvec.kernels.schedule import Schedule, filled_length

BLOCK_SCORES = 1 << 22  # elements of a block of scores: 16 MB of fp32, several of which live at once
DRAWN = 64  # probabilities of a row that are drawn for together, whether a text has so many or not
KEPT_LENGTH = DRAWN  # tokens of the longest texts whose probabilities live until the backward
MOST_FILLED = 2  # times a batch's rows: where texts fill up to more, q, k and v are kept as they came
HIDDEN = -1e30  # added to a filled key's score: its probability is zero, and a row that sees none else stays finite
RUN_ROWS = 1 << 15  # rows of so many whose draws neighbouring blocks share: 8 MB


class _Settings(NamedTuple):
    scale: float
    reach: Reach
    softcap: float | None
    dropout: Dropout | None  # None where nothing is dropped


class _Block(NamedTuple):
    """Queries `first` to `stop` of neighbouring sequences that fill up to `length` tokens, the first at row `start`."""

    start: int
    length: int
    first: int
    stop: int
    sequences: slice  # among those that have tokens
    hidden: Tensor | None  # what hides the keys that fill up, [c G, 1, n]; None where nothing does

    @property
    def num_sequences(self) -> int:
        return self.sequences.stop - self.sequences.start

    def is_kept(self, settings: _Settings) -> bool:
        """Whether its probabilities live until the backward, negative where they are dropped."""
        return self.length <= KEPT_LENGTH and settings.softcap is None  # a soft-cap's gradient asks for the scores

    def queries(self, x_TXK: Tensor, num_kv_heads: int) -> Tensor:
        """A view [c, G, H / G, m, K] of what is in the order of heads."""
        return self._heads(x_TXK, num_kv_heads)[..., self.first : self.stop, :]

    def keys(self, x_TXK: Tensor) -> Tensor:
        """A view [c G, n, K] of what is in the order of heads."""
        return self._heads(x_TXK, x_TXK.shape[1]).flatten(0, 2)

    def _heads(self, x_TXK: Tensor, num_kv_heads: int) -> Tensor:
        rows = x_TXK[self.start : self.start + self.num_sequences * self.length]
        return rows.view(self.num_sequences, num_kv_heads, -1, self.length, x_TXK.shape[2])


@as_given
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
        ordered = [_by_heads(x, schedule) for x in (q_THK, k_TGK, v_TGK)]
        queries, keys, values = (x.float() for x in ordered)
        G, mixed, kept, kept_scale = keys.shape[1], torch.empty_like(queries), [], _kept_scale(settings)
        for block, draws in _blocks_and_draws(schedule, q_THK.shape[1], G, settings):
            q = block.queries(queries, G).flatten(2, 3).flatten(0, 1)
            p, _ = _probabilities(block, q, block.keys(keys), settings)
            thinned, is_kept = p, block.is_kept(settings)
            if draws is not None:
                thinned = _drop(p, draws, settings, out=torch.empty_like(p) if is_kept else p)
            _multiply(thinned, block.keys(values), kept_scale, out=block.queries(mixed, G))
            if is_kept:
                kept.append(p if draws is None else p.lerp_(thinned, 2.0))  # 2 thinned - p: exact
        ctx.is_ordered = len(queries) <= MOST_FILLED * len(q_THK)
        # A copy of v: as a part of the merged product it would keep q and k alive, of which the rotated ones are kept.
        held = ordered if ctx.is_ordered else (q_THK, k_TGK, v_TGK.contiguous())
        ctx.save_for_backward(*held, *kept)
        ctx.schedule, ctx.settings, ctx.num_rows = schedule, settings, len(q_THK)
        return _by_tokens(mixed, q_THK.dtype, len(q_THK), schedule)

    @staticmethod
    @as_given
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # what is kept has no graph: torch would take zeros for its gradient
            raise RuntimeError("attention's backward has no gradient: first derivatives alone, no create_graph=True")
        q_THK, k_TGK, v_TGK, *kept = ctx.saved_tensors
        schedule, settings, left = ctx.schedule, ctx.settings, iter(kept)
        held = (q_THK, k_TGK, v_TGK)
        ordered = held if ctx.is_ordered else [_by_heads(x, schedule) for x in held]
        queries, keys, values, gradients = (x.float() for x in (*ordered, _by_heads(grads[0], schedule)))
        (_, H, _), (_, G, _), dtype = queries.shape, keys.shape, q_THK.dtype
        dqueries, dkeys, dvalues = (torch.empty_like(x) for x in (queries, keys, values))
        kept_scale = _kept_scale(settings)
        scale = settings.scale * kept_scale  # scores' gradients are linear in the probabilities' ones
        for block, draws in _blocks_and_draws(schedule, H, G, settings, again=True):
            q, dout = (block.queries(x, G).flatten(2, 3).flatten(0, 1) for x in (queries, gradients))
            k, v = block.keys(keys), block.keys(values)
            dp = torch.bmm(dout, v.transpose(1, 2))
            if block.is_kept(settings):
                p, slope = next(left), None
                thinned = p
                if settings.dropout is not None:
                    torch.ops.aten.threshold_backward.grad_input(dp, p, 0, grad_input=dp)
                    thinned, p = p.relu(), p.abs()
            else:
                p, slope = _probabilities(block, q, k, settings)
                thinned = p
                if draws is not None:
                    thinned = _drop(p, draws, settings, out=torch.empty_like(p))
                    _drop(dp, draws, settings, out=dp)
            ds = torch._softmax_backward_data(dp, p, -1, torch.float32)
            if slope is not None:
                ds.mul_(slope)
            before = 0 if block.first == 0 else 1  # other queries of these sequences have added their share
            dk, dv = block.keys(dkeys), block.keys(dvalues)
            torch.baddbmm(dv, thinned.transpose(1, 2), dout, beta=before, alpha=kept_scale, out=dv)
            torch.baddbmm(dk, ds.transpose(1, 2), q, beta=before, alpha=scale, out=dk)
            _multiply(ds, k, scale, out=block.queries(dqueries, G))
        return *(_by_tokens(x, dtype, ctx.num_rows, schedule) for x in (dqueries, dkeys, dvalues)), None, None


def _by_heads(x_TXK: Tensor, schedule: Schedule) -> Tensor:
    """[filled tokens, X, K] whose memory is in the order of `Schedule.head_order`, zero where it is filled up.

    The first two axes say how much there is, not where: `_Block`'s views find a sequence's heads in it.
    """
    T, (_, X, K) = schedule.num_tokens, x_TXK.shape
    order = schedule.head_order(X)
    found = x_TXK[:T].reshape(T * X, K).index_select(0, order.rows)
    return found.index_fill_(0, order.filling, 0).view(-1, X, K)


def _by_tokens(x_TXK: Tensor, dtype: torch.dtype, num_rows: int, schedule: Schedule) -> Tensor:
    """The inverse of `_by_heads`; rows past all texts are zero."""
    T, (_, X, K) = schedule.num_tokens, x_TXK.shape
    found = x_TXK.to(dtype).view(-1, K)
    out_TXK = found.new_empty(num_rows, X, K)
    out_TXK[T:] = 0
    torch.index_select(found, 0, schedule.head_order(X).places, out=out_TXK[:T].view(T * X, K))
    return out_TXK


def _multiply(a: Tensor, b: Tensor, scale: float, out: Tensor) -> None:
    """A batched product times `scale` into a view of `_Block.queries`, whole sequences' or a part of one."""
    if out.is_contiguous():
        found = out.view(len(a), -1, b.shape[2])
        torch.baddbmm(found, a, b, beta=0, alpha=scale, out=found)
    else:
        out.copy_(torch.baddbmm(a.new_zeros(()), a, b, beta=0, alpha=scale).view(out.shape))


def _blocks(schedule: Schedule, num_heads: int, num_kv_heads: int, least_columns: int = 1) -> list[_Block]:
    """What is multiplied at once; all blocks of a run of sequences follow each other, first queries first.

    A block has `BLOCK_SCORES` elements at most, counting rows of scores as at least `least_columns` long. Every layer
    asks for the same ones: made when first asked for.
    """
    key = (num_heads, num_kv_heads, least_columns)
    if key not in schedule.head_blocks:
        schedule.head_blocks[key] = list(_cut(schedule, num_heads, num_kv_heads, least_columns))
    return schedule.head_blocks[key]


def _cut(schedule: Schedule, num_heads: int, num_kv_heads: int, least_columns: int) -> Iterator[_Block]:
    start = sequence = 0
    for n, same in groupby((n for n in schedule.lengths if n), filled_length):
        left = list(same)
        while left:
            count = min(len(left), max(1, BLOCK_SCORES // (num_heads * n * max(n, least_columns))))
            step = n if count > 1 else max(1, min(n, BLOCK_SCORES // (num_heads * max(n, least_columns))))
            sequences, hidden = slice(sequence, sequence + count), _hidden(left[:count], n, num_kv_heads)
            for first in range(0, n, step):
                yield _Block(start, n, first, min(first + step, n), sequences, hidden)
            start, sequence, left = start + count * n, sequence + count, left[count:]


def _hidden(lengths: list[int], filled: int, num_kv_heads: int) -> Tensor | None:
    if min(lengths) == filled:
        return None
    fills = torch.arange(filled) >= torch.tensor(lengths)[:, None]
    return (fills * HIDDEN).repeat_interleave(num_kv_heads, 0)[:, None]


def _probabilities(block: _Block, q: Tensor, k: Tensor, settings: _Settings) -> tuple[Tensor, Tensor | None]:
    """Softmax of the scores, fp32 [c G, (H / G) m, n], and the soft-cap's derivative where there is one."""
    slope, hidden = None, block.hidden
    if settings.softcap is None and hidden is not None:
        scores = torch.baddbmm(hidden, q, k.transpose(1, 2), alpha=settings.scale)
    else:
        scores = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=settings.scale)
    if settings.softcap is not None:
        share = scores.div_(settings.softcap).tanh_()
        slope = 1 - share.square()
        scores = share.mul_(settings.softcap)
        if hidden is not None:
            scores += hidden
    see = visible(block.first, block.stop, 0, block.length, settings.reach, q.device)
    if see is not None:
        scores.view(-1, block.stop - block.first, block.length).masked_fill_(~see, float("-inf"))
    return torch.softmax(scores, -1), slope


# --- dropout ------------------------------------------------------------------------------------------


def _kept_scale(settings: _Settings) -> float:
    return 1.0 if settings.dropout is None else settings.dropout.scale


def _drop(p: Tensor, draws: Tensor, settings: _Settings, out: Tensor) -> Tensor:
    assert settings.dropout is not None
    drop_cpu(p.view(draws.shape), draws, settings.dropout.threshold, out=out.view(draws.shape))
    return out


class _Run(NamedTuple):
    """Neighbouring blocks that are drawn for together: of short texts one has less to draw than the calls cost."""

    blocks: list[_Block]
    heads: Tensor  # int64 [rows]: of each row, which head of which of the run's sequences, counted through
    positions: Tensor  # int32 [rows]: of each row, its query

    @property
    def width(self) -> int:
        return max(block.length for block in self.blocks)


def _blocks_and_draws(
    schedule: Schedule, num_heads: int, num_kv_heads: int, settings: _Settings, *, again: bool = False
) -> Iterator[tuple[_Block, Tensor | None]]:
    """Every block with what decides over its probabilities, int32 [c, H, m, n], if some are dropped.

    The second time (`again`) blocks whose probabilities were kept come without: it stands in these.
    """
    dropout = settings.dropout
    if dropout is None:
        yield from ((block, None) for block in _blocks(schedule, num_heads, num_kv_heads))
        return
    assert schedule.identities is not None
    identities = schedule.identities
    if 0 in schedule.lengths:
        identities = identities[torch.tensor(schedule.lengths) > 0]
    for run in _runs(schedule, num_heads, num_kv_heads):
        if again and all(block.is_kept(settings) for block in run.blocks):
            yield from ((block, None) for block in run.blocks)
            continue
        draws = draws_cpu(_row_keys(run, identities, dropout, num_heads), run.width, torch.float32)
        start = 0
        for block in run.blocks:
            shape = (block.num_sequences, num_heads, block.stop - block.first, block.length)
            stop = start + prod(shape[:3])
            yield block, draws[start:stop, : block.length].unflatten(0, shape[:3])
            start = stop


def _runs(schedule: Schedule, num_heads: int, num_kv_heads: int) -> list[_Run]:
    """Neighbouring blocks of whole sequences whose rows need as many draws; others alone. Made when first asked for."""
    key = (num_heads, num_kv_heads)
    if key not in schedule.head_runs:
        blocks = _blocks(schedule, num_heads, num_kv_heads, DRAWN)
        schedule.head_runs[key] = [_run(blocks, num_heads) for blocks in _neighbours(blocks, num_heads)]
    return schedule.head_runs[key]


def _neighbours(blocks: Iterable[_Block], num_heads: int) -> Iterator[list[_Block]]:
    found: list[_Block] = []
    size, kind = 0, None
    for block in blocks:
        num_queries, draws = block.stop - block.first, -(-block.length // DRAWN)
        own = block.num_sequences * num_heads * num_queries * draws
        own_kind = draws if num_queries == block.length else None
        if found and (own_kind is None or own_kind != kind or size + own > RUN_ROWS):
            yield found
            found, size = [], 0
        found.append(block)
        size, kind = size + own, own_kind
    if found:
        yield found


def _run(blocks: list[_Block], num_heads: int) -> _Run:
    queries = torch.tensor([block.stop - block.first for block in blocks for _ in range(block.num_sequences)])
    counts = queries.repeat_interleave(num_heads)
    heads = torch.repeat_interleave(counts)
    positions = torch.arange(len(heads)) - (counts.cumsum(0) - counts)[heads] + blocks[0].first
    return _Run(blocks, heads, positions.to(torch.int32))


def _row_keys(run: _Run, identities: Tensor, dropout: Dropout, num_heads: int) -> tuple[Tensor, Tensor]:
    """Keys of a run's rows in their order: each is named by sequence, head and query."""
    own = identities[run.blocks[0].sequences.start : run.blocks[-1].sequences.stop]
    key = fold_reference(dropout.key(), own)
    key = fold_reference((key[0][:, None], key[1][:, None]), torch.arange(num_heads, dtype=torch.int32))
    return fold_reference((key[0].flatten()[run.heads], key[1].flatten()[run.heads]), run.positions)
