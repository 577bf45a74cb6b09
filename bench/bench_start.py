"""What a first vector costs: seconds from a new process to it, and peak memory; ours and each peer's.

    peers/bin/python -m flashvec.bench.bench_start --model smollm2-encoder [--gguf model.gguf]

Every measurement has a process of its own: started, model opened, one text embedded; then about 3,000 tokens of
passages. Peak memory is of resident pages, the mapped model's included, over all of it. Peers are opened through this
project's code (`bench/peers.py`), whose imports are in their seconds as ours are in ours; the reference implementation
by a script that imports nothing else.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from flashvec.bench.lengths import Texts
from flashvec.bench.own_process import ProcessEndedError
from flashvec.bench.peers import is_installed
from flashvec.bench.rows import NOT_INSTALLED
from flashvec.bench.timing import append_rows, at_least_one, run_name
from flashvec.bench.variants import OURS, Subject

PASSAGE_TOKENS = 3000


def measure_once(name: str, subject: Subject, dtype: str) -> tuple[float, int]:
    """Seconds until the first vector and peak memory in MiB, of a new process.

    Raises:
        ProcessEndedError: it did not come so far; says why.
    """
    process = subject.process(name, dtype)
    try:
        start = time.perf_counter()
        process.embed(["One sentence, to see that it runs."])
        seconds, peak = time.perf_counter() - start, process.peak_mib
        process.embed(Texts(None, 1.4).draw("passages", PASSAGE_TOKENS, 0))
        return seconds, round(max(peak, process.peak_mib))
    finally:
        process.close()


def measure(subject: Subject, dtype: str, repetitions: int) -> list[dict[str, Any]]:
    """A row for ours and for each peer, one that fails or is not installed among them.

    Raises:
        ProcessEndedError: ours fails; says why.
    """
    peers = subject.peers(dtype)
    names = [OURS, *peers]
    found: dict[str, list[tuple[float, int]]] = {}
    failed = {name: NOT_INSTALLED for name, peer in peers.items() if not is_installed(peer.package)}
    run = run_name()
    for _ in range(repetitions):
        for name in (n for n in names if n not in failed):
            try:
                found.setdefault(name, []).append(measure_once(name, subject, dtype))
            except ProcessEndedError as error:
                if name == OURS:
                    raise
                failed[name] = str(error)
    rows: list[dict[str, Any]] = []
    for name in names:
        row: dict[str, Any] = {
            "benchmark": "start", "model": Path(subject.model).name, "run": run, "dtype": dtype, "variant": name
        }  # fmt: skip
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
    parser.add_argument("--repetitions", type=at_least_one, default=3)
    parser.add_argument("--dry", action="store_true", help="keep no rows")
    options = parser.parse_args()
    try:
        rows = measure(Subject(options.model, options.gguf), options.dtype, options.repetitions)
    except ProcessEndedError as error:  # of ours: the model's files, or the dtype
        sys.exit(f"bench_start: {error}")
    for row in rows:
        shown = row.get("failed") or f"{row['seconds']:7.2f} s to the first vector  {row['peak_mib']:6,} MiB at most"
        print(f"{row['variant']:44} {shown}")
    if not options.dry:
        append_rows(rows)


if __name__ == "__main__":
    main()
