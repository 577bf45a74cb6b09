"""Sentences to train on, from running text: one a line, in the order of the source, each once.

Reads .txt files of one paragraph a line, `<doc ...>` blocks of Wikipedia extractors among them, and .jsonl files whose
texts have one in each of their lines. What is no sentence (headings, list items, formulas, fragments) is left out, and
so is what stands alone: a paragraph has two sentences or more, else it is mostly a caption or a heading. Some lines are
passages of several sentences, so that longer texts are learnt as well.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from flashvec.training.data import read_texts, text_hash
from flashvec.training.files import whole

MIN_WORDS = 5  # of a sentence
MAX_WORDS = 28
PASSAGE_SENTENCES = 4  # at most
MIN_LETTERS = 0.7  # share of a sentence's characters that are letters or spaces
# After . ! ? and what closes quotes, before a capital letter, digit or quote; not after an initial or an abbreviation.
BOUNDARY = re.compile(
    r"""(?:(?<=[.!?])|(?<=[.!?]["')]))(?<!\b[A-Z]\.)(?<!\b(?:Mr|Dr|St|vs|No|Jr|Sr|ca)\.)(?<!\b(?:Mrs|etc)\.)"""
    r"""\s+(?=["'(]?[A-Z0-9])"""
)
ENDS = (".", "!", "?", '."', '!"', '?"')


def sentences_of(paragraph: str, max_words: int = MAX_WORDS) -> list[str]:
    """The whole sentences of a paragraph, in order."""
    found = [" ".join(part.split()) for part in BOUNDARY.split(paragraph)]
    return [part for part in found if _is_sentence(part, max_words)]


def text_hashes(text: str) -> set[int]:
    """Names of a text and of every sentence in it: a test sentence inside a passage was seen, too."""
    parts = (part for line in text.split("\n") for part in BOUNDARY.split(line))
    return {text_hash(part) for part in (text, *parts) if part.strip()}


def _is_sentence(text: str, max_words: int) -> bool:
    if not MIN_WORDS <= len(text.split()) <= max_words or not text.endswith(ENDS):
        return False
    letters = sum(c.isalpha() or c == " " for c in text)
    return letters >= MIN_LETTERS * len(text) and not text.startswith("<")


def training_lines(
    paths: Sequence[str],
    *,
    limit: int | None = None,
    passages: float = 0.1,
    max_words: int = MAX_WORDS,
    seed: int = 0,
) -> list[str]:
    """Lines of a training file.

    Args:
        paths: .txt or .jsonl files of paragraphs.
        limit: lines at most: paragraphs are then drawn at random, the sentences of each stay together.
        passages: share of lines that hold up to `PASSAGE_SENTENCES` sentences instead of one.
        max_words: of a sentence; longer ones are left out.
        seed: of what is drawn.

    Raises:
        DataError: a file is missing, of another kind, or damaged.
    """
    if not 0 <= passages <= 1 or (limit is not None and limit < 1):
        raise ValueError(f"passages is {passages}, limit {limit}; expected a share from 0 to 1, and at least 1")
    rng = np.random.default_rng(seed)
    lines = (line for text in read_texts(paths) for line in text.split("\n"))
    paragraphs = [found for line in lines if len(found := sentences_of(line, max_words)) > 1]
    chosen = rng.permutation(len(paragraphs)) if limit is not None else np.arange(len(paragraphs))
    kept: dict[int, list[str]] = {}
    seen: set[int] = set()
    left = limit
    for index in chosen.tolist():
        if left == 0:
            break
        kept[index] = list(_joined(list(_unseen(paragraphs[index], seen)), passages, rng))[:left]
        left = None if left is None else left - len(kept[index])
    return [line for index in sorted(kept) for line in kept[index]]


def _joined(sentences: Sequence[str], passages: float, rng: np.random.Generator) -> Iterator[str]:
    place = 0
    while place < len(sentences):
        count = int(rng.integers(2, PASSAGE_SENTENCES + 1)) if rng.random() < passages else 1
        yield " ".join(sentences[place : place + count])
        place += count


def _unseen(lines: Iterable[str], seen: set[int]) -> Iterator[str]:
    for line in lines:
        name = text_hash(line)
        if name not in seen:
            seen.add(name)
            yield line


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """One text a line, UTF-8; the file is there whole or not at all."""
    with whole(path) as partial:
        partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
