"""What loading takes: seconds, and the most memory that is allocated meanwhile beside the weights it leaves (Linux).

    python -m flashvec.bench.bench_load --model smollm2-encoder [--gguf model.gguf] [--adapter models/smollm2-135m]

Every load has a process of its own (`bench/load_worker.py`), after one that is not counted: files are in memory then.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from flashvec.bench.timing import append_rows, at_least_one, run_name


def load_once(model: Path, dtype: str, adapters: tuple[Path, ...]) -> dict[str, Any]:
    """Seconds, weights_bytes and peak_bytes of one load in a new process.

    Raises:
        ValueError: it could not be loaded; says why.
    """
    command = [sys.executable, "-m", "flashvec.bench.load_worker", str(model), dtype, *map(str, adapters)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout)


def measure(name: str, model: Path, dtype: str, adapters: tuple[Path, ...], repetitions: int) -> dict[str, Any]:
    """The row of one format and dtype: median seconds and the highest peak."""
    load_once(model, dtype, adapters)
    loads = [load_once(model, dtype, adapters) for _ in range(repetitions)]
    return {
        "benchmark": "load",
        "model": model.name,
        "format": name,
        "dtype": dtype,
        "seconds": round(median(load["seconds"] for load in loads), 2),
        "weights_mib": round(loads[0]["weights_bytes"] / 2**20),
        "peak_mib": round(max(load["peak_bytes"] for load in loads) / 2**20),
        "repetitions": repetitions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--gguf", type=Path, help="a GGUF file, too")
    parser.add_argument("--adapter", type=Path, help="an adapter to be merged into --model, too")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repetitions", type=at_least_one, default=3)
    parser.add_argument("--dry", action="store_true", help="keep no rows")
    options = parser.parse_args()
    formats: dict[str, tuple[Path, tuple[Path, ...]]] = {"safetensors": (options.model, ())}
    if options.gguf:
        formats["GGUF"] = (options.gguf, ())
    if options.adapter:
        formats["safetensors and an adapter"] = (options.model, (options.adapter,))
    run = run_name()
    rows = []
    try:
        for name, (model, adapters) in formats.items():
            for dtype in options.dtypes:
                row = measure(name, model, dtype, adapters, options.repetitions)
                rows.append({**row, "run": run})
                sizes = f"weights {row['weights_mib']:,} MiB, peak {row['peak_mib']:,} MiB"
                print(f"{name:28} {dtype:9} {row['seconds']:6.2f} s  {sizes}", flush=True)
    except ValueError as error:
        sys.exit(f"bench_load: {error}")
    if not options.dry:
        append_rows(rows)


if __name__ == "__main__":
    main()
