"""Forward of packed attention on a GPU: the kernel, its launch, and the op that autograd knows.

`kernels/attention.py` defines what is computed and holds the public function; `kernels/attention_bwd.py` the gradients.
"""

import torch
from torch import Tensor

from flashvec.kernels.attention_bwd import gradients, save_for_backward
from flashvec.kernels.attention_hopper import launch_attention_hopper, takes
from flashvec.kernels.attention_tiles import (
    forward_configs,
    fp32_precision,
    has_far_heads,
    head_chunks,
    head_reciprocal_rms,
    kept,
    key_ranges,
    load_chunk,
    load_rotated_chunk,
    packed_heads,
    row_key,
    seen,
    softcapped,
)
from flashvec.kernels.backend import define_op, launch, target, tl, triton
from flashvec.kernels.schedule import Queries, Schedule

# --- kernel: one program per tile and group of packed heads -----------------------------------------------


@triton.jit
def _attend(
    q0, q1, acc0, acc1, running_max, running_sum, k_ptr, v_ptr, k_stride, v_stride, start, first_key, length,
    token, drop_a, drop_b, scale, softcap, left, right, threshold, drop_scale,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, KEYS: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, MASKED: tl.constexpr,
    ONE_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold one tile of keys into the running maximum, sum and output of each query row."""
    key = first_key + tl.arange(0, KEYS)
    exists = key < length
    k_row, v_row = start + key.to(tl.int64), start + key.to(tl.int64)
    s = tl.dot(q0, load_chunk(k_ptr, k_row, k_stride, exists, 0, K0, K).T, input_precision=PRECISION)
    if K1 > 0:
        k1 = load_chunk(k_ptr, k_row, k_stride, exists, K0, K1, K)
        s = tl.dot(q1, k1.T, s, input_precision=PRECISION)
    s = softcapped(s * scale, softcap) * 1.4426950408889634 if HAS_SOFTCAP else s * (scale * 1.4426950408889634)
    if MASKED:
        visible = seen(token[:, None], key[None, :], length, left, right, HAS_LEFT, HAS_RIGHT)
        s = tl.where(visible, s, float("-inf"))
    new_max = tl.maximum(running_max, tl.max(s, 1))
    if MASKED and (HAS_LEFT or HAS_RIGHT):  # a row may see nothing of this tile, or of any so far
        p = tl.exp2(s - tl.where(new_max == float("-inf"), 0.0, new_max)[:, None])
        rescale = tl.exp2(running_max - tl.where(new_max == float("-inf"), 0.0, new_max))
    else:
        p = tl.exp2(s - new_max[:, None])
        rescale = tl.exp2(running_max - new_max)
    running_sum = running_sum * rescale + tl.sum(p, 1)  # before dropout: it thins the products, not the weights
    if HAS_DROPOUT:
        p = tl.where(kept(drop_a[:, None], drop_b[:, None], key[None, :], threshold), p * drop_scale, 0.0)
    v0 = load_chunk(v_ptr, v_row, v_stride, exists, 0, K0, K)
    p = p.to(v0.dtype)
    if not ONE_TILE:
        acc0 = acc0 * rescale[:, None]
    acc0 = tl.dot(p, v0, acc0, input_precision=PRECISION)
    if K1 > 0:
        v1 = load_chunk(v_ptr, v_row, v_stride, exists, K0, K1, K)
        acc1 = tl.dot(p, v1, acc1 * rescale[:, None], input_precision=PRECISION)
    return acc0, acc1, new_max, running_sum


@triton.jit(do_not_specialize=["key_a", "key_b"])  # drawn anew every step
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tile_ptr, cos_ptr, sin_ptr, norm_ptr, identity_ptr, shift_stop_ptr,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, T, H,
    scale, softcap, left, right, norm_eps, norm_offset, key_a, key_b, threshold, drop_scale,
    TOKENS: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    K: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, ONE_TILE: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, ROTATE: tl.constexpr,
    NORM: tl.constexpr, SUBSET: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile_ptr += tl.program_id(0) * 4
    sequence = tl.load(tile_ptr + 3)
    if sequence < 0:
        return
    start, length, first = tl.load(tile_ptr).to(tl.int64), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    first_head = tl.program_id(1) * PACKED
    kv_head = first_head // GROUP

    shift, stop = start, length
    if SUBSET:
        shift = tl.load(shift_stop_ptr + sequence * 2).to(tl.int64)
        stop = tl.load(shift_stop_ptr + sequence * 2 + 1)

    row = tl.arange(0, ROWS)
    token, head = first + row // PACKED, first_head + row % PACKED
    row_exists = (row < TOKENS * PACKED) & (token < stop)
    q_row = shift + token.to(tl.int64)
    q_ptr += (head.to(tl.int64) if WIDE else head)[:, None] * q_head_stride
    if ROTATE:
        reciprocal_rms = tl.zeros([ROWS], tl.float32)
        if NORM:
            reciprocal_rms = head_reciprocal_rms(q_ptr, q_row, q_stride, row_exists, norm_eps, K, K0, K1)
        q0 = load_rotated_chunk(
            q_ptr, cos_ptr, sin_ptr, norm_ptr, q_row, q_stride, q_row, row_exists, reciprocal_rms, norm_offset,
            0, K0, K, NORM,
        )  # fmt: skip
    else:
        q0 = load_chunk(q_ptr, q_row, q_stride, row_exists, 0, K0, K)
    q1 = q0
    if K1 > 0:
        if ROTATE:
            q1 = load_rotated_chunk(
                q_ptr, cos_ptr, sin_ptr, norm_ptr, q_row, q_stride, q_row, row_exists, reciprocal_rms, norm_offset,
                K0, K1, K, NORM,
            )  # fmt: skip
        else:
            q1 = load_chunk(q_ptr, q_row, q_stride, row_exists, K0, K1, K)
    drop_a, drop_b = row, row
    if HAS_DROPOUT:
        drop_a, drop_b = row_key(key_a, key_b, tl.load(identity_ptr + sequence), head, token)

    k_ptr += kv_head.to(tl.int64) * k_head_stride
    v_ptr += kv_head.to(tl.int64) * v_head_stride
    acc0 = tl.zeros([ROWS, K0], tl.float32)
    acc1 = tl.zeros([ROWS, K1 if K1 > 0 else 1], tl.float32)
    running_max = tl.full([ROWS], float("-inf"), tl.float32)
    running_sum = tl.zeros([ROWS], tl.float32)
    if ONE_TILE:
        acc0, acc1, running_max, running_sum = _attend(
            q0, q1, acc0, acc1, running_max, running_sum, k_ptr, v_ptr, k_stride, v_stride, start, 0, length,
            token, drop_a, drop_b, scale, softcap, left, right, threshold, drop_scale, K, K0, K1, KEYS, HAS_LEFT,
            HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, True, True, PRECISION,
        )  # fmt: skip
    else:
        low, full_low, full_high, high = key_ranges(first, stop, length, left, right, TOKENS, KEYS, HAS_LEFT, HAS_RIGHT)
        if HAS_LEFT:
            for key in tl.range(low, full_low, KEYS):
                acc0, acc1, running_max, running_sum = _attend(
                    q0, q1, acc0, acc1, running_max, running_sum, k_ptr, v_ptr, k_stride, v_stride, start, key, length,
                    token, drop_a, drop_b, scale, softcap, left, right, threshold, drop_scale, K, K0, K1, KEYS,
                    HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, True, False, PRECISION,
                )  # fmt: skip
        for key in tl.range(full_low, full_high, KEYS):
            acc0, acc1, running_max, running_sum = _attend(
                q0, q1, acc0, acc1, running_max, running_sum, k_ptr, v_ptr, k_stride, v_stride, start, key, length,
                token, drop_a, drop_b, scale, softcap, left, right, threshold, drop_scale, K, K0, K1, KEYS,
                HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, False, False, PRECISION,
            )  # fmt: skip
        for key in tl.range(full_high, high, KEYS):
            acc0, acc1, running_max, running_sum = _attend(
                q0, q1, acc0, acc1, running_max, running_sum, k_ptr, v_ptr, k_stride, v_stride, start, key, length,
                token, drop_a, drop_b, scale, softcap, left, right, threshold, drop_scale, K, K0, K1, KEYS,
                HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_DROPOUT, True, False, PRECISION,
            )  # fmt: skip

    running_sum = tl.where(running_sum == 0.0, 1.0, running_sum)  # rows that do not exist
    out_ptr += (q_row * H + head)[:, None] * K
    column = tl.arange(0, K0)
    out0 = (acc0 / running_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + column[None, :], out0, mask=row_exists[:, None] & (column < K)[None, :])
    if K1 > 0:
        column = K0 + tl.arange(0, K1)
        out1 = (acc1 / running_sum[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + column[None, :], out1, mask=row_exists[:, None] & (column < K)[None, :])
    lse = running_max + tl.log2(running_sum)  # to base 2, as the backward wants it: two roundings less
    tl.store(lse_ptr + head.to(tl.int64) * T + q_row, lse, mask=row_exists)


# --- op -----------------------------------------------------------------------------------------------


def launch_attention(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    rotated_TGK: Tensor | None,
    tiles: list[Tensor],
    later_tiles: list[Tensor],
    num_tokens: int,
    cos_TK: Tensor | None,
    sin_TK: Tensor | None,
    query_norm_K: Tensor | None,
    norm_eps: float,
    norm_offset: float,
    identities: Tensor | None,
    shift_stop: Tensor | None,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    threshold: int,
    key_a: int,
    key_b: int,
) -> tuple[Tensor, Tensor]:
    """Output [T, H, K] and log-sum-exp of the scores to base 2, fp32 [H, T]; rows past `num_tokens` are zero.

    `later_tiles` are the backward's, which autograd keeps. `left` and `right` are -1 where nothing is hidden.
    """
    (T, H, K), G = q_THK.shape, k_TGK.shape[1]  # with queries selected, T counts their rows
    packed, rotates = packed_heads(H, G), cos_TK is not None
    options = max(left, right) >= 0, softcap > 0, threshold > 0, shift_stop is not None
    specialised = takes(q_THK, k_TGK, v_TGK, *options)
    if rotated_TGK is not None:
        k_TGK = rotated_TGK
    out_THK, lse_HT = q_THK.new_empty(T, H, K), q_THK.new_empty(H, T, dtype=torch.float32)
    out_THK[num_tokens:] = 0
    lse_HT[:, num_tokens:] = 0
    K0, K1 = head_chunks(K)
    configs = forward_configs(target(q_THK), q_THK.dtype, K, packed, rotates, specialised)
    for config, tile_list in zip(configs, tiles, strict=True):
        if config.ring:
            launch_attention_hopper(
                *(config, q_THK, k_TGK, v_TGK, out_THK, lse_HT, tile_list, packed),
                *(cos_TK, sin_TK, query_norm_K, norm_eps, norm_offset, scale),
            )
            continue
        launch(
            _attention_fwd_kernel,
            (len(tile_list), H // packed),
            *(q_THK, k_TGK, v_TGK, out_THK, lse_HT, tile_list, cos_TK, sin_TK, query_norm_K, identities),
            shift_stop,
            *(q_THK.stride(0), q_THK.stride(1), k_TGK.stride(0), k_TGK.stride(1), v_TGK.stride(0), v_TGK.stride(1)),
            *(T, H, scale, softcap, left, right, norm_eps, norm_offset, key_a, key_b, threshold),
            256 / (256 - threshold),
            TOKENS=config.tile_class.tokens,
            PACKED=packed,
            GROUP=H // G,
            ROWS=config.rows,
            KEYS=config.keys,
            K=K,
            K0=K0,
            K1=K1,
            ONE_TILE=config.one_tile,
            HAS_LEFT=left >= 0,
            HAS_RIGHT=right >= 0,
            HAS_SOFTCAP=softcap > 0,
            HAS_DROPOUT=threshold > 0,
            ROTATE=rotates,
            NORM=query_norm_K is not None,
            SUBSET=shift_stop is not None,
            WIDE=has_far_heads(q_THK),
            PRECISION=fp32_precision(target(q_THK)),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            maxnreg=config.maxnreg,
        )
    return out_THK, lse_HT


def _attention_fake(q_THK: Tensor, k_TGK: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    T, H, K = q_THK.shape
    return q_THK.new_empty(T, H, K), q_THK.new_empty(H, T, dtype=torch.float32)


attention_op = define_op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? rotated_k, Tensor[] tiles, Tensor[] backward_tiles, "
    "SymInt num_tokens, Tensor? cos, Tensor? sin, Tensor? query_norm, float norm_eps, float norm_offset, "
    "Tensor? identities, Tensor? shift_stop, float scale, SymInt left, SymInt right, float softcap, SymInt threshold, "
    "SymInt key_a, SymInt key_b) -> (Tensor out, Tensor lse)",
    launch_attention,
    _attention_fake,
    setup_context=save_for_backward,
    backward=gradients,
)


def forward_tiles(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, of: Schedule | Queries, rotate: bool, *options: bool
) -> list[Tensor]:
    """The tile lists that the forward walks, in its order: of all queries, or of the selected ones.

    Args:
        options: is there a window, a soft-cap, dropout?
    """
    packed = packed_heads(q_THK.shape[1], k_TGK.shape[1])
    specialised = takes(q_THK, k_TGK, v_TGK, *options, isinstance(of, Queries))
    configs = forward_configs(target(q_THK), q_THK.dtype, q_THK.shape[2], packed, rotate, specialised)
    return [of.tiles(config.tile_class) for config in configs]
