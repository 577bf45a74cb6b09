"""What is made of a batch: the decoder's pass, and what follows it on the device."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flashvec.kernels.backend import implementation
from flashvec.kernels.rms_norm import rms_norm
from flashvec.kernels.schedule import select_queries
from flashvec.runtime.batches import Batch
from flashvec.runtime.decoder import Decoder
from flashvec.runtime.pooling import DenseHead, States, finish, pool, pooled_tokens
from flashvec.runtime.spec import ModelSpec

Count = Literal["texts", "rows"]


@dataclass(frozen=True)
class Program:
    """A function of a batch whose launches depend on the batch's size alone.

    `run(decoder, batch)` gives tensors; `counts` says of each what its first dimension counts, the batch's texts or its
    rows (filling included). Two programs with the same `key` do the same: a recorded one is found by it.
    """

    key: Hashable
    run: Callable[[Decoder, Batch], tuple[Tensor, ...]]
    counts: tuple[Count, ...]


def embedding_program(
    spec: ModelSpec,
    heads: Sequence[DenseHead],
    *,
    vectors: bool = True,
    states: bool = False,
    normalize: bool | None = None,
    truncate_dim: int | None = None,
) -> Program:
    """Finished vectors, final token states, or both from one pass.

    Args:
        vectors: fp32 [B, d], pooled and finished.
        states: fp32 [T, D], after the final norm.
        normalize, truncate_dim: of the vectors, see `finish`.
    """
    causal = spec.attention == "causal"

    def run(decoder: Decoder, batch: Batch) -> tuple[Tensor, ...]:
        schedule, outputs = batch.schedule, []
        if not states:
            pooled = pool(spec, decoder, _pooled_states(spec, decoder, batch), batch.spans_B2)
            return (finish(spec, pooled, heads, normalize, truncate_dim),)
        hidden_TD = decoder.forward(batch.ids_T, schedule, batch.row_plan, causal)
        if vectors:
            pooled = pool(spec, decoder, States(hidden_TD, schedule), batch.spans_B2)
            outputs.append(finish(spec, pooled, heads, normalize, truncate_dim))
        if states:
            own_TD = hidden_TD[: schedule.num_tokens]
            outputs.append(rms_norm(own_TD, decoder.norm_D, decoder.spec.norm_eps, decoder.spec.norm_offset))
        return tuple(outputs)

    wanted: tuple[tuple[bool, Count], ...] = ((vectors, "texts"), (states, "rows"))
    counts = tuple(count for is_wanted, count in wanted if is_wanted)
    facts = (causal, spec.pooling, spec.span, spec.layout, spec.normalize, spec.truncate_dim)
    return Program((counts, facts, tuple(heads), normalize, truncate_dim), run, counts)


@torch.inference_mode()
def _pooled_states(spec: ModelSpec, decoder: Decoder, batch: Batch) -> States:
    """What pooling reads: on a GPU, of the tokens that are pooled alone, if some are not.

    A text all of whose tokens are pooled runs whole beside others; on Hopper by another kernel than in a batch where
    that holds for all, so that its last bits may differ. A recorded batch takes other texts later, and keeps every row.
    """
    schedule, queries = batch.schedule, None
    if batch.host_spans is not None and implementation(decoder.norm_D) == "triton":
        lengths = np.asarray(schedule.lengths, dtype=np.int64)
        spans = pooled_tokens(spec, lengths, batch.host_spans)
        count = int((spans[:, 1] - spans[:, 0]).sum())
        if count < lengths.sum():
            queries = select_queries(schedule, spans, sum(decoder.row_plan(count)))
    causal = spec.attention == "causal"
    stream = decoder.run(batch.ids_T, schedule, batch.row_plan, causal, queries=queries)
    return States(stream.hidden_TD, schedule, stream.delta_TD, stream.post_norm_D, queries)
