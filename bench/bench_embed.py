"""Tokens per second of `Encoder.embed`, against the machine's own ceiling and against Hugging Face.

    python -m flashvec.bench.bench_embed --model M [--texts FILE] [--quick]

Every variant has a process of its own; they take turns on the same texts, new ones in every repetition. Ours and the
peers go from a list of str to a numpy array, tokenisation included. The ceiling is what the matrix library gives for
the model's bare products (`bench/ceiling.py`). Vectors are compared before any time is taken: a peer whose vectors are
others, that fails or is not installed is a row that says so. A text's vector may differ, as quantised weights make it;
but the median cosine must be 0.9 at least, and three in four vectors must lie nearer to the model's own vector of their
text than to that of any other: where all texts have cosines of 0.8 to each other, a high median says little.
Peak memory is of resident pages during the timed calls, mapped weights included. Long texts are long work for those
that pad, and take their memory: `--longest-call` and `--memory` say how much is waited for and given. OpenVINO,
ONNX Runtime, llama.cpp and the reference implementation come with `make peers` (then run it with peers/bin/python);
llama.cpp takes the model's GGUF file, sentence-transformers and the reference a folder that `flashvec convert` wrote.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from flashvec.bench.ceiling import Ceiling
from flashvec.bench.lengths import PROFILES, Texts
from flashvec.bench.own_process import LONGEST_CALL_S, MEMORY_GIB, OwnProcess, ProcessEndedError
from flashvec.bench.peers import is_installed
from flashvec.bench.rows import NOT_INSTALLED
from flashvec.bench.timing import append_rows, at_least_one, interleave, run_name, spread
from flashvec.bench.variants import OURS, Subject
from flashvec.kernels.backend import has_hardware_bf16
from flashvec.runtime.encoder import Encoder
from flashvec.runtime.progress import Progress

TOKENS_PER_RUN = 3000
LONG_TAIL_TOKENS_PER_RUN = 12_000  # enough for a few long ones
WARM_UP_TOKENS = 2000
SAME_MODEL = 0.9  # median cosine below which a peer runs another model, not the same one less exactly
MOST = 0.75  # of its vectors, which must lie nearer to the model's of their own text than to any other text's
QUICK_SHARE = 0.5  # of the tokens above
QUICK_PEERS = r"float\d+, sorted|^sentence-transformers|^llm2vec"  # those that run the model's own weights


def bench_profile(
    profile: str,
    texts: Texts,
    counter: Encoder,
    embedders: dict[str, Any],
    ceilings: dict[str, Ceiling],
    repetitions: int,
    share: float = 1.0,
) -> list[dict[str, Any]]:
    """Rows of one length profile: every variant in turn on the same new texts.

    Args:
        profile: key of `PROFILES`.
        texts: where they are cut from.
        counter: counts their tokens, cut as all cut them.
        embedders: ours, named `OURS` and something, the first one's vectors the model's; then others.
        ceilings: by dtype.
        repetitions: of each.
        share: of the usual number of tokens.
    """
    tokens = TOKENS_PER_RUN if PROFILES[profile] else LONG_TAIL_TOKENS_PER_RUN
    inputs = [texts.draw(profile, round(share * tokens), seed) for seed in range(repetitions)]
    num_tokens = [int(np.minimum(counter.count_tokens(t), counter.spec.max_length).sum()) for t in inputs]
    warm = texts.draw(profile, round(share * WARM_UP_TOKENS), -1)
    truth_name = next(iter(embedders))
    truth = embedders[truth_name].embed(warm)
    timed = {name: _Timed(name, embedder, inputs) for name, embedder in embedders.items()}
    with Progress(len(timed), sys.stderr.isatty(), f"comparing vectors of {profile}", "programs") as progress:
        for each in timed.values():
            each.compare(warm, truth, truth_name, truth if each.name == truth_name else None)
            progress.advance(1, 0)
    variants: dict[str, Callable[[int], Any]] = {name: each.run for name, each in timed.items() if not each.failed}
    for kind, bare in ceilings.items():
        variants |= {f"{kind}: {form}": run for form, run in bare.forms.items()}
    seconds = interleave(variants, repetitions)

    top = {kind: c.tokens_per_second({f: seconds[f"{kind}: {f}"] for f in c.forms}) for kind, c in ceilings.items()}
    rows: list[dict[str, Any]] = []
    for name, each in timed.items():
        if each.failed:
            rows.append(failed_row(name, profile, counter.spec.max_length, each.failed))
            print(f"{name}: {each.failed}", flush=True)
            continue
        rates = [n / s for n, s in zip(num_tokens, seconds[name], strict=True)]
        ceiling, form = top["float32" if "float32" in name else "bfloat16" if "bfloat16" in top else "float32"]
        rows.append(
            {
                "benchmark": "embed",
                "variant": name,
                "profile": profile,
                "max_length": counter.spec.max_length,
                "mean_tokens": round(sum(num_tokens) / sum(map(len, inputs)), 1),
                "tokens": round(median(num_tokens)),
                "tokens_per_s": round(median(rates)),
                "texts_per_s": round(median(len(t) / s for t, s in zip(inputs, seconds[name], strict=True)), 1),
                "spread": spread(rates),
                "ceiling_tokens_per_s": round(ceiling),
                "ceiling_form": form,
                "share_of_ceiling": round(median(rates) / ceiling, 3),
                **each.agreement,
                "peak_mib": round(each.peak_mib),
                "repetitions": repetitions,
            }
        )
        print("  ".join(f"{rows[-1][k]!s:>9}" if k != "variant" else f"{name:44}" for k in SHOWN), flush=True)
    return rows


def failed_row(name: str, profile: str, max_length: int, why: str) -> dict[str, Any]:
    """The row of a variant that has no number."""
    return {"benchmark": "embed", "variant": name, "profile": profile, "max_length": max_length, "failed": why}


class _Timed:
    """One variant on the inputs of all repetitions; what another library fails with is a result, ours must not fail."""

    def __init__(self, name: str, embedder: Any, inputs: Sequence[list[str]]) -> None:
        self.name, self.embedder, self.inputs = name, embedder, inputs
        self.failed, self.peak_mib = "", 0.0
        self.agreement: dict[str, float] = {}

    def compare(self, texts: list[str], truth: np.ndarray, of: str, vectors: np.ndarray | None = None) -> None:
        """Whether its vectors are those of `truth`, of other exactness; where they are not, it is not timed."""
        vectors = self._embed(texts) if vectors is None else vectors
        if vectors is None:
            return
        if vectors.shape != truth.shape:
            self.failed = f"vectors of shape {vectors.shape}, {of}'s are {truth.shape}"
        else:
            cosines = vectors @ truth.T
            own = np.diag(cosines)
            nearest = float(np.mean(cosines.argmax(1) == np.arange(len(own))))
            middle, least = float(np.median(own)), float(own.min())
            self.agreement = {"median_cosine": round(middle, 5), "least_cosine": round(least, 5)}
            self.agreement["own_nearest"] = round(nearest, 3)
            if not middle >= SAME_MODEL:  # nor where it is no number
                self.failed = f"median cosine {middle:.4f} to {of}: not the same model"
            elif nearest < MOST:
                self.failed = f"{nearest:.0%} of its vectors lie nearest to their text's of {of}: not the same model"
        if self.failed and self.name.startswith(OURS):
            raise ValueError(f"{self.name}: {self.failed}")

    def run(self, repetition: int) -> None:
        if not self.failed:
            self._embed(self.inputs[repetition])
            self.peak_mib = max(self.peak_mib, getattr(self.embedder, "peak_mib", 0.0))

    def _embed(self, texts: list[str]) -> np.ndarray | None:
        try:
            return self.embedder.embed(texts)
        except Exception as error:
            if self.name.startswith(OURS):
                raise
            kind = "" if isinstance(error, ProcessEndedError) else f"{type(error).__name__}: "
            self.failed = kind + " ".join(str(error).split())[:200]
            return None


SHOWN = ("variant", "profile", "mean_tokens", "tokens_per_s", "spread", "share_of_ceiling")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder or GGUF file")
    parser.add_argument("--texts", type=Path, help="file or folder of prose; default: the documentation Python carries")
    parser.add_argument("--profiles", nargs="+", choices=PROFILES, default=list(PROFILES))
    parser.add_argument("--repetitions", type=at_least_one, default=5)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="under 5 minutes on 2 cores: passages, half the tokens, three times, no quantised peers",
    )
    parser.add_argument("--no-peers", action="store_true", help="leave Hugging Face, OpenVINO, ONNX Runtime, ... out")
    parser.add_argument("--gguf", type=Path, help="the same model's GGUF file, for llama.cpp")
    parser.add_argument("--max-length", type=int, help="tokens of a text; default the model's")
    parser.add_argument(
        "--longest-call", type=float, default=LONGEST_CALL_S, help="seconds; a peer that takes longer has no number"
    )
    parser.add_argument(
        "--memory", type=float, default=MEMORY_GIB, metavar="GIB", help="that each program may take; default a third"
    )
    parser.add_argument("--only", default="", help="peers whose names this regular expression finds")
    parser.add_argument("--workers", type=at_least_one, nargs="+", default=[1], help="packs at the same time")
    parser.add_argument("--threads", type=at_least_one, help="torch threads; default all cores")
    parser.add_argument("--dry", action="store_true", help="keep no rows")
    options = parser.parse_args()
    for name, value in (("--longest-call", options.longest_call), ("--memory", options.memory)):
        if not value > 0:
            parser.error(f"{name} is {value:g}, expected more than 0")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.quick:
        options.profiles, options.repetitions = ["passages"], 3
        options.only = options.only or QUICK_PEERS
    start = time.perf_counter()
    subject = Subject(options.model, options.gguf, options.max_length, options.longest_call, options.memory)
    done = run(
        subject,
        options.texts,
        options.profiles,
        options.repetitions,
        has_peers=not options.no_peers,
        only=options.only,
        workers=options.workers,
        share=QUICK_SHARE if options.quick else 1.0,
    )
    try:
        for rows in done:
            if not options.dry:
                append_rows(rows)
    except re.error as error:
        sys.exit(f"bench_embed: --only {options.only!r}: {error}")
    except (ValueError, OSError, ProcessEndedError) as error:  # the model's files, the texts, ours: says what and where
        sys.exit(f"bench_embed: {error}")
    print(f"took {(time.perf_counter() - start) / 60:.1f} minutes")


def run(
    subject: Subject,
    texts: Path | None,
    profiles: Sequence[str],
    repetitions: int,
    *,
    has_peers: bool,
    only: str = "",
    workers: Sequence[int] = (1,),
    share: float = 1.0,
) -> Iterator[list[dict[str, Any]]]:
    """Measure and print, profile by profile; yields each one's rows.

    Args:
        subject: the model.
        texts: file or folder of prose; None takes Python's own documentation.
        profiles: keys of `PROFILES`.
        repetitions: of each variant, in turn.
        has_peers: also what else is installed.
        only: a regular expression that a peer's name must hold.
        workers: packs that ours runs at the same time, a variant each.
        share: of the usual number of tokens.
    """
    embedders: dict[str, OwnProcess] = {}
    missing: list[str] = []
    ceilings: dict[str, Ceiling] = {}
    for dtype in ("bfloat16", "float32"):
        if dtype == "bfloat16" and not has_hardware_bf16(torch.device("cpu")):
            continue  # no hardware for it
        for count in workers:
            name = f"{OURS} {dtype}" + (f", {count} workers" if count > 1 else "")
            embedders[name] = subject.process(name, dtype, count)
        counter = Encoder.load(subject.model, dtype=dtype, max_length=subject.max_length)
        ceilings[dtype] = Ceiling(counter)
    if has_peers:
        dtype = next(iter(ceilings))
        peers = {name: peer for name, peer in subject.peers(dtype).items() if re.search(only, name)}
        embedders |= {name: subject.process(name, dtype) for name, p in peers.items() if is_installed(p.package)}
        missing = [name for name in peers if name not in embedders]
        for name in missing:
            print(f"{name}: {NOT_INSTALLED}", flush=True)
    drawn = Texts.for_encoder(texts, counter)
    name_of_run = run_name()

    print("  ".join(f"{k:>9}" if k != "variant" else f"{k:44}" for k in SHOWN))
    try:
        for profile in profiles:
            rows = bench_profile(profile, drawn, counter, embedders, ceilings, repetitions, share)
            rows += [failed_row(name, profile, counter.spec.max_length, NOT_INSTALLED) for name in missing]
            yield [{"model": Path(subject.model).name, "run": name_of_run, **row} for row in rows]
    finally:
        for process in embedders.values():
            process.close()


if __name__ == "__main__":
    main()
