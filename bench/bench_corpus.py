"""What a corpus job costs beside the model: `run_shard` against `Encoder.embed`, memory, planning, reuse.

    python -m flashvec.bench.bench_corpus --model M --texts FOLDER [--rows 300] [--layers 2]
    python -m flashvec.bench.bench_corpus --stand-in

The first form times one shard and a plain list of the same texts in turn, in one process, and then the shard again with
one row in a hundred changed and the rest taken from the first job; and it gives the peak memory of a process that does
such a shard and nothing else, beside the model's weights. With a few layers alone the model costs less and the job the
same: a stricter measure, and many rows in minutes. The second needs no model: vectors are hashes, so that what is left
is the job itself; it gives the process's peak memory over 10^4 and 10^6 rows and the time to plan 10,000 Parquet files.
"""

import argparse
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash

from flashvec.runtime.corpus.cuts import cut
from flashvec.runtime.corpus.inspect import inspect_sources, resolve_columns
from flashvec.runtime.corpus.job import draft_plan
from flashvec.runtime.corpus.manifest import SUCCESS_FILE
from flashvec.runtime.corpus.plan import PLAN_FILE, ModelFacts, Plan
from flashvec.runtime.corpus.reuse import EarlierVectors
from flashvec.runtime.corpus.settings import JobSettings
from flashvec.runtime.corpus.shard import Step, run_shard
from flashvec.runtime.corpus.sources import find_sources
from flashvec.runtime.corpus.storage import Storage

SHORT_ROWS = (10_000, 1_000_000)
MANY_FILES = 10_000
MIN_CHARS = 200  # of a paragraph
STAND_IN_DIM = 64


class HashEncoder:
    """Vectors that cost nothing."""

    def embed(self, texts: Sequence[str], **settings: Any) -> np.ndarray:
        seeds = [xxhash.xxh3_128_digest(text.encode()) for text in texts]
        values = np.frombuffer(b"".join(seeds), np.uint8).reshape(-1, 16).astype(np.float32)
        return np.tile(values, (1, STAND_IN_DIM // 16))


def plan_for(path: Path, dim: int, settings: JobSettings | None = None) -> Plan:
    """A plan for one file; the model's facts but its width are of no account here."""
    plan = draft_plan(find_sources([path]), settings or JobSettings(), {})
    return replace(plan, model=ModelFacts({}, dim, "w", "t", "s", {}))


def paragraphs(folder: Path, count: int) -> list[str]:
    """Different paragraphs from all over a folder of text files, in a fixed random order."""
    lines = [line for path in sorted(folder.glob("*.txt")) for line in path.read_text("utf-8").splitlines()]
    found = list(dict.fromkeys(line for line in lines if len(line) >= MIN_CHARS and not re.match(r"</?doc", line)))
    random.Random(0).shuffle(found)
    return found[:count]


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def measure_overhead(
    model: str, texts: Sequence[str], max_length: int, repetitions: int, layers: int | None = None
) -> list[dict[str, Any]]:
    """A shard against a list, interleaved; and a shard of which 99 % is reused.

    Args:
        model: folder or GGUF file.
        texts: a row each.
        max_length: tokens of a text.
        repetitions: of both.
        layers: the first of the model's; default all.
    """
    from flashvec.bench.timing import spread, take_turns
    from flashvec.runtime.encoder import Encoder
    from flashvec.runtime.texts import TruncationWarning

    encoder = Encoder.load(model, layers=layers)
    settings = JobSettings(max_length=max_length)
    stages = {"read": 0.0, "embed": 0.0, "write": 0.0}

    def on_step(step: Step) -> None:
        for name in stages:
            stages[name] += getattr(step, f"{name}_s")

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        root = Path(folder)
        plan = plan_for(write_jsonl(root / "in.jsonl", texts), encoder.spec.embedding_size, settings)

        def shard(repetition: int) -> float:
            storage = Storage(root / f"out{repetition}")
            return _cpu_seconds(lambda: run_shard(plan, 0, encoder, storage, on_step=on_step))

        def plain(repetition: int) -> float:
            return _cpu_seconds(lambda: encoder.embed(list(texts), max_length=max_length))

        encoder.embed(list(texts[:8]), max_length=max_length)
        found = take_turns({"Encoder.embed": plain, "run_shard": shard}, repetitions)
        first = Storage(root / "out0")
        first.write(PLAN_FILE, plan.to_json())
        first.write(SUCCESS_FILE, b"{}")
        edited = [f"{text} (edited)" if i % 100 == 0 else text for i, text in enumerate(texts)]
        again = plan_for(write_jsonl(root / "new.jsonl", edited), encoder.spec.embedding_size, settings)
        reuse = _cpu_seconds(
            lambda: run_shard(
                again, 0, encoder, Storage(root / "reused"), known=EarlierVectors(str(root / "out0")), on_step=on_step
            )
        )
    ratios = [a / b for a, b in zip(found["run_shard"], found["Encoder.embed"], strict=True)]
    row = {
        "benchmark": "corpus",
        "model": Path(model).name,
        "rows": len(texts),
        "max_length": max_length,
        "layers": encoder.spec.decoder.num_layers,
        "dtype": str(encoder.dtype).removeprefix("torch."),
        "clock": "CPU seconds of the process",
        "repetitions": repetitions,
    }
    share = {f"{name}_share": round(value / sum(stages.values()), 4) for name, value in stages.items()}
    seconds = {name: round(median(values), 3) for name, values in found.items()}
    return [
        {**row, "variant": "overhead", "ratio": round(median(ratios), 4), "spread": spread(ratios), **seconds, **share},
        {**row, "variant": "reuse, 1 % edited", "ratio": round(reuse / median(found["run_shard"]), 4)},
    ]


def _cpu_seconds(run: Any) -> float:
    """CPU seconds of this process, all threads: other work on the machine does not count."""
    start = time.process_time()
    run()
    return time.process_time() - start


def measure_memory(num_rows: int) -> dict[str, Any]:
    """Peak memory of this process over a job of short rows; run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.txt"
        with path.open("w") as file:
            file.writelines(f"short row number {i}\n" for i in range(num_rows))
        plan = plan_for(path, STAND_IN_DIM)
        encoder, storage = HashEncoder(), Storage(Path(folder) / "out")
        start = time.perf_counter()
        rows = sum(run_shard(plan, i, encoder, storage).rows for i in range(len(plan.shards)))
        seconds = time.perf_counter() - start
    assert rows == num_rows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"rows": num_rows, "peak_mib": round(peak / 1024, 1), "rows_per_s": round(num_rows / seconds)}


def measure_model_memory(model: str, texts: Path, num_rows: int, max_length: int, layers: int | None) -> dict[str, Any]:
    """Peak memory of this process over a shard with a real model, and its weights' bytes; in a process of its own."""
    from flashvec.runtime.encoder import Encoder
    from flashvec.runtime.texts import TruncationWarning

    warnings.simplefilter("ignore", TruncationWarning)
    encoder = Encoder.load(model, layers=layers)
    decoder = encoder.decoder
    held = [decoder.embedding_VD, decoder.norm_D, *(x for layer in decoder.layers for x in vars(layer).values())]
    weights = sum(x.nbytes for x in held if isinstance(x, torch.Tensor)) / 2**20
    with tempfile.TemporaryDirectory() as folder:
        path = write_jsonl(Path(folder) / "in.jsonl", paragraphs(texts, num_rows))
        settings = JobSettings(max_length=max_length)
        plan = plan_for(path, encoder.spec.embedding_size, settings)
        storage = Storage(Path(folder) / "out")
        rows = sum(run_shard(plan, i, encoder, storage).rows for i in range(len(plan.shards)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"rows": rows, "peak_mib": round(peak, 1), "weights_mib": round(weights, 1)}


def measure_planning(num_files: int) -> dict[str, Any]:
    """Seconds to plan a folder of Parquet files."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0.parquet"
        pq.write_table(pa.table({"text": [f"row {i}" for i in range(100)]}), path)
        content = path.read_bytes()
        for i in range(1, num_files):
            path.with_name(f"{i}.parquet").write_bytes(content)
        start = time.perf_counter()
        sources = find_sources([folder])
        inspected = inspect_sources(sources)
        settings, _ = resolve_columns(JobSettings(), sources, inspected)
        shards = cut(sources, inspected, settings.shard_size)
        return {"files": num_files, "shards": len(shards), "seconds": round(time.perf_counter() - start, 2)}


def measure_stand_in() -> list[dict[str, Any]]:
    """Memory in fresh processes, and planning."""
    rows = []
    for num_rows in SHORT_ROWS:
        found = _in_new_process(["--memory-of", str(num_rows)])
        rows.append({"benchmark": "corpus", "model": "stand-in", "variant": "memory", **found})
    return [*rows, {"benchmark": "corpus", "model": "none", "variant": "planning", **measure_planning(MANY_FILES)}]


def _in_new_process(arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "flashvec.bench.bench_corpus", *arguments]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(printed)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--layers", type=int, help="run the model's first layers alone")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--stand-in", action="store_true")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name in ("rows", "max_length", "repetitions"):
        if (number := getattr(options, name)) < 1:
            parser.error(f"--{name.replace('_', '-')} is {number}, expected at least 1")
    if options.memory_of and options.model:
        found = measure_model_memory(
            options.model, options.texts, options.memory_of, options.max_length, options.layers
        )
        print(json.dumps(found))
        return
    if options.memory_of:
        print(json.dumps(measure_memory(options.memory_of)))
        return
    if not options.model and not options.stand_in:
        parser.error("give --model and --texts, or --stand-in")
    rows = measure_stand_in() if options.stand_in else []
    if options.model:
        if options.texts is None:
            parser.error("--model needs --texts, a folder of text files")
        texts = paragraphs(options.texts, options.rows)
        if not texts:
            parser.error(f"--texts {options.texts}: no folder of *.txt with lines of {MIN_CHARS} characters")
        rows += measure_overhead(options.model, texts, options.max_length, options.repetitions, options.layers)
        same = ["--model", options.model, "--texts", str(options.texts), "--max-length", str(options.max_length)]
        same += ["--layers", str(options.layers)] if options.layers else []
        found = _in_new_process(["--memory-of", str(len(texts)), *same])
        about = {key: rows[-1][key] for key in ("benchmark", "model", "max_length", "layers", "dtype")}
        rows.append({**about, "variant": "memory", **found})
    for row in rows:
        print(json.dumps(row), file=sys.stderr)
    if rows:
        from flashvec.bench.timing import append_rows

        append_rows(rows)


if __name__ == "__main__":
    main()
