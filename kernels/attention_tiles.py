"""What attention's forward and backward kernels share: how sequences are cut, and the parts of a tile.

Query heads that read one kv head lie side by side in a tile's rows: row m of a tile is token m // P and head m % P of
the P heads it packs, so K and V are read once for all of them, and short sequences fill a tile P times as well.

A head of any size is held in two chunks of powers of two, the second possibly absent: 64 = 64, 80 = 64 + 16,
96 = 64 + 32. Products over a head are sums of one product per chunk.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from flashvec.kernels.backend import WARPGROUPS, Target, tl, triton
from flashvec.kernels.dropout import fold, keep
from flashvec.kernels.schedule import TileClass

LOG2E = 1.4426950408889634
MAX_PACKED_HEADS = 16  # more heads a tile would leave too few tokens in it for one head's mask and tail to pay


@dataclass(frozen=True)
class TileConfig:
    """How one class of sequences runs: which they are, the tile's rows and keys, and compilation options.

    With `one_tile` a tile holds all keys of its sequences: no loop, no running maximum. With a `ring`, of that many
    slots, the kernel is `kernels/attention_hopper.py`'s.
    """

    tile_class: TileClass
    rows: int  # query rows of a tile: tokens times packed heads
    keys: int
    num_warps: int
    num_stages: int
    one_tile: bool = False
    maxnreg: int | None = None
    ring: int = 0


@dataclass(frozen=True)
class BackwardConfig:
    """How one class of sequences runs in one of the backward's kernels.

    `form`: "one tile" gives all gradients of sequences whose keys fit one tile; "dq" and then "dkv" share the longer
    ones. `rows`: query rows of a step (of a tile for "dq"), tokens times heads. With a `ring` the kernel is
    `kernels/attention_hopper_bwd.py`'s.
    """

    form: Literal["one tile", "dq", "dkv"]
    tile_class: TileClass
    rows: int
    keys: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    ring: int = 0


def packed_heads(num_heads: int, num_kv_heads: int) -> int:
    """Query heads in one tile: those of one kv head, or the largest divisor of their number that is not too many."""
    group = num_heads // num_kv_heads
    return max(p for p in range(1, min(group, MAX_PACKED_HEADS) + 1) if group % p == 0)


def head_chunks(head_size: int) -> tuple[int, int]:
    """Powers of two, at least 16, that hold a head; the second is 0 where one is enough."""
    first = 1 << (head_size.bit_length() - 1)
    rest = head_size - first
    if first < 16:
        return 16, 0
    return first, (max(16, 1 << (rest - 1).bit_length()) if rest else 0)


def has_specialised(target: Target, head_size: int) -> bool:
    """True if there are kernels with specialised warps (`kernels/attention_hopper.py`) for heads of this size."""
    return target.name == "sm_90" and head_size in (64, 128)


@cache
def forward_configs(
    target: Target, dtype: torch.dtype, head_size: int, packed: int, rotate: bool, specialised: bool = False
) -> tuple[TileConfig, ...]:
    """How a target runs the forward: one config per class of sequence lengths, shortest first.

    A sequence's class depends on its own length alone, so its bits do not depend on its batch. Up to 64 or 128 tokens
    one tile holds all keys, where a target has the registers; beyond, tiles of 16 to 128 keys are walked with a running
    maximum. The numbers were chosen by compiling for each target and reading registers, spills and shared memory
    (`kernels/aot.py`); on sm_90, among what does not spill, by time on an H100 (`bench/gpu_attention.py`). Rotating
    queries takes registers.

    Args:
        specialised: is the call one that `attention_hopper.takes`?
    """
    first, second = head_chunks(head_size)
    width = first + second
    if specialised and has_specialised(target, head_size):
        return _hopper_configs(width, packed, rotate)
    if dtype == torch.float32:  # three matrix products for one: a path for checks, not for speed
        rows, keys = (64, 32) if width <= 64 else (32 if width <= 128 else 16, 16)
        return (_config(rows, keys, 4, 1, packed),)
    if target.backend == "hip":  # a warp's matrix instruction takes 32 rows: more warps would compute scores twice
        short = _config(64, 64, 2, 1, packed, longest=64, one_tile=True)
        return short, _config(128, 64 if width <= 128 else 32, 4, 1, packed, shorter=64)
    if second and target.name in WARPGROUPS:
        # Compiled by triton 3.6.0 and run on an H100, tiles that hold all keys of such a head read shared memory out
        # of bounds (72, 80; found by compute-sanitizer; right in the interpreter). The loop does not.
        return (_config(128, 64, 8, 2, packed) if width <= 128 else _config(64, 32, 4, 1, packed),)
    if width > 128 and target.name in WARPGROUPS:  # a warpgroup multiplies 64 rows: more would compute scores twice
        short = _config(64, 64, 4, 1, packed, longest=64, one_tile=True)
        rows, warps = (128, 8) if target.name == "sm_90" else (64, 4)  # 128 rows spill on sm_100
        return short, _config(rows, 32, warps, 1, packed, shorter=64)
    if width > 128:  # 64 keys instead of 32 spill with a window
        return (
            _config(64, 64, 8, 1, packed, longest=64, one_tile=True),
            _config(64, 32, 8, 1, packed, shorter=64),
        )
    if target.name == "sm_90":  # small blocks, several on a multiprocessor, hide each other's loads
        rows, warps = (64, 4) if width > 64 or rotate else (128, 8)
        crowded = width > 64 and rotate  # four warps would spill
        short = _config(rows, 64, 8 if crowded else warps, 1, packed, longest=64, one_tile=True)
        all_keys = (128, 128, 8, 1) if crowded else (64, 128, 4, 1)
        return (
            short,
            _config(*all_keys, packed, shorter=64, longest=128, one_tile=True),
            _config(rows, 64, warps, 3, packed, shorter=128),
        )
    if target.name in WARPGROUPS:  # four warps of wide heads spill once the query is normalised, too
        short = _config(64, 64, 8 if width > 64 else 4, 1, packed, longest=64, one_tile=True)
        middle = _config(128, 128, 8, 1, packed, shorter=64, longest=128, one_tile=True)
        return short, middle, _config(128, 64, 8, 2, packed, shorter=128)
    # 128 rows, or 64 keys of wider heads, spill here; this leaves room for two to four blocks.
    short = _config(64, 64, 4, 1, packed, longest=64, one_tile=True)
    return short, _config(64, 64 if width <= 64 else 32, 4, 2, packed, shorter=64)


def _hopper_configs(width: int, packed: int, rotate: bool) -> tuple[TileConfig, ...]:
    def specialised(keys: int, ring: int, shorter: int = 0, longest: int | None = None) -> TileConfig:
        return TileConfig(TileClass(128 // packed, shorter, longest), 128, keys, 4, 1, ring=ring)

    ring = 1024 // width
    if rotate and width == 128:  # beside 128 keys there is no register left for it
        return (specialised(64, ring),)
    longest = 256 if width == 64 else 448
    return specialised(64, ring, longest=longest), specialised(128, ring // 2, shorter=longest)


def has_far_heads(x: Tensor) -> bool:
    """True if a head's place within a token's [heads, K] takes 64 bits: with tokens innermost, in large batches."""
    return x.shape[1] * x.stride(1) >= 2**31


def fp32_precision(target: Target) -> str:
    """How fp32 operands are multiplied: three TF32 products on NVIDIA, whose matrix units have no fp32; fp32 on AMD."""
    return "tf32x3" if target.backend == "cuda" else "ieee"


def _config(
    rows: int,
    keys: int,
    num_warps: int,
    num_stages: int,
    packed: int,
    *,
    shorter: int = 0,
    longest: int | None = None,
    one_tile: bool = False,
    maxnreg: int | None = None,
) -> TileConfig:
    tile_class = TileClass(tokens=rows // packed, shorter=shorter, longest=longest)
    return TileConfig(tile_class, rows, keys, num_warps, num_stages, one_tile, maxnreg)


Tile = tuple[int, int, int, int]  # rows, keys, warps, stages


@cache
def backward_configs(
    target: Target,
    dtype: torch.dtype,
    head_size: int,
    packed: int,
    rotate: bool,
    window: bool,
    softcap: bool,
    dropout: bool,
    specialised: bool = False,
) -> tuple[BackwardConfig, ...]:
    """How a target runs the backward: the form for short sequences in its classes, then the two for longer ones.

    As in the forward a sequence's class depends on its own length alone, and the numbers come from compiling; on sm_90
    those without options come from time, too. Rotation, dropout and the soft-cap each take registers: with them on,
    tiles that would spill are narrower or left out.

    Args:
        rotate, window, softcap, dropout: what the call asks for; a causal mask is a window.
        specialised: is the call one that `attention_hopper_bwd.takes`?
    """
    extras, plain = rotate + dropout + softcap, not (rotate or dropout or softcap)
    first, second = head_chunks(head_size)
    width = first + second
    short: list[Tile] = []
    stages = 1 if extras == 3 else 2
    if dtype == torch.float32:
        short, dq, dkv = [(16, 32, 4, 1)], (32, 32 if width <= 64 else 16, 4, 1), (16, 32, 4, 1)
    elif target.backend == "hip":  # 32 keys or rows a warp, as in the forward
        short = [(16, 64, 4, 1), (16, 128, 4, 1)]
        dq, dkv = (128, 64 if width <= 128 else 16, 4, 1), (32 if width <= 128 else 16, 128, 4, 1)
    elif target.name == "sm_90" and second == 0 and width <= 64:
        short = [(32, 64, 4, 2)]
        dq, dkv = (64, 64, 4, 3), (32, 64, 4, 3)
    elif target.name == "sm_90" and second == 0 and width <= 128:
        short = [(32, 64, 4, 2), (32, 128, 8, 2)] if plain else [(16, 64, 8, 2), (16, 128, 8, 2)]
        dq = (128, 32, 8, 2) if window else (128, 64, 8, 3)
        dkv = (32, 128, 8, stages) if rotate else (32, 64, 4, 2)
    elif target.name in WARPGROUPS:
        if width <= 64:
            short = [(32, 64, 4, 2), (32, 128, 8, 2), *([(16, 256, 8, 2)] if plain else [])]
            dq, dkv = (128, 64, 8, 2), (64, 128, 8, 2)
        elif width <= 128:
            short = [(16, 64, 4 if plain else 8, 2), (16, 128, 8, 2)]
            dq, dkv = (128, 32, 8, stages), (32, 128, 8, stages)
        else:  # 64 keys a step of dkv, for a warpgroup, spill 40 to 256 bytes and compute scores twice
            dq, dkv = (128, 32, 8, 2), (64, 32, 8, 2)
    else:  # operands lie in registers, too; a warp takes 16 rows of scores, and more warps would compute them twice
        if width <= 64:
            short = [(16, 64, 4, 2), (16, 128, 8, 2)]
            dq, dkv = (64, 32, 4, 2), (16 if rotate else 32, 64, 4, 2)
        elif width <= 128:
            dq, dkv = (128, 32, 8, stages), (16, 128, 8, stages) if second else (64, 64, 8, 1 if rotate else 2)
        else:
            # 64 rows spill with dropout on the other two: 32 and 152 bytes
            dq, dkv = (64 if target.name == "sm_80" else 32, 32, 8, 1), (32, 32, 8, 1)

    specialised = specialised and has_specialised(target, head_size)
    if specialised:
        short = short[:1]
    configs, shorter = [], 0
    for rows, keys, num_warps, num_stages in short if second == 0 and width <= 128 else []:
        tile_class = TileClass(keys, shorter, keys)
        configs.append(BackwardConfig("one tile", tile_class, rows, keys, num_warps, num_stages))
        shorter = keys
    if specialised:  # beyond 64 tokens: one class more costs mixed lengths more than it gains
        rings = (6, 8) if width == 128 else (12, 16)
        dq_class, dkv_class = TileClass(128 // packed, shorter), TileClass(128, shorter)
        configs.append(BackwardConfig("dq", dq_class, 128, 64, 4, 1, ring=rings[0]))
        configs.append(BackwardConfig("dkv", dkv_class, 64, 128, 4, 1, ring=rings[1]))
        return tuple(configs)
    forms: tuple[tuple[Literal["dq", "dkv"], Tile], ...] = (("dq", dq), ("dkv", dkv))
    for form, (rows, keys, num_warps, num_stages) in forms:
        tile_class = TileClass(rows // packed if form == "dq" else keys, shorter)
        configs.append(BackwardConfig(form, tile_class, rows, keys, num_warps, num_stages))
    return tuple(configs)


# --- parts of a tile --------------------------------------------------------------------------------


@triton.jit
def load_chunk(pointer, row, row_stride, row_exists, OFFSET: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr):
    """[rows, SIZE] elements of a head from OFFSET on; zeros past the head's size and in rows that do not exist."""
    column = OFFSET + tl.arange(0, SIZE)
    exists = row_exists[:, None]
    if OFFSET + SIZE > K:
        exists = exists & (column < K)[None, :]
    return tl.load(pointer + row[:, None] * row_stride + column[None, :], mask=exists, other=0.0)


@triton.jit
def load_rotated_chunk(
    pointer,
    cos_ptr,
    sin_ptr,
    norm_ptr,
    row,
    row_stride,
    table_row,
    row_exists,
    reciprocal_rms,
    norm_offset,
    OFFSET: tl.constexpr,
    SIZE: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
):
    """`load_chunk` with the head normalised (NORM) and rotated by its token's position, rounded once.

    The partner of an element, half a head away, is loaded beside it: it lies in a line that is being read anyway.
    """
    HALF: tl.constexpr = K // 2
    column = OFFSET + tl.arange(0, SIZE)
    partner = tl.where(column < HALF, column + HALF, column - HALF)
    exists = row_exists[:, None] & (column < K)[None, :]
    x = tl.load(pointer + row[:, None] * row_stride + column[None, :], mask=exists, other=0.0)
    y = tl.load(pointer + row[:, None] * row_stride + partner[None, :], mask=exists, other=0.0).to(tl.float32)
    angle = table_row[:, None] * HALF + (column % HALF)[None, :]
    cos = tl.load(cos_ptr + angle, mask=exists, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=exists, other=0.0)
    dtype = x.dtype
    x = x.to(tl.float32)
    if NORM:
        x_weight = tl.load(norm_ptr + column, mask=column < K, other=0.0).to(tl.float32) + norm_offset
        y_weight = tl.load(norm_ptr + partner, mask=column < K, other=0.0).to(tl.float32) + norm_offset
        x = x * reciprocal_rms[:, None] * x_weight[None, :]
        y = y * reciprocal_rms[:, None] * y_weight[None, :]
    signed = tl.where(column[None, :] < HALF, -sin, sin)
    return (x * cos + y * signed).to(dtype)


@triton.jit
def head_reciprocal_rms(pointer, row, row_stride, row_exists, eps, K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr):
    """1 / sqrt(mean(x²) + eps) of each row's head."""
    x = load_chunk(pointer, row, row_stride, row_exists, 0, K0, K).to(tl.float32)
    total = tl.sum(x * x, 1)
    if K1 > 0:
        x = load_chunk(pointer, row, row_stride, row_exists, K0, K1, K).to(tl.float32)
        total += tl.sum(x * x, 1)
    return 1.0 / tl.sqrt(total / K + eps)


@triton.jit
def store_chunk(pointer, x, row, row_exists, OFFSET: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr):
    """Elements of heads from OFFSET on into rows of K elements, rounded to the tensor's dtype."""
    column = OFFSET + tl.arange(0, SIZE)
    exists = row_exists[:, None]
    if OFFSET + SIZE > K:
        exists = exists & (column < K)[None, :]
    tl.store(pointer + row[:, None] * K + column[None, :], x.to(pointer.dtype.element_ty), mask=exists)


@triton.jit
def store_unrotated(
    pointer, x, cos_ptr, sin_ptr, row, table_row, row_exists, ROWS: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """`store_chunk` of whole heads, rotated back by their tokens' positions; K is a power of two."""
    HALF: tl.constexpr = K // 2
    column = tl.arange(0, HALF)
    x0, x1 = tl.split(tl.permute(tl.reshape(x, [ROWS, 2, HALF]), [0, 2, 1]))
    angle = table_row[:, None] * HALF + column[None, :]
    exists = row_exists[:, None]
    cos = tl.load(cos_ptr + angle, mask=exists, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=exists, other=0.0)
    dtype = pointer.dtype.element_ty
    pointer += row[:, None] * K + column[None, :]
    tl.store(pointer, (x0 * cos + x1 * sin).to(dtype), mask=exists)
    tl.store(pointer + HALF, (x1 * cos - x0 * sin).to(dtype), mask=exists)


@triton.jit
def key_ranges(
    first, stop, length, left, right, TOKENS: tl.constexpr, KEYS: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """Tiles of keys for the queries from `first` on, before `stop`: (low, full_low, full_high, high).

    Some query sees keys in [low, high); every one sees all of [full_low, full_high): no mask there.
    """
    last = tl.minimum(first + TOKENS, stop) - 1
    low, high, full_low, full_high = 0, length, 0, length // KEYS * KEYS
    if HAS_LEFT:
        low = tl.maximum(first - left, 0) // KEYS * KEYS
        full_low = (tl.maximum(last - left, 0) + KEYS - 1) // KEYS * KEYS
    if HAS_RIGHT:
        high = tl.minimum(length, last + right + 1)
        full_high = tl.minimum(full_high, (first + right + 1) // KEYS * KEYS)
    full_low = tl.minimum(full_low, high)
    full_high = tl.maximum(full_high, full_low)
    return low, full_low, full_high, high


@triton.jit
def softcapped(s, softcap):
    """softcap * tanh(s / softcap), by one exponential and one division."""
    return softcap - 2.0 * softcap / (1.0 + tl.exp2(s * (2.0 * 1.4426950408889634 / softcap)))


@triton.jit
def seen(query, key, length, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Which keys each query sees; `query` and `key` are tokens of one sequence, broadcast against each other."""
    visible = key < length
    if HAS_LEFT:
        visible = visible & (key >= query - left)
    if HAS_RIGHT:
        visible = visible & (key <= query + right)
    return visible


@triton.jit
def row_key(key_a, key_b, identity, head, query):
    """Dropout's key of an attention row: folded from the sequence's identity, the head and the query's position."""
    a, b = fold(key_a.to(tl.uint32), key_b.to(tl.uint32), identity)
    a, b = fold(a, b, head)
    return fold(a, b, query)


@triton.jit
def kept(a, b, key, threshold):
    """Which probabilities dropout keeps; `a`, `b` from `row_key`, `key` the keys' tokens."""
    return keep(a, b, key, threshold)
