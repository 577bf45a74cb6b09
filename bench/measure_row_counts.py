"""Measure which row counts give equal bits on this machine and write them into `runtime/row_counts.json`.

    python -m flashvec.bench.measure_row_counts

Run it on a machine whose instruction set the table lacks, or with a new torch; other machines' entries stay.
"""

import json

import torch

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
    table = json.loads(TABLE.read_text())
    shapes = sorted({shape for model in MODELS.values() for shape in products(*model)})
    found: dict[str, dict[str, list[int]]] = {}
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        found[name] = {}
        for rows, columns in shapes:
            weight = torch.randn(rows, columns, generator=generator).to(dtype)
            differing = sorted({r for threads in TABLED_THREADS for r in _measure(weight, threads)})
            found[name][f"{rows}x{columns}"] = differing
            print(f"{name:10} {rows:6} x {columns:5}  {differing or 'all agree'}", flush=True)
    table["disagree"][machine_key()] = found
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


def _measure(weight: torch.Tensor, threads: int) -> list[int]:
    torch.set_num_threads(threads)
    return measure(weight)


if __name__ == "__main__":
    main()
