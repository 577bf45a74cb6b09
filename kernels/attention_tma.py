"""A candidate for long sequences on Hopper: attention with bulk copies and warps specialised by Triton.

The same mathematics as `kernels/attention.py`, unmasked: one warp moves K and V tiles to shared memory by tensor
descriptors while two groups of warps multiply. It is off: on an H100, compiled by triton 3.6.0, specialised warps give
wrong results (head sizes 64, 128 and 256, off by half, other bits when run again), without any complaint. Without
specialisation the same kernel is right there; it was not timed. `bench/gpu.py` checks both against the reference and
times what passes; `attention` chooses neither.

A sequence's descriptors end with it: a box that passes its end is filled with zeros by hardware, so a neighbour's rows,
which could hold NaN, are never read; scores of the filling are masked.
"""

import torch
from torch import Tensor

from flashvec.kernels.backend import launch, tl, triton
from flashvec.kernels.schedule import Schedule, TileClass

ROWS = 128
SHORTER = 2048  # below it one block per tile has too few keys to fill its pipeline
KEYS = {64: 128, 128: 128, 256: 64}  # head size -> keys of a tile: what shared memory holds twice


@triton.jit
def _attention_tma_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tile_ptr, q_stride, q_head_stride, k_stride, k_head_stride, v_stride,
    v_head_stride, T, H, scale_log2, GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, K: tl.constexpr,
    SPECIALIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile_ptr += tl.program_id(0) * 4  # a filling tile has length 0 and stores nothing: no early return, which the
    # compiler's specialisation does not take
    start, length, first = tl.load(tile_ptr).to(tl.int64), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2)
    head = tl.program_id(1)
    k_ptr += (head // GROUP).to(tl.int64) * k_head_stride
    v_ptr += (head // GROUP).to(tl.int64) * v_head_stride
    q_ptr += start * q_stride + head * q_head_stride
    # A box ends where its sequence does: what lies past it arrives as zeros, never as the neighbour's rows.
    q_boxes = tl.make_tensor_descriptor(q_ptr, [length, K], [q_stride, 1], [ROWS, K])
    k_boxes = tl.make_tensor_descriptor(k_ptr + start * k_stride, [length, K], [k_stride, 1], [KEYS, K])
    v_boxes = tl.make_tensor_descriptor(v_ptr + start * v_stride, [length, K], [v_stride, 1], [KEYS, K])

    q = q_boxes.load([first, 0])
    acc = tl.zeros([ROWS, K], tl.float32)
    running_max = tl.full([ROWS], float("-inf"), tl.float32)
    running_sum = tl.zeros([ROWS], tl.float32)
    for key in tl.range(0, length, KEYS, warp_specialize=SPECIALIZE):
        k = k_boxes.load([key, 0])
        s = tl.dot(q, k.T, input_precision=PRECISION) * scale_log2
        s = tl.where((key + tl.arange(0, KEYS) < length)[None, :], s, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(s, 1))
        rescale = tl.exp2(running_max - new_max)
        p = tl.exp2(s - new_max[:, None])
        v = v_boxes.load([key, 0])
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        running_sum = running_sum * rescale + tl.sum(p, 1)
        running_max = new_max

    token = first + tl.arange(0, ROWS)
    row = start + token
    exists = token < length
    out = (acc / running_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (row * H + head)[:, None] * K + tl.arange(0, K)[None, :], out, mask=exists[:, None])
    lse = running_max + tl.log2(running_sum)
    tl.store(lse_ptr + head.to(tl.int64) * T + row, lse, mask=exists)


def attention_tma(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, schedule: Schedule, *, scale: float, specialize: bool = True
) -> tuple[Tensor, Tensor]:
    """Unmasked attention of sequences longer than `SHORTER`; rows of shorter ones are left zero.

    Args:
        q_THK, k_TGK, v_TGK, schedule, scale: as in `attention`; fp16 or bf16, K of 64, 128 or 256.
        specialize: let Triton give copies and products to warps of their own.

    Returns:
        [T, H, K] in the dtype of `q_THK`, and the log-sum-exp [H, T] in fp32, to base 2.
    """
    (T, H, K), G = q_THK.shape, k_TGK.shape[1]
    out_THK, lse_HT = q_THK.new_zeros(T, H, K), q_THK.new_zeros(H, T, dtype=torch.float32)
    if q_THK.is_cuda:  # descriptors are written to scratch memory by the kernel itself
        triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=q_THK.device))
    tiles = schedule.tiles(TileClass(ROWS, shorter=SHORTER))
    launch(
        _attention_tma_fwd_kernel,
        (len(tiles), H),
        *(q_THK, k_TGK, v_TGK, out_THK, lse_HT, tiles),
        *(q_THK.stride(0), q_THK.stride(1), k_TGK.stride(0), k_TGK.stride(1), v_TGK.stride(0), v_TGK.stride(1)),
        *(T, H, scale * 1.4426950408889634),
        GROUP=H // G,
        ROWS=ROWS,
        KEYS=KEYS[K],
        K=K,
        SPECIALIZE=specialize,
        PRECISION="ieee" if q_THK.dtype == torch.float32 else "tf32",
        num_warps=4 if specialize else 8,  # four that multiply are made twelve by specialisation
        num_stages=2,
    )
    return out_THK, lse_HT
