"""Texts to vectors with a graph: one packed stream for whatever columns a batch has.

Every sequence carries an identity, its number in the step's whole batch: dropout's masks are keyed by it, so that
neither the micro-batch nor the process that a sequence falls into changes what is dropped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flashvec.kernels.dropout import Dropout
from flashvec.kernels.schedule import Schedule, build_schedule
from flashvec.runtime import prepare
from flashvec.runtime.batches import TokenRows
from flashvec.runtime.decoder import Decoder, Stream, Training
from flashvec.runtime.packing import pack
from flashvec.runtime.pooling import States, pool
from flashvec.training.config import LoopConfig
from flashvec.training.data import DataError
from flashvec.training.distributed import World
from flashvec.training.model import Model

MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 16_384}


@dataclass(frozen=True)
class Rates:
    """Dropout of one run: rates, and the seed of its masks."""

    attention: float
    lora: float
    seed: int

    def training(self, base: Training, step: int, recompute: bool = False) -> Training:
        """`base` with this step's masks."""
        attention = Dropout(self.attention, self.seed, step) if self.attention else None
        lora = Dropout(self.lora, self.seed ^ 0x5EED, step) if self.lora else None
        return replace(base, attention_dropout=attention, lora_dropout=lora, recompute=recompute)


def token_rows(
    model: Model, texts: Sequence[str], instructions: Sequence[str] | None = None, places: Sequence[str] = ()
) -> TokenRows:
    """Tokens of texts, and which of them are pooled: exactly as `Encoder.embed` would read them.

    Args and errors as of `text_rows`.
    """
    return _rows(model, texts, instructions, places, instructions is not None)[0]


def text_rows(
    model: Model, texts: Sequence[str], instructions: Sequence[str] | None = None, places: Sequence[str] = ()
) -> tuple[TokenRows, np.ndarray]:
    """`token_rows`, and the tokens of the texts themselves, without what stands around them: int64 [n, 2].

    Args:
        places: file and line of each text, for errors; default its row.

    Raises:
        DataError: a text of which `max_length` leaves nothing.
    """
    return _rows(model, texts, instructions, places, True)


def _rows(
    model: Model, texts: Sequence[str], instructions: Sequence[str] | None, places: Sequence[str], offsets: bool
) -> tuple[TokenRows, np.ndarray]:
    spec, tokenizer = model.spec, model.tokenizer
    prepared = prepare.prepare(spec, texts, instructions, tokenizer)
    offsets = offsets or spec.span == "template"
    tokens = prepare.tokenise(tokenizer, prepared, spec.max_length, offsets=offsets)
    spans = prepare.pooled_spans(spec, tokens, prepared, instructions, tokenizer)
    own = spans
    if offsets and spec.compat is None:  # compat writes instruction and template into the text
        own = prepare.text_token_spans(tokens, [len(b) for b in prepared.before], [len(t) for t in prepared.texts])
        for row in np.flatnonzero(tokens.truncated & (own[:, 1] <= own[:, 0])):
            place = (places[int(row)] if places else "") or f"row {row}"
            raise DataError(f"{place}: max_length={spec.max_length} leaves nothing of the text after its prompt")
    return TokenRows(tokens.ids, tokens.lengths, spans), own


def check_instructions(model: Model, places: Mapping[str, str]) -> None:
    """Instructions, and what else stands around a text, must leave room for it.

    Args:
        places: where each instruction comes from, for errors.

    Raises:
        DataError: names the place.
    """
    strings = prepare.prepare(model.spec, [""] * len(places), list(places), model.tokenizer).strings
    limit = model.spec.max_length
    for where, size in zip(places.values(), model.tokenizer.count(strings, special=True).tolist(), strict=True):
        if size >= limit:
            raise DataError(f"{where}: what stands around a text has {size} tokens, max_length is {limit}")


def micro_batches(lengths: np.ndarray, budget: int | None, device: torch.device) -> list[np.ndarray]:
    """Rows that run together: packs of similar length under a token budget."""
    return list(pack(lengths, budget or MICRO_BATCH_TOKENS.get(device.type, 2048)))


def own_packs(world: World, lengths: np.ndarray, loop: LoopConfig, device: torch.device) -> list[np.ndarray]:
    """This process's rows of a batch, in micro-batches; where the base is sharded, as many as all others have."""
    share = world.share(lengths)
    packs = [share[own] for own in micro_batches(lengths[share], loop.micro_batch_tokens, device)]
    return world.evened(packs) if loop.shard_base else packs


def row_plan(decoder: Decoder, num_tokens: int) -> Sequence[int]:
    """Rows of each piece that so many tokens run in: on a GPU they are filled up to a bucket.

    On a CPU to a multiple of 8: of other counts some take the library a fifth longer, in bf16 some a third.
    """
    return (-(-num_tokens // 8) * 8,) if decoder.device.type == "cpu" else decoder.row_plan(num_tokens)


def run_rows(
    model: Model,
    rows: TokenRows,
    identities: Sequence[int] | np.ndarray,
    training: Training,
    depths: Sequence[int] = (),
) -> tuple[list[Stream], Schedule]:
    """The decoder's pass over packed rows, differentiable where gradients are enabled.

    Returns:
        The stream after each of `depths` layers (default all of them), and the batch's geometry.
    """
    decoder = model.decoder
    num_tokens = len(rows.ids)
    plan = row_plan(decoder, num_tokens)
    own = [int(identity) for identity in identities]
    schedule = build_schedule(rows.lengths.tolist(), sum(plan), decoder.device, identities=own)
    ids_T = torch.from_numpy(rows.ids).to(decoder.device)
    wanted = depths or (len(decoder.layers),)
    return decoder.streams(ids_T, schedule, plan, False, wanted, training=training), schedule


def encode(
    model: Model,
    rows: TokenRows,
    identities: Sequence[int] | np.ndarray,
    training: Training,
    depths: Sequence[int] = (),
) -> Tensor:
    """Pooled vectors, fp32 [n, D], not normalised: the loss does that.

    With `depths` the vectors after each of these numbers of layers, side by side, as models cut there would give them.
    """
    streams, schedule = run_rows(model, rows, identities, training, depths)
    spans_B2 = torch.from_numpy(rows.spans).to(model.decoder.device)
    vectors = [
        pool(model.spec, model.decoder, States(s.hidden_TD, schedule, s.delta_TD, s.post_norm_D), spans_B2)
        for s in streams
    ]
    return torch.cat(vectors, 1)
