"""Gradients of packed attention in q, k and v: op and autograd. `kernels/attention.py` defines what is differentiated.

    p = exp(s - lse)                delta = sum over a row of dout * out       dv = (kept p)ᵀ dout
    ds = p * (dp - delta) * s'      dp = kept (dout vᵀ)                        dq = ds k * scale,  dk = dsᵀ q * scale

`s'` is the soft-cap's slope 1 - tanh², `kept` what dropout kept, drawn again. The reference is torch's autograd of
`attention_reference`.

Short sequences, whose keys fit one tile, take one program per kv head: it holds dk and dv, walks the rows of the
group's query heads, and finishes dq as it goes, so each tensor is read or written once. With all keys at hand it finds
`delta` as the sum of p * dp, closer than from a rounded `out`, and never reads `out`. Longer ones take two kernels:
dq by tiles of queries, which leaves `delta` behind, then dk and dv by tiles of keys. Nothing is added atomically.

In the kernel of dk and dv the rows of every product lie along keys or along the head (sᵀ = k qᵀ, dqᵀ = kᵀ dsᵀ), never
along queries: a step takes 16 to 64 query rows and dk and dv alone stay in registers, so that nothing spills.

Shape letters: T = packed tokens, H = query heads, G = kv heads, K = head size, n = a sequence's tokens.
Cost 10*n²*K FLOPs a head in one kernel, 14*n²*K in two; 2*(3 + 4*G/H)*n*K bytes in 16 bits in one: bound by memory
below some 250 tokens on an H100. Sources: Dao et al. 2022; Dao 2023 (delta); the transposed products are our own.
"""

from typing import Any

from torch import Tensor

from flashvec.kernels.attention_bwd_kernels import _attention_bwd_dkv_kernel, _attention_bwd_dq_kernel
from flashvec.kernels.attention_hopper_bwd import launch_attention_hopper_bwd, takes
from flashvec.kernels.attention_tiles import (
    backward_configs,
    fp32_precision,
    has_far_heads,
    head_chunks,
    packed_heads,
)
from flashvec.kernels.backend import define_op, launch, target
from flashvec.kernels.rope import rope
from flashvec.kernels.schedule import Schedule

# --- op -----------------------------------------------------------------------------------------------


def launch_attention_bwd(
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
    specialised: bool,
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
    packed, options = packed_heads(H, G), (max(left, right) >= 0, softcap > 0, threshold > 0)
    configs = backward_configs(target(q_THK), q_THK.dtype, K, packed, rotate, *options, specialised)
    turned_THK = q_THK.new_empty(q_THK.shape) if rotate and any(config.ring for config in configs) else None
    for config, tile_list in zip(configs, tiles, strict=True):
        if config.ring:
            launch_attention_hopper_bwd(
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


def _attention_bwd_fake(
    dout_THK: Tensor, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    return q_THK.new_empty(q_THK.shape), k_TGK.new_empty(k_TGK.shape), v_TGK.new_empty(v_TGK.shape)


attention_bwd = define_op(
    "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor[] tiles, "
    "SymInt num_tokens, Tensor? cos, Tensor? sin, Tensor? identities, float scale, SymInt left, SymInt right, "
    "float softcap, SymInt threshold, SymInt key_a, SymInt key_b, bool specialised) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
    launch_attention_bwd,
    _attention_bwd_fake,
)


# --- autograd of `flashvec::attention` ------------------------------------------------------------------


def backward_tiles(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, schedule: Schedule, rotate: bool, *options: bool
) -> list[Tensor]:
    """The tile lists that the backward walks, in its order.

    Args:
        options: is there a window, a soft-cap, dropout?
    """
    packed = packed_heads(q_THK.shape[1], k_TGK.shape[1])
    specialised = takes(q_THK, k_TGK, v_TGK, rotate, *options)
    configs = backward_configs(target(q_THK), q_THK.dtype, q_THK.shape[2], packed, rotate, *options, specialised)
    return [schedule.tiles(config.tile_class) for config in configs]


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_THK, k_TGK, v_TGK, rotated_TGK, tiles, later_tiles, num_tokens, cos_TK, sin_TK, query_norm_K, *_ = inputs
    identities, shift_stop, *ctx.numbers = inputs[12:]
    _, left, right, softcap, threshold, *_ = ctx.numbers
    out_THK, lse_HT = output
    if query_norm_K is not None or shift_stop is not None:
        raise RuntimeError("attention has no gradient through head norms or for selected queries; see attention()")
    if (rotated_TGK is None) != (cos_TK is None):
        raise RuntimeError("attention's gradient needs rotated keys together with cos and sin, or neither")
    # The rotated keys, a tenth of what is saved, spare the backward a pass over k; q is rotated as it is loaded.
    keys_TGK = k_TGK if rotated_TGK is None else rotated_TGK
    # Decided here, as the tile lists were: hooks on saved tensors (`save_on_cpu`) may bring them back in other strides.
    options = max(left, right) >= 0, softcap > 0, threshold > 0
    ctx.specialised = takes(q_THK, k_TGK, v_TGK, cos_TK is not None, *options)
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
            *(cos_TK, sin_TK, identities, *ctx.numbers, ctx.specialised),
        )
    return *wanted, None, [None] * ctx.num_tiles, [None] * len(tiles), *(None,) * 15
