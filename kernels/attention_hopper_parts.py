"""What the specialised kernels on Hopper share: barriers, copies into shared memory, rotation there.

`kernels/attention_hopper.py` explains how such a kernel works. Triton's names that differ between 3.6 and 3.9 are
settled here.
"""

from flashvec.kernels.backend import gl, gluon, hopper

GROUPS = gl.constexpr(2)  # of warps that multiply: a third would leave 128 registers a thread to what needs 150

copy_async = getattr(hopper.async_copy, "async_load", None) or hopper.async_copy.async_copy_global_to_shared
copy_bulk = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
mbarrier = hopper.mbarrier
warpgroup_mma = hopper.warpgroup_mma
warpgroup_mma_wait = hopper.warpgroup_mma_wait


@gluon.jit
def tile_of(tile_ptr, item, num_bands):
    """The sequence's first row, its length, the tile's first token and the sequence's number (negative: filling).

    An item is a tile and a band of heads; a tile's bands are neighbours.
    """
    entry = tile_ptr + item // num_bands * 4
    return gl.load(entry).to(gl.int64), gl.load(entry + 1), gl.load(entry + 2), gl.load(entry + 3)


@gluon.jit
def wait(barriers, fill, RING: gl.constexpr):
    """Wait until the slot of the fill's number is full; with a whole ring added, until it is empty again for it."""
    mbarrier.wait(barriers.index(fill % RING), (fill // RING) & 1)


# --- copies ---------------------------------------------------------------------------------------------
# Four warps copy PIECE rows by a few instructions each, laid out as COPY says; more at a time want more registers.


@gluon.jit
def copy_rows(
    slot, pointer, stride, first, length, ROWS: gl.constexpr, K: gl.constexpr, PIECE: gl.constexpr, COPY: gl.constexpr
):  # fmt: skip
    """Begin to copy neighbouring rows from `first` on; zeros past the sequence."""
    column = gl.arange(0, K, gl.SliceLayout(0, COPY))
    for part in gl.static_range(ROWS // PIECE):
        row = first + part * PIECE + gl.arange(0, PIECE, gl.SliceLayout(1, COPY))
        rows = slot.slice(part * PIECE, PIECE, 0)
        copy_async(rows, pointer + (row[:, None] * stride + column[None, :]), mask=(row < length)[:, None])


@gluon.jit
def copy_query_rows(
    slots, slot, pointer, start, first, length, head, stride, head_stride, TOKENS: gl.constexpr, PACKED: gl.constexpr,
    K: gl.constexpr, PIECE: gl.constexpr, COPY: gl.constexpr,
):  # fmt: skip
    """Begin to copy a tile's rows, tokens times packed heads, of all groups; zeros past the sequence."""
    row = gl.arange(0, PIECE, gl.SliceLayout(1, COPY))
    column = gl.arange(0, K, gl.SliceLayout(0, COPY))
    pointer += start * stride + head.to(gl.int64) * head_stride
    for part in gl.static_range(GROUPS * 64 // PIECE):
        place = part * PIECE + row
        token = first + place // PACKED
        exists = (token < length) & (place < TOKENS * PACKED)
        offset = token * stride + place % PACKED * head_stride
        rows = slots.index(slot * GROUPS + part * PIECE // 64).slice(part * PIECE % 64, PIECE, 0)
        copy_async(rows, pointer + (offset[:, None] + column[None, :]), mask=exists[:, None])


@gluon.jit
def land(full, fill, RING: gl.constexpr):
    """Announce the last two groups of copies, into the slots of this fill and the next, as each lands."""
    for part in gl.static_range(2):
        hopper.async_copy.wait_group(1 - part)
        hopper.fence_async_shared()  # matrix instructions read shared memory by a way of their own
        barrier()
        mbarrier.arrive(full.index((fill + part) % RING), count=1)


@gluon.jit
def copy_keys_and_values(
    ring, full, empty, fill, start, length, kv_head, k_ptr, v_ptr, k_boxes, v_boxes, strides, KEYS: gl.constexpr,
    K: gl.constexpr, RING: gl.constexpr, PIECE: gl.constexpr, COPY: gl.constexpr,
):  # fmt: skip
    """Fill slots with tiles of keys and of values in turn, the last tiles first; returns the number of the next fill.

    The last tiles may pass the sequence's end and are copied row by row; the others come by the bulk copy engine.
    """
    k_stride, k_head_stride, v_stride, v_head_stride = strides
    key = (length - 1) // KEYS * KEYS
    wait(empty, fill + RING, RING)
    k_ptr += start * k_stride + kv_head.to(gl.int64) * k_head_stride
    copy_rows(ring.index(fill % RING), k_ptr, k_stride, key, length, KEYS, K, PIECE, COPY)
    hopper.async_copy.commit_group()
    wait(empty, fill + 1 + RING, RING)
    v_ptr += start * v_stride + kv_head.to(gl.int64) * v_head_stride
    copy_rows(ring.index((fill + 1) % RING), v_ptr, v_stride, key, length, KEYS, K, PIECE, COPY)
    hopper.async_copy.commit_group()
    land(full, fill, RING)
    fill += 2
    key -= KEYS
    while key >= 0:
        for part in gl.static_range(2):
            slot = (fill + part) % RING
            wait(empty, fill + part + RING, RING)
            mbarrier.expect(full.index(slot), KEYS * K * 2)
            row = start.to(gl.int32) + key
            if part == 0:
                copy_bulk(k_boxes, [row, kv_head * K], full.index(slot), ring.index(slot))
            else:
                copy_bulk(v_boxes, [row, kv_head * K], full.index(slot), ring.index(slot))
        fill += 2
        key -= KEYS
    return fill


# --- rotation -------------------------------------------------------------------------------------------


@gluon.jit
def rotate_in_place(
    queries, cos_ptr, sin_ptr, norm_ptr, start, first, length, norm_eps, norm_offset,
    NUMBER: gl.constexpr, TOKENS: gl.constexpr, PACKED: gl.constexpr, K: gl.constexpr, NORM: gl.constexpr,
):  # fmt: skip
    """Queries in shared memory normalised (NORM) and rotated in place, rounded once.

    A thread has both halves of a head's elements; 32 rows at a time, or registers would not do.
    """
    HALF: gl.constexpr = gl.BlockedLayout([1, 8], [512 // K, K // 16], [4, 1], [1, 0])
    ROWS: gl.constexpr = 32
    column = gl.arange(0, K // 2, gl.SliceLayout(0, HALF))
    for part in gl.static_range(64 // ROWS):
        place = NUMBER * 64 + part * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, HALF))
        token = first + place // PACKED
        exists = (token < length) & (place < TOKENS * PACKED)
        angle = (start + token)[:, None] * (K // 2) + column[None, :]
        cos = gl.load(cos_ptr + angle, mask=exists[:, None], other=0.0)
        sin = gl.load(sin_ptr + angle, mask=exists[:, None], other=0.0)
        rows = queries.slice(part * ROWS, ROWS, 0)
        x = rows.load(HALF).to(gl.float32)
        x0, x1 = gl.split(gl.permute(gl.reshape(x, [ROWS, 2, K // 2]), [0, 2, 1]))
        x0, x1 = gl.convert_layout(x0, HALF), gl.convert_layout(x1, HALF)
        if NORM:
            total = gl.sum(x0 * x0 + x1 * x1, 1)
            reciprocal_rms = gl.expand_dims(1.0 / gl.sqrt(total / K + norm_eps), 1)
            weight0 = gl.load(norm_ptr + column).to(gl.float32) + norm_offset
            weight1 = gl.load(norm_ptr + K // 2 + column).to(gl.float32) + norm_offset
            x0 = x0 * reciprocal_rms * weight0[None, :]
            x1 = x1 * reciprocal_rms * weight1[None, :]
        y = gl.join(x0 * cos - x1 * sin, x1 * cos + x0 * sin)
        rows.store(gl.reshape(gl.permute(y, [0, 2, 1]), [ROWS, K]).to(queries.dtype))
    hopper.fence_async_shared()
    barrier()


@gluon.jit
def rotated_back(x, cos_ptr, sin_ptr, row, exists, ROWS: gl.constexpr, K: gl.constexpr):
    """Heads rotated back by their tokens' positions: `row` of the tables, as a slice of the layout of `x`."""
    x0, x1 = gl.split(gl.permute(gl.reshape(x, [ROWS, 2, K // 2]), [0, 2, 1]))
    HALF: gl.constexpr = x0.type.layout
    column = gl.arange(0, K // 2, gl.SliceLayout(0, HALF))
    angle = gl.expand_dims(gl.convert_layout(row, gl.SliceLayout(1, HALF)), 1) * (K // 2) + gl.expand_dims(column, 0)
    there = gl.expand_dims(gl.convert_layout(exists, gl.SliceLayout(1, HALF)), 1)
    cos = gl.load(cos_ptr + angle, mask=there, other=0.0)
    sin = gl.load(sin_ptr + angle, mask=there, other=0.0)
    y = gl.join(x0 * cos + x1 * sin, x1 * cos - x0 * sin)
    return gl.convert_layout(gl.reshape(gl.permute(y, [0, 2, 1]), [ROWS, K]), x.type.layout)
