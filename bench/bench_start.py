"""What a first vector costs: seconds from a new process to it, and peak memory; ours and each peer's.

    peers/bin/python -m flashvec.bench.bench_start --model smollm2-encoder [--gguf model.gguf]

Every measurement has a process of its own: started, model opened, one text embedded; then about 3,000 tokens of
passages. Peak memory is of resident pages, the mapped model's included, over all of it. Peers are opened through this
project's code (`bench/peers.py`), whose imports are in their seconds as ours are in ours.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

OURS = "flashvec"
PASSAGE_TOKENS = 3000


def measure_here(name: str, model: str, dtype: str, gguf: Path | None) -> None:
    """One encoder or peer in this process; prints a line when the first vector is there, one at the end."""
    embedder: Any
    if name == OURS:
        from flashvec.runtime.encoder import Encoder

        embedder = Encoder.load(model, dtype=dtype)
    else:
        from flashvec.bench.peers import ways

        embedder = ways(model, dtype, gguf)[name][1]()
    embedder.embed(["One sentence, to see that it runs."])
    print("ready", flush=True)
    from flashvec.bench.bench_embed import Texts  # after the first vector: not part of starting

    embedder.embed(Texts(None, 1.4).draw("passages", PASSAGE_TOKENS, 0))
    if hasattr(embedder, "close"):
        embedder.close()
    usage = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({"peak_mib": round(max(usage) / 1024)}))


def measure_once(name: str, model: str, dtype: str, gguf: Path | None) -> tuple[float, int]:
    """Seconds until the first vector and peak memory in MiB, of a new process.

    Raises:
        ValueError: it did not come so far; holds the last line that it printed.
    """
    command = [sys.executable, "-m", "flashvec.bench.bench_start", "--model", model, "--only", name, "--dtype", dtype]
    command += ["--gguf", str(gguf)] if gguf else []
    start = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as said,  # no pipe: one that nobody reads fills up, and its writer waits
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:  # a library may print lines of its own
            if line == "ready\n":
                seconds = time.perf_counter() - start
                break
        rest, _ = child.communicate()
        if child.returncode:
            said.seek(0)
            raise ValueError((said.read().strip().splitlines() or ["no word"])[-1][:200])
    return seconds, json.loads(rest.strip().splitlines()[-1])["peak_mib"]


def measure(model: str, dtype: str, gguf: Path | None, repetitions: int) -> list[dict[str, Any]]:
    """A row for ours and for each peer that is installed."""
    from flashvec.bench.peers import installed, ways

    names = [OURS, *(name for name, (package, _) in ways(model, dtype, gguf).items() if installed(package))]
    found: dict[str, list[tuple[float, int]]] = {}
    failed: dict[str, str] = {}
    for _ in range(repetitions):
        for name in (n for n in names if n not in failed):
            try:
                found.setdefault(name, []).append(measure_once(name, model, dtype, gguf))
            except ValueError as error:
                failed[name] = str(error)
    rows: list[dict[str, Any]] = []
    for name in names:
        row: dict[str, Any] = {"benchmark": "start", "model": Path(model).name, "dtype": dtype, "variant": name}
        if name in failed:
            rows.append({**row, "failed": failed[name]})
            continue
        seconds, peaks = zip(*found[name], strict=True)
        rows.append(
            {**row, "seconds": round(median(seconds), 2), "peak_mib": max(peaks), "repetitions": len(found[name])}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or GGUF file")
    parser.add_argument("--gguf", type=Path, help="the same model's GGUF file, for llama.cpp")
    parser.add_argument("--dtype", default="float32", help="default %(default)s")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--dry", action="store_true", help="keep no rows")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        measure_here(options.only, options.model, options.dtype, options.gguf)
        return
    rows = measure(options.model, options.dtype, options.gguf, options.repetitions)
    for row in rows:
        shown = row.get("failed") or f"{row['seconds']:7.2f} s to the first vector  {row['peak_mib']:6,} MiB at most"
        print(f"{row['variant']:44} {shown}")
    if not options.dry:
        from flashvec.bench.timing import append_rows

        append_rows(rows)


if __name__ == "__main__":
    main()
