"""Where the time of `Encoder.embed` goes, part by part.

    flashvec bench smollm2-encoder --profile

Each part's functions are wrapped in a clock while the texts run; a part called within another is not counted twice. On
a GPU every part is waited for, so that parts are right and their sum is larger than an undisturbed call.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any
from unittest import mock

import torch

from flashvec.runtime import decoder as decoder_module
from flashvec.runtime import pooling as pooling_module
from flashvec.runtime import prepare
from flashvec.runtime.decoder import Decoder
from flashvec.runtime.encoder import Encoder

PARTS: tuple[tuple[str, Any, str], ...] = (
    ("tokenising", prepare, "tokenise"),
    ("embedding, rotary tables", Decoder, "_embed"),
    ("embedding, rotary tables", Decoder, "_rope_rows"),
    ("matrix products", decoder_module, "linear"),
    ("attention, rotation", decoder_module, "attention"),
    ("residual additions, norms", decoder_module, "add_rms_norm"),
    ("residual additions, norms", decoder_module, "rms_norm"),
    ("activation", decoder_module, "swiglu"),
    ("pooling", pooling_module, "mean_pool"),
)
REST = "everything else"


@dataclass
class Part:
    """Seconds spent in a part, not counting parts inside it, and how often it was called."""

    seconds: float = 0.0
    calls: int = 0


class Clock:
    """Adds up parts; `stack` holds what the running ones have spent in parts inside them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.parts: dict[str, Part] = {}
        self.stack: list[float] = []

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def around(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run`, its time added to a part."""

        @wraps(run)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.stack.append(0.0)
            start = self.now()
            try:
                return run(*args, **kwargs)
            finally:
                spent, inside = self.now() - start, self.stack.pop()
                if self.stack:
                    self.stack[-1] += spent
                part = self.parts.setdefault(name, Part())
                part.seconds += spent - inside
                part.calls += 1

        return timed


@contextmanager
def clocked(clock: Clock) -> Iterator[None]:
    """Every part's functions wrapped in the clock."""
    with ExitStack() as stack:
        for name, owner, attribute in PARTS:
            stack.enter_context(mock.patch.object(owner, attribute, clock.around(name, getattr(owner, attribute))))
        yield


def profile(encoder: Encoder, texts: Sequence[str]) -> dict[str, Part]:
    """Parts of one call of `embed`, longest first; the last is everything else.

    Args:
        encoder: on one device; with more than one worker their parts would overlap.

    Raises:
        ValueError: an encoder with several workers.
    """
    if encoder.workers != 1:
        raise ValueError(f"encoder has {encoder.workers} workers: parts that overlap have no shares, use one")
    encoder.embed(list(texts), show_progress=False)  # warm
    graphs, encoder.engine.graphs = encoder.engine.graphs, None  # a recorded pack has no parts
    clock = Clock(encoder.device)
    try:
        start = clock.now()
        with clocked(clock):
            encoder.embed(list(texts), show_progress=False)
        total = clock.now() - start
    finally:
        encoder.engine.graphs = graphs
    found = dict(sorted(clock.parts.items(), key=lambda item: -item[1].seconds))
    return found | {REST: Part(total - sum(part.seconds for part in found.values()), 1)}


def table(parts: dict[str, Part], num_tokens: int) -> list[str]:
    """A line a part: milliseconds, share, calls; then the whole."""
    total = sum(part.seconds for part in parts.values())
    lines = [
        f"{name:28} {1e3 * part.seconds:9.1f} ms {part.seconds / total:6.1%} {part.calls:6d} calls"
        for name, part in parts.items()
    ]
    return [*lines, f"{'in all':28} {1e3 * total:9.1f} ms, {num_tokens:,} tokens, {num_tokens / total:,.0f} tokens/s"]
