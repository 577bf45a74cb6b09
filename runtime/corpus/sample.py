"""A few texts from all over a job's inputs: for int8 ranges, estimates and whitening."""

from collections.abc import Iterator, Sequence
from itertools import islice

from flashvec.runtime.corpus.cuts import Piece
from flashvec.runtime.corpus.plan import Plan
from flashvec.runtime.corpus.readers import read_rows

SAMPLED_SHARDS = 64


def sample_texts(plan: Plan, count: int) -> list[str]:
    """Up to about `count` texts: the first ones of shards spread over the whole job; always the same ones."""
    step = max(1, -(-len(plan.shards) // SAMPLED_SHARDS))
    chosen = plan.shards[::step]
    share = -(-count // len(chosen))
    texts: list[str] = []
    for shard in chosen:
        texts += islice(_texts(plan, shard.pieces), share)
    return texts[:count]


def _texts(plan: Plan, pieces: Sequence[Piece]) -> Iterator[str]:
    for piece in pieces:
        for rows in read_rows(piece.file, plan.sources[piece.file], piece.start, piece.stop, plan.settings):
            yield from (text for i, text in enumerate(rows.texts) if i not in rows.bad)
