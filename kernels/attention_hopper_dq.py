"""dq of packed attention on Hopper: the first pass of `kernels/attention_hopper_bwd.py`.

A block works through tiles of queries, as the forward does. The tile's gradient of the output lies beside its queries,
and `delta` is found from it and the output before the loop. What the second pass reads is left behind: `delta`, and the
queries as they were rotated.
"""

from torch import Tensor

from flashvec.kernels.attention_hopper_parts import (
    GROUPS,
    copy_keys_and_values,
    copy_query_rows,
    mbarrier,
    rotate_in_place,
    rotated_back,
    tile_of,
    wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from flashvec.kernels.attention_tiles import BackwardConfig
from flashvec.kernels.backend import gl, gluon, launch, num_multiprocessors, tensor_descriptor

REGISTERS = gl.constexpr(208)  # a thread's in the groups that multiply,
COPIER_REGISTERS = gl.constexpr(88)  # and in the copying warps

# --- dq: a block works through tiles of queries ------------------------------------------------------------


@gluon.jit
def _copy(
    arguments, slots, TOKENS: gl.constexpr, PACKED: gl.constexpr, GROUP: gl.constexpr, KEYS: gl.constexpr,
    K: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """The copying warps: queries and gradients of the output, then keys and values, as in the forward."""
    PIECE: gl.constexpr = 32
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    dout_ptr, q_ptr, k_ptr, v_ptr, k_boxes, v_boxes, tile_ptr, num_items, num_bands, H, strides = arguments
    q_stride, q_head_stride, key_strides = strides
    queries, douts, ring, full, empty, queries_empty = slots
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
            copy_query_rows(
                douts, done & 1, dout_ptr, start, first, length, head, H * K, K, TOKENS, PACKED, K, PIECE, COPY
            )  # fmt: skip
            fill = copy_keys_and_values(
                ring, full, empty, fill, start, length, head // GROUP, k_ptr, v_ptr, k_boxes, v_boxes, key_strides,
                KEYS, K, RING, PIECE, COPY,
            )  # fmt: skip
            done += 1


@gluon.jit
def _multiply(
    arguments, slots, NUMBER: gl.constexpr, TOKENS: gl.constexpr, PACKED: gl.constexpr, KEYS: gl.constexpr,
    K: gl.constexpr, RING: gl.constexpr, ROTATE: gl.constexpr,
):  # fmt: skip
    """A group of four warps: dq of its 64 rows of each tile, and what the second pass reads of them."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [4, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    pointers, tile_ptr, cos_ptr, sin_ptr, num_items, num_bands, T, H, scale = arguments
    out_ptr, lse_ptr, delta_ptr, dq_ptr, rotated_ptr = pointers
    queries, douts, ring, full, empty, queries_empty = slots
    dtype: gl.constexpr = dq_ptr.dtype.element_ty
    fill = 0
    done = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        start, length, first, sequence = tile_of(tile_ptr, item, num_bands)
        if sequence >= 0:
            head = item % num_bands * PACKED
            q, dout = queries.index((done & 1) * GROUPS + NUMBER), douts.index((done & 1) * GROUPS + NUMBER)
            place = NUMBER * 64 + gl.arange(0, 64, gl.SliceLayout(1, STORED))
            column = gl.arange(0, K, gl.SliceLayout(0, STORED))
            token = first + place // PACKED
            exists = (token < length) & (place < TOKENS * PACKED)
            own = ((start + token) * H + head + place % PACKED) * K
            out = gl.load(out_ptr + own[:, None] + column[None, :], mask=exists[:, None], other=0.0)
            of_head = (head + place % PACKED).to(gl.int64) * T + start + token
            lse = gl.load(lse_ptr + of_head, mask=exists, other=float("inf"))

            wait(full, fill, RING)
            delta = gl.sum(dout.load(STORED).to(gl.float32) * out.to(gl.float32), 1)
            gl.store(delta_ptr + of_head, delta, mask=exists)
            delta = gl.expand_dims(gl.convert_layout(delta, ROW), 1)
            lse = gl.expand_dims(gl.convert_layout(lse, ROW), 1)
            if ROTATE:
                rotate_in_place(
                    q, cos_ptr, sin_ptr, cos_ptr, start, first, length, 0.0, 0.0, NUMBER, TOKENS, PACKED, K, False
                )
                gl.store(rotated_ptr + own[:, None] + column[None, :], q.load(STORED), mask=exists[:, None])

            s = gl.zeros([64, KEYS], gl.float32, SCORES)
            s = warpgroup_mma(q, ring.index(fill % RING).permute((1, 0)), s, use_acc=False, is_async=True)
            wait(full, fill + 1, RING)
            dp = gl.zeros([64, KEYS], gl.float32, SCORES)
            dp = warpgroup_mma(dout, ring.index((fill + 1) % RING).permute((1, 0)), dp, use_acc=False, is_async=True)
            s, dp = warpgroup_mma_wait(0, deps=[s, dp])
            mbarrier.arrive(empty.index((fill + 1) % RING), count=1)
            ds = gl.exp2(s * (scale * 1.4426950408889634) - lse) * (dp - delta)
            last = (length - 1) // KEYS * KEYS
            key = last + gl.arange(0, KEYS, gl.SliceLayout(0, SCORES))
            ds = gl.where((key < length)[None, :], ds, 0.0)
            weights = gl.convert_layout(ds.to(dtype), WEIGHTS)
            dq = gl.zeros([64, K], gl.float32, OUT)

            for _ in range(0, last, KEYS):
                wait(full, fill + 2, RING)
                s = gl.zeros([64, KEYS], gl.float32, SCORES)
                s = warpgroup_mma(q, ring.index((fill + 2) % RING).permute((1, 0)), s, use_acc=False, is_async=True)
                wait(full, fill + 3, RING)
                dp = gl.zeros([64, KEYS], gl.float32, SCORES)
                dp = warpgroup_mma(
                    dout, ring.index((fill + 3) % RING).permute((1, 0)), dp, use_acc=False, is_async=True
                )
                dq = warpgroup_mma(weights, ring.index(fill % RING), dq, is_async=True)
                s, dp = warpgroup_mma_wait(1, deps=[s, dp])
                mbarrier.arrive(empty.index((fill + 3) % RING), count=1)
                ds = gl.exp2(s * (scale * 1.4426950408889634) - lse) * (dp - delta)
                later = gl.convert_layout(ds.to(dtype), WEIGHTS)
                wait(full, fill, RING)  # passed long since, and a branch: see `attention_hopper`
                dq, weights, later = warpgroup_mma_wait(0, deps=[dq, weights, later])
                mbarrier.arrive(empty.index(fill % RING), count=1)
                weights = later
                fill += 2

            dq = warpgroup_mma(weights, ring.index(fill % RING), dq, is_async=True)
            dq, weights = warpgroup_mma_wait(0, deps=[dq, weights])
            mbarrier.arrive(empty.index(fill % RING), count=1)
            fill += 2

            # Read and computed again: cheaper than registers to keep it in.
            start, length, first, sequence = tile_of(tile_ptr, item, num_bands)
            token = first + place // PACKED
            exists = (token < length) & (place < TOKENS * PACKED)
            own = ((start + token) * H + item % num_bands * PACKED + place % PACKED) * K
            dq = dq * scale
            if ROTATE:
                dq = rotated_back(dq, cos_ptr, sin_ptr, start + token, exists, 64, K)
            q.store(dq.to(dtype))
            gl.store(dq_ptr + own[:, None] + column[None, :], q.load(STORED), mask=exists[:, None])
            mbarrier.arrive(queries_empty.index(done & 1), count=1)
            done += 1


@gluon.jit(do_not_specialize=["num_items"])  # another in every batch: it must not compile them anew
def _attention_hopper_dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, k_boxes, v_boxes, out_ptr, lse_ptr, delta_ptr, dq_ptr, rotated_ptr, tile_ptr,
    cos_ptr, sin_ptr, q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, num_items, num_bands,
    T, H, scale, TOKENS: gl.constexpr, PACKED: gl.constexpr, GROUP: gl.constexpr, KEYS: gl.constexpr, K: gl.constexpr,
    RING: gl.constexpr, ROTATE: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    queries = gl.allocate_shared_memory(dtype, [2 * GROUPS, 64, K], SWIZZLED)
    douts = gl.allocate_shared_memory(dtype, [2 * GROUPS, 64, K], SWIZZLED)
    ring = gl.allocate_shared_memory(dtype, [RING, KEYS, K], SWIZZLED)
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    queries_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(RING):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    for i in gl.static_range(2):
        mbarrier.init(queries_empty.index(i), count=GROUPS)
    slots = (queries, douts, ring, full, empty, queries_empty)
    multiply = (
        (out_ptr, lse_ptr, delta_ptr, dq_ptr, rotated_ptr), tile_ptr, cos_ptr, sin_ptr, num_items, num_bands, T, H,
        scale,
    )  # fmt: skip
    copy = (
        dout_ptr, q_ptr, k_ptr, v_ptr, k_boxes, v_boxes, tile_ptr, num_items, num_bands, H,
        (q_stride, q_head_stride, (k_stride, k_head_stride, v_stride, v_head_stride)),
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_multiply, (multiply, slots, 0, TOKENS, PACKED, KEYS, K, RING, ROTATE)),
            (_multiply, (multiply, slots, 1, TOKENS, PACKED, KEYS, K, RING, ROTATE)),
            (_copy, (copy, slots, TOKENS, PACKED, GROUP, KEYS, K, RING)),
        ],
        [4, 4],
        [REGISTERS, COPIER_REGISTERS],
    )


# --- launching ------------------------------------------------------------------------------------------


def launch_attention_hopper_dq(
    config: BackwardConfig,
    dout_THK: Tensor,
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    out_THK: Tensor,
    lse_HT: Tensor,
    delta_HT: Tensor,
    dq_THK: Tensor,
    rotated_THK: Tensor | None,
    tiles: Tensor,
    packed: int,
    cos_TK: Tensor | None,
    sin_TK: Tensor | None,
    scale: float,
) -> None:
    """Write `dq_THK` and `delta_HT` of the sequences in `tiles`, and their rotated queries where they are rotated."""
    (T, H, K), G = q_THK.shape, k_TGK.shape[1]
    if not len(tiles):
        return  # of no rows there is nothing to describe
    num_items = len(tiles) * (H // packed)
    boxes = [tensor_descriptor(x.flatten(1), [config.keys, K]) for x in (k_TGK, v_TGK)]
    launch(
        _attention_hopper_dq_kernel,
        (min(num_items, num_multiprocessors(q_THK.device)),),
        *(dout_THK, q_THK, k_TGK, v_TGK, *boxes, out_THK, lse_HT, delta_HT, dq_THK),
        dq_THK if rotated_THK is None else rotated_THK,  # the compiler wants a pointer even where nothing is written
        tiles,
        *(lse_HT if x is None else x for x in (cos_TK, sin_TK)),
        *(q_THK.stride(0), q_THK.stride(1), k_TGK.stride(0), k_TGK.stride(1), v_TGK.stride(0), v_TGK.stride(1)),
        *(num_items, H // packed, T, H, scale),
        TOKENS=config.tile_class.tokens,
        PACKED=packed,
        GROUP=H // G,
        KEYS=config.keys,
        K=K,
        RING=config.ring,
        ROTATE=cos_TK is not None,
        num_warps=4,
    )
