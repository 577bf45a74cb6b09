"""Masked next token prediction: LLM2Vec's first step.

    loss = -mean over masked positions i of log softmax(W h[i - 1])[token i]

A decoder predicts the next token, so the prediction of a masked token is read one position before it; the first token
of a text has no such position and is never masked. Texts lie packed, each attending to itself alone; longer ones are
cut into blocks. Only the rows that are read pass the final norm and the head, and their logits exist as tiles
(`kernels/cross_entropy.py`). The head is frozen unless asked for. With `depths` tokens are predicted after each of
these numbers of layers, by the same norm and head, as models cut there would do.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flashvec.kernels.cross_entropy import cross_entropy
from flashvec.kernels.rms_norm import rms_norm
from flashvec.runtime.batches import TokenRows
from flashvec.runtime.decoder import Stream
from flashvec.runtime.tokenize import Tokenizer
from flashvec.training.config import MntpConfig
from flashvec.training.data import DataError, read_texts, rows_of_step
from flashvec.training.distributed import World
from flashvec.training.encode import Rates, own_packs, run_rows
from flashvec.training.model import Model
from flashvec.training.settings import ConfigError

UNCUT = 1 << 30  # tokens of a text before it is cut into blocks
COMPAT_TEXTS = 1000  # the reference joins the tokens of so many texts and drops what fills no block
MASK_SHARE, RANDOM_SHARE = 0.8, 0.1  # BERT's: of the chosen tokens; the rest stays as it is


class Blocks(NamedTuple):
    """Tokens of all texts end to end, int32, and the blocks they are cut into: int64 [n, 2], start and stop."""

    ids: np.ndarray
    spans: np.ndarray
    texts: np.ndarray  # int64 [n, 2]: first and stop of the texts that a block is of


class Masked(NamedTuple):
    """A batch after masking: `targets[i]` is the token that stood at `positions[i]`, counted over all ids."""

    rows: TokenRows
    positions: np.ndarray
    targets: np.ndarray


def cut_blocks(tokenizer: Tokenizer, texts: list[str], max_length: int, joined: bool) -> Blocks:
    """Texts as blocks of at most `max_length` tokens, of at least two.

    Args:
        joined: the reference's way: texts end to end, cut across their boundaries, every block full.

    Raises:
        DataError: no text gives a block.
    """
    tokens = tokenizer.encode(texts, UNCUT)
    stops = np.cumsum(tokens.lengths, dtype=np.int64)
    if joined:
        last = np.append(stops[COMPAT_TEXTS - 1 :: COMPAT_TEXTS], stops[-1:])
        runs = np.stack([np.append(0, last[:-1]), last], 1)
    else:
        runs = np.stack([stops - tokens.lengths, stops], 1)
    spans = [(start, min(start + max_length, stop)) for first, stop in runs for start in range(first, stop, max_length)]
    least = max_length if joined else 2
    kept = np.array([span for span in spans if span[1] - span[0] >= least], np.int64).reshape(-1, 2)
    if not len(kept):
        raise DataError(f"texts: no block of {least} tokens or more in {len(texts)} texts: give longer ones")
    first, last = (np.searchsorted(stops, place, side="right") for place in (kept[:, 0], kept[:, 1] - 1))
    return Blocks(tokens.ids, kept, np.stack([first, last + 1], 1))


def maskable(blocks: Blocks, special_ids: tuple[int, ...]) -> Blocks:
    """Those with a token that can be hidden: not the first, which nothing before it predicts, and not a special one.

    Raises:
        DataError: there is none.
    """
    counted = np.append(0, np.cumsum(~np.isin(blocks.ids, special_ids)))
    kept = counted[blocks.spans[:, 1]] > counted[blocks.spans[:, 0] + 1]
    if not kept.any():
        raise DataError("texts: hold nothing but special tokens and first ones, which are not to be predicted")
    return blocks._replace(spans=blocks.spans[kept], texts=blocks.texts[kept])


def mask_blocks(
    blocks: Blocks,
    rows: np.ndarray,
    rng: np.random.Generator,
    *,
    probability: float,
    mask_id: int,
    vocab_size: int,
    special_ids: tuple[int, ...],
    all_mask: bool,
) -> Masked:
    """Choose tokens of some blocks and hide them; at least one of a batch is chosen."""
    spans = blocks.spans[rows]
    lengths = (spans[:, 1] - spans[:, 0]).astype(np.int32)
    ids = np.concatenate([blocks.ids[start:stop] for start, stop in spans])
    is_first = np.zeros(len(ids), bool)
    is_first[np.cumsum(lengths) - lengths] = True
    eligible = ~is_first & ~np.isin(ids, special_ids)
    draws = rng.random(len(ids))
    chosen = eligible & (draws < probability)
    if not chosen.any():
        if not eligible.any():
            raise DataError("texts: a batch holds nothing but special tokens")
        chosen[np.flatnonzero(eligible)[np.argmin(draws[eligible])]] = True
    positions = np.flatnonzero(chosen)
    targets = ids[positions].astype(np.int64)
    kinds = rng.random(len(positions))
    other = rng.integers(0, vocab_size, len(positions))
    hidden = np.where(kinds < MASK_SHARE, mask_id, np.where(kinds < MASK_SHARE + RANDOM_SHARE, other, targets))
    ids[positions] = mask_id if all_mask else hidden
    whole = np.stack([np.zeros_like(lengths), lengths], 1).astype(np.int64)
    return Masked(TokenRows(ids, lengths, whole), positions, targets)


class Mntp:
    """The objective: `step` leaves gradients of one step in the model's parameters."""

    def __init__(self, model: Model, config: MntpConfig, world: World) -> None:
        self.model, self.config, self.world = model, config, world
        assert model.head_VD is not None
        model.end_at(config.depths)
        self.texts = read_texts(config.texts)
        self.blocks = cut_blocks(model.tokenizer, self.texts, config.max_length, config.llm2vec_compat)
        self.mask_id = mask_token_id(model.tokenizer, config.mask_token)
        tokenizer = model.tokenizer
        named = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        self.special_ids = (
            *tokenizer.prefix_ids,
            *tokenizer.suffix_ids,
            *(i for i in named if i is not None),
        )
        self.blocks = maskable(self.blocks, self.special_ids)
        self.rates = Rates(0.0, config.lora.dropout if config.train == "lora" else 0.0, config.loop.seed)
        self.head_VD = model.head_VD
        if config.train_head:
            self.head_VD = model.head_VD.detach().float().clone().requires_grad_()

    def parameters(self) -> dict[str, Tensor]:
        """Beside the model's own: the head, where it is trained. It is no part of what is saved as the encoder."""
        return {"head": self.head_VD} if self.config.train_head else {}

    def batch(self, step: int) -> Masked:
        """What a step sees: a function of seed and step alone."""
        config = self.config
        rows = rows_of_step(len(self.blocks.spans), config.batch_size, config.loop.seed, step)
        return mask_blocks(
            self.blocks,
            rows,
            np.random.default_rng([config.loop.seed, step, 2]),
            probability=config.mask_probability,
            mask_id=self.mask_id,
            vocab_size=self.model.decoder.spec.vocab_size,
            special_ids=self.special_ids,
            all_mask=config.masking == "all",
        )

    def step(self, step: int) -> dict[str, float]:
        """Gradients of one step, of this process's share; and the loss of all."""
        masked, config, device = self.batch(step), self.config, self.model.decoder.device
        loop, rows = config.loop, masked.rows
        training = self.rates.training(self.model.trainable.training(), step, loop.recompute)
        total = torch.zeros((), device=device)
        for own in own_packs(self.world, rows.lengths, loop, device):
            read, targets = _rows_read(masked, own)
            if not len(read) and not loop.shard_base:  # there every pass helps the other processes to theirs
                continue
            streams, _ = run_rows(self.model, rows.take(own), own, training, config.depths)
            read_R, targets_R = torch.from_numpy(read).to(device), torch.from_numpy(targets).to(device)
            loss = torch.stack([self._loss(stream, read_R, targets_R) for stream in streams]).mean()
            loss = loss / len(masked.positions)
            loss.backward()
            total += loss.detach()
        return {"loss": float(self.world.sum(total)), "tokens": int(rows.lengths.sum())}

    def _loss(self, stream: Stream, read_R: Tensor, targets_R: Tensor) -> Tensor:
        """Summed over the rows that are read."""
        decoder = self.model.decoder
        eps, offset = decoder.spec.norm_eps, decoder.spec.norm_offset
        delta_RD = stream.delta_TD[read_R]
        if stream.post_norm_D is not None:
            delta_RD = rms_norm(delta_RD, stream.post_norm_D, eps, offset)
        h_RD = rms_norm(stream.hidden_TD[read_R] + delta_RD, decoder.norm_D, eps, offset, decoder.dtype)
        every = torch.arange(len(read_R), device=read_R.device)
        head_VD = self.head_VD.to(decoder.dtype)
        return cross_entropy(h_RD, head_VD, every, targets_R, softcap=self.model.head_softcap, reduction="sum")

    def seen(self, step: int) -> Iterator[str]:
        """Texts of a step."""
        config = self.config
        rows = rows_of_step(len(self.blocks.spans), config.batch_size, config.loop.seed, step)
        return (text for first, stop in self.blocks.texts[rows] for text in self.texts[first:stop])


def _rows_read(masked: Masked, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of some of the batch's sequences laid end to end: the rows before masked tokens, and those tokens."""
    starts = masked.rows.starts
    read, targets, place = [], [], 0
    for sequence in own:
        start, stop = starts[sequence], starts[sequence + 1]
        first, last = np.searchsorted(masked.positions, [start, stop])
        read.append(masked.positions[first:last] - start - 1 + place)
        targets.append(masked.targets[first:last])
        place += stop - start
    return np.concatenate(read), np.concatenate(targets)


def mask_token_id(tokenizer: Tokenizer, token: str) -> int:
    """The one id of the mask token's text.

    Raises:
        ConfigError: it is no single token.
    """
    found = tokenizer.backend.token_to_id(token)
    if found is None:
        ids = tokenizer.backend.encode(token, add_special_tokens=False).ids
        if len(ids) != 1:
            raise ConfigError(f"mask_token {token!r} is {len(ids)} tokens for this tokenizer; choose one that is one")
        found = ids[0]
    return int(found)
