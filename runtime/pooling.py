"""From token states to finished vectors: pool, dense heads, cut, normalise, number format."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flashvec.kernels.linear import linear
from flashvec.kernels.mean_pool import mean_pool
from flashvec.kernels.schedule import Queries, Schedule
from flashvec.runtime.decoder import Decoder
from flashvec.runtime.row_counts import RowCounts
from flashvec.runtime.spec import ModelSpec
from flashvec.runtime.texts import check_truth

PRECISIONS = ("float32", "float16", "int8", "uint8", "binary", "ubinary")

DENSE_FUNCTIONS = {
    "identity": lambda x: x,
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
}


class DenseHead:
    """A linear layer after pooling, in fp32: it is tiny, and its rounding would reach the vector unaveraged."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str) -> None:
        self.weight, self.bias, self.activation = weight.float(), None if bias is None else bias.float(), activation
        self.row_counts = RowCounts([self.weight])

    def __call__(self, x_BD: Tensor) -> Tensor:
        rows = len(x_BD)
        if x_BD.device.type == "cpu":  # zero rows up to a count that gives the same bits as any other
            plan = self.row_counts.plan(rows)
            x_BD = F.pad(x_BD, (0, 0, 0, sum(plan) - rows))
        else:
            plan = (rows,)
        return DENSE_FUNCTIONS[self.activation](linear(x_BD, self.weight, self.bias, plan))[:rows]


@dataclass(frozen=True)
class States:
    """A batch after the last layer: all rows, or those of `queries`."""

    hidden_TD: Tensor  # fp32 residual stream, before the final norm
    schedule: Schedule
    delta_TD: Tensor | None = None  # still to be added to it
    post_norm_D: Tensor | None = None  # norm of `delta_TD` before that
    queries: Queries | None = None


def pool(spec: ModelSpec, decoder: Decoder, pack: States, spans_B2: Tensor) -> Tensor:
    """Pool each of a pack's texts over its span of tokens.

    Args:
        spans_B2: int64 [B, 2] first token and one past the last, counted from the text's own first token.

    Returns:
        fp32 [B, D * modes], before heads and normalisation.
    """
    starts_B = pack.schedule.cu_seqlens[:-1].to(torch.int64)
    if pack.queries is not None:
        starts_B = pack.queries.shift_stop[:, 0].to(torch.int64)
    lengths_B = pack.schedule.cu_seqlens.diff().to(torch.int64)
    pooled = []
    for mode in spec.pooling:
        spans = spans_B2
        # The text's own last and first token, whatever the instruction; in a sentence-transformers folder that
        # leaves prompts out, the first is the one after the prompt.
        if mode == "last" or (mode == "cls" and spec.span != "prompt_tokens"):
            edge_B = lengths_B - 1 if mode == "last" else torch.zeros_like(lengths_B)
            spans = torch.stack([edge_B, edge_B + 1], 1)
        first = spans[:, 0] + 1 if spec.span == "prompt_tokens" else None
        rows_B2 = spans + starts_B[:, None]
        if pack.schedule.is_static:  # a filling sequence has no rows: it reads row 0, and nobody reads its vector
            rows_B2 = rows_B2 * (lengths_B > 0)[:, None]
            rows_B2[:, 1].clamp_(min=1)
        pooled.append(
            mean_pool(
                pack.hidden_TD,
                rows_B2,
                decoder.norm_D,
                decoder.spec.norm_eps,
                norm_offset=decoder.spec.norm_offset,
                mode=mode,
                first_weights_S=first,
                delta_TD=pack.delta_TD,
                post_norm_weight_D=pack.post_norm_D,
                longest=pack.schedule.max_length,
            )
        )
    return torch.cat(pooled, 1)


def pooled_tokens(spec: ModelSpec, lengths: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """The tokens of each text that `pool` reads, all modes together: int64 [B, 2], first and one past the last."""
    firsts, stops = [], []
    for mode in spec.pooling:
        if mode == "last":
            first, stop = lengths - 1, lengths
        elif mode == "cls":
            first = spans[:, 0] if spec.span == "prompt_tokens" else np.zeros_like(lengths)
            stop = first + 1
        else:
            first, stop = spans[:, 0], spans[:, 1]
        firsts.append(first)
        stops.append(stop)
    return np.stack([np.min(firsts, 0), np.max(stops, 0)], 1)


def finish(
    spec: ModelSpec, x_SD: Tensor, heads: Sequence[DenseHead], normalize: bool | None, truncate_dim: int | None
) -> Tensor:
    """Dense heads, Matryoshka cut and L2 norm, fp32.

    A sentence-transformers folder cuts after its own normalisation and does not normalise again unless asked to;
    everything else cuts first, so that a cut vector has unit length too. A zero vector stays zero.
    """
    for head in heads:
        x_SD = head(x_SD)
    wanted = spec.normalize if normalize is None else normalize
    if dim := truncate_dim or spec.truncate_dim:
        if _normalizes_first(spec, normalize):
            x_SD = F.normalize(x_SD, dim=-1)
        wanted, x_SD = _normalizes_cut(spec, normalize), x_SD[:, :dim]
    return F.normalize(x_SD, dim=-1) if wanted else x_SD


def _normalizes_first(spec: ModelSpec, normalize: bool | None) -> bool:
    """Is a vector normalised before it is cut."""
    return spec.layout == "sentence-transformers" and spec.normalize and normalize is not False


def _normalizes_cut(spec: ModelSpec, normalize: bool | None) -> bool:
    """Is a vector normalised after it is cut: then it is not the start of the whole one."""
    return bool(normalize) or (normalize is None and spec.normalize and not _normalizes_first(spec, normalize))


def vector_length(spec: ModelSpec, dim: int, normalize: bool | None) -> str:
    """Which of `VECTOR_LENGTHS` vectors of `dim` dimensions have."""
    is_cut = dim < spec.embedding_size or spec.truncate_dim is not None
    is_unit = spec.normalize if normalize is None else normalize
    if _normalizes_cut(spec, normalize) if is_cut else is_unit:
        return "unit"
    return "start of unit" if _normalizes_first(spec, normalize) else "own"


def cut_ranges(
    spec: ModelSpec, dim: int, normalize: bool | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The value ranges of `spec` for vectors of `dim` dimensions; None where they are of others.

    Ranges were measured on vectors of their own width and length. Those of a narrower cut are their start, unless the
    cut is brought back to unit length: its values are larger then, and many would lie outside.
    """
    if spec.int8_ranges is None:
        return None
    low, high = spec.int8_ranges
    length, width = vector_length(spec, dim, normalize), len(low)
    if width < dim or (width > dim and length == "unit"):
        return None
    is_start_of_whole = length == "start of unit" and width == replace(spec, truncate_dim=None).embedding_size
    if spec.int8_length not in (None, length) and not (is_start_of_whole and spec.int8_length == "unit"):
        return None
    return low[:dim], high[:dim]


def number_format(
    spec: ModelSpec, dim: int, normalize: bool | None, precision: str, output: str
) -> Callable[[Tensor], Any]:
    """What turns `embed`'s fp32 vectors [n, dim] into those that were asked for.

    Args:
        dim, normalize, precision, output: as in `Encoder.embed`.

    Raises:
        TypeError, ValueError: an unknown name, names that do not go together, or value ranges that are missing.
    """
    if normalize is not None:
        check_truth("normalize", normalize)
    if output not in ("numpy", "torch"):
        raise ValueError(f"output is {output!r}, known are 'numpy' and 'torch'")
    if output == "torch":
        if precision not in ("float32", "float16"):
            raise ValueError(f"output='torch' gives float32 or float16, precision is {precision!r}")
        return lambda vectors: vectors.to(torch.float16) if precision == "float16" else vectors
    ranges = cut_ranges(spec, dim, normalize)
    if precision in ("int8", "uint8") and ranges is None:
        cut = f", truncate_dim={dim}" if dim < spec.embedding_size else ""
        own = ""
        if spec.int8_ranges is not None:
            own = f" (the encoder's are for {len(spec.int8_ranges[0])})"
            if len(spec.int8_ranges[0]) == dim:
                own = f" (the encoder's are of vectors of another length: {spec.int8_length})"
        stated = "" if normalize is None else f", normalize={normalize}"
        raise ValueError(
            f"precision={precision!r} needs value ranges for {dim} dimensions{own}: "
            f"call enc.calibrate(texts{cut}{stated}) once on typical texts"
        )
    quantize(np.zeros((0, dim), np.float32), precision, ranges)  # refuses the rest before there is work
    return lambda vectors: quantize(vectors.numpy(), precision, ranges)


def quantize(x: np.ndarray, precision: str, ranges: tuple[Sequence[float], Sequence[float]] | None) -> np.ndarray:
    """Vectors in a narrower number format.

    Args:
        x: fp32 [n, d].
        precision: one of `PRECISIONS`. int8 and uint8 spread each dimension's range over 255 steps, of which the
            lower end counts, int8 from -128 on; binary keeps signs, eight to a byte (d a multiple of 8), offset by -128
            to int8; ubinary leaves the bytes as they are.
        ranges: per dimension minimum and maximum, for int8 and uint8, as wide as the vectors.

    Returns:
        [n, d], or [n, d / 8] for the binary formats.

    Raises:
        ValueError: an unknown precision, ranges that are missing or of another width, or a width that does not fill
            bytes.
    """
    if precision == "float32":
        return x
    if precision == "float16":
        return x.astype(np.float16)
    if precision in ("binary", "ubinary"):
        if x.shape[1] % 8:
            raise ValueError(f"precision={precision!r} packs 8 dimensions to a byte; {x.shape[1]} is no multiple of 8")
        bits = np.packbits(x > 0, axis=-1)
        return bits if precision == "ubinary" else (bits.astype(np.int16) - 128).astype(np.int8)
    if precision in ("int8", "uint8"):
        if ranges is None:
            raise ValueError(
                f"precision={precision!r} needs value ranges: call enc.calibrate(texts) once on typical texts"
            )
        low, high = (np.asarray(r, dtype=np.float32) for r in ranges)
        if len(low) != x.shape[1]:
            raise ValueError(f"the value ranges are of {len(low)} dimensions, the vectors have {x.shape[1]}")
        steps = np.floor(np.clip((x - low) / np.maximum(high - low, 1e-12) * 255, 0, 255))
        return steps.astype(np.uint8) if precision == "uint8" else (steps - 128).astype(np.int8)
    raise ValueError(f"precision is {precision!r}, known are {', '.join(PRECISIONS)}")


def dequantize(steps: np.ndarray, ranges: tuple[Sequence[float], Sequence[float]]) -> np.ndarray:
    """fp32 [n, d] of int8 or uint8 vectors that `quantize` made with the same ranges: the middle of each step."""
    low, high = (np.asarray(r, dtype=np.float32) for r in ranges)
    lowest = 128 if steps.dtype == np.int8 else 0
    values: np.ndarray = (steps.astype(np.float32) + (lowest + 0.5)) / 255 * (high - low) + low
    return values
