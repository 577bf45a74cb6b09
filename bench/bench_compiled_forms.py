"""What torch.compile would gain over the forms that the element-wise parts of a layer run in on the CPU.

    python -m flashvec.bench.bench_compiled_forms --model M [--one-thread] [--dry]

The reference of each op is compiled, for any number of rows, and takes turns with the form that runs today; then
layers do, with the compiled forms put in place. First calls are timed in processes of their own, with an empty cache
on disk and with the one that the first left there. A compiled form could only be used if it gave a row the same bits
at every row count; that is checked as well.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from flashvec.bench.timing import append_rows, at_least_one, interleave, spread
from flashvec.kernels import attention as attention_module
from flashvec.kernels.rms_norm import rms_norm, rms_norm_reference
from flashvec.kernels.rope import rope, rope_reference
from flashvec.kernels.schedule import build_schedule
from flashvec.kernels.swiglu import swiglu, swiglu_reference
from flashvec.runtime import decoder as decoder_module
from flashvec.runtime.decoder import Decoder
from flashvec.runtime.encoder import Encoder

TOKENS, TEXT_LENGTH = 2048, 128
ROW_COUNTS = (16, 48, 112, 480, 1920)  # of the row counts that products run at
NUM_LAYERS = 4  # enough that their neighbours' traffic through the caches is there
REPEATS = 8  # calls in one measurement of an op: most take less than a millisecond

Form = Callable[..., Any]
Clock = Callable[[], float]
compiled = partial(torch.compile, dynamic=True)


def residual_norm(h_TD: Tensor, y_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Residual add and the norm that reads its result: what a compiler would fuse first."""
    h_TD = h_TD + y_TD
    return h_TD, rms_norm_reference(h_TD, weight_D, eps)


def _residual_norm_eager(h_TD: Tensor, y_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    h_TD = h_TD.add_(y_TD)
    return h_TD, rms_norm(h_TD, weight_D, eps)


OPS: dict[str, tuple[Form, Form]] = {  # today's form, and the definition that is compiled
    "rms_norm": (rms_norm, rms_norm_reference),
    "rope": (rope, rope_reference),
    "swiglu": (swiglu, swiglu_reference),
    "residual add + rms_norm": (_residual_norm_eager, residual_norm),
}

# Those that a layer calls by these names, and the module it calls them from. Its norms are part of the residual add.
LAYER_OPS: dict[str, Any] = {"rope": attention_module, "swiglu": decoder_module}


def inputs(decoder: Decoder, num_rows: int) -> dict[str, tuple[Any, ...]]:
    """Arguments of each op as a layer gives them; the same rows whatever their number."""
    spec = decoder.spec
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = decoder.dtype) -> Tensor:
        return torch.randn(TOKENS, *shape, generator=generator).to(dtype)[:num_rows]

    D, H, G = spec.hidden_size, spec.num_heads, spec.num_kv_heads
    qkv = draw(H + 2 * G, spec.head_size)
    angles = draw(spec.head_size // 2, dtype=torch.float32)
    h_TD, y_TD = draw(D, dtype=torch.float32), draw(D)
    weight_D = decoder.layers[0].mlp_norm
    return {
        "rms_norm": (h_TD, weight_D, spec.norm_eps, spec.norm_offset, decoder.dtype),
        "rope": (qkv[:, : H + G], angles.cos(), angles.sin()),
        "swiglu": (draw(2 * spec.mlp_size), spec.activation),
        "residual add + rms_norm": (h_TD, y_TD, weight_D, spec.norm_eps),
    }


def first_calls(model: str) -> dict[str, float]:
    """Seconds of each compiled form's first call in this process."""
    given = inputs(Encoder.load(model, layers=1).decoder, TOKENS)
    seconds = {}
    for op, (_, definition) in OPS.items():
        start = time.perf_counter()
        compiled(definition)(*given[op])
        seconds[op] = time.perf_counter() - start
    return seconds


def first_calls_in_new_processes(model: str) -> tuple[dict[str, float], dict[str, float]]:
    """`first_calls` with nothing on disk, then with what that left there."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "flashvec.bench.bench_compiled_forms", "--model", model, "--first-calls"]
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        runs = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(2)]
    cold, warm = (json.loads(run.stdout.splitlines()[-1]) for run in runs)
    return cold, warm


def same_bits_at_every_count(form: Form, decoder: Decoder, op: str) -> bool:
    """True if rows come out of `form` with the bits they have among `TOKENS` rows, at each of `ROW_COUNTS`."""
    truth = _tensors(form(*inputs(decoder, TOKENS)[op]))
    for count in ROW_COUNTS:
        got = _tensors(form(*inputs(decoder, count)[op]))
        if not all(torch.equal(a, b[:count]) for a, b in zip(got, truth, strict=True)):
            return False
    return True


def _tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@contextmanager
def in_place(forms: dict[str, Form]) -> Iterator[None]:
    """Layers run `forms` instead of their own ops of these names."""
    before = {op: getattr(LAYER_OPS[op], op) for op in forms}
    try:
        for op, form in forms.items():
            setattr(LAYER_OPS[op], op, form)
        yield
    finally:
        for op, form in before.items():
            setattr(LAYER_OPS[op], op, form)


def bench_ops(decoder: Decoder, repetitions: int, clock: Clock = time.perf_counter) -> list[dict[str, Any]]:
    """A row for each op: its form and the compiled definition in turn."""
    given, rows = inputs(decoder, TOKENS), []
    for op, (eager, definition) in OPS.items():
        form = compiled(definition)
        same_bits = same_bits_at_every_count(form, decoder, op)
        own, other = (partial(_repeat, f, given[op]) for f in (eager, form))
        rows.append(_compare(op, own, other, repetitions, clock))
        rows[-1] |= {"eager_ms": rows[-1]["eager_ms"] / REPEATS, "compiled_ms": rows[-1]["compiled_ms"] / REPEATS}
        rows[-1]["same_bits_at_every_row_count"] = same_bits
    return rows


def bench_layers(decoder: Decoder, repetitions: int, clock: Clock = time.perf_counter) -> dict[str, Any]:
    """One row: whole layers, products and attention included, with and without the compiled forms."""
    forms = {op: compiled(OPS[op][1]) for op in LAYER_OPS}
    schedule = build_schedule([TEXT_LENGTH] * (TOKENS // TEXT_LENGTH), TOKENS, decoder.device)
    ids_T = torch.arange(TOKENS) % decoder.spec.vocab_size

    def eager(repetition: int) -> None:
        decoder.forward(ids_T, schedule, (TOKENS,), False)

    def with_compiled(repetition: int) -> None:
        with in_place(forms):
            decoder.forward(ids_T, schedule, (TOKENS,), False)

    row = _compare("layer", eager, with_compiled, repetitions, clock)
    return row | {key: row[key] / len(decoder.layers) for key in ("eager_ms", "compiled_ms")}


def _repeat(form: Form, arguments: tuple[Any, ...], repetition: int) -> None:
    for _ in range(REPEATS):
        form(*arguments)


def _compare(
    op: str, eager: Callable[[int], None], other: Callable[[int], None], repetitions: int, clock: Clock
) -> dict[str, Any]:
    """Medians of both, in milliseconds, and of their ratio within a repetition."""
    with torch.inference_mode():
        interleave({"eager": eager, "compiled": other}, 2)
        seconds = interleave({"eager": eager, "compiled": other}, repetitions, clock)
    ratios = [c / e for e, c in zip(seconds["eager"], seconds["compiled"], strict=True)]
    return {
        "op": op,
        "eager_ms": 1e3 * median(seconds["eager"]),
        "compiled_ms": 1e3 * median(seconds["compiled"]),
        "compiled_to_eager": round(median(ratios), 3),
        "spread": spread(ratios),
        "repetitions": repetitions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or GGUF file")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: what the model would run in here")
    parser.add_argument("--repetitions", type=at_least_one, default=21)
    parser.add_argument(
        "--one-thread", action="store_true", help="CPU time of one thread: for a machine others use too"
    )
    parser.add_argument("--first-calls", action="store_true", help="time first calls in this process, print JSON")
    parser.add_argument("--dry", action="store_true", help="keep no rows")
    options = parser.parse_args()
    if options.first_calls:
        print(json.dumps(first_calls(options.model)))
        return
    if options.one_thread:
        torch.set_num_threads(1)
    clock = time.thread_time if options.one_thread else time.perf_counter
    decoder = Encoder.load(options.model, dtype=options.dtype, layers=NUM_LAYERS).decoder
    rows = [*bench_ops(decoder, options.repetitions, clock), bench_layers(decoder, options.repetitions, clock)]
    if not options.one_thread:  # seconds on the wall mean nothing on a busy machine
        cold, warm = first_calls_in_new_processes(options.model)
        cold["layer"], warm["layer"] = (sum(seconds[op] for op in LAYER_OPS) for seconds in (cold, warm))
        for row in rows:
            row |= {"first_call_s": round(cold[row["op"]], 2), "first_call_cached_s": round(warm[row["op"]], 2)}
    for row in rows:
        row |= {key: round(row[key], 3) for key in ("eager_ms", "compiled_ms")}
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    about = {
        "benchmark": "compiled_forms",
        "model": Path(options.model).name,
        "variant": "torch.compile",
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "tokens": TOKENS,
        "clock": "CPU time of the thread" if options.one_thread else "wall",
    }
    if not options.dry:
        append_rows([{**about, **row} for row in rows])


if __name__ == "__main__":
    main()
