"""How the cost of embedding grows: with a text's length, the texts of a call, the tokens that run together, the model.

    python -m flashvec.bench.bench_scaling --model demo-cache/smollm2-135m

One process; all points of all sweeps take turns, on new texts in every repetition. Larger models have the shapes of
real ones and random weights, whose products take the same time.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from flashvec.bench.gpu_models import CONFIGS, random_model
from flashvec.bench.lengths import Texts
from flashvec.bench.timing import append_rows, at_least_one, interleave, run_name, spread
from flashvec.runtime.encoder import Encoder
from flashvec.runtime.texts import TruncationWarning

LENGTHS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)  # tokens of every text
COUNTS = (1, 4, 16, 64, 256)  # sentences in a call
BUDGETS = (128, 256, 512, 1024, 2048, 4096)  # tokens run together
TOKENS_PER_RUN = 2048
SHAPES = ("gemma-3-270m", "qwen3-0.6b", "llama-3.2-1b")


@dataclass(frozen=True)
class Point:
    """One measurement: which sweep, where on it, and the call, a function of the repetition."""

    sweep: str
    at: float
    model: str
    encoder: Encoder
    texts: Sequence[list[str]]
    options: dict[str, Any]

    def run(self, repetition: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncationWarning)  # that is how texts get their length
            self.encoder.embed(self.texts[repetition], **self.options)

    def tokens(self) -> list[int]:
        """In each repetition's call."""
        limit = self.options.get("max_length", self.encoder.spec.max_length)
        return [int(self.encoder.count_tokens(texts).clip(max=limit).sum()) for texts in self.texts]


def points(encoder: Encoder, name: str, texts: Texts, shapes: Sequence[str], repetitions: int) -> list[Point]:
    """All points of all sweeps.

    Args:
        encoder: of the model itself; the larger ones get its tokenizer.
        name: of its model.
        texts: where texts are cut from.
        shapes: names of larger models.
        repetitions: each gets texts of its own.
    """

    def drawn(draw: Callable[[int], list[str]]) -> list[list[str]]:
        return [draw(seed) for seed in range(repetitions + 1)]  # the last one warms up

    found = []
    for length in (n for n in LENGTHS if n <= encoder.spec.max_length):
        count = max(1, TOKENS_PER_RUN // length)
        own = drawn(partial(texts.of_length, 2 * length + 16, count))  # cut to `length`
        found.append(Point("length", length, name, encoder, own, {"max_length": length}))
    for count in COUNTS:
        own = drawn(partial(texts.of_length, 25, count))
        found.append(Point("texts", count, name, encoder, own, {}))
    passages = drawn(lambda seed: texts.draw("passages", 2 * TOKENS_PER_RUN, seed))
    for budget in BUDGETS:
        found.append(Point("budget", budget, name, encoder, passages, {"batch_tokens": budget}))
    few = drawn(lambda seed: texts.draw("passages", TOKENS_PER_RUN // 2, seed))
    found.append(Point("model", _millions(encoder), name, encoder, few, {}))
    for shape in shapes:
        model = random_model(shape, CONFIGS[shape], torch.device("cpu"), encoder.dtype)
        larger = Encoder(model.spec, model.decoder, encoder.tokenizer)
        found.append(Point("model", _millions(larger), f"{shape} shapes", larger, few, {}))
    return found


def _millions(encoder: Encoder) -> float:
    """Weights of the layers' products, in millions."""
    layers = encoder.decoder.layers
    return round(sum(w.numel() for x in layers for w in (x.qkv, x.out, x.gate_up, x.down)) / 1e6, 1)


def measure(found: Sequence[Point], repetitions: int) -> list[dict[str, Any]]:
    """A row for each point."""
    for point in found:
        point.run(repetitions)
    names = [f"{point.sweep} {point.at} {point.model}" for point in found]
    seconds = interleave({name: point.run for name, point in zip(names, found, strict=True)}, repetitions)
    rows, run = [], run_name()
    for name, point in zip(names, found, strict=True):
        tokens, taken = point.tokens()[:repetitions], seconds[name]
        rates = [n / s for n, s in zip(tokens, taken, strict=True)]
        rows.append(
            {
                "benchmark": "scaling",
                "run": run,
                "sweep": point.sweep,
                "at": point.at,
                "model": point.model,
                "dtype": str(point.encoder.dtype),
                "texts": len(point.texts[0]),
                "mean_tokens": round(median(tokens) / len(point.texts[0]), 1),
                "tokens_per_s": round(median(rates), 1),
                "ms_per_call": round(1000 * median(taken), 2),
                "spread": spread(rates),
                "repetitions": repetitions,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or GGUF file")
    parser.add_argument("--texts", type=Path, help="file or folder of prose; default: the documentation Python carries")
    parser.add_argument("--dtype", help="default: the model's on this machine")
    parser.add_argument("--shapes", nargs="*", choices=CONFIGS, default=list(SHAPES), help="default: %(default)s")
    parser.add_argument("--repetitions", type=at_least_one, default=3)
    parser.add_argument("--dry", action="store_true", help="keep no rows")
    options = parser.parse_args()
    try:
        encoder = Encoder.load(options.model, dtype=options.dtype)
        texts = Texts.for_encoder(options.texts, encoder)
    except (ValueError, OSError) as error:  # the model's files, the dtype, the texts: says what and where
        sys.exit(f"bench_scaling: {error}")
    found = points(encoder, Path(options.model).name, texts, options.shapes, options.repetitions)
    rows = measure(found, options.repetitions)
    for row in rows:
        where = f"{row['sweep']:8} {row['at']:>7}  {row['model']:22}"
        print(f"{where} {row['tokens_per_s']:>9,.0f} tokens/s {row['ms_per_call']:>10,.1f} ms  {row['spread']}")
    if not options.dry:
        append_rows(rows)


if __name__ == "__main__":
    main()
