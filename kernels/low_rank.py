"""Products with the two thin matrices of a low-rank update, for up to three projections of one input at once.

    shrink    h_p = scale_p * drop(x_p) w_p               [T, P, R]
    expand    out_p = h_p w_pᵀ + bias_p                    [T, N], each projection its own columns
              out = drop(sum over p of h_p w_pᵀ)           [T, C], when all of them share the columns
    reduce    dw_p = drop(x_p)ᵀ h_p                        like w

`lora.py` composes its forward and backward of them, with w = A, which all projections read in full ([P, R, C]), or
w = B, of which each has its own rows ([N, R]).

Shape letters: T = packed tokens, C = input features, N = output features of all projections, P = projections, R = rank.
Memory-bound: each reads or writes the wide matrix once and next to nothing else; neighbouring programs of several
projections share it through the L2 cache.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flashvec.kernels.backend import WARPGROUPS, launch, target, tl, triton
from flashvec.kernels.dropout import fold, keep, mix

MAX_PROJECTIONS = 3  # query, key, value

BLOCK_T, BLOCK_C = 64, 128  # rows: a warp group's for wgmma; columns: 256 bytes of bf16, a multiple of dropout's 64
REDUCE_C = 256  # columns of a gradient's tile: its quarters are what wgmma wants, 64 rows
SPLIT_ROWS = 1024  # rows summed by one program for a gradient: at rank 16 partial sums add 6 % to the bytes read


# --- kernels -----------------------------------------------------------------------------------------
# `stop_0`, `stop_1`, `stop_2` are where the projections' columns end. SLICED: each projection reads or writes its own
# columns; else all of them share all columns, up to stop_0. `w` is A or B, element (column, rank) at the given strides.


@triton.jit
def _pick(p, value_0, value_1, value_2):
    return tl.where(p == 0, value_0, tl.where(p == 1, value_1, value_2))


@triton.jit
def _locate(tile, stop_0, stop_1, stop_2, BLOCK_C: tl.constexpr):
    """Which projection a tile of columns belongs to, its first column, and where the projection's columns end."""
    tiles_0 = tl.cdiv(stop_0, BLOCK_C)
    tiles_1 = tiles_0 + tl.cdiv(stop_1 - stop_0, BLOCK_C)
    p = (tile >= tiles_0).to(tl.int32) + (tile >= tiles_1).to(tl.int32)
    first = _pick(p, 0, stop_0, stop_1) + (tile - _pick(p, 0, tiles_0, tiles_1)) * BLOCK_C
    return p, first, _pick(p, stop_0, stop_1, stop_2)


@triton.jit
def _draws(key_ptr, t, in_t, T, first, NUM: tl.constexpr):
    """Draws for rows `t` and the 4 * NUM columns from `first`, a multiple of 64, on: uint32 [rows, NUM]."""
    a = tl.load(key_ptr + t, mask=in_t, other=0).to(tl.uint32)
    b = tl.load(key_ptr + T + t, mask=in_t, other=0).to(tl.uint32)
    draw = (first // 4 + tl.arange(0, NUM)).to(tl.uint32)
    return mix(a[:, None] + draw[None, :] * 0x9E3779B9, b[:, None])


@triton.jit
def _load_quarter(
    x_ptr, row, in_t, first, stop, draws, threshold, quarter: tl.constexpr, NUM: tl.constexpr, DROPPED: tl.constexpr
):
    """A quarter of x's 4 * NUM columns from `first` on, and which they are.

    With dropout it holds the columns that read one byte of the draws, so that a thread draws once for its four.
    """
    i = tl.arange(0, NUM)
    c = first + (i // 16 * 64 + quarter * 16 + i % 16 if DROPPED else quarter * NUM + i)
    x = tl.load(x_ptr + row + c[None, :], mask=in_t[:, None] & (c < stop)[None, :], other=0.0)
    if DROPPED:
        x = tl.where(((draws >> quarter * 8) & 0xFF) >= threshold, x, 0.0)
    return x, c


@triton.jit(do_not_specialize=["a", "b"])
def _low_rank_keys_kernel(identity_ptr, position_ptr, out_ptr, T, a, b, BLOCK: tl.constexpr):
    """Two words for each row, folded from the shared key, the identity and the position."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_t = t < T
    a, b = fold(a.to(tl.uint32), b.to(tl.uint32), tl.load(identity_ptr + t, mask=in_t, other=0))
    a, b = fold(a, b, tl.load(position_ptr + t, mask=in_t, other=0))
    tl.store(out_ptr + t, a.to(tl.int32, bitcast=True), mask=in_t)
    tl.store(out_ptr + T + t, b.to(tl.int32, bitcast=True), mask=in_t)


@triton.jit
def _low_rank_shrink_kernel(
    x_ptr, w_ptr, key_ptr, out_ptr,
    T, x_stride, stop_0, stop_1, stop_2, w_stride_p, w_stride_c, w_stride_r,
    scale_0, scale_1, scale_2, threshold, R,
    NUM_P: tl.constexpr, SLICED: tl.constexpr, DROPPED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[t, p, :] = scale_p * drop(x[t, columns]) w_p; neighbouring programs share x through the L2 cache."""
    p = tl.program_id(0)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    j = tl.arange(0, BLOCK_R)
    in_t, in_r = t < T, j < R
    start, stop = 0, stop_0
    if SLICED:
        start, stop = _pick(p, 0, stop_0, stop_1), _pick(p, stop_0, stop_1, stop_2)
    row = t.to(tl.int64)[:, None] * x_stride
    w_ptr += p * w_stride_p + j[None, :] * w_stride_r

    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for first in range(start, stop, BLOCK_C):
        draws = _draws(key_ptr, t, in_t, T, first, BLOCK_C // 4) if DROPPED else 0
        for quarter in tl.static_range(4):
            x, c = _load_quarter(x_ptr, row, in_t, first, stop, draws, threshold, quarter, BLOCK_C // 4, DROPPED)
            w = tl.load(w_ptr + c[:, None] * w_stride_c, mask=(c < stop)[:, None] & in_r[None, :], other=0.0)
            acc = tl.dot(x, w, acc, input_precision="ieee")
    acc *= _pick(p, scale_0, scale_1, scale_2)
    out_ptr += t.to(tl.int64)[:, None] * (NUM_P * R) + p * R + j[None, :]
    tl.store(out_ptr, acc.to(out_ptr.dtype.element_ty), mask=in_t[:, None] & in_r[None, :])


@triton.jit
def _low_rank_expand_kernel(
    h_ptr, w_ptr, bias_ptr, key_ptr, out_ptr,
    T, out_stride, stop_0, stop_1, stop_2, w_stride_p, w_stride_c, w_stride_r, threshold, R,
    NUM_P: tl.constexpr, SLICED: tl.constexpr, DROPPED: tl.constexpr, BIASED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """SLICED: out[t, columns of p] = h_p w_pᵀ + bias; else out[t, :] = drop(sum over p of h_p w_pᵀ)."""
    tile = tl.program_id(0)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    j = tl.arange(0, BLOCK_R)
    in_t, in_r = t < T, j < R
    p, first, stop = 0, tile * BLOCK_C, stop_0
    if SLICED:
        p, first, stop = _locate(tile, stop_0, stop_1, stop_2, BLOCK_C)
    c = first + tl.arange(0, BLOCK_C)
    in_c = c < stop
    h_ptr += t.to(tl.int64)[:, None] * (NUM_P * R) + p * R + j[None, :]
    w_ptr += p * w_stride_p + c[None, :] * w_stride_c + j[:, None] * w_stride_r

    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for q in tl.static_range(1 if SLICED else NUM_P):
        h = tl.load(h_ptr + q * R, mask=in_t[:, None] & in_r[None, :], other=0.0)
        w = tl.load(w_ptr + q * w_stride_p, mask=in_r[:, None] & in_c[None, :], other=0.0)
        acc = tl.dot(h, w, acc, input_precision="ieee")
    if DROPPED:
        # Columns are counted within the tile so that the compiler sees which of a thread's share a draw.
        a = tl.load(key_ptr + t, mask=in_t, other=0).to(tl.uint32) + tl.cast(first // 4, tl.uint32) * 0x9E3779B9
        b = tl.load(key_ptr + T + t, mask=in_t, other=0).to(tl.uint32)
        acc = tl.where(keep(a[:, None], b[:, None], tl.arange(0, BLOCK_C)[None, :], threshold), acc, 0.0)
    if BIASED:
        acc += tl.load(bias_ptr + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    out_ptr += t.to(tl.int64)[:, None] * out_stride + c[None, :]
    tl.store(out_ptr, acc.to(out_ptr.dtype.element_ty), mask=in_t[:, None] & in_c[None, :])


@triton.jit
def _low_rank_reduce_kernel(
    x_ptr, h_ptr, key_ptr, out_ptr,
    T, x_stride, stop_0, stop_1, stop_2, out_stride_s, out_stride_p, out_stride_c, out_stride_r, threshold, R,
    NUM_P: tl.constexpr, SLICED: tl.constexpr, DROPPED: tl.constexpr, SPLIT_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[s, p, c, :] = sum over the rows t of split s of drop(x)[t, c] h[t, p, :]."""
    tile, split = tl.program_id(0), tl.program_id(1)
    p, first, stop = tile % NUM_P, tile // NUM_P * BLOCK_C, stop_0
    if SLICED:
        p, first, stop = _locate(tile, stop_0, stop_1, stop_2, BLOCK_C)
    j = tl.arange(0, BLOCK_R)
    in_r = j < R
    NUM: tl.constexpr = BLOCK_C // 4

    acc_0 = tl.zeros((NUM, BLOCK_R), tl.float32)
    acc_1, acc_2, acc_3 = acc_0, acc_0, acc_0
    for start in range(split * SPLIT_ROWS, tl.minimum(T, (split + 1) * SPLIT_ROWS), BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        in_t = t < T
        row = t.to(tl.int64)[:, None] * x_stride
        h_at = t.to(tl.int64)[:, None] * (NUM_P * R) + p * R + j[None, :]
        h = tl.load(h_ptr + h_at, mask=in_t[:, None] & in_r[None, :], other=0.0)
        draws = _draws(key_ptr, t, in_t, T, first, NUM) if DROPPED else 0
        x, _ = _load_quarter(x_ptr, row, in_t, first, stop, draws, threshold, 0, NUM, DROPPED)
        acc_0 = tl.dot(tl.trans(x), h, acc_0, input_precision="ieee")
        x, _ = _load_quarter(x_ptr, row, in_t, first, stop, draws, threshold, 1, NUM, DROPPED)
        acc_1 = tl.dot(tl.trans(x), h, acc_1, input_precision="ieee")
        x, _ = _load_quarter(x_ptr, row, in_t, first, stop, draws, threshold, 2, NUM, DROPPED)
        acc_2 = tl.dot(tl.trans(x), h, acc_2, input_precision="ieee")
        x, _ = _load_quarter(x_ptr, row, in_t, first, stop, draws, threshold, 3, NUM, DROPPED)
        acc_3 = tl.dot(tl.trans(x), h, acc_3, input_precision="ieee")

    out_ptr += split.to(tl.int64) * out_stride_s + p * out_stride_p + j[None, :] * out_stride_r
    i = tl.arange(0, NUM)
    step: tl.constexpr = 16 if DROPPED else NUM
    c = first + (i // 16 * 64 + i % 16 if DROPPED else i)
    tl.store(out_ptr + c[:, None] * out_stride_c, acc_0, mask=(c < stop)[:, None] & in_r[None, :])
    c += step
    tl.store(out_ptr + c[:, None] * out_stride_c, acc_1, mask=(c < stop)[:, None] & in_r[None, :])
    c += step
    tl.store(out_ptr + c[:, None] * out_stride_c, acc_2, mask=(c < stop)[:, None] & in_r[None, :])
    c += step
    tl.store(out_ptr + c[:, None] * out_stride_c, acc_3, mask=(c < stop)[:, None] & in_r[None, :])


# --- launchers ---------------------------------------------------------------------------------------
# A [P, R, C] is read by all projections in full, B [N, R] by each in its rows: their strides as (p, column, rank).


def _strides(w: Tensor) -> tuple[int, int, int]:
    return (w.stride(0), w.stride(2), w.stride(1)) if w.ndim == 3 else (0, w.stride(0), w.stride(1))


def _stops(splits: Sequence[int]) -> list[int]:
    stops = [sum(splits[: p + 1]) for p in range(len(splits))]
    return stops + stops[-1:] * (MAX_PROJECTIONS - len(stops))


def _blocks(x: Tensor, R: int, block_c: int = BLOCK_C, draws: bool = False) -> dict[str, int]:
    """Tile sizes and options. `draws`: masks beside four accumulators spill on sm_100 unless more warps share them."""
    block_r = max(16, 1 << (R - 1).bit_length())
    large = block_r > 32
    if x.element_size() == 4:  # without matrix units: small tiles
        return {"BLOCK_T": 32, "BLOCK_C": 64, "BLOCK_R": block_r, "num_warps": 8 if large else 4, "num_stages": 2}
    stages = 2 if large or target(x).backend == "hip" else 3  # what fits the smallest shared memories
    warps = 8 if large or (draws and target(x).name == "sm_100") else 4
    return {"BLOCK_T": BLOCK_T, "BLOCK_C": block_c, "BLOCK_R": block_r, "num_warps": warps, "num_stages": stages}


def shrink(
    x: Tensor, w: Tensor, splits: Sequence[int], scales: Sequence[float], keys: Tensor | None, threshold: int
) -> Tensor:
    """[T, P, R]: scale_p * drop(x) w_p."""
    T, P, R, sliced = x.shape[0], len(splits), w.shape[-1 if w.ndim == 2 else 1], w.ndim == 2
    stops = _stops(splits) if sliced else [x.shape[1]] * MAX_PROJECTIONS
    factors = [*scales, 0.0, 0.0][:MAX_PROJECTIONS]
    out = x.new_empty(T, P, R)
    blocks = _blocks(x, R)
    launch(
        _low_rank_shrink_kernel, (P, -(-T // blocks["BLOCK_T"])), x, w, keys, out,
        T, x.stride(0), *stops, *_strides(w), *factors, threshold, R,
        NUM_P=P, SLICED=sliced, DROPPED=keys is not None, **blocks,
    )  # fmt: skip
    return out


def expand(
    h: Tensor, w: Tensor, splits: Sequence[int], bias: Tensor | None, keys: Tensor | None, threshold: int
) -> Tensor:
    """[T, N] with B: each projection's own columns, and the bias; [T, C] with A: the sum over projections."""
    (T, P, R), sliced = h.shape, w.ndim == 2
    columns = w.shape[0] if sliced else w.shape[2]
    stops = _stops(splits) if sliced else [columns] * MAX_PROJECTIONS
    blocks = _blocks(h, R)
    tiles = sum(-(-n // blocks["BLOCK_C"]) for n in (splits if sliced else [columns]))
    out = h.new_empty(T, columns)
    launch(
        _low_rank_expand_kernel, (tiles, -(-T // blocks["BLOCK_T"])), h, w, bias, keys, out,
        T, out.stride(0), *stops, *_strides(w), threshold, R,
        NUM_P=P, SLICED=sliced, DROPPED=keys is not None, BIASED=bias is not None, **blocks,
    )  # fmt: skip
    return out


def reduce(x: Tensor, h: Tensor, like: Tensor, splits: Sequence[int], keys: Tensor | None, threshold: int) -> Tensor:
    """The gradient of `like`, A or B, in its dtype: fp32 sums over fixed blocks of rows, then over the blocks."""
    (T, P, R), sliced = h.shape, like.ndim == 2
    stops = _stops(splits) if sliced else [x.shape[1]] * MAX_PROJECTIONS
    blocks = _blocks(x, R, REDUCE_C, draws=keys is not None) | {"num_stages": 2}
    if blocks["BLOCK_R"] == 64 and target(x).backend == "cuda" and target(x).name not in WARPGROUPS:
        blocks["BLOCK_T"] = 32  # 64 rows spill 32 to 120 bytes there
    tiles = sum(-(-n // blocks["BLOCK_C"]) for n in (splits if sliced else [x.shape[1]] * P))
    num_splits = max(1, -(-T // SPLIT_ROWS))
    sums = like.new_empty(num_splits, *like.shape, dtype=torch.float32)
    launch(
        _low_rank_reduce_kernel, (tiles, num_splits), x, h, keys, sums,
        T, x.stride(0), *stops, sums.stride(0), *_strides(sums[0]), threshold, R,
        NUM_P=P, SLICED=sliced, DROPPED=keys is not None, SPLIT_ROWS=SPLIT_ROWS, **blocks,
    )  # fmt: skip
    return sums.sum(0).to(like.dtype)


def row_keys(identities_T: Tensor, positions_T: Tensor, words: Sequence[int]) -> Tensor:
    """int32 [2, T]: every row's key, folded from the two words of the key that all of them share."""
    T = len(identities_T)
    out = identities_T.new_empty(2, T, dtype=torch.int32)
    launch(_low_rank_keys_kernel, (-(-T // 256),), identities_T, positions_T, out, T, *words, BLOCK=256, num_warps=4)
    return out
