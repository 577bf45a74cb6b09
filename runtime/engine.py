"""Runs tokenised texts through the decoder, pack by pack."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flashvec.kernels.schedule import Schedule, build_schedule
from flashvec.runtime.decoder import Decoder
from flashvec.runtime.packing import pack

TOKEN_BUDGET_CPU = 2048  # where bf16 and fp32 products reach their best rate; more only costs memory
TOKEN_BUDGET_CUDA = 16_384


@dataclass(frozen=True)
class Pack:
    """Texts that ran together: which they were and what came out."""

    indices: np.ndarray  # int64 [B] positions of these texts in the call's list
    hidden_TD: Tensor  # fp32 residual stream, before the final norm
    schedule: Schedule


def default_budget(device: torch.device) -> int:
    """Tokens per pack where the caller sets none."""
    return TOKEN_BUDGET_CUDA if device.type == "cuda" else TOKEN_BUDGET_CPU


def run(decoder: Decoder, ids: np.ndarray, lengths: np.ndarray, budget: int, causal: bool) -> Iterator[Pack]:
    """Run texts in packs of similar length.

    Args:
        ids: int32 [sum(lengths)] token ids, text after text.
        lengths: int32 [n] tokens of each text, at least 1.
        budget: tokens per pack.
        causal: hide later tokens.

    Yields:
        One `Pack` after the other; together they hold every text once. A text's rows have the same bits whatever
        the budget and its neighbours (CPU).
    """
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    for indices in pack(lengths, budget):
        packed = np.concatenate([ids[starts[i] : starts[i + 1]] for i in indices])
        plan = decoder.row_plan(len(packed))
        schedule = build_schedule(lengths[indices].tolist(), sum(plan), decoder.device)
        ids_T = torch.from_numpy(packed).to(decoder.device)
        yield Pack(indices, decoder.forward(ids_T, schedule, plan, causal), schedule)
