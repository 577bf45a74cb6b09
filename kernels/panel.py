"""Products with a panel: some columns of a matrix that is too large to hold in full.

    out[m, :] = scale * sum over k of panel[m, k] * factor[k] * x[row[k], :]        added to out, if asked for

A loss over a large vocabulary, or over many documents, makes its matrix of scores panel by panel. Forward reduces each
panel to one number a row at once. Backward makes a panel of weights and multiplies it: as it stands for the gradient
of what scored, a sum over panels; transposed for the gradient of what was scored, which one panel completes. Panels
keep every sum in one place: no atomics, equal bits on repetition.

Shape letters: M, N, K = rows, columns and inner size of a product. Cost 2*M*N*K FLOPs.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from flashvec.kernels.backend import implementation, launch, target, tl, triton

PANEL_ELEMENTS = 1 << 25  # of a panel on a GPU: 64 MB of halves, far from the memory that matters
PANEL_ELEMENTS_CPU = 1 << 19  # 2 MB of fp32: the passes over a panel read the cache
ROWS_CPU = 8  # up to a multiple: a CPU's library sums those left over term by term, which loses two digits over 50,000
GAIN = 4096.0  # multiplies panels of fp16, whose weights are at most 1: most probabilities are below its normal range
WIDE_TEMPORARIES = {"sm_90": 1, "sm_100": 0}  # more of them spill beside a tile of 128 x 256
GROUP_M = 8  # row blocks that walk the columns together, so that the L2 cache serves both factors


@triton.jit
def grouped(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row block and column block of a tile, in an order that stays in a narrow band of rows."""
    group = tile // (GROUP_M * tiles_n)
    first = group * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return first + within % rows, within // rows


@triton.jit
def halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile: what follows a wide product takes half the registers, one at a time."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _write(acc, out_ptr, out_stride, in_m, first, N, ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store a tile at the columns from `first` on, or add it to what is there."""
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    inside = in_m[:, None] & (first + j < N)[None, :]
    at = out_ptr + first + i[:, None] * out_stride + j[None, :]
    if ADD:
        acc += tl.load(at, mask=inside, other=0.0)
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _panel_product_kernel(
    panel_ptr, x_ptr, row_ptr, factor_ptr, scale_ptr, out_ptr,
    M, N, K, panel_stride_m, panel_stride_k, x_stride, out_stride,
    ADD: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    # A tile's place goes into its base, in 64 bits; offsets within it fit 32, and half the registers.
    i, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    in_m, in_n = tile_m * BLOCK_M + i < M, tile_n * BLOCK_N + j < N
    panel_ptr += (tile_m * BLOCK_M).to(tl.int64) * panel_stride_m
    out_ptr += (tile_m * BLOCK_M).to(tl.int64) * out_stride
    x_ptr += tile_n * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_k = k < K
        row = k.to(tl.int64)
        if row_ptr is not None:
            row = tl.load(row_ptr + k, mask=in_k, other=0).to(tl.int64)
        x = tl.load(x_ptr + row[:, None] * x_stride + j[None, :], mask=in_k[:, None] & in_n[None, :], other=0.0)
        if factor_ptr is not None:
            factor = tl.load(factor_ptr + k, mask=in_k, other=0.0)
            x = (x.to(tl.float32) * factor[:, None]).to(x.dtype)
        at = i[:, None] * panel_stride_m + k.to(tl.int64)[None, :] * panel_stride_k
        panel = tl.load(panel_ptr + at, mask=in_m[:, None] & in_k[None, :], other=0.0)
        acc = tl.dot(panel, x, acc, input_precision="ieee")
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr)
    if BLOCK_N > 128:
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        _write(left, out_ptr, out_stride, in_m, tile_n * BLOCK_N, N, ADD, BLOCK_M, BLOCK_N // 2)
        first = tile_n * BLOCK_N + BLOCK_N // 2
        _write(right, out_ptr, out_stride, in_m, first, N, ADD, BLOCK_M, BLOCK_N // 2)
    else:
        _write(acc, out_ptr, out_stride, in_m, tile_n * BLOCK_N, N, ADD, BLOCK_M, BLOCK_N)


def tile_sizes(x: Tensor, temporaries: int = 0) -> dict[str, Any]:
    """Tiles of a product and its options, by what shared memory and registers of a target take.

    Halves: 128 x 256 where wgmma reads both factors from shared memory and what follows the product leaves it the
    registers, else 128 x 128. fp32 runs without matrix units, exactly, and is for checking: small tiles.

    Args:
        x: a factor.
        temporaries: fp32 numbers that are alive for each element once the product is done, beside it.
    """
    device = target(x)
    if x.element_size() == 4:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    if temporaries <= WIDE_TEMPORARIES.get(device.name, -1):
        return {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    large = device.shared_bytes > 128 * 1024
    return {
        "BLOCK_M": 128,
        "BLOCK_N": 128,
        "BLOCK_K": 64 if large or device.backend == "hip" else 32,
        "num_warps": 8,
        "num_stages": 3 if device.backend == "cuda" else 2,
    }


def panel_width(num_rows: int, num_columns: int, unit: int, elements: int) -> int:
    """Columns of a panel of so many rows: a multiple of `unit` of about `elements` elements, at most all columns."""
    return min(-(-num_columns // unit), max(1, elements // (unit * max(1, num_rows)))) * unit


def panel_product(
    panel_MK: Tensor,
    x: Tensor,
    out_MN: Tensor,
    *,
    add: bool = False,
    rows_K: Tensor | None = None,
    factor_K: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """Write the product into `out_MN`, or add it.

    Args:
        panel_MK: [M, K] any strides: a panel, or a transposed one.
        x: [K, N], or [*, N] of which `rows_K` names the rows; rows contiguous in themselves. The panel is multiplied
            in its dtype.
        out_MN: [M, N] rows contiguous in themselves; any float dtype, fp32 if added to.
        factor_K: fp32 [K], multiplies rows of `x`, rounded to its dtype.
        scale: fp32 of one element.
    """
    if implementation(x) != "triton":
        x = x if rows_K is None else x[rows_K]
        x = x if factor_K is None else (x * factor_K[:, None]).to(x.dtype)
        M, panel_MK = panel_MK.shape[0], panel_MK.to(x.dtype)
        if M % ROWS_CPU:
            panel_MK = F.pad(panel_MK, (0, 0, 0, -M % ROWS_CPU))
        product = (panel_MK @ x)[:M]
        product = product if scale is None else product * scale
        out_MN.copy_(out_MN + product if add else product)
        return
    (M, K), N = panel_MK.shape, out_MN.shape[1]
    tile = tile_sizes(x)
    launch(
        _panel_product_kernel, (-(-M // tile["BLOCK_M"]) * -(-N // tile["BLOCK_N"]),),
        panel_MK, x, rows_K, factor_K, scale, out_MN,
        M, N, K, *panel_MK.stride(), x.stride(0), out_MN.stride(0), ADD=add, GROUP_M=GROUP_M, **tile,
    )  # fmt: skip
