"""Triton kernels of attention's backward, and the steps they share; `kernels/attention_bwd.py` says what they compute.

`_attention_bwd_dq_kernel` takes tiles of queries, `_attention_bwd_dkv_kernel` tiles of keys: of a short sequence, whose
keys fit one tile, all of it.
"""

from flashvec.kernels.attention_tiles import (
    kept,
    key_ranges,
    load_chunk,
    load_rotated_chunk,
    row_key,
    seen,
    softcapped,
    store_chunk,
    store_unrotated,
)
from flashvec.kernels.backend import tl, triton


@triton.jit
def _score_gradients(
    s, dp, lse, delta, query, key, length, drop_a, drop_b, scale, softcap, left, right, threshold, drop_scale,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    MASKED: tl.constexpr, ALL_KEYS: tl.constexpr,
):  # fmt: skip
    """Probabilities as they met v, and the gradient of the scores, unscaled; queries along either axis.

    What belongs to a query (`lse`, to base 2, `delta`, `query`, `drop_a`, `drop_b`) and `key` come ready to broadcast.
    With ALL_KEYS of the queries at hand, along the first axis, `delta` is found here, as a sum over them.
    """
    if HAS_SOFTCAP:
        s = softcapped(s * scale, softcap)
        p = tl.exp2(s * 1.4426950408889634 - lse)
    else:
        p = tl.exp2(s * (scale * 1.4426950408889634) - lse)
    if MASKED:
        p = tl.where(seen(query, key, length, left, right, HAS_LEFT, HAS_RIGHT), p, 0.0)
    thinned = p
    if HAS_DROPOUT:
        keep = kept(drop_a, drop_b, key, threshold)
        thinned = tl.where(keep, p * drop_scale, 0.0)
        dp = tl.where(keep, dp * drop_scale, 0.0)
    if ALL_KEYS:
        delta = tl.sum(p * dp, 0)[None, :]
    ds = p * (dp - delta)
    if HAS_SOFTCAP:
        tanh = s / softcap
        ds = ds * (1.0 - tanh * tanh)
    return thinned, ds


@triton.jit
def _dq_step(
    q0, q1, dout0, dout1, dq0, dq1, lse, delta, k_ptr, v_ptr, k_stride, v_stride, start, first_key, length,
    token, drop_a, drop_b, scale, softcap, left, right, threshold, drop_scale,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, KEYS: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what one tile of keys gives to the gradient of each query row."""
    key = first_key + tl.arange(0, KEYS)
    exists = key < length
    key_row = start + key
    k0 = load_chunk(k_ptr, key_row, k_stride, exists, 0, K0, K)
    s = tl.dot(q0, k0.T, input_precision=PRECISION)
    dp = tl.dot(dout0, load_chunk(v_ptr, key_row, v_stride, exists, 0, K0, K).T, input_precision=PRECISION)
    if K1 > 0:
        k1 = load_chunk(k_ptr, key_row, k_stride, exists, K0, K1, K)
        s = tl.dot(q1, k1.T, s, input_precision=PRECISION)
        v1 = load_chunk(v_ptr, key_row, v_stride, exists, K0, K1, K)
        dp = tl.dot(dout1, v1.T, dp, input_precision=PRECISION)
    _, ds = _score_gradients(
        s, dp, lse[:, None], delta[:, None], token[:, None], key[None, :], length, drop_a[:, None], drop_b[:, None],
        scale, softcap, left, right, threshold, drop_scale, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, MASKED,
        False,
    )  # fmt: skip
    ds = ds.to(k0.dtype)
    dq0 = tl.dot(ds, k0, dq0, input_precision=PRECISION)
    if K1 > 0:
        dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
    return dq0, dq1


@triton.jit(do_not_specialize=["key_a", "key_b"])
def _attention_bwd_dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr, tile_ptr, cos_ptr, sin_ptr, identity_ptr,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, T, H,
    scale, softcap, left, right, key_a, key_b, threshold, drop_scale,
    TOKENS: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, ROTATE: tl.constexpr, UNROTATE: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile_ptr += tl.program_id(0) * 4
    sequence = tl.load(tile_ptr + 3)
    if sequence < 0:
        return
    start, length, first = tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    if WIDE:
        start = start.to(tl.int64)
    first_head = tl.program_id(1) * PACKED
    kv_head = (first_head // GROUP).to(tl.int64)

    row = tl.arange(0, ROWS)
    token, head = first + row // PACKED, first_head + row % PACKED
    row_exists = (row < TOKENS * PACKED) & (token < length)
    q_row = start + token
    own_row = q_row * H + head  # of out, dout and dq
    q_ptr += (head.to(tl.int64) if WIDE else head)[:, None] * q_head_stride
    q1, dout1 = row, row
    if ROTATE:
        q0 = load_rotated_chunk(
            q_ptr, cos_ptr, sin_ptr, q_ptr, q_row, q_stride, q_row, row_exists, row, 0.0, 0, K0, K, False,
        )  # fmt: skip
    else:
        q0 = load_chunk(q_ptr, q_row, q_stride, row_exists, 0, K0, K)
    dout0 = load_chunk(dout_ptr, own_row, K, row_exists, 0, K0, K)
    out0 = load_chunk(out_ptr, own_row, K, row_exists, 0, K0, K)
    delta = tl.sum(dout0.to(tl.float32) * out0.to(tl.float32), 1)
    if K1 > 0:
        if ROTATE:
            q1 = load_rotated_chunk(
                q_ptr, cos_ptr, sin_ptr, q_ptr, q_row, q_stride, q_row, row_exists, row, 0.0, K0, K1, K, False,
            )  # fmt: skip
        else:
            q1 = load_chunk(q_ptr, q_row, q_stride, row_exists, K0, K1, K)
        dout1 = load_chunk(dout_ptr, own_row, K, row_exists, K0, K1, K)
        out1 = load_chunk(out_ptr, own_row, K, row_exists, K0, K1, K)
        delta += tl.sum(dout1.to(tl.float32) * out1.to(tl.float32), 1)
    of_head = head * T + q_row if not WIDE else head.to(tl.int64) * T + q_row
    tl.store(delta_ptr + of_head, delta, mask=row_exists)
    lse = tl.load(lse_ptr + of_head, mask=row_exists, other=float("inf"))
    drop_a, drop_b = row, row
    if HAS_DROPOUT:
        drop_a, drop_b = row_key(key_a, key_b, tl.load(identity_ptr + sequence), head, token)

    k_ptr += kv_head * k_head_stride
    v_ptr += kv_head * v_head_stride
    dq0 = tl.zeros([ROWS, K0], tl.float32)
    dq1 = tl.zeros([ROWS, K1 if K1 > 0 else 1], tl.float32)
    low, full_low, full_high, high = key_ranges(first, length, length, left, right, TOKENS, KEYS, HAS_LEFT, HAS_RIGHT)
    if HAS_LEFT:
        for key in tl.range(low, full_low, KEYS):
            dq0, dq1 = _dq_step(
                q0, q1, dout0, dout1, dq0, dq1, lse, delta, k_ptr, v_ptr, k_stride, v_stride, start, key, length,
                token, drop_a, drop_b, scale, softcap, left, right, threshold, drop_scale, K, K0, K1, KEYS,
                HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, True, PRECISION,
            )  # fmt: skip
    for key in tl.range(full_low, full_high, KEYS):
        dq0, dq1 = _dq_step(
            q0, q1, dout0, dout1, dq0, dq1, lse, delta, k_ptr, v_ptr, k_stride, v_stride, start, key, length,
            token, drop_a, drop_b, scale, softcap, left, right, threshold, drop_scale, K, K0, K1, KEYS,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, False, PRECISION,
        )  # fmt: skip
    for key in tl.range(full_high, high, KEYS):
        dq0, dq1 = _dq_step(
            q0, q1, dout0, dout1, dq0, dq1, lse, delta, k_ptr, v_ptr, k_stride, v_stride, start, key, length,
            token, drop_a, drop_b, scale, softcap, left, right, threshold, drop_scale, K, K0, K1, KEYS,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, True, PRECISION,
        )  # fmt: skip

    if UNROTATE:
        store_unrotated(dq_ptr, dq0 * scale, cos_ptr, sin_ptr, own_row, q_row, row_exists, ROWS, K)
    else:
        store_chunk(dq_ptr, dq0 * scale, own_row, row_exists, 0, K0, K)
        if K1 > 0:
            store_chunk(dq_ptr, dq1 * scale, own_row, row_exists, K0, K1, K)


@triton.jit(do_not_specialize=["key_a", "key_b"])
def _attention_bwd_dkv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr, tile_ptr, cos_ptr, sin_ptr,
    identity_ptr, q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, T, H,
    scale, softcap, left, right, key_a, key_b, threshold, drop_scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr,
    ONE_TILE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, ROTATE: tl.constexpr, UNROTATE: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile_ptr += tl.program_id(0) * 4
    sequence = tl.load(tile_ptr + 3)
    if sequence < 0:
        return
    start, length, first = tl.load(tile_ptr).to(tl.int64), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    kv_head = tl.program_id(1)
    identity = sequence
    if HAS_DROPOUT:
        identity = tl.load(identity_ptr + sequence)

    # Pointers to the sequence's first row; offsets from there rarely need 64 bits, and registers are scarce.
    q_ptr, k_ptr, v_ptr = q_ptr + start * q_stride, k_ptr + start * k_stride, v_ptr + start * v_stride
    dout_ptr, dq_ptr = dout_ptr + start * H * K, dq_ptr + start * H * K
    dk_ptr, dv_ptr = dk_ptr + start * (H // GROUP) * K, dv_ptr + start * (H // GROUP) * K
    lse_ptr, delta_ptr = lse_ptr + start, delta_ptr + start
    if ROTATE:
        cos_ptr, sin_ptr = cos_ptr + start * (K // 2), sin_ptr + start * (K // 2)
    k_ptr += kv_head.to(tl.int64) * k_head_stride
    v_ptr += kv_head.to(tl.int64) * v_head_stride

    key = first + tl.arange(0, KEYS)
    key_exists = key < length
    key_row = key.to(tl.int64) if WIDE else key
    k0 = load_chunk(k_ptr, key_row, k_stride, key_exists, 0, K0, K)
    v0 = load_chunk(v_ptr, key_row, v_stride, key_exists, 0, K0, K)
    dk0 = tl.zeros([KEYS, K0], tl.float32)
    dv0 = tl.zeros([KEYS, K0], tl.float32)
    dk1 = tl.zeros([KEYS, K1 if K1 > 0 else 1], tl.float32)
    dv1 = tl.zeros([KEYS, K1 if K1 > 0 else 1], tl.float32)
    if K1 > 0:
        k1 = load_chunk(k_ptr, key_row, k_stride, key_exists, K0, K1, K)
        v1 = load_chunk(v_ptr, key_row, v_stride, key_exists, K0, K1, K)

    # Rows run over tokens, and within a token over the group's heads: those tokens that see some key of the tile.
    low, high = 0, length
    if HAS_RIGHT and not ONE_TILE:
        low = tl.maximum(first - right, 0)
    if HAS_LEFT and not ONE_TILE:
        high = tl.minimum(length, first + KEYS + left)
    for first_row in tl.range(low * GROUP, high * GROUP, ROWS):
        row = first_row + tl.arange(0, ROWS)
        row_exists = row < high * GROUP
        token, head = row // GROUP, kv_head * GROUP + row % GROUP
        q_row = token.to(tl.int64) if WIDE else token
        own_row = q_row * H + head  # of dout and dq
        head_ptr = q_ptr + (head.to(tl.int64) if WIDE else head)[:, None] * q_head_stride
        if ROTATE:
            q0 = load_rotated_chunk(
                head_ptr, cos_ptr, sin_ptr, q_ptr, q_row, q_stride, q_row, row_exists, row, 0.0, 0, K0, K, False,
            )  # fmt: skip
        else:
            q0 = load_chunk(head_ptr, q_row, q_stride, row_exists, 0, K0, K)
        dout0 = load_chunk(dout_ptr, own_row, K, row_exists, 0, K0, K)
        s = tl.dot(k0, q0.T, input_precision=PRECISION)
        dp = tl.dot(v0, dout0.T, input_precision=PRECISION)
        if K1 > 0:
            if ROTATE:
                q1 = load_rotated_chunk(
                    head_ptr, cos_ptr, sin_ptr, q_ptr, q_row, q_stride, q_row, row_exists, row, 0.0, K0, K1, K, False,
                )  # fmt: skip
            else:
                q1 = load_chunk(head_ptr, q_row, q_stride, row_exists, K0, K1, K)
            dout1 = load_chunk(dout_ptr, own_row, K, row_exists, K0, K1, K)
            s = tl.dot(k1, q1.T, s, input_precision=PRECISION)
            dp = tl.dot(v1, dout1.T, dp, input_precision=PRECISION)
        of_head = head.to(tl.int64) * T + q_row if WIDE else head * T + q_row
        lse = tl.load(lse_ptr + of_head, mask=row_exists, other=float("inf"))
        delta = lse
        if not ONE_TILE:
            delta = tl.load(delta_ptr + of_head, mask=row_exists, other=0.0)
        drop_a, drop_b = row, row
        if HAS_DROPOUT:
            drop_a, drop_b = row_key(key_a, key_b, identity, head, token)
        # A key past the sequence's end harms nothing but its own row, unless the product for dq sums over keys.
        thinned, ds = _score_gradients(
            s, dp, lse[None, :], delta[None, :], token[None, :], key[:, None], length, drop_a[None, :], drop_b[None, :],
            scale, softcap, left, right, threshold, drop_scale, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT,
            ONE_TILE or HAS_LEFT or HAS_RIGHT, ONE_TILE,
        )  # fmt: skip
        thinned, ds = thinned.to(k0.dtype), ds.to(k0.dtype)
        dv0 = tl.dot(thinned, dout0, dv0, input_precision=PRECISION)
        dk0 = tl.dot(ds, q0, dk0, input_precision=PRECISION)
        if K1 > 0:
            dv1 = tl.dot(thinned, dout1, dv1, input_precision=PRECISION)
            dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
        if ONE_TILE:
            dq = tl.dot(k0.T, ds, input_precision=PRECISION).T * scale
            if UNROTATE:
                store_unrotated(dq_ptr, dq, cos_ptr, sin_ptr, own_row, q_row, row_exists, ROWS, K)
            else:
                store_chunk(dq_ptr, dq, own_row, row_exists, 0, K0, K)

    own_key_row = key_row * (H // GROUP) + kv_head
    store_chunk(dv_ptr, dv0, own_key_row, key_exists, 0, K0, K)
    if UNROTATE:
        store_unrotated(dk_ptr, dk0 * scale, cos_ptr, sin_ptr, own_key_row, key_row, key_exists, KEYS, K)
    else:
        store_chunk(dk_ptr, dk0 * scale, own_key_row, key_exists, 0, K0, K)
    if K1 > 0:
        store_chunk(dv_ptr, dv1, own_key_row, key_exists, K0, K1, K)
        store_chunk(dk_ptr, dk1 * scale, own_key_row, key_exists, K0, K1, K)
