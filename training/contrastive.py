"""Contrastive learning: two views of a text, or texts that belong together, against all others of the batch.

All columns of a batch (queries, positives, hard negatives, or both views) are one list of sequences, encoded in one
packed stream. Two views of a text differ by what is dropped (attention probabilities and the updates' inputs, as in
SimCSE), because their identities differ; or by which part of the text they see.
"""

import logging
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flashvec.kernels.info_nce import info_nce
from flashvec.runtime.batches import TokenRows
from flashvec.training.config import ContrastiveConfig
from flashvec.training.data import (
    DataError,
    Pair,
    SourceBatches,
    read_pairs,
    read_texts,
    run_starts,
    text_files,
    text_hash,
)
from flashvec.training.distributed import World
from flashvec.training.encode import Rates, check_instructions, encode, own_packs, text_rows, token_rows
from flashvec.training.model import Model
from flashvec.training.overlap import WordOverlap, overlap_loss
from flashvec.training.reference_config import E5_INSTRUCTIONS
from flashvec.training.settings import ConfigError
from flashvec.training.step import Retention, backward_through

logger = logging.getLogger("flashvec")

LEAST_CROP = 0.5  # share of a text that a crop keeps at least


class Columns(NamedTuple):
    """A batch: all its sequences, the first `num_queries` of them queries, the next as many their positives."""

    rows: TokenRows
    num_queries: int
    ids: np.ndarray  # int64: names of the texts, to leave copies of a positive out
    scores: np.ndarray | None  # float64 [num_queries], of graded pairs
    overlap: np.ndarray | None  # fp32 [all, all], of the words that texts share, where these teach


class Contrastive:
    """The objective: `step` leaves gradients of one step in the model's parameters."""

    def __init__(self, model: Model, config: ContrastiveConfig, world: World) -> None:
        self.model, self.config, self.world = model, config, world
        if bool(config.texts) == bool(config.pairs):
            raise ConfigError("give either texts (each its own positive) or pairs")
        model.end_at(config.depths)
        self.pairs = _as_pairs(config)
        if (config.loss == "cosent") != (self.pairs[0].score is not None):
            raise ConfigError(f"loss is {config.loss}: scores belong to cosent, pairs without them to info_nce")
        if config.texts and config.view == "dropout" and not config.attention_dropout and not self._lora_dropout:
            raise ConfigError("view is dropout, but nothing is dropped: set attention_dropout or lora.dropout")
        self._check_batches()
        own = {pair.instruction: pair.where for pair in reversed(self.pairs) if pair.instruction is not None}
        check_instructions(model, {config.instruction or "": "instruction", **own})
        if config.prefixes and config.prefixes[-1] > model.decoder.spec.hidden_size:
            raise ConfigError(f"prefixes end at {config.prefixes[-1]}, vectors have {model.decoder.spec.hidden_size}")
        names = [frozenset(text_hash(t) for t in {p.query, p.positive}) for p in self.pairs]
        sources = np.array([p.source for p in self.pairs])
        files = ["texts"] if config.texts else list(map(str, text_files(config.pairs)))
        groups = None
        if config.neighbours > 1:
            groups = np.split(np.arange(len(sources)), run_starts(sources, config.neighbours)[1:])
        self.batches = SourceBatches(sources, names, config.batch_size, config.loop.seed, files=files, groups=groups)
        self.word_overlap = WordOverlap(pair.positive for pair in self.pairs) if config.words else None
        self.rates = Rates(config.attention_dropout, self._lora_dropout, config.loop.seed)
        agree = world.least if config.loop.shard_base else int
        self.retention = Retention(config.loop.activation_gib, agree)
        self.was_checked = False  # that every column is given a gradient

    def _check_batches(self) -> None:
        """Some batch must have something to teach."""
        if self.config.batch_size == 1 and (self.config.loss == "cosent" or not all(p.negatives for p in self.pairs)):
            raise ConfigError("batch_size is 1: a text is told from the others of its batch, take 2 or more")
        grades = {(pair.source, pair.score) for pair in self.pairs}  # a batch holds pairs of one file
        if self.config.loss == "cosent" and len(grades) == len({source for source, _ in grades}):
            raise DataError("pairs: all scores of a file are alike: there is nothing to rank")

    @property
    def _lora_dropout(self) -> float:
        return self.config.lora.dropout if self.config.train == "lora" else 0.0

    def parameters(self) -> dict[str, Tensor]:
        """None beside the model's own."""
        return {}

    def batch(self, step: int) -> Columns:
        """What a step sees: a function of seed and step alone."""
        pairs = [self.pairs[row] for row in self.batches.rows(step)]
        queries = [p.query for p in pairs]
        documents = [p.positive for p in pairs] + [text for p in pairs for text in p.negatives]
        texts = queries + documents
        own = [self._instruction(pair) for pair in pairs]
        # As they will be embedded: queries with their instruction, documents without any; of views and of scored pairs
        # neither is a query, and both have it.
        asked = own if any(own) else None
        is_symmetric = bool(self.config.texts) or pairs[0].score is not None
        places = [p.where for p in pairs]
        columns = [
            (queries, asked, places),
            (documents, asked if is_symmetric else None, places + [p.where for p in pairs for _ in p.negatives]),
        ]
        if self.config.view == "crop":
            rng = np.random.default_rng([self.config.loop.seed, step, 3])
            rows = joined(*(crop(*text_rows(self.model, *column), rng) for column in columns))
        else:
            rows = joined(*(token_rows(self.model, *column) for column in columns))
        ids = np.array([text_hash(text) for text in texts], np.int64)
        scores = None if pairs[0].score is None else np.array([p.score for p in pairs], np.float64)
        overlap = None if self.word_overlap is None else self.word_overlap(texts)
        return Columns(rows, len(queries), ids, scores, overlap)

    def _instruction(self, pair: Pair) -> str:
        return pair.instruction if pair.instruction is not None else self.config.instruction or ""

    def step(self, step: int) -> dict[str, float]:
        """Gradients of one step, of this process's share; and the loss of all."""
        config, columns, device = self.config, self.batch(step), self.model.decoder.device
        rows = columns.rows
        training = self.rates.training(self.model.trainable.training(), step, config.loop.recompute)

        def vectors_of(own: np.ndarray) -> Tensor:
            return encode(self.model, rows.take(own), own, training, config.depths)

        packs = own_packs(self.world, rows.lengths, config.loop, device)
        loss, gradient = backward_through(
            vectors_of,
            packs,
            len(rows.lengths),
            lambda vectors: self.loss(vectors, columns),
            num_kept=self.retention.num_kept(self.model, vectors_of, packs, rows.lengths),
            exchange=self.world.sum,
        )
        can_teach = columns.scores is None or len(set(columns.scores)) > 1  # pairs of one score are not ranked
        if can_teach and not self.was_checked:
            self.was_checked = True
            _check_columns(gradient, columns)
        return {"loss": float(loss), "tokens": int(rows.lengths.sum())}

    def loss(self, vectors: Tensor, columns: Columns) -> Tensor:
        """The loss of a whole batch's vectors [n, D], those of several depths side by side: the mean of theirs."""
        parts = vectors.chunk(max(1, len(self.config.depths)), 1)
        return torch.stack([self._at(part.contiguous(), columns) for part in parts]).mean()

    def _at(self, vectors: Tensor, columns: Columns) -> Tensor:
        n, config = columns.num_queries, self.config
        if columns.scores is not None:
            return cosent(vectors[:n], vectors[n : 2 * n], columns.scores, config.temperature)
        loss = info_nce(
            vectors[:n],
            vectors[n:],
            torch.arange(n, device=vectors.device),
            config.temperature,
            document_ids_M=torch.from_numpy(columns.ids[n:]).to(vectors.device),
            margin=config.margin,
            prefixes=config.prefixes or None,
        ).mean()
        if columns.overlap is None:
            return loss
        overlap, sizes = torch.from_numpy(columns.overlap), config.prefixes or (vectors.shape[1],)
        shared = [overlap_loss(vectors[:, :size], overlap, config.temperature) for size in sizes]
        return (1 - config.words) * loss + config.words * torch.stack(shared).mean()

    def seen(self, step: int) -> Iterator[str]:
        """Texts of a step; of the first one also all positives, where the rarity of their words was counted."""
        if step == 0 and self.word_overlap is not None:
            yield from (pair.positive for pair in self.pairs)
        for row in self.batches.rows(step):
            pair = self.pairs[row]
            yield from (pair.query, pair.positive, *pair.negatives)


def cosent(left_BD: Tensor, right_BD: Tensor, scores_B: np.ndarray, temperature: float) -> Tensor:
    """Graded pairs: log(1 + sum over pairs i, j with score i > score j of exp((cos j - cos i) / temperature)).

    Source: CoSENT (Su 2022).
    """
    cosines = F.cosine_similarity(left_BD.float(), right_BD.float()) / temperature
    scores = torch.from_numpy(scores_B).to(cosines.device)
    differences = cosines[None, :] - cosines[:, None]
    wanted = differences[scores[:, None] > scores[None, :]]
    return torch.cat([wanted, wanted.new_zeros(1)]).logsumexp(0)


def joined(first: TokenRows, second: TokenRows) -> TokenRows:
    """The texts of both, in order."""
    both = zip(
        (first.ids, first.lengths, first.spans),
        (second.ids, second.lengths, second.spans),
        strict=True,
    )
    return TokenRows(*(np.concatenate(fields) for fields in both))


def crop(rows: TokenRows, texts: np.ndarray, rng: np.random.Generator) -> TokenRows:
    """A run of each text's tokens, of random length and place; what stands around them stays.

    Args:
        texts: int64 [n, 2], the texts' own tokens: instruction, template and special tokens are none of them.
    """
    ids, lengths, spans = [], [], []
    for row in range(len(rows.lengths)):
        tokens = rows.ids[rows.starts[row] : rows.starts[row + 1]]
        first, stop = (int(x) for x in texts[row])
        size = stop - first
        length = min(size, max(1, round(size * rng.uniform(LEAST_CROP, 1.0))))
        start = first + int(rng.integers(0, size - length + 1))
        ids.append(np.concatenate([tokens[:first], tokens[start : start + length], tokens[stop:]]))
        lengths.append(len(ids[-1]))
        begins, ends = (int(x) for x in rows.spans[row])
        spans.append((min(begins, first) if size else begins, ends - (size - length)))
    return TokenRows(np.concatenate(ids), np.array(lengths, np.int32), np.array(spans, np.int64))


def _as_pairs(config: ContrastiveConfig) -> list[Pair]:
    if config.pairs:
        if config.e5_instructions:
            _check_known(config)
        return read_pairs(config.pairs, E5_INSTRUCTIONS if config.e5_instructions else None)
    return [Pair(text, text) for text in read_texts(config.texts)]  # one source: files may be a folder's small parts


def _check_known(config: ContrastiveConfig) -> None:
    """Files under other names would be left without an instruction."""
    files = text_files(config.pairs)
    unknown = [path.name for path in files if path.stem not in E5_INSTRUCTIONS]
    known = f"known by their names are {', '.join(E5_INSTRUCTIONS)}"
    if len(unknown) == len(files):
        raise ConfigError(f"e5_instructions has none for {', '.join(unknown)}: {known}")
    if unknown:
        logger.warning("e5_instructions has none for %s: %s", ", ".join(unknown), known)


def _check_columns(gradient: Tensor, columns: Columns) -> None:
    """Every column must have been given a gradient; a column that has none trains nothing, in silence."""
    n = columns.num_queries
    parts = {"queries": gradient[:n], "positives": gradient[n : 2 * n], "negatives": gradient[2 * n :]}
    for name, part in parts.items():
        if len(part) and not bool(part.any()):
            why = "are all its texts alike?"
            if columns.overlap is not None:
                why += " With words: 1 texts that share no rare word teach nothing either"
            raise DataError(f"{name} got no gradient in a whole batch: {why}")
