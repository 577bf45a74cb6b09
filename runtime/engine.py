"""Runs tokenised texts through the decoder, pack by pack."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flashvec.kernels.schedule import Schedule, build_schedule
from flashvec.runtime.decoder import Decoder
from flashvec.runtime.packing import pack
from flashvec.runtime.tokenize import Tokens

TOKEN_BUDGET_CPU = 2048  # where bf16 and fp32 products reach their best rate; more only costs memory
TOKEN_BUDGET_CUDA = 16_384


@dataclass(frozen=True)
class Pack:
    """Texts that ran together: which they were and what came out."""

    indices: np.ndarray  # int64 [B] positions of these texts in the call's list
    hidden_TD: Tensor  # fp32 residual stream, before the final norm
    schedule: Schedule


@dataclass(frozen=True)
class RunSettings:
    """How a call runs: what `embed`, `embed_tokens` and `embed_spans` have in common."""

    max_length: int | None = None
    batch_tokens: int | None = None
    split_special: bool = False
    show_progress: bool | None = None


class Done(NamedTuple):
    """One pack of texts that ran, and what is needed to finish it."""

    rows: np.ndarray  # int64 [B] numbers of these texts in the call's list
    pack: Pack
    spans_B2: Tensor  # int64 tokens that each text's vector is made of
    tokens: Tokens  # of the window this pack is from; `pack.indices` counts in it
    starts: np.ndarray  # int64 first token of each of the window's texts, and the end
    text_starts: list[int]  # characters that template and instruction put before each of the window's texts

    def own(self, index: int) -> slice:
        """A text's tokens in `tokens`, by its number in the window."""
        return slice(self.starts[index], self.starts[index + 1])


def default_budget(device: torch.device) -> int:
    """Tokens per pack where the caller sets none."""
    return TOKEN_BUDGET_CUDA if device.type == "cuda" else TOKEN_BUDGET_CPU


def run(
    decoder: Decoder, ids: np.ndarray, lengths: np.ndarray, budget: int, causal: bool, workers: int = 1
) -> Iterator[Pack]:
    """Run texts in packs of similar length.

    Args:
        ids: int32 [sum(lengths)] token ids, text after text.
        lengths: int32 [n] tokens of each text, at least 1.
        budget: tokens per pack.
        causal: hide later tokens.
        workers: packs that run at the same time, each on one thread, over the same weights (CPU). One pack on all
            threads waits for the slowest of them at every operation; single-threaded packs never wait.

    Yields:
        One `Pack` after the other; together they hold every text once. A text's rows have the same bits whatever
        the budget and its neighbours (CPU).
    """
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def run_pack(indices: np.ndarray) -> Pack:
        packed = np.concatenate([ids[starts[i] : starts[i + 1]] for i in indices])
        plan = decoder.row_plan(len(packed))
        schedule = build_schedule(lengths[indices].tolist(), sum(plan), decoder.device)
        ids_T = torch.from_numpy(packed).to(decoder.device)
        return Pack(indices, decoder.forward(ids_T, schedule, plan, causal), schedule)

    packs = list(pack(lengths, budget))
    if workers == 1 or decoder.device.type != "cpu":
        yield from map(run_pack, packs)
    else:
        yield from _run_on_workers(run_pack, packs, workers)


def _run_on_workers(run_pack: Callable[[np.ndarray], Pack], packs: list[np.ndarray], workers: int) -> Iterator[Pack]:
    """Packs in order, `workers` of them under way; at most one finished pack per worker waits in memory."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            under_way = deque(pool.submit(run_pack, indices) for indices in packs[: 2 * workers])
            for indices in packs[2 * workers :]:
                yield under_way.popleft().result()
                under_way.append(pool.submit(run_pack, indices))
            while under_way:
                yield under_way.popleft().result()
        finally:
            torch.set_num_threads(threads)  # a worker's own setting is also the process's default
