"""Gradients of packed attention on Hopper, with warps specialised by hand; `kernels/attention_hopper.py` explains how.

The mathematics and the two passes are those of `kernels/attention_bwd.py`: dq by tiles of queries
(`kernels/attention_hopper_dq.py`), then dk and dv by tiles of keys (`kernels/attention_hopper_dkv.py`), nothing added
atomically.
"""

from torch import Tensor

from flashvec.kernels import attention_hopper
from flashvec.kernels.attention_hopper_dkv import launch_attention_hopper_dkv
from flashvec.kernels.attention_hopper_dq import launch_attention_hopper_dq
from flashvec.kernels.attention_tiles import BackwardConfig


def takes(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, rotate: bool, *options: bool) -> bool:
    """True if the kernels can run these; see `attention_hopper.takes`.

    Args:
        rotate: queries and keys are rotated: whatever their strides were, what is copied is contiguous.
        options: is there a window (or a causal mask), a soft-cap, dropout?
    """
    if rotate:
        return attention_hopper.takes(q_THK, v_TGK, v_TGK, *options)
    return attention_hopper.takes(q_THK, k_TGK, v_TGK, *options) and attention_hopper.has_neighbouring_heads(q_THK)


def launch_attention_hopper_bwd(
    config: BackwardConfig,
    dout_THK: Tensor,
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    out_THK: Tensor,
    lse_HT: Tensor,
    delta_HT: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    rotated_THK: Tensor | None,
    tiles: Tensor,
    packed: int,
    cos_TK: Tensor | None,
    sin_TK: Tensor | None,
    scale: float,
) -> None:
    """The pass that `config` names, "dq" before "dkv", of the sequences in `tiles`; keys come rotated, queries not."""
    dq_THK, dk_TGK, dv_TGK = gradients
    if config.form == "dq":
        launch_attention_hopper_dq(
            *(config, dout_THK, q_THK, k_TGK, v_TGK, out_THK, lse_HT, delta_HT, dq_THK, rotated_THK, tiles, packed),
            *(cos_TK, sin_TK, scale),
        )
    else:
        rows_THK = q_THK if rotated_THK is None else rotated_THK
        launch_attention_hopper_dkv(
            *(config, dout_THK, rows_THK, k_TGK, v_TGK, lse_HT, delta_HT, dk_TGK, dv_TGK, tiles, cos_TK, sin_TK, scale)
        )
