"""Measure which row counts give equal bits on this machine and write them into `runtime/row_counts.json`.

    python -m flashvec.bench.measure_row_counts [--dtypes float32 bfloat16] [--packed]

Run it on a machine whose instruction set the table lacks, or with a new torch; other machines' entries stay. The table
is written shape by shape: what an interrupted run has measured is kept. bf16 takes an hour where the processor has
no instructions for it. With --packed it measures packed weights (`kernels/linear.py`), which encoders have from then on
where the dtype is in the table: see by `bench_packed` first whether they are faster there and as exact.
"""

import argparse
import json

import torch

from flashvec.kernels.linear import pack
from flashvec.runtime.row_counts import TABLE, TABLED_THREADS, machine_key, measure

# (hidden, mlp, query heads, kv heads, head size) of models that people embed with, and how products come of them.
MODELS = {
    "SmolLM2-135M": (576, 1536, 9, 3, 64),
    "Gemma 3 270M": (640, 2048, 4, 1, 256),
    "EmbeddingGemma-300M": (768, 1152, 3, 1, 256),
    "Qwen3-0.6B": (1024, 3072, 16, 8, 128),
    "Llama-3.2-1B": (2048, 8192, 32, 8, 64),
}


def products(hidden: int, mlp: int, heads: int, kv_heads: int, head_size: int) -> list[tuple[int, int]]:
    """Output and input features of a layer's four merged products."""
    return [
        ((heads + 2 * kv_heads) * head_size, hidden),
        (hidden, heads * head_size),
        (2 * mlp, hidden),
        (hidden, mlp),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--packed", action="store_true", help="measure packed weights")
    options = parser.parse_args()
    shapes = sorted({shape for model in MODELS.values() for shape in products(*model)})
    generator = torch.Generator().manual_seed(1)
    for name in options.dtypes:
        for rows, columns in shapes:
            weight = torch.randn(rows, columns, generator=generator).to(getattr(torch, name))
            weight = pack(weight) if options.packed else weight
            differing = sorted({r for threads in TABLED_THREADS for r in _measure(weight, threads)})
            enter(name, f"{rows}x{columns}", differing, options.packed)
            print(f"{name:10} {rows:6} x {columns:5}  {differing or 'all agree'}", flush=True)


def enter(dtype: str, shape: str, differing: list[int], packed: bool = False) -> None:
    """Write one measured shape of this machine into the table."""
    table, key = json.loads(TABLE.read_text()), machine_key(packed)
    entries = table["disagree"].setdefault(key, {}).setdefault(dtype, {})
    entries[shape] = differing
    ordered = sorted(entries.items(), key=lambda entry: tuple(map(int, entry[0].split("x"))))
    table["disagree"][key][dtype] = dict(ordered)
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


def _measure(weight: torch.Tensor, threads: int) -> list[int]:
    torch.set_num_threads(threads)
    return measure(weight)


if __name__ == "__main__":
    main()
