"""Which rows a pooled span takes, what each of them weighs, how a long one is cut: parts of `mean_pool`'s kernels.

Shape letters: S = spans, D = hidden size.
"""

from flashvec.kernels.backend import tl, triton

MODES = ("mean", "weighted_mean", "mean_sqrt_len", "max", "last", "cls")
ONE_ROW = ("last", "cls")
SHORTEST = 1e-12  # divides a zero vector, which stays zero, as in torch.nn.functional.normalize


@triton.jit
def span_rows(spans_ptr, s, S, MODE: tl.constexpr):
    """First row of spans and one past the last, int64; (0, 0) past the last span."""
    start = tl.load(spans_ptr + 2 * s.to(tl.int64), mask=s < S, other=0).to(tl.int64)
    stop = tl.load(spans_ptr + 2 * s.to(tl.int64) + 1, mask=s < S, other=0).to(tl.int64)
    if MODE == "last":
        start = tl.maximum(stop - 1, start)
    if MODE == "cls":
        stop = tl.minimum(start + 1, stop)
    return start, stop


@triton.jit
def first_weight(first_ptr, s, HAS_FIRST: tl.constexpr):
    """Weight of a span's first row in a weighted mean, int64."""
    first = tl.full((), 1, tl.int64)
    if HAS_FIRST:
        first = tl.load(first_ptr + s).to(tl.int64)
    return first


@triton.jit
def row_weight(rank, first, MODE: tl.constexpr):
    """Weight of the row with this rank in its span."""
    weight = tl.full(rank.shape, 1.0, tl.float32)
    if MODE == "weighted_mean":
        weight = (first + rank).to(tl.float32)
    return weight


@triton.jit
def span_total(count, first, MODE: tl.constexpr):
    """What a span's weighted sum is divided by."""
    total = count.to(tl.float32)
    if MODE == "mean_sqrt_len":
        total = tl.sqrt(total)
    if MODE == "weighted_mean":
        total = (count * first + count * (count - 1) // 2).to(tl.float32)
    return total


@triton.jit
def chunking(count, places, CHUNK: tl.constexpr, ROWS: tl.constexpr):
    """Rows of a chunk of a span of `count` rows, and how many chunks that makes: at most `places`."""
    wanted = tl.maximum(tl.minimum(tl.cdiv(count, CHUNK), places), 1)
    size = tl.maximum(tl.cdiv(tl.cdiv(count, wanted), ROWS), 1) * ROWS
    return size, tl.maximum(tl.cdiv(count, size), 1)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def finish(
    pooled,
    weight_ptr,
    out_ptr,
    length_ptr,
    s,
    count,
    first,
    offset,
    D: tl.constexpr,
    CUT: tl.constexpr,
    MODE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Weigh and divide a span's sum, cut, normalise, store."""
    d = tl.arange(0, BLOCK_D)
    if MODE != "max":
        weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32) + offset
        pooled = pooled * weight / span_total(count, first, MODE)
    pooled = tl.where(d < CUT, pooled, 0.0)
    if NORMALIZE:
        length = tl.sqrt(tl.sum(pooled * pooled, 0))
        pooled = pooled / tl.maximum(length, 1e-12, propagate_nan=tl.PropagateNan.ALL)
        tl.store(length_ptr + s, length)
    tl.store(out_ptr + s.to(tl.int64) * CUT + d, pooled, mask=d < CUT)
