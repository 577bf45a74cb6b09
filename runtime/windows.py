"""Texts made ready to run, a window at a time: written out, tokenised, and which of their tokens are pooled."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from flashvec.runtime import prepare
from flashvec.runtime.ahead import ahead
from flashvec.runtime.batches import TokenRows
from flashvec.runtime.engine import Engine, Ran
from flashvec.runtime.options import RunOptions
from flashvec.runtime.program import Program
from flashvec.runtime.spec import ModelSpec
from flashvec.runtime.texts import check_truth
from flashvec.runtime.tokenize import Tokenizer, Tokens

WINDOW = 8192  # texts tokenised, sorted and packed together: bounds memory, long enough to fill packs evenly
FIRST_WINDOW = 1024  # where tokenising runs ahead: a device that waits for its first texts should not wait long


@dataclass(frozen=True)
class RunSettings:
    """How a call runs: what `embed`, `embed_tokens` and `embed_spans` have in common."""

    max_length: int | None = None
    batch_tokens: int | None = None
    split_special: bool = False
    show_progress: bool | None = None
    first_row: int = 0  # number of the first text in warnings: more than 0 where a stream is run in windows

    def __post_init__(self) -> None:
        check_truth("split_special", self.split_special)
        if self.show_progress is not None:
            check_truth("show_progress", self.show_progress)


RUN_SETTINGS = tuple(RunOptions.__annotations__)  # those that a caller may give
EMBED_SETTINGS = ("truncate_dim", "precision", "output", "out", "spans")  # what `embed` alone can do


def run_settings(given: Mapping[str, Any]) -> RunSettings:
    """What a caller gave by name to a method that takes these settings beside its own arguments.

    Raises:
        TypeError: a name that is none of them, with those that are.
    """
    check_settings(given, RUN_SETTINGS)
    return RunSettings(**given)


def check_settings(given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse what a method does not take beside its own arguments.

    Raises:
        TypeError: a name that is none of `known`, with those that are.
    """
    for name in given:
        if name not in known:
            cure = f": call embed for {name}" if name in EMBED_SETTINGS else ""
            there = ", ".join(known)
            raise TypeError(f"{name!r} is no argument here (beside the method's own there are {there}){cure}")


@dataclass(frozen=True)
class Call:
    """Texts to run, and how."""

    texts: Sequence[str]
    instructions: Sequence[str] | None  # one per text
    limit: int  # tokens a text may have
    split_special: bool
    program: Program
    offsets: bool  # keep each token's characters
    on_device: bool  # leave results there

    def take(self, rows: np.ndarray) -> "Call":
        """The same for some of the texts."""
        own = None if self.instructions is None else [self.instructions[row] for row in rows]
        return replace(self, texts=[self.texts[row] for row in rows], instructions=own)


@dataclass(frozen=True)
class Window:
    """A run of a call's texts, the first of them number `at`."""

    at: int
    tokens: Tokens
    rows: TokenRows
    text_starts: list[int]  # characters that template and instruction put before each text

    def own(self, index: int) -> slice:
        """A text's tokens in `tokens`, by its number in the window."""
        return slice(self.rows.starts[index], self.rows.starts[index + 1])


class Done(NamedTuple):
    """One pack of texts that ran, and what is needed to finish it."""

    rows: np.ndarray  # int64 [B] numbers of these texts in the call's list
    ran: Ran  # its `indices` count in the window
    window: Window


def window_starts(num_texts: int, run_ahead: bool) -> list[int]:
    """Where windows begin; the last number is where they end. With `run_ahead` the first ones are short."""
    starts, size = [0], FIRST_WINDOW if run_ahead else WINDOW
    while starts[-1] < num_texts:
        starts.append(min(starts[-1] + size, num_texts))
        size = min(2 * size, WINDOW)
    return starts


def read_windows(call: Call, spec: ModelSpec, tokenizer: Tokenizer, starts: Sequence[int]) -> Iterator[Window]:
    """Tokenise a call's texts, a window between each two of `starts`.

    Raises:
        ValueError: tokens that the model does not have, or an instruction that leaves nothing of a text.
    """
    offsets = call.offsets or spec.span == "template" or (spec.span == "offsets" and call.instructions is not None)
    for start, stop in pairwise(starts):
        own = None if call.instructions is None else call.instructions[start:stop]
        prepared = prepare.prepare(spec, call.texts[start:stop], own, tokenizer)
        tokens = prepare.tokenise(tokenizer, prepared, call.limit, offsets=offsets, split_special=call.split_special)
        _check_ids(tokens.ids, spec, tokenizer)
        spans = prepare.pooled_spans(spec, tokens, prepared, own, tokenizer)
        rows = TokenRows(tokens.ids, tokens.lengths, spans)
        yield Window(start, tokens, rows, [len(before) for before in prepared.before])


def run_call(
    call: Call, spec: ModelSpec, tokenizer: Tokenizer, engine: Engine, budget: int, workers: int = 1
) -> Iterator[Done]:
    """Run a call's texts; where a device works by itself, the next window is tokenised meanwhile.

    Args:
        budget, workers: as in `Engine.run`.
    """
    run_ahead = engine.accelerator is not None
    starts = window_starts(len(call.texts), run_ahead)
    windows: Any = read_windows(call, spec, tokenizer, starts)
    if run_ahead and len(starts) > 2:  # more than one window
        windows = ahead(windows)
    with closing(windows):
        for window in windows:
            for ran in engine.run(window.rows, budget, call.program, workers, call.on_device):
                yield Done(ran.indices + window.at, ran, window)


def _check_ids(ids: np.ndarray, spec: ModelSpec, tokenizer: Tokenizer) -> None:
    size = spec.decoder.vocab_size
    if len(ids) and ids.max() >= size:
        token = tokenizer.backend.id_to_token(int(ids.max()))
        raise ValueError(
            f"the tokenizer gives {token!r} the id {ids.max()}, the model's embedding has {size} rows: "
            "tokenizer.json belongs to another model"
        )
