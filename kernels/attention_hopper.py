"""Forward of packed attention on Hopper, with warps specialised by hand.

The mathematics is that of `kernels/attention.py`, without a window, soft-cap or dropout. It is written in Gluon, the
layer of Triton's compiler in which layouts, barriers and warps are the author's. Triton itself lets every warp load,
multiply and take exponentials in turn, so the matrix unit waits. Two small blocks on a multiprocessor hide some of that
and read keys from L2 as fast as it can deliver them. Here a block stays on its multiprocessor and works through
many tiles. Four of its warps copy, the others, in groups of four, multiply:

    copying warps       queries, then keys and values of a tile, ... into a ring of slots in shared memory, as far
                        ahead as slots are free: the next tile's while this one is being finished
    each other group    64 rows of queries: scores of keys j | softmax of scores j, while weights j-1 times values j-1
                        run in the matrix unit | rescale the output ...; and while one group takes exponentials,
                        another's products run

Barriers in shared memory tie them: `full[slot]` once a copy has landed, `empty[slot]` once all groups have read it.
Tiles of keys that lie inside their sequence are moved by the bulk copy engine; the last one, which may not, by masked
copies of 16 bytes that write zeros past the end: a neighbour's rows, which could hold NaN, are never read. It comes
first, so that the loop needs no mask.

Measured beside `kernels/attention_fwd.py` and others by `bench/gpu.py`; see LOG.md.
"""

import torch
from torch import Tensor

from flashvec.kernels.attention_hopper_parts import (
    GROUPS,
    copy_keys_and_values,
    copy_query_rows,
    mbarrier,
    rotate_in_place,
    tile_of,
    wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from flashvec.kernels.attention_tiles import LOG2E, TileConfig
from flashvec.kernels.backend import gl, gluon, launch, num_multiprocessors, runs_gluon, tensor_descriptor

REGISTERS = gl.constexpr(224)  # a thread's in the groups that multiply,
COPIER_REGISTERS = gl.constexpr(56)  # and in the copying warps: all that a multiprocessor has

# --- kernel: a block works through tiles ------------------------------------------------------------------


@gluon.jit
def _copy(
    arguments, slots, TOKENS: gl.constexpr, PACKED: gl.constexpr, GROUP: gl.constexpr, KEYS: gl.constexpr,
    K: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """What the copying warps do: fill slots of the ring, keys and values in turn, the last tile of each item first."""
    PIECE: gl.constexpr = 2048 // K
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [4, 1], [1, 0])
    q_ptr, k_ptr, v_ptr, k_boxes, v_boxes, tile_ptr, num_items, num_bands, strides = arguments
    q_stride, q_head_stride, key_strides = strides
    queries, ring, full, empty, queries_empty = slots
    fill = 0
    done = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        start, length, first, sequence = tile_of(tile_ptr, item, num_bands)
        if sequence >= 0:
            head = item % num_bands * PACKED
            wait(queries_empty, done + 2, 2)
            copy_query_rows(
                queries, done & 1, q_ptr, start, first, length, head, q_stride, q_head_stride, TOKENS, PACKED, K, PIECE,
                COPY,
            )  # fmt: skip
            fill = copy_keys_and_values(
                ring, full, empty, fill, start, length, head // GROUP, k_ptr, v_ptr, k_boxes, v_boxes, key_strides,
                KEYS, K, RING, PIECE, COPY,
            )  # fmt: skip
            done += 1


@gluon.jit
def _weigh(s, running_max, running_sum, scale_log2):
    """Softmax's numerators of a tile of scores, what rescales the tiles before, and the new maximum and sum."""
    new_max = gl.maximum(running_max, gl.max(s, 1) * scale_log2)
    p = gl.exp2(s * scale_log2 - gl.expand_dims(new_max, 1))
    rescale = gl.exp2(running_max - new_max)
    return p, rescale, new_max, running_sum * rescale + gl.sum(p, 1)


@gluon.jit
def _multiply(
    arguments, slots, NUMBER: gl.constexpr, TOKENS: gl.constexpr, PACKED: gl.constexpr,
    KEYS: gl.constexpr, K: gl.constexpr, RING: gl.constexpr, ROTATE: gl.constexpr, NORM: gl.constexpr,
):  # fmt: skip
    """What a group of four warps does: attention of its 64 rows of each tile."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [4, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    out_ptr, lse_ptr, tile_ptr, cos_ptr, sin_ptr, norm_ptr, num_items, num_bands, T, H, numbers = arguments
    scale_log2, norm_eps, norm_offset = numbers
    queries, ring, full, empty, queries_empty = slots
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    fill = 0
    done = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        start, length, first, sequence = tile_of(tile_ptr, item, num_bands)
        if sequence >= 0:
            head = item % num_bands * PACKED
            q = queries.index((done & 1) * GROUPS + NUMBER)
            last = (length - 1) // KEYS * KEYS
            wait(full, fill, RING)
            if ROTATE:
                rotate_in_place(
                    q, cos_ptr, sin_ptr, norm_ptr, start, first, length, norm_eps, norm_offset,
                    NUMBER, TOKENS, PACKED, K, NORM,
                )  # fmt: skip

            # Keys of the last tile, the only one that may pass the sequence's end.
            s = gl.zeros([64, KEYS], gl.float32, SCORES)
            s = warpgroup_mma(q, ring.index(fill % RING).permute((1, 0)), s, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(empty.index(fill % RING), count=1)
            key = last + gl.arange(0, KEYS, gl.SliceLayout(0, SCORES))
            s = gl.where((key < length)[None, :], s, float("-inf"))
            running_max = gl.full([64], float("-inf"), gl.float32, ROW)
            running_sum = gl.zeros([64], gl.float32, ROW)
            p, rescale, running_max, running_sum = _weigh(s, running_max, running_sum, scale_log2)
            weights = gl.convert_layout(p.to(dtype), WEIGHTS)
            acc = gl.zeros([64, K], gl.float32, OUT)

            for _ in range(0, last, KEYS):
                k_fill = fill + 2
                v_fill = fill + 1
                wait(full, k_fill, RING)
                s = gl.zeros([64, KEYS], gl.float32, SCORES)
                s = warpgroup_mma(q, ring.index(k_fill % RING).permute((1, 0)), s, use_acc=False, is_async=True)
                wait(full, v_fill, RING)
                acc = warpgroup_mma(weights, ring.index(v_fill % RING), acc, is_async=True)
                s = warpgroup_mma_wait(1, deps=[s])
                mbarrier.arrive(empty.index(k_fill % RING), count=1)
                p, rescale, running_max, running_sum = _weigh(s, running_max, running_sum, scale_log2)
                later = gl.convert_layout(p.to(dtype), WEIGHTS)
                # Passed long since. Without a branch here ptxas moves the next wait before the exponentials, which
                # are to run beside the product that it waits for.
                wait(full, v_fill, RING)
                acc, weights, later = warpgroup_mma_wait(0, deps=[acc, weights, later])
                mbarrier.arrive(empty.index(v_fill % RING), count=1)
                acc = acc * gl.expand_dims(gl.convert_layout(rescale, gl.SliceLayout(1, OUT)), 1)
                weights = later
                fill += 2

            wait(full, fill + 1, RING)
            acc = warpgroup_mma(weights, ring.index((fill + 1) % RING), acc, is_async=True)
            acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
            mbarrier.arrive(empty.index((fill + 1) % RING), count=1)
            fill += 2

            # Through the queries' own slot, whose rows are whole again there: 16 bytes a thread to memory.
            total = gl.convert_layout(running_sum, gl.SliceLayout(1, OUT))
            q.store((acc / gl.expand_dims(total, 1)).to(dtype))
            out = q.load(STORED)
            place = NUMBER * 64 + gl.arange(0, 64, gl.SliceLayout(1, STORED))
            column = gl.arange(0, K, gl.SliceLayout(0, STORED))
            token = first + place // PACKED
            exists = (token < length) & (place < TOKENS * PACKED)
            row = (start + token) * H + head + place % PACKED
            gl.store(out_ptr + (row * K)[:, None] + column[None, :], out, mask=exists[:, None])
            mbarrier.arrive(queries_empty.index(done & 1), count=1)
            done += 1

            place = NUMBER * 64 + gl.arange(0, 64, ROW)
            token = first + place // PACKED
            exists = (token < length) & (place < TOKENS * PACKED)
            lse = running_max + gl.log2(running_sum)  # to base 2, as the backward wants it
            gl.store(lse_ptr + (head + place % PACKED).to(gl.int64) * T + start + token, lse, mask=exists)


@gluon.jit(do_not_specialize=["num_items"])  # another in every batch: it must not compile them anew
def _attention_hopper_fwd_kernel(
    q_ptr, k_ptr, v_ptr, k_boxes, v_boxes, out_ptr, lse_ptr, tile_ptr, cos_ptr, sin_ptr, norm_ptr, q_stride,
    q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, num_items, num_bands, T, H, scale_log2, norm_eps,
    norm_offset, TOKENS: gl.constexpr, PACKED: gl.constexpr, GROUP: gl.constexpr, KEYS: gl.constexpr,
    K: gl.constexpr, RING: gl.constexpr, ROTATE: gl.constexpr, NORM: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    queries = gl.allocate_shared_memory(dtype, [2 * GROUPS, 64, K], SWIZZLED)
    ring = gl.allocate_shared_memory(dtype, [RING, KEYS, K], SWIZZLED)
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    queries_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(RING):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    for i in gl.static_range(2):
        mbarrier.init(queries_empty.index(i), count=GROUPS)
    slots = (queries, ring, full, empty, queries_empty)
    multiply = (
        out_ptr, lse_ptr, tile_ptr, cos_ptr, sin_ptr, norm_ptr, num_items, num_bands, T, H,
        (scale_log2, norm_eps, norm_offset),
    )  # fmt: skip
    copy = (
        q_ptr, k_ptr, v_ptr, k_boxes, v_boxes, tile_ptr, num_items, num_bands,
        (q_stride, q_head_stride, (k_stride, k_head_stride, v_stride, v_head_stride)),
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_multiply, (multiply, slots, 0, TOKENS, PACKED, KEYS, K, RING, ROTATE, NORM)),
            (_multiply, (multiply, slots, 1, TOKENS, PACKED, KEYS, K, RING, ROTATE, NORM)),
            (_copy, (copy, slots, TOKENS, PACKED, GROUP, KEYS, K, RING)),
        ],
        [4, 4],
        [REGISTERS, COPIER_REGISTERS],
    )


# --- launching ------------------------------------------------------------------------------------------


def takes(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, *options: bool) -> bool:
    """True if the kernel can run these: none of the options it lacks, rows that can be copied 16 bytes at a time.

    Offsets within a sequence, which may have all rows of the batch, must fit 32 bits: also those of queries as they are
    rotated, and of what lies beside them, the output and its gradient.

    Args:
        q_THK, k_TGK, v_TGK: as in `attention`.
        options: is there a window (or a causal mask), a soft-cap, dropout, a selection of queries?
    """
    if not runs_gluon() or any(options) or q_THK.dtype not in (torch.float16, torch.bfloat16):
        return False
    for x in (q_THK, k_TGK, v_TGK):
        if x.stride(0) == 0:  # one row for all; whether the copy engine takes that was never tried
            return False
        # Of a stride Triton tells its compiler whether 16 divides it, not whether 8 does, which would be 16 bytes.
        if x.stride(0) % 16 or x.stride(1) % 16 or x.storage_offset() % 8:
            return False
        rows, heads, K = x.shape
        if max(rows * x.stride(0) + heads * x.stride(1), rows * heads * K) >= 2**31:
            return False
    return all(has_neighbouring_heads(x) for x in (k_TGK, v_TGK))


def has_neighbouring_heads(x: Tensor) -> bool:
    """True if the bulk copy engine finds a row's heads in one line: [T, heads, K] seen as [T, heads * K]."""
    return x.shape[1] == 1 or x.stride(1) == x.shape[2]


def launch_attention_hopper(
    config: TileConfig,
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    out_THK: Tensor,
    lse_HT: Tensor,
    tiles: Tensor,
    packed: int,
    cos_TK: Tensor | None,
    sin_TK: Tensor | None,
    query_norm_K: Tensor | None,
    norm_eps: float,
    norm_offset: float,
    scale: float,
) -> None:
    """Attention of the sequences in `tiles`, written to their rows of `out_THK` and `lse_HT`."""
    (T, H, K), G = q_THK.shape, k_TGK.shape[1]
    if not len(tiles):
        return  # of no rows there is nothing to describe
    num_items = len(tiles) * (H // packed)
    boxes = [tensor_descriptor(x.flatten(1), [config.keys, K]) for x in (k_TGK, v_TGK)]
    nothing = lse_HT  # any fp32 tensor: the compiler wants a pointer even where none is read
    launch(
        _attention_hopper_fwd_kernel,
        (min(num_items, num_multiprocessors(q_THK.device)),),
        *(q_THK, k_TGK, v_TGK, *boxes, out_THK, lse_HT, tiles),
        *(nothing if x is None else x for x in (cos_TK, sin_TK, query_norm_K)),
        *(q_THK.stride(0), q_THK.stride(1), k_TGK.stride(0), k_TGK.stride(1), v_TGK.stride(0), v_TGK.stride(1)),
        *(num_items, H // packed, T, H, scale * LOG2E, norm_eps, norm_offset),
        TOKENS=config.tile_class.tokens,
        PACKED=packed,
        GROUP=H // G,
        KEYS=config.keys,
        K=K,
        RING=config.ring,
        ROTATE=cos_TK is not None,
        NORM=query_norm_K is not None,
        num_warps=4,
    )
