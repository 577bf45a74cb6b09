"""Gradients of packed attention in q, k and v; `kernels/attention.py` defines what is differentiated.

    p = exp(s - lse)                delta = sum over a row of dout * out       dv = (kept p)ᵀ dout
    ds = p * (dp - delta) * s'      dp = kept (dout vᵀ)                        dq = ds k * scale,  dk = dsᵀ q * scale

`s'` is the soft-cap's slope 1 - tanh², `kept` what dropout kept, drawn again. The reference is torch's autograd of
`attention_reference`.

Short sequences, whose keys fit one tile, take one program per kv head: it holds dk and dv, walks the rows of the
group's query heads, and finishes dq as it goes, so each tensor is read or written once. With all keys at hand it finds
`delta` as the sum of p * dp, closer than from a rounded `out`, and never reads `out`. Longer ones take two kernels:
dq by tiles of queries, which leaves `delta` behind, then dk and dv by tiles of keys. Nothing is added atomically.

In the kernel of dk and dv the rows of every product lie along keys or along the head (sᵀ = k qᵀ, dqᵀ = kᵀ dsᵀ), never
along queries: a step takes 16 or 32 query rows and dk and dv alone stay in registers, so that nothing spills.

Shape letters: T = packed tokens, H = query heads, G = kv heads, K = head size, n = a sequence's tokens.
Cost 10*n²*K FLOPs a head in one kernel, 14*n²*K in two; 2*(3 + 4*G/H)*n*K bytes in 16 bits in one: bound by memory
below some 250 tokens on an H100. Sources: Dao et al. 2022; Dao 2023 (delta); the transposed products are our own.
"""

from typing import Any

from torch import Tensor

from flashvec.kernels import attention_hopper_bwd as specialised
from flashvec.kernels.attention_tiles import (
    BackwardConfig,
    backward_configs,
    fp32_precision,
    has_far_heads,
    head_chunks,
    kept,
    key_ranges,
    load_chunk,
    load_rotated_chunk,
    packed_heads,
    row_key,
    seen,
    softcapped,
    store_chunk,
    store_unrotated,
)
from flashvec.kernels.backend import define_op, launch, target, tl, triton
from flashvec.kernels.rope import rope
from flashvec.kernels.schedule import Schedule

# --- kernels ------------------------------------------------------------------------------------------


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
        own_row = q_row * H + head  # of out, dout and dq
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


# --- op -----------------------------------------------------------------------------------------------


def _attention_bwd_launch(
    dout_THK: Tensor,
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    out_THK: Tensor,
    lse_HT: Tensor,
    tiles: list[Tensor],
    num_tokens: int,
    cos_TK: Tensor | None,
    sin_TK: Tensor | None,
    identities: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    threshold: int,
    key_a: int,
    key_b: int,
) -> tuple[Tensor, Tensor, Tensor]:
    (T, H, K), G = q_THK.shape, k_TGK.shape[1]
    dout_THK = dout_THK.contiguous()
    if dout_THK.data_ptr() % 16:  # a slice of a longer tensor: bulk copies begin at multiples of 16 bytes
        dout_THK = dout_THK.clone()
    dq_THK, dk_TGK, dv_TGK = (x.new_empty(x.shape) for x in (q_THK, k_TGK, v_TGK))
    delta_HT = lse_HT.new_empty(lse_HT.shape)
    for x in (dq_THK, dk_TGK, dv_TGK):
        x[num_tokens:] = 0
    K0, K1 = head_chunks(K)
    rotate = cos_TK is not None
    # A head's halves are at hand in registers where it is one power of two; dk of wider ones leaves none free for it.
    unrotate, unrotate_keys = rotate and K == K0, rotate and K == K0 <= 128
    row, far_heads = max(H * K, q_THK.stride(0), k_TGK.stride(0), v_TGK.stride(0)), has_far_heads(q_THK)
    configs = _configs(q_THK, k_TGK, v_TGK, rotate, threshold > 0, softcap > 0, max(left, right) >= 0)
    packed = packed_heads(H, G)
    turned_THK = q_THK.new_empty(q_THK.shape) if rotate and any(config.ring for config in configs) else None
    for config, tile_list in zip(configs, tiles, strict=True):
        if config.ring:
            specialised.launch_attention_hopper_bwd(
                *(config, dout_THK, q_THK, k_TGK, v_TGK, out_THK, lse_HT, delta_HT, (dq_THK, dk_TGK, dv_TGK)),
                *(turned_THK, tile_list, packed, cos_TK, sin_TK, scale),
            )
            continue
        if config.form == "dq":
            tensors = [dout_THK, q_THK, k_TGK, v_TGK, out_THK, lse_HT, delta_HT, dq_THK]
        else:
            tensors = [dout_THK, q_THK, k_TGK, v_TGK, lse_HT, delta_HT, dq_THK, dk_TGK, dv_TGK]
        shape: dict[str, int] = {"GROUP": H // G, "ROWS": config.rows, "KEYS": config.keys, "K": K, "K0": K0, "K1": K1}
        if config.form == "dq":
            shape |= {"TOKENS": config.tile_class.tokens, "PACKED": packed}
        else:
            shape |= {"ONE_TILE": config.form == "one tile"}
        launch(
            _attention_bwd_dq_kernel if config.form == "dq" else _attention_bwd_dkv_kernel,
            (len(tile_list), H // packed if config.form == "dq" else G),
            *(*tensors, tile_list, cos_TK, sin_TK, identities),
            *(q_THK.stride(0), q_THK.stride(1), k_TGK.stride(0), k_TGK.stride(1), v_TGK.stride(0), v_TGK.stride(1)),
            *(T, H, scale, softcap, left, right, key_a, key_b, threshold, 256 / (256 - threshold)),
            **shape,
            HAS_LEFT=left >= 0,
            HAS_RIGHT=right >= 0,
            HAS_SOFTCAP=softcap > 0,
            HAS_DROPOUT=threshold > 0,
            ROTATE=rotate,
            UNROTATE=unrotate_keys if config.form == "dkv" else unrotate,
            # A short sequence counts its rows from its own first one, the others count all rows.
            WIDE=far_heads or (config.keys if config.form == "one tile" else T) * row >= 2**31,
            PRECISION=fp32_precision(target(q_THK)),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            maxnreg=config.maxnreg,
        )
    if cos_TK is not None and sin_TK is not None:
        dq_THK = dq_THK if unrotate else rope(dq_THK, cos_TK, -sin_TK)
        dk_TGK = dk_TGK if unrotate_keys else rope(dk_TGK, cos_TK, -sin_TK)
    return dq_THK, dk_TGK, dv_TGK


def _configs(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, rotate: bool, *options: bool) -> tuple[BackwardConfig, ...]:
    """The table's choice; options: is there dropout, a soft-cap, a window?"""
    packed = packed_heads(q_THK.shape[1], k_TGK.shape[1])
    by_hand = specialised.takes(q_THK, k_TGK, v_TGK, rotate, *options)
    return backward_configs(target(q_THK), q_THK.dtype, q_THK.shape[2], packed, rotate, *options, by_hand)


def _attention_bwd_fake(
    dout_THK: Tensor, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    return q_THK.new_empty(q_THK.shape), k_TGK.new_empty(k_TGK.shape), v_TGK.new_empty(v_TGK.shape)


attention_bwd = define_op(
    "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor[] tiles, "
    "SymInt num_tokens, Tensor? cos, Tensor? sin, Tensor? identities, float scale, SymInt left, SymInt right, "
    "float softcap, SymInt threshold, SymInt key_a, SymInt key_b) -> (Tensor dq, Tensor dk, Tensor dv)",
    _attention_bwd_launch,
    _attention_bwd_fake,
)


# --- autograd of `flashvec::attention` ------------------------------------------------------------------


def backward_tiles(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, schedule: Schedule, rotate: bool, *options: bool
) -> list[Tensor]:
    """The tile lists that the backward walks, in its order.

    Args:
        options: is there dropout, a soft-cap, a window?
    """
    configs = _configs(q_THK, k_TGK, v_TGK, rotate, *options)
    return [schedule.tiles(config.tile_class) for config in configs]


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_THK, k_TGK, v_TGK, rotated_TGK, tiles, later_tiles, num_tokens, cos_TK, sin_TK, query_norm_K, *_ = inputs
    identities, shift_stop, *ctx.numbers = inputs[12:]
    out_THK, lse_HT = output
    if query_norm_K is not None or shift_stop is not None:
        raise RuntimeError("attention has no gradient through head norms or for selected queries; see attention()")
    if (rotated_TGK is None) != (cos_TK is None):
        raise RuntimeError("attention's gradient needs rotated keys together with cos and sin, or neither")
    # The rotated keys, a tenth of what is saved, spare the backward a pass over k; q is rotated as it is loaded.
    keys_TGK = k_TGK if rotated_TGK is None else rotated_TGK
    ctx.num_tokens, ctx.num_tiles = num_tokens, len(tiles)
    ctx.save_for_backward(q_THK, keys_TGK, v_TGK, out_THK, lse_HT, cos_TK, sin_TK, identities, *later_tiles)
    ctx.mark_non_differentiable(lse_HT)
    ctx.set_materialize_grads(False)


def gradients(ctx: Any, dout_THK: Tensor | None, _: None) -> tuple[Any, ...]:
    q_THK, k_TGK, v_TGK, out_THK, lse_HT, cos_TK, sin_TK, identities, *tiles = ctx.saved_tensors
    wanted: tuple[Tensor | None, ...] = (None, None, None)
    if dout_THK is not None:
        wanted = attention_bwd(
            *(dout_THK, q_THK, k_TGK, v_TGK, out_THK, lse_HT, tiles, ctx.num_tokens),
            *(cos_TK, sin_TK, identities, *ctx.numbers),
        )
    return *wanted, None, [None] * ctx.num_tiles, [None] * len(tiles), *(None,) * 15
