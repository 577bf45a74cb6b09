"""How much a frozen encoder's word vectors know: parts of speech, chunks or entities by a linear probe.

After LLM2Vec's word-level tasks: a word's vector is the mean of its tokens' states, a linear layer learns its tag, and
accuracy is the share of words that get theirs. Differences: the vectors are made once and standardised, no dropout, and
a tenth of the training sentences chooses when to stop.
"""

import copy
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from flashvec.runtime.encoder import Encoder
from flashvec.runtime.progress import Progress
from flashvec.runtime.texts import TruncationWarning
from flashvec.training.data import DataError
from flashvec.training.entities import entity_scores
from flashvec.training.probe import MAX_EPOCHS, fit_probe
from flashvec.training.word_files import TaggedSentence

logger = logging.getLogger("flashvec")

EmbedWords = Callable[[Sequence[Sequence[str]]], list[np.ndarray]]
CHUNK_SENTENCES = 512  # embedded together: the states of all their tokens are held
HELD_OUT = 0.1  # of the training sentences
MEASURES = ("accuracy", "precision", "recall", "f1")


def without_template(encoder: Encoder) -> Encoder:
    """The same encoder with nothing written around words: LLM2Vec's chat template is not part of its word tasks."""
    plain = copy.copy(encoder)
    plain.spec = replace(encoder.spec, template=None, text_suffix="")
    return plain


class WordSet:
    """Tagged sentences with vectors: `vectors` fp32 [n, D], `tags` n of them, `sentence` int64 [n].

    Words without a vector (cut off by the encoder's maximal length, or nothing lies where `shift` looks) are left out,
    as in the reference; `num_left_out` counts them.
    """

    def __init__(self, embed: EmbedWords, sentences: Sequence[TaggedSentence], progress: Progress) -> None:
        self.vectors = np.zeros((0, 0), np.float32)
        num_words = sum(len(sentence.words) for sentence in sentences)
        tags: list[str] = []
        numbers: list[np.ndarray] = []
        for start in range(0, len(sentences), CHUNK_SENTENCES):
            chunk = sentences[start : start + CHUNK_SENTENCES]
            with warnings.catch_warnings():  # what is cut is counted below, once for all chunks
                warnings.simplefilter("ignore", TruncationWarning)
                embedded = embed([sentence.words for sentence in chunk])
            for number, (sentence, vectors) in enumerate(zip(chunk, embedded, strict=True), start):
                if not self.vectors.size:
                    self.vectors = np.zeros((num_words, vectors.shape[1]), np.float32)
                there = np.flatnonzero(vectors.any(1))
                self.vectors[len(tags) : len(tags) + len(there)] = vectors[there]
                tags += [sentence.tags[word] for word in there]
                numbers.append(np.full(len(there), number))
            progress.advance(len(chunk), 0)
        self.tags = tags
        self.vectors = self.vectors[: len(tags)]
        self.sentence = np.concatenate(numbers)
        self.num_left_out = num_words - len(tags)

    def by_sentence(self, tags: Sequence[str]) -> list[list[str]]:
        """Tags of all words, cut into sentences."""
        stops = np.flatnonzero(np.diff(self.sentence)) + 1
        return [list(part) for part in np.split(np.array(tags, dtype=object), stops)]


def probe_words(
    embed: EmbedWords,
    train: Sequence[TaggedSentence],
    dev: Sequence[TaggedSentence],
    *,
    has_entities: bool,
    seeds: int = 3,
    show_progress: bool | None = None,
) -> dict[str, Any]:
    """Train probes on one set of sentences and measure them on another.

    Args:
        embed: lists of words to one array [words, D] each; a zero row for a word without a vector.
        train: what the probes see; a tenth of it, another for each seed, chooses the epoch.
        dev: what they are measured on, and nothing else.
        has_entities: tags are BIO, entities are scored too.
        seeds: number of probes.
        show_progress: bars on stderr; default on a terminal when it takes a while.

    Returns:
        `accuracy` and, with entities, `precision`, `recall`, `f1`: means over the seeds, times 100, with `accuracy_std`
        and so on where there are several; `commonest`, the accuracy of the commonest training tag alone; `words`,
        `entities`, `left_out`, and `runs`, the measures of each seed.

    Raises:
        DataError: fewer than two training sentences or tags, or no word with a vector.
    """
    with Progress(len(train) + len(dev), show_progress) as progress:
        own, other = WordSet(embed, train, progress), WordSet(embed, dev, progress)
    names, numbers = np.unique(np.array(own.tags, dtype=str), return_inverse=True)
    sentences = np.unique(own.sentence)
    if len(names) < 2 or len(sentences) < 2:
        raise DataError(
            f"the training words have {len(names)} different tags in {len(sentences)} sentences; a probe needs two"
        )
    if not other.tags:
        raise DataError("no word that is to be tagged has a vector")
    _say_what_is_missing(own, other, set(names.tolist()))
    runs = []
    with Progress(seeds * MAX_EPOCHS * len(own.tags), show_progress, "probing", "words") as progress:
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            chosen = rng.choice(sentences, max(1, int(len(sentences) * HELD_OUT)), replace=False)
            probe = fit_probe(
                torch.from_numpy(own.vectors),
                torch.from_numpy(numbers),
                len(names),
                torch.from_numpy(np.isin(own.sentence, chosen)),
                seed=seed,
                on_epochs=lambda num: progress.advance(num * len(own.tags), 0),
            )
            predicted = names[probe.predict(torch.from_numpy(other.vectors)).numpy()].tolist()
            runs.append({"seed": seed, "epochs": probe.num_epochs, **_scores(other, predicted, has_entities)})
    commonest = Counter(own.tags).most_common(1)[0][0]
    found = _means(runs)
    found["commonest"] = round(100 * other.tags.count(commonest) / len(other.tags), 4)
    counts: dict[str, float] = {"words": len(other.tags), "left_out": own.num_left_out + other.num_left_out}
    if has_entities:
        counts["entities"] = entity_scores(other.by_sentence(other.tags), other.by_sentence(other.tags))["entities"]
    return {**found, **counts, "train_words": len(own.tags), "runs": runs}


def _scores(words: WordSet, predicted: list[str], has_entities: bool) -> dict[str, float]:
    right = sum(a == b for a, b in zip(words.tags, predicted, strict=True))
    scores = {"accuracy": 100 * right / len(predicted)}
    if has_entities:
        scores |= entity_scores(words.by_sentence(words.tags), words.by_sentence(predicted))
        del scores["entities"]
    return {name: round(value, 4) for name, value in scores.items()}


def _means(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean of each measure over the seeds and, where there are several, their standard deviation (n - 1)."""
    found = {}
    for name in MEASURES:
        if name in runs[0]:
            values = [run[name] for run in runs]
            found[name] = round(float(np.mean(values)), 4)
            if len(runs) > 1:
                found[f"{name}_std"] = round(float(np.std(values, ddof=1)), 4)
    return found


def _say_what_is_missing(own: WordSet, other: WordSet, known: set[str]) -> None:
    unseen = Counter(tag for tag in other.tags if tag not in known)
    if unseen:
        names = ", ".join(sorted(unseen)[:5]) + (", ..." if len(unseen) > 5 else "")
        logger.warning("%d words have a tag that training has not (%s): counted as wrong", unseen.total(), names)
    if own.num_left_out or other.num_left_out:
        logger.warning(
            "%d training words and %d others have no vector (cut off, or nothing where their state is read) "
            "and are left out",
            own.num_left_out,
            other.num_left_out,
        )
