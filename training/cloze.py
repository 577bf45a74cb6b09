"""Pairs to train search on, from running text alone: a sentence asks, the rest of its paragraph answers.

The inverse cloze task (Lee et al. 2019): a sentence, or several that follow each other, is taken out of its paragraph,
and the paragraph is to be found by it; in one of ten it stays, so that shared words count as well. Another paragraph of
the same document stands beside them as what does not match: it is of the same topic, which makes it hard. Contrastive
training's `neighbours` brings pairs of one document together instead, which costs no text more. A document is a
`<doc ...>` block of Wikipedia extractors, or a whole file. Only text is used, no title, no link, no label.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from flashvec.training.data import Pair, read_texts, text_hash
from flashvec.training.sentences import sentences_of

MAX_QUERY_WORDS = 35
MIN_ANSWERS = 2  # sentences
MIN_SENTENCES = 1 + MIN_ANSWERS  # of a paragraph: one asks
KEPT = 0.1  # share of paragraphs that keep the sentence which asks


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
        paths: .txt files of one paragraph a line.
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
    if min(max_words, max_asking, 1 if limit is None else limit) < 1:
        raise ValueError(f"max_words is {max_words}, max_asking {max_asking}, limit {limit}; expected at least 1")
    rng = np.random.default_rng(seed)
    paragraphs = list(_paragraphs(paths))
    documents = np.array([paragraph.document for paragraph in paragraphs])
    kept: dict[int, Pair] = {}
    seen: set[int] = set()
    for index in rng.permutation(len(paragraphs)).tolist():
        if limit is not None and len(kept) == limit:
            break
        sentences = paragraphs[index].sentences
        most = min(max_asking, len(sentences) - MIN_ANSWERS)
        count = 1 if most == 1 else int(rng.integers(1, most + 1))
        asks = int(rng.integers(len(sentences) - count + 1))
        query = " ".join(sentences[asks : asks + count])
        answers = sentences if rng.random() < KEPT else [*sentences[:asks], *sentences[asks + count :]]
        first, stop = np.searchsorted(documents, [documents[index], documents[index] + 1])
        negatives: tuple[str, ...] = ()
        if stop - first > 1:
            other = first + (index - first + int(rng.integers(1, stop - first))) % (stop - first)
            negatives = (_cut(paragraphs[other].sentences, max_words),)
        if (name := text_hash(query)) not in seen:
            seen.add(name)
            kept[index] = Pair(query, _cut(answers, max_words), negatives if with_negatives else ())
    return [kept[index] for index in sorted(kept)]


def _paragraphs(paths: Sequence[str]) -> Iterator[Paragraph]:
    """Those that can be asked for."""
    document = -1
    for path in paths:
        document += 1
        for text in read_texts([path]):
            if text.startswith(("<doc ", "</doc>")):
                document += 1
            elif len(sentences := sentences_of(text, MAX_QUERY_WORDS)) >= MIN_SENTENCES:
                yield Paragraph(sentences, document)


def _cut(sentences: Sequence[str], max_words: int) -> str:
    return " ".join(" ".join(sentences).split()[:max_words])
