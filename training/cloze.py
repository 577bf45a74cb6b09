"""Pairs to train search on, from running text alone: a sentence asks, the rest of its paragraph answers.

The inverse cloze task (Lee et al. 2019): a sentence, or several that follow each other, is taken out of its paragraph,
and the paragraph is to be found by it; in one of ten it is left in, so that shared words count as well (of a long
paragraph it may lie behind the cut). For long questions a whole paragraph asks for the one that it stands beside.
Another paragraph of the same document is given as what does not match: it is of the same topic, which makes it hard.
Contrastive training's `neighbours` brings pairs of one document together instead, which costs no text more. A document
is a `<doc ...>` block of Wikipedia extractors, a line of a .jsonl file, or else a whole file. Only text is used, no
title, no link, no label.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from flashvec.training.data import Pair, read_texts, text_files, text_hash
from flashvec.training.sentences import sentences_of

MAX_QUERY_WORDS = 35
MIN_ANSWERS = 2  # sentences
MIN_SENTENCES = 1 + MIN_ANSWERS  # of a paragraph: one asks
KEPT = 0.1  # share of paragraphs that keep the sentence which asks
MIN_ASKING_WORDS = 20  # of a paragraph that asks: it is cut at a place that is drawn


class Paragraph(NamedTuple):
    """Its whole sentences, and the number of its document."""

    sentences: list[str]
    document: int


def cloze_pairs(
    paths: Sequence[str],
    *,
    limit: int | None = None,
    max_words: int = 80,
    max_asking: int = 1,
    with_negatives: bool = True,
    seed: int = 0,
) -> list[Pair]:
    """A pair for each paragraph of at least `MIN_SENTENCES` sentences, in the order of the source; each query once.

    Args:
        paths: .txt files of one paragraph a line; .jsonl files of one document a line, of one paragraph in each of its.
        limit: pairs at most: paragraphs are then drawn at random.
        max_words: of a passage; what follows is cut off.
        max_asking: sentences that ask together, one to so many; two are left to answer.
        with_negatives: without them the pairs are the same: where neighbours meet in a batch, each is the others'.
        seed: of what is drawn.

    Returns:
        Each with one negative, if wanted, but for those whose document has no other paragraph.

    Raises:
        DataError: a file is missing, of another kind, or damaged.
    """
    _check(max_words=max_words, max_asking=max_asking, limit=limit)
    source = _Source(paths)

    def pair(index: int, rng: np.random.Generator) -> Pair:
        sentences = source.paragraphs[index].sentences
        most = min(max_asking, len(sentences) - MIN_ANSWERS)
        count = 1 if most == 1 else int(rng.integers(1, most + 1))
        asks = int(rng.integers(len(sentences) - count + 1))
        query = " ".join(sentences[asks : asks + count])
        answers = sentences if rng.random() < KEPT else [*sentences[:asks], *sentences[asks + count :]]
        return Pair(query, _cut(answers, max_words), source.another(index, index, max_words, rng))

    return _drawn(range(len(source.paragraphs)), pair, limit, with_negatives, seed)


def paragraph_pairs(
    paths: Sequence[str], *, limit: int | None = None, max_words: int = 80, with_negatives: bool = True, seed: int = 0
) -> list[Pair]:
    """Pairs of two paragraphs of one document, one after the other, in the order of the source; none is in two.

    One of the two asks, its first `MIN_ASKING_WORDS` to `max_words` words. Arguments, result and errors are those of
    `cloze_pairs`.
    """
    _check(max_words=max_words, limit=limit)
    source = _Source(paths)
    firsts = [i for start, stop in source.documents() for i in range(start, stop - 1, 2)]

    def pair(index: int, rng: np.random.Generator) -> Pair:
        asks, answers = (index, index + 1) if rng.random() < 0.5 else (index + 1, index)
        asking = int(rng.integers(min(MIN_ASKING_WORDS, max_words), max_words + 1))
        negatives = source.another(index, index + 1, max_words, rng)
        return Pair(source.text(asks, asking), source.text(answers, max_words), negatives)

    return _drawn(firsts, pair, limit, with_negatives, seed)


class _Source:
    """The paragraphs that can be asked for, and which lie in one document."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paragraphs = list(_paragraphs(paths))
        self._numbers = np.array([paragraph.document for paragraph in self.paragraphs])

    def documents(self) -> Iterator[tuple[int, int]]:
        """Each one's first paragraph and the next one's."""
        starts = np.unique(self._numbers, return_index=True)[1].tolist()
        return pairwise([*starts, len(self.paragraphs)])

    def another(self, first: int, last: int, max_words: int, rng: np.random.Generator) -> tuple[str, ...]:
        """A paragraph of the same document, none of `first` to `last`; nothing where it has no other."""
        start, stop = np.searchsorted(self._numbers, [self._numbers[first], self._numbers[first] + 1])
        size, taken = int(stop - start), last - first + 1
        if size == taken:
            return ()
        other = start + (last - start + int(rng.integers(1, size - taken + 1))) % size
        return (self.text(other, max_words),)

    def text(self, index: int, max_words: int) -> str:
        return _cut(self.paragraphs[index].sentences, max_words)


def _drawn(
    places: Sequence[int],
    pair: Callable[[int, np.random.Generator], Pair],
    limit: int | None,
    with_negatives: bool,
    seed: int,
) -> list[Pair]:
    """A pair of each place, or of as many as are wanted, drawn at random; in their order, each query once."""
    rng = np.random.default_rng(seed)
    kept: dict[int, Pair] = {}
    seen: set[int] = set()
    for number in rng.permutation(len(places)).tolist():
        if len(kept) == limit:
            break
        found = pair(places[number], rng)
        if (name := text_hash(found.query)) not in seen:
            seen.add(name)
            kept[number] = found if with_negatives else replace(found, negatives=())
    return [kept[number] for number in sorted(kept)]


def _check(**sizes: int | None) -> None:
    if min(1 if size is None else size for size in sizes.values()) < 1:
        raise ValueError(f"{', '.join(f'{name} is {size}' for name, size in sizes.items())}; expected at least 1")


def _paragraphs(paths: Sequence[str]) -> Iterator[Paragraph]:
    """Those that can be asked for."""
    document = -1
    for file in text_files(paths):
        document += 1
        for text in read_texts([str(file)]):
            document += text.startswith(("<doc ", "</doc>")) or file.suffix == ".jsonl"
            for line in text.split("\n"):
                if len(sentences := sentences_of(line, MAX_QUERY_WORDS)) >= MIN_SENTENCES:
                    yield Paragraph(sentences, document)


def _cut(sentences: Sequence[str], max_words: int) -> str:
    return " ".join(" ".join(sentences).split()[:max_words])
