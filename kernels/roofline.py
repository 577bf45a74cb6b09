"""Floors of a layer's parts on a GPU: the least time their operations, bytes and exponentials take.

    python -m flashvec.kernels.aot --roofline llama-3-8b --tokens 16384 --mean-length 256

Computed, not measured. "floor" is the largest of FLOPs over the peak of bf16 matrix products, bytes over bandwidth and
exponentials over the rate of the special-function units; once with the datasheet (989 TFLOP/s, 3.35 TB/s), once with
what products and copies were measured to reach on one (798 TFLOP/s, 3.0 TB/s). For attention "tiles" adds what the
chosen tiles cost: rows and keys that exist only to fill a tile, and exponentials that wait for products where just one
block fits a multiprocessor. Lengths are log-normal (sigma 0.6) around the mean, the same in every run.

Each part reads its inputs and writes its outputs once, in bf16; the residual stream is fp32.
"""

from dataclasses import dataclass

import numpy as np
import torch

from flashvec.kernels.attention_tiles import TileConfig, forward_configs, packed_heads
from flashvec.kernels.backend import TARGETS
from flashvec.kernels.schedule import build_tiles

DATASHEET = (989e12, 3.35e12)  # FLOP/s, bytes/s of an H100 SXM
MEASURED = (798e12, 3.0e12)
EXPONENTIALS = 16 * 132 * 1.83e9  # per clock and multiprocessor, multiprocessors, clock


@dataclass(frozen=True)
class Shape:
    """A decoder layer's sizes, in the letters of the kernels."""

    layers: int
    D: int
    F: int
    H: int
    G: int
    K: int
    head_norms: bool = False


MODELS = {
    "llama-3-8b": Shape(32, 4096, 14336, 32, 8, 128),
    "mistral-7b": Shape(32, 4096, 14336, 32, 8, 128),
    "llama-3.2-1b": Shape(16, 2048, 8192, 32, 8, 64),
    "qwen3-0.6b": Shape(28, 1024, 3072, 16, 8, 128, True),
    "gemma-3-270m": Shape(18, 640, 2048, 4, 1, 256, True),
}


@dataclass(frozen=True)
class Part:
    """One launch of a layer: what it computes and moves."""

    name: str
    flops: float
    bytes: float
    exponentials: float = 0.0

    def floor(self, peak: tuple[float, float]) -> tuple[float, str]:
        """Seconds, and which of the three bounds them."""
        times = {
            "products": self.flops / peak[0],
            "memory": self.bytes / peak[1],
            "exponentials": self.exponentials / EXPONENTIALS,
        }
        bound = max(times, key=lambda name: times[name])
        return times[bound], bound


def lengths_of(tokens: int, mean_length: int) -> list[int]:
    """Log-normal lengths that sum to `tokens`."""
    generator = np.random.default_rng(0)
    sigma = 0.6
    drawn = generator.lognormal(np.log(mean_length) - sigma**2 / 2, sigma, 2 * tokens // mean_length + 100)
    lengths = np.maximum(1, drawn.round()).astype(int)
    stops = lengths.cumsum()
    count = int(np.searchsorted(stops, tokens))
    kept = lengths[: count + 1].tolist()
    kept[-1] -= int(stops[count]) - tokens
    return kept


def layer_parts(shape: Shape, lengths: list[int]) -> list[Part]:
    """The launches of one layer, in their order."""
    T, pairs = sum(lengths), float(sum(n * n for n in lengths))
    D, F, H, G, K = shape.D, shape.F, shape.H, shape.G, shape.K

    def product(name: str, columns: int, inputs: int) -> Part:
        return Part(name, 2.0 * T * columns * inputs, 2.0 * (T * (columns + inputs) + columns * inputs))

    norm = Part("residual + norm", 0, T * D * (4 + 2 + 4 + 2))  # stream and delta in, stream and normed out
    return [
        norm,
        product("q k v product", (H + 2 * G) * K, D),
        Part("rotate keys", 0, 2.0 * T * G * K * 2 + T * K * 4),
        Part("attention", 4.0 * pairs * K * H, 2.0 * T * K * (2 * H + 2 * G) + 4 * T * H, pairs * H),
        product("output product", D, H * K),
        norm,
        product("gate, up product", 2 * F, D),
        Part("activation", 0, 2.0 * T * F * 3, T * F),
        product("down product", D, F),
    ]


def tile_time(shape: Shape, lengths: list[int], blocks_per_sm: dict[int, int]) -> tuple[float, float]:
    """Seconds that attention's tiles take at most speed, and the share of their FLOPs that are useful.

    Args:
        blocks_per_sm: blocks that fit a multiprocessor, by the config's place in its table.
    """
    peak, bandwidth = MEASURED
    packed = packed_heads(shape.H, shape.G)
    compute = issued_total = 0.0
    configs = forward_configs(TARGETS["sm_90"], torch.bfloat16, shape.K, packed, rotate=True, specialised=True)
    for place, config in enumerate(configs):
        issued = _issued_pairs(config, lengths) * (shape.H // packed)
        products, exponentials = 4.0 * issued * shape.K / peak, issued / EXPONENTIALS
        overlapped = config.ring > 0 or blocks_per_sm.get(place, 1) > 1
        compute += max(products, exponentials) if overlapped else products + exponentials
        issued_total += issued
    useful = sum(n * n for n in lengths) * shape.H / issued_total
    attention = next(part for part in layer_parts(shape, lengths) if part.name == "attention")
    return max(compute, attention.bytes / bandwidth), useful


def _issued_pairs(config: TileConfig, lengths: list[int]) -> float:
    """Query rows times keys that the tiles of a class compute, for one group of packed heads."""
    tiles = build_tiles(lengths, config.tile_class)
    keys = -(-tiles[:, 1] // config.keys) * config.keys
    return float((config.rows * keys.astype(np.int64)).sum())


def print_roofline(model: str, tokens: int, mean_length: int) -> int:
    """Print a model's table; returns the command's exit code."""
    from rich.console import Console
    from rich.table import Table

    if model not in MODELS:
        print(f"--roofline {model!r} is not known; choose one of {', '.join(MODELS)}")
        return 2
    if mean_length < 1 or tokens < mean_length:
        print(f"--tokens {tokens} and --mean-length {mean_length}: expected 1 <= mean length <= tokens")
        return 2
    shape, lengths = MODELS[model], lengths_of(tokens, mean_length)
    table = Table(title=f"{model}: one layer, {tokens:,} tokens in {len(lengths)} sequences (computed for an H100)")
    for column in ("part", "GFLOP", "MB", "bound by", "floor µs, datasheet", "floor µs, measured", "tiles µs"):
        table.add_column(column, justify="left" if column in ("part", "bound by") else "right")
    tiles, useful = tile_time(shape, lengths, committed_blocks(shape.K))
    totals = np.zeros(3)
    for part in layer_parts(shape, lengths):
        (sheet, bound), (measured, _) = part.floor(DATASHEET), part.floor(MEASURED)
        chosen = tiles if part.name == "attention" else measured
        totals += np.array([sheet, measured, chosen])
        figures = [f"{part.flops / 1e9:,.0f}", f"{part.bytes / 1e6:,.0f}", bound]
        table.add_row(part.name, *figures, *(f"{x * 1e6:,.0f}" for x in (sheet, measured, chosen)))
    table.add_section()
    table.add_row("layer", "", "", "", *(f"{x * 1e6:,.0f}" for x in totals))
    flops = sum(part.flops for part in layer_parts(shape, lengths))
    rates = [tokens / (shape.layers * total) for total in totals]
    table.add_row("share of 989 TFLOP/s", "", "", "", *(f"{flops / total / DATASHEET[0]:.1%}" for total in totals))
    table.add_row("thousand tokens/s", "", "", "", *(f"{rate / 1e3:,.0f}" for rate in rates))
    Console(width=110).print(table)
    print(f"{useful:.0%} of the FLOPs that attention's tiles compute are useful ones.")
    return 0


def committed_blocks(K: int) -> dict[int, int]:
    """Blocks per multiprocessor of the forward's configs on sm_90, from the committed rows of `kernels/aot.py`."""
    from flashvec.kernels.aot import committed_reports

    rows = (r for key, r in committed_reports().items() if key[:2] == ("sm_90", f"attention {K} plain"))
    return {row.place: row.blocks_per_sm for row in rows}
