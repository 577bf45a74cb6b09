"""What a job would take, from a sample of its inputs: nothing is written."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashvec.runtime.corpus.job import draft_plan
from flashvec.runtime.corpus.plan import Plan
from flashvec.runtime.corpus.reporter import counted, duration
from flashvec.runtime.corpus.sample import sample_texts
from flashvec.runtime.corpus.settings import JobSettings
from flashvec.runtime.corpus.sources import find_sources
from flashvec.runtime.corpus.worker import ShardRunner

SAMPLED_TEXTS = 2048  # for lengths and duplicates
TIMED_TEXTS = 64


@dataclass(frozen=True)
class Estimate:
    """A job's size and cost; all but files and shards are estimates."""

    files: int
    shards: int
    rows: int
    tokens: int  # as cut to max_length
    longest: int  # tokens, in the sample
    duplicate_share: float  # in the sample
    bytes_out: int
    tokens_per_s: float
    seconds: float  # with one worker on this machine


def estimate_job(
    inputs: Sequence[str | Path],
    *,
    model: str | Path,
    settings: JobSettings,
    load: dict[str, Any] | None = None,
    device: str | None = None,
    note: Callable[[str], None] | None = None,
) -> Estimate:
    """Sample texts from all over the inputs, count their tokens and time some of them.

    Raises:
        ValueError: as `embed_corpus` does for bad inputs.
    """
    note = note or (lambda text: None)
    plan = draft_plan(find_sources(inputs, note), settings, {}, note=note)
    texts = sample_texts(plan, SAMPLED_TEXTS)
    if not texts:
        raise ValueError("the sampled rows hold no text")
    runner: Any = ShardRunner.load({**(load or {}), "model": str(model), "device": device})
    encoder = runner.encoder
    limit = settings.max_length or encoder.spec.max_length
    counts = encoder.count_tokens(texts, instruction=settings.instruction, prompt_name=settings.prompt_name)
    step = max(1, len(texts) // TIMED_TEXTS)
    runner.speed(texts[::step][:4], plan.settings)  # the first call is slower
    timed = runner.speed(texts[::step][:TIMED_TEXTS], plan.settings)
    used = counts.clip(max=limit) if settings.long == "truncate" else counts
    tokens = float(used.mean()) * plan.num_rows
    rate = timed["tokens"] / timed["seconds"]
    return Estimate(
        files=len(plan.sources),
        shards=len(plan.shards),
        rows=plan.num_rows,
        tokens=int(tokens),
        longest=int(counts.max()),
        duplicate_share=1 - len(set(texts)) / len(texts),
        bytes_out=plan.num_rows * _with_model(plan, runner).bytes_per_row(),
        tokens_per_s=rate,
        seconds=tokens / rate,
    )


def _with_model(plan: Plan, runner: ShardRunner) -> Plan:
    from dataclasses import replace

    return replace(plan, model=runner.facts)


def estimate_lines(estimate: Estimate) -> Iterator[str]:
    """An estimate as a person reads it."""
    yield f"{counted(estimate.files, 'file')}, {counted(estimate.shards, 'shard')}, about {estimate.rows:,} rows"
    yield f"about {estimate.tokens:,} tokens, the longest sampled text {estimate.longest:,}"
    yield f"about {estimate.duplicate_share:.1%} of the sampled rows repeat another"
    yield f"about {estimate.bytes_out:,} bytes of vectors"
    yield f"about {duration(estimate.seconds)} at {estimate.tokens_per_s:,.0f} tokens/s, one worker on this machine"
