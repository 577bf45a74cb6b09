"""InfoNCE's kernels: tiles of cosines between queries and documents, several prefixes in one pass.

With w = dL/dcos and r the reciprocal lengths, each prefix's columns of the gradient are
    dq_i = sum_j w_ij r_i r_j c_j - (sum_j w_ij cos_ij) r_i² q_i                              and likewise for c_j.
A program owns rows of the gradient and adds to them tile by tile: no atomics, one order of sums. The second sum, which
takes out what would only change a row's length, leaves the kernel as one number a row and prefix.

Shape letters as in `kernels/info_nce.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flashvec.kernels.attention_tiles import fp32_precision
from flashvec.kernels.backend import launch, target, tl, triton

BLOCK = 64  # queries and documents of a tile
BLOCK_D = 64  # columns multiplied at a time
WANTED_PROGRAMS = 264  # two for each multiprocessor of an H100: few queries share out the documents


@triton.jit
def _dot_columns(
    row_ptr, column_ptr, dots, rows, columns, row_ok, column_ok, begin, end, D,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the products of columns [begin, end) to a tile of dot products."""
    for d in range(begin, end, BLOCK_D):
        in_d = d + tl.arange(0, BLOCK_D)
        x = tl.load(
            row_ptr + rows[:, None] * D + in_d[None, :], mask=row_ok[:, None] & (in_d < end)[None, :], other=0.0
        )
        y = tl.load(
            column_ptr + columns[:, None] * D + in_d[None, :],
            mask=column_ok[:, None] & (in_d < end)[None, :],
            other=0.0,
        )
        dots = tl.dot(x, y.T, dots, input_precision=PRECISION)
    return dots


@triton.jit
def _counted(
    cosines, query, document, query_ok, document_ok, positive_ptr, exact_ptr, id_ptr, margin, HAS_IDS: tl.constexpr
):
    """Cosines less the positive's, at which they are exactly 0; which element that is; which candidates count.

    What is no number counts, and makes the loss none: at the positive `exact - exact` is 0 or NaN.
    """
    positive = tl.load(positive_ptr + query, mask=query_ok, other=-1)
    exact = tl.load(exact_ptr + query, mask=query_ok, other=0.0)
    is_positive = document == positive
    above = tl.where(is_positive, exact, cosines) - exact
    counts = ~(cosines > exact + margin)
    if HAS_IDS:
        own = tl.load(id_ptr + positive, mask=query_ok, other=0)
        counts = counts & (tl.load(id_ptr + document, mask=document_ok, other=0) != own)
    return above, is_positive, (counts | is_positive) & query_ok & document_ok


@triton.jit
def _info_nce_fwd_kernel(
    q_ptr, c_ptr, q_reciprocal_ptr, c_reciprocal_ptr, positive_ptr, exact_ptr, id_ptr, end_ptr, loss_ptr,
    B, M, D, inverse_temperature, margin, tiles_per_split,
    P: tl.constexpr, P_PAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, HAS_IDS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    query_ok = query < B
    prefix = tl.arange(0, P_PAD)[None, :]
    largest = tl.full([BLOCK, P_PAD], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK, P_PAD], tl.float32)
    for tile in tl.range(tl.program_id(1) * tiles_per_split, (tl.program_id(1) + 1) * tiles_per_split):
        document = (tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        document_ok = document < M
        dots = tl.zeros([BLOCK, BLOCK], tl.float32)
        begin = 0
        for m in tl.static_range(P):
            end = tl.load(end_ptr + m)
            dots = _dot_columns(
                q_ptr, c_ptr, dots, query, document, query_ok, document_ok, begin, end, D, BLOCK_D, PRECISION
            )  # fmt: skip
            begin = end
            cosines = dots * tl.load(q_reciprocal_ptr + m * B + query, mask=query_ok, other=0.0)[:, None]
            cosines = cosines * tl.load(c_reciprocal_ptr + m * M + document, mask=document_ok, other=0.0)[None, :]
            above, _, counts = _counted(
                cosines, query[:, None], document[None, :], query_ok[:, None], document_ok[None, :], positive_ptr,
                exact_ptr + m * B, id_ptr, margin, HAS_IDS,
            )  # fmt: skip
            scores = tl.where(counts, above * (inverse_temperature * 1.4426950408889634), float("-inf"))
            before = tl.max(tl.where(prefix == m, largest, float("-inf")), 1)
            after = tl.maximum(before, tl.max(scores, 1))
            safe = tl.where(after == float("-inf"), 0.0, after)
            rescale = tl.exp2(before - safe)
            added = tl.sum(tl.exp2(scores - safe[:, None]), 1)
            total = tl.where(prefix == m, total * rescale[:, None] + added[:, None], total)
            largest = tl.where(prefix == m, after[:, None], largest)
    loss = (largest + tl.log2(tl.where(total == 0.0, 1.0, total))) * 0.6931471805599453
    out = loss_ptr + (tl.program_id(1).to(tl.int64) * P + prefix) * B + query[:, None]
    tl.store(out, loss, mask=query_ok[:, None] & (prefix < P))


@triton.jit
def _info_nce_bwd_kernel(
    row_ptr, column_ptr, row_reciprocal_ptr, column_reciprocal_ptr, positive_ptr, exact_ptr, loss_ptr, dloss_ptr,
    id_ptr, end_ptr, scratch_ptr, grad_ptr, along_ptr, B, num_rows, num_columns, D, inverse_temperature, margin,
    tiles_per_split, P: tl.constexpr, P_PAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_IDS: tl.constexpr, ROWS_ARE_QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the rows: queries, or documents; the columns are the other side."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row_ok = row < num_rows
    split = tl.program_id(1).to(tl.int64)
    prefix = tl.arange(0, P_PAD)[None, :]
    grad_ptr += (split * num_rows + row[:, None]) * D
    corner = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    scratch_ptr += (split * tl.num_programs(0) + tl.program_id(0)) * P * BLOCK * BLOCK
    along = tl.zeros(
        [BLOCK, P_PAD], tl.float32
    )  # of each prefix: sum of w cos, what the gradient takes back of the row
    first = tl.program_id(1) * tiles_per_split
    for tile in tl.range(first, first + tiles_per_split):
        column = (tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        column_ok = column < num_columns
        if ROWS_ARE_QUERIES:
            query, document = row[:, None], column[None, :]
            query_ok, document_ok = row_ok[:, None], column_ok[None, :]
        else:
            query, document = column[None, :], row[:, None]
            query_ok, document_ok = column_ok[None, :], row_ok[:, None]
        has_sum = tl.full([1, 1], tile, tl.int32) > first  # before the first tile the gradient's memory holds anything
        dots = tl.zeros([BLOCK, BLOCK], tl.float32)
        pull = tl.zeros([BLOCK, BLOCK], tl.float32)  # w r_row r_column, summed over the prefixes that hold a column
        begin = 0
        for m in tl.static_range(P):
            end = tl.load(end_ptr + m)
            dots = _dot_columns(
                row_ptr, column_ptr, dots, row, column, row_ok, column_ok, begin, end, D, BLOCK_D, PRECISION
            )  # fmt: skip
            begin = end
            reciprocal = tl.load(row_reciprocal_ptr + m * num_rows + row, mask=row_ok, other=0.0)[:, None]
            reciprocal = reciprocal * tl.load(
                column_reciprocal_ptr + m * num_columns + column, mask=column_ok, other=0.0
            )[None, :]  # fmt: skip
            cosines = dots * reciprocal
            above, is_positive, counts = _counted(
                cosines, query, document, query_ok, document_ok, positive_ptr, exact_ptr + m * B, id_ptr,
                margin, HAS_IDS,
            )  # fmt: skip
            loss = tl.load(loss_ptr + m * B + query, mask=query_ok, other=0.0)
            p = tl.exp2((above * inverse_temperature - loss) * 1.4426950408889634)
            p = tl.where(counts, p, 0.0) - tl.where(is_positive & query_ok & document_ok, 1.0, 0.0)
            w = p * tl.load(dloss_ptr + m * B + query, mask=query_ok, other=0.0) * inverse_temperature
            along += tl.where(prefix == m, tl.sum(w * cosines, 1)[:, None], 0.0)
            pull = w * reciprocal
            if P > 1:
                tl.store(scratch_ptr + m * BLOCK * BLOCK + corner, pull)
        if P > 1:
            tl.debug_barrier()  # what is read back may have been written by other threads of this program
            pull = tl.zeros([BLOCK, BLOCK], tl.float32)
        for back in tl.static_range(P):
            if P > 1:
                pull += tl.load(scratch_ptr + (P - 1 - back) * BLOCK * BLOCK + corner)
            # At unit peak, so that narrow dtypes keep the small ones among them.
            peak = tl.max(tl.max(tl.abs(pull), 1), 0)
            peak = tl.where(peak == 0.0, 1.0, peak)
            scaled = (pull / peak).to(column_ptr.dtype.element_ty)
            begin = tl.load(end_ptr + (P - 2 - back)) if back < P - 1 else 0
            end = tl.load(end_ptr + (P - 1 - back))
            for d in range(begin, end, BLOCK_D):
                in_d = d + tl.arange(0, BLOCK_D)
                y = tl.load(
                    column_ptr + column[:, None] * D + in_d[None, :], mask=column_ok[:, None] & (in_d < end)[None, :],
                    other=0.0,
                )  # fmt: skip
                mine = row_ok[:, None] & (in_d < end)[None, :]
                sofar = tl.load(grad_ptr + in_d[None, :], mask=mine & has_sum, other=0.0)
                added = tl.dot(scaled, y, input_precision=PRECISION) * peak
                tl.store(grad_ptr + in_d[None, :], sofar + added, mask=mine)
        tl.debug_barrier()
    out = along_ptr + (split * P + prefix) * num_rows + row[:, None]
    tl.store(out, along, mask=row_ok[:, None] & (prefix < P))


# --- launching --------------------------------------------------------------------------------------------


def _splits(num_rows: int, num_columns: int) -> tuple[int, int, int]:
    """Blocks of rows, splits of the columns, and tiles in a split; of the sizes alone."""
    row_blocks, tiles = -(-num_rows // BLOCK), -(-num_columns // BLOCK)
    splits = max(1, min(tiles, WANTED_PROGRAMS // max(row_blocks, 1)))
    per_split = max(1, -(-tiles // splits))  # of no columns there is no split
    return row_blocks, -(-tiles // per_split), per_split


def _options(q_BD: Tensor, ids: Tensor | None, prefixes: Sequence[int]) -> dict[str, object]:
    return {
        "P": len(prefixes),
        "P_PAD": 1 << (len(prefixes) - 1).bit_length(),
        "BLOCK": BLOCK,
        "BLOCK_D": BLOCK_D,
        "HAS_IDS": ids is not None,
        "PRECISION": fp32_precision(target(q_BD)),
        "num_warps": 4 if len(prefixes) == 1 else 8,  # four spill where several prefixes keep their own sums
        "num_stages": 2,
    }


def loss_tiles(
    q_BD: Tensor,
    c_MD: Tensor,
    q_PB: Tensor,
    c_PM: Tensor,
    positives_B: Tensor,
    exact_PB: Tensor,
    ids_M: Tensor | None,
    temperature: float,
    margin: float,
    prefixes: Sequence[int],
) -> Tensor:
    """Each query's loss: fp32 [P, B], the log-sum-exp of its scores less its positive's.

    `q_PB`, `c_PM` are reciprocal lengths, `exact_PB` the positives' cosines.
    """
    (B, D), M = q_BD.shape, c_MD.shape[0]
    row_blocks, splits, per_split = _splits(B, M)
    loss_SPB = q_BD.new_empty(splits, len(prefixes), B, dtype=torch.float32)
    ends_P = torch.tensor(prefixes, dtype=torch.int32, device=q_BD.device)
    launch(
        _info_nce_fwd_kernel,
        (row_blocks, splits),
        *(q_BD, c_MD, q_PB, c_PM, positives_B, exact_PB, ids_M, ends_P, loss_SPB),
        *(B, M, D, 1 / temperature, margin, per_split),
        **_options(q_BD, ids_M, prefixes),
    )
    return loss_SPB.logsumexp(0)


def gradient_tiles(
    rows_RD: Tensor,
    columns_CD: Tensor,
    rows_are_queries: bool,
    row_PR: Tensor,
    column_PC: Tensor,
    positives_B: Tensor,
    exact_PB: Tensor,
    loss_PB: Tensor,
    dloss_PB: Tensor,
    ids_M: Tensor | None,
    temperature: float,
    margin: float,
    prefixes: Sequence[int],
) -> Tensor:
    """Gradient of one side, queries or documents: [R, D] in its dtype. `row_PR`, `column_PC`: reciprocal lengths."""
    R, D = rows_RD.shape
    row_blocks, splits, per_split = _splits(R, len(columns_CD))
    grad_SRD = rows_RD.new_empty(splits, R, D, dtype=torch.float32)
    along_SPR = rows_RD.new_empty(splits, len(prefixes), R, dtype=torch.float32)
    scratch = rows_RD.new_empty(splits * row_blocks * len(prefixes) * BLOCK * BLOCK, dtype=torch.float32)
    ends_P = torch.tensor(prefixes, dtype=torch.int32, device=rows_RD.device)
    launch(
        _info_nce_bwd_kernel,
        (row_blocks, splits),
        *(rows_RD, columns_CD, row_PR, column_PC, positives_B, exact_PB, loss_PB, dloss_PB, ids_M, ends_P),
        *(scratch, grad_SRD, along_SPR, len(positives_B), R, len(columns_CD), D, 1 / temperature, margin, per_split),
        ROWS_ARE_QUERIES=rows_are_queries,
        **_options(rows_RD, ids_M, prefixes),
    )
    grad_RD = grad_SRD.sum(0)
    grad_RD[:, prefixes[-1] :] = 0  # columns past the last prefix take part in nothing
    for size, along_R, reciprocal_R in zip(prefixes, along_SPR.sum(0), row_PR, strict=True):
        grad_RD[:, :size] -= (along_R * reciprocal_R.square())[:, None] * rows_RD[:, :size]
    return grad_RD.to(rows_RD.dtype)
