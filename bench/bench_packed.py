"""What weights that are packed once gain on a CPU: calls of an encoder whose weights are, beside one whose are plain.

    python -m flashvec.bench.bench_packed --model demo-cache/smollm2-135m [--dtype float32] [--keep]

The two take turns on the same texts, new ones in every repetition; see `kernels/linear.py`. Sentences one at a time,
a few, and as many as fill packs. Where packed ones win on a machine that has no table of them yet,
`measure_row_counts --packed` makes one.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from flashvec.bench.lengths import Texts
from flashvec.bench.timing import append_rows, at_least_one, interleave, run_name, spread
from flashvec.kernels.linear import can_pack, unpacked
from flashvec.runtime.decoder import PRODUCTS, Decoder, Layer, packed
from flashvec.runtime.encoder import Encoder

LENGTH = 12  # mean tokens of a text
COUNTS = (1, 8, 64, 512)  # texts in a call


def forms(encoder: Encoder) -> dict[str, Encoder]:
    """The encoder with plain weights, and with packed ones."""

    def plain(layer: Layer) -> Layer:
        return replace(layer, **{name: unpacked(getattr(layer, name)) for name in PRODUCTS})

    def of(convert: Callable[[Layer], Layer]) -> Encoder:
        own = encoder.decoder
        decoder = Decoder(own.spec, own.embedding_VD, [convert(layer) for layer in own.layers], own.norm_D)
        return Encoder(encoder.spec, decoder, encoder.tokenizer, encoder.heads)

    found = {"plain": of(plain)}
    if not can_pack(found["plain"].decoder.layers[0].qkv):
        raise ValueError(f"this machine's torch packs no weights of {encoder.dtype}")
    return found | {"packed": of(lambda layer: packed(plain(layer)))}


def measure(encoders: dict[str, Encoder], model: str, texts: Texts, repetitions: int) -> list[dict[str, Any]]:
    """A row for each form and number of texts."""
    rows, run = [], run_name()
    for count in COUNTS:
        drawn = [texts.of_length(LENGTH, count, seed) for seed in range(repetitions + 1)]  # the last one warms up
        vectors = [encoder.embed(drawn[-1]) for encoder in encoders.values()]
        calls: dict[str, Callable[[int], Any]] = {
            name: partial(_embed, encoder, drawn) for name, encoder in encoders.items()
        }
        seconds = interleave(calls, repetitions)
        for name, taken in seconds.items():
            rows.append(
                {
                    "benchmark": "packed",
                    "run": run,
                    "variant": name,
                    "model": model,
                    "dtype": str(encoders[name].dtype).removeprefix("torch."),
                    "texts": count,
                    "ms_per_call": round(1000 * median(taken), 2),
                    "over_plain": round(median(b / a for a, b in zip(taken, seconds["plain"], strict=True)), 3),
                    "largest_difference": float(np.abs(vectors[0] - vectors[-1]).max()),
                    "spread": spread(taken),
                    "repetitions": repetitions,
                }
            )
    return rows


def _embed(encoder: Encoder, drawn: list[list[str]], repetition: int) -> None:
    encoder.embed(drawn[repetition])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or GGUF file")
    parser.add_argument("--dtype", help="default: the model's on this machine")
    parser.add_argument("--repetitions", type=at_least_one, default=9)
    parser.add_argument("--keep", action="store_true", help="append the rows to bench/results")
    options = parser.parse_args()
    try:
        encoder = Encoder.load(options.model, dtype=options.dtype, device="cpu")
        encoders = forms(encoder)
    except ValueError as error:  # the model's files, the dtype, the machine: says what and where
        sys.exit(f"bench_packed: {error}")
    rows = measure(encoders, Path(options.model).name, Texts.for_encoder(None, encoder), options.repetitions)
    for row in rows:
        time, gain = f"{row['ms_per_call']:>9,.1f} ms {row['spread']:>5}", f"{row['over_plain']:.2f} x plain"
        print(f"{row['texts']:4} texts  {row['variant']:6} {time}  {gain}  off by {row['largest_difference']:.1e}")
    if options.keep:
        append_rows(rows)


if __name__ == "__main__":
    main()
