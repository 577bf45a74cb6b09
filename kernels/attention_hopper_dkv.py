"""dk and dv of packed attention on Hopper: the second pass of `kernels/attention_hopper_bwd.py`.

A block works through tiles of 128 keys and walks the rows of the group's query heads. The rows of every product are
keys, so that p and ds go from the registers that hold them straight into the products that use them. The products that
give the scores and dp begin at -lse and -delta.
"""

from torch import Tensor

from flashvec.kernels.attention_hopper_parts import (
    GROUPS,
    barrier,
    copy_bulk,
    copy_rows,
    land,
    mbarrier,
    rotated_back,
    tile_of,
    wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from flashvec.kernels.attention_tiles import BackwardConfig
from flashvec.kernels.backend import gl, gluon, hopper, launch, num_multiprocessors, tensor_descriptor

REGISTERS = gl.constexpr(224)  # a thread's in the groups that multiply,
COPIER_REGISTERS = gl.constexpr(56)  # and in the copying warps

# --- dk and dv: a block works through tiles of keys ---------------------------------------------------------


@gluon.jit
def _copy(arguments, slots, GROUP: gl.constexpr, K: gl.constexpr, RING: gl.constexpr):
    """The copying warps: a tile of keys and values, then queries and gradients of the output of each head in turn.

    Beside each 64 rows go two lines: -lse, in units of the scores, and -delta.
    """
    PIECE: gl.constexpr = 32
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    pointers, boxes, tile_ptr, q_stride, num_items, num_bands, T, H, scale_log2 = arguments
    dout_ptr, q_ptr, lse_ptr, delta_ptr = pointers
    dout_boxes, q_boxes, k_boxes, v_boxes = boxes
    keys, values, ring, lines, full, empty, keys_full, keys_empty = slots
    fill = 0
    done = 0
    row = gl.arange(0, 64, LINE)
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        start, length, first, sequence = tile_of(tile_ptr, item, num_bands)
        if sequence >= 0:
            kv_head = item % num_bands
            # Rows past the sequence harm nothing but gradients of their own, which nobody stores.
            wait(keys_empty, done + 1, 1)
            mbarrier.expect(keys_full.index(0), 2 * GROUPS * 64 * K * 2)
            for group in gl.static_range(GROUPS):
                key_row = start.to(gl.int32) + first + group * 64
                copy_bulk(k_boxes, [key_row, kv_head * K], keys_full.index(0), keys.index(group))
                copy_bulk(v_boxes, [key_row, kv_head * K], keys_full.index(0), values.index(group))
            last = (length - 1) // 64 * 64
            for number in range(GROUP):
                head = kv_head * GROUP + number
                token = last
                while token >= 0:
                    of_head = head.to(gl.int64) * T + start + token + row
                    lse = gl.load(lse_ptr + of_head, mask=token + row < length, other=float("inf"))
                    delta = gl.load(delta_ptr + of_head, mask=token + row < length, other=0.0)
                    wait(empty, fill + RING, RING)
                    wait(empty, fill + 1 + RING, RING)
                    lines.index(fill % RING).store(lse / -scale_log2)
                    lines.index((fill + 1) % RING).store(-delta)
                    barrier()
                    if token + 64 > length:
                        q_ptr_of = q_ptr + start * q_stride + head * K
                        dout_ptr_of = dout_ptr + start * (H * K) + head * K
                        copy_rows(ring.index(fill % RING), q_ptr_of, q_stride, token, length, 64, K, PIECE, COPY)
                        hopper.async_copy.commit_group()
                        copy_rows(ring.index((fill + 1) % RING), dout_ptr_of, H * K, token, length, 64, K, PIECE, COPY)
                        hopper.async_copy.commit_group()
                        land(full, fill, RING)
                    else:
                        for part in gl.static_range(2):
                            slot = (fill + part) % RING
                            mbarrier.expect(full.index(slot), 64 * K * 2)
                            token_row = start.to(gl.int32) + token
                            if part == 0:
                                copy_bulk(q_boxes, [token_row, head * K], full.index(slot), ring.index(slot))
                            else:
                                copy_bulk(dout_boxes, [token_row, head * K], full.index(slot), ring.index(slot))
                    fill += 2
                    token -= 64
            done += 1


@gluon.jit
def _multiply(
    arguments, slots, NUMBER: gl.constexpr, GROUP: gl.constexpr, K: gl.constexpr, RING: gl.constexpr,
    ROTATE: gl.constexpr,
):  # fmt: skip
    """A group of four warps: dk and dv of its 64 keys of each tile."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [4, 1], [1, 0])
    COLUMN: gl.constexpr = gl.SliceLayout(0, SCORES)
    dk_ptr, dv_ptr, tile_ptr, cos_ptr, sin_ptr, num_items, num_bands, scale = arguments
    keys, values, ring, lines, full, empty, keys_full, keys_empty = slots
    dtype: gl.constexpr = dk_ptr.dtype.element_ty
    k, v = keys.index(NUMBER), values.index(NUMBER)
    scale_log2 = scale * 1.4426950408889634
    fill = 0
    done = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        start, length, first, sequence = tile_of(tile_ptr, item, num_bands)
        if sequence >= 0:
            dk = gl.zeros([64, K], gl.float32, OUT)
            dv = gl.zeros([64, K], gl.float32, OUT)
            zeros = gl.zeros([64, 64], gl.float32, SCORES)
            wait(keys_full, done, 1)
            for _ in range(0, (length + 63) // 64 * GROUP):
                q, dout = ring.index(fill % RING), ring.index((fill + 1) % RING)
                wait(full, fill, RING)
                # Products that begin at -lse and -delta: neither takes registers, or an addition, of its own.
                s = gl.expand_dims(lines.index(fill % RING).load(COLUMN), 0)
                s, _ = gl.broadcast(s, zeros)
                s = warpgroup_mma(k, q.permute((1, 0)), s, is_async=True)
                wait(full, fill + 1, RING)
                dp = gl.expand_dims(lines.index((fill + 1) % RING).load(COLUMN), 0)
                dp, _ = gl.broadcast(dp, zeros)
                dp = warpgroup_mma(v, dout.permute((1, 0)), dp, is_async=True)
                s = warpgroup_mma_wait(1, deps=[s])
                p = gl.exp2(s * scale_log2)
                weights = gl.convert_layout(p.to(dtype), WEIGHTS)
                dv = warpgroup_mma(weights, dout, dv, is_async=True)
                dp, dv, weights = warpgroup_mma_wait(0, deps=[dp, dv, weights])
                mbarrier.arrive(empty.index((fill + 1) % RING), count=1)
                ds = gl.convert_layout((p * dp).to(dtype), WEIGHTS)
                dk = warpgroup_mma(ds, q, dk, is_async=True)
                dk, ds = warpgroup_mma_wait(0, deps=[dk, ds])
                mbarrier.arrive(empty.index(fill % RING), count=1)
                fill += 2

            start, length, first, sequence = tile_of(tile_ptr, item, num_bands)  # again: cheaper than to keep it
            place = NUMBER * 64 + gl.arange(0, 64, gl.SliceLayout(1, STORED))
            column = gl.arange(0, K, gl.SliceLayout(0, STORED))
            key = first + place
            own = ((start + key) * num_bands + item % num_bands) * K
            v.store(dv.to(dtype))
            gl.store(dv_ptr + own[:, None] + column[None, :], v.load(STORED), mask=(key < length)[:, None])
            dk = dk * scale
            if ROTATE:
                dk = rotated_back(dk, cos_ptr, sin_ptr, start + key, key < length, 64, K)
            k.store(dk.to(dtype))
            gl.store(dk_ptr + own[:, None] + column[None, :], k.load(STORED), mask=(key < length)[:, None])
            hopper.fence_async_shared()  # the bulk copy engine, too, has its own way to shared memory
            mbarrier.arrive(keys_empty.index(0), count=1)
            done += 1


@gluon.jit(do_not_specialize=["num_items"])  # another in every batch: it must not compile them anew
def _attention_hopper_dkv_kernel(
    dout_ptr, q_ptr, dout_boxes, q_boxes, k_boxes, v_boxes, lse_ptr, delta_ptr, dk_ptr, dv_ptr, tile_ptr, cos_ptr,
    sin_ptr, q_stride, num_items, num_bands, T, H, scale,
    GROUP: gl.constexpr, K: gl.constexpr, RING: gl.constexpr, ROTATE: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    keys = gl.allocate_shared_memory(dtype, [GROUPS, 64, K], SWIZZLED)
    values = gl.allocate_shared_memory(dtype, [GROUPS, 64, K], SWIZZLED)
    ring = gl.allocate_shared_memory(dtype, [RING, 64, K], SWIZZLED)
    lines = gl.allocate_shared_memory(gl.float32, [RING, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    keys_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    keys_empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(RING):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    mbarrier.init(keys_full.index(0), count=1)
    mbarrier.init(keys_empty.index(0), count=GROUPS)
    slots = (keys, values, ring, lines, full, empty, keys_full, keys_empty)
    multiply = (dk_ptr, dv_ptr, tile_ptr, cos_ptr, sin_ptr, num_items, num_bands, scale)
    copy = (
        (dout_ptr, q_ptr, lse_ptr, delta_ptr), (dout_boxes, q_boxes, k_boxes, v_boxes), tile_ptr, q_stride, num_items,
        num_bands, T, H, scale * 1.4426950408889634,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_multiply, (multiply, slots, 0, GROUP, K, RING, ROTATE)),
            (_multiply, (multiply, slots, 1, GROUP, K, RING, ROTATE)),
            (_copy, (copy, slots, GROUP, K, RING)),
        ],
        [4, 4],
        [REGISTERS, COPIER_REGISTERS],
    )


# --- launching ------------------------------------------------------------------------------------------


def launch_attention_hopper_dkv(
    config: BackwardConfig,
    dout_THK: Tensor,
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    lse_HT: Tensor,
    delta_HT: Tensor,
    dk_TGK: Tensor,
    dv_TGK: Tensor,
    tiles: Tensor,
    cos_TK: Tensor | None,
    sin_TK: Tensor | None,
    scale: float,
) -> None:
    """Write `dk_TGK` and `dv_TGK` of the sequences in `tiles`; queries come as they were rotated."""
    (T, H, K), G = q_THK.shape, k_TGK.shape[1]
    if not len(tiles):
        return  # of no rows there is nothing to describe
    num_items = len(tiles) * G
    boxes = [tensor_descriptor(x.flatten(1), [64, K]) for x in (dout_THK, q_THK, k_TGK, v_TGK)]
    launch(
        _attention_hopper_dkv_kernel,
        (min(num_items, num_multiprocessors(q_THK.device)),),
        *(dout_THK, q_THK, *boxes, lse_HT, delta_HT, dk_TGK, dv_TGK, tiles),
        *(lse_HT if x is None else x for x in (cos_TK, sin_TK)),
        *(q_THK.stride(0), num_items, G, T, H, scale),
        GROUP=H // G,
        K=K,
        RING=config.ring,
        ROTATE=cos_TK is not None,
        num_warps=4,
    )
