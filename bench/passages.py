"""Prose that Python itself carries (`pydoc_data.topics`, what `help("lambda")` prints), cut into passages.

Code, grammar and tables are left out: they are most of some topics, and an encoder of prose has little to say about
them. What a paragraph defines, a method's signature on a line of its own, stays in front of it.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

MIN_WORDS, MAX_WORDS = 60, 150
SHORTEST = 30  # words of a topic's last passage, for many topics the only one
LONGEST_SENTENCE = MAX_WORDS - MIN_WORDS  # so that a passage still too short has room for any sentence

_UNDERLINE = re.compile(r"[*=\-~^]{3,}")
_SIGNATURE = re.compile(r"(?:class |async )?[\w.]+\(.*\)")
_LIST_MARK = re.compile(r"^(?:\*|[\dIVX]+\.) +")
_SENTENCE_END = re.compile(r"(?<=[.!?]) +(?=[A-Z\"*(])")
_WORD = re.compile(r"[(\"'‘“*]*[A-Za-z]+(?:[-’'][a-z]+)*[)\"'’”*]*[.,;:!?]?[)\"'’”*]*")
_END = (".", ":", "!", "?", ".)", ',"', '."')


class Passage(NamedTuple):
    """A piece of a topic's text."""

    topic: str
    text: str


def cut_passages(topics: Mapping[str, str], limit: int | None = None) -> list[Passage]:
    """Cut topics into passages of 60 to 150 words (the last 30): whole paragraphs, or sentences of long ones.

    Topics quote one another ("compound" holds all of "while"): a paragraph that several have belongs to the shortest
    of them, the one that is about it.

    Args:
        topics: topic -> text.
        limit: keep the first so many passages of each topic.

    Returns:
        Passages by topic, in the order of its text. A topic with less prose than one passage has none.
    """
    seen: set[str] = set()
    found: dict[str, list[str]] = {}
    for topic in sorted(topics, key=lambda name: (len(topics[name]), name)):
        fresh = [paragraph for paragraph in paragraphs(topics[topic]) if paragraph not in seen]
        seen.update(fresh)
        found[topic] = list(_fill(fresh))[:limit]
    return [Passage(topic, text) for topic in sorted(found) for text in found[topic]]


def paragraphs(text: str) -> Iterator[str]:
    """A topic's paragraphs of prose, each on one line."""
    signature = ""
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.strip().split("\n")]
        if len(lines) > 1 and _UNDERLINE.fullmatch(lines[1]):
            continue
        if all(_SIGNATURE.fullmatch(line) for line in lines):
            signature = lines[0] + ": "
            continue
        line = _LIST_MARK.sub("", " ".join(" ".join(lines).split()), count=1)
        if is_prose(line):
            yield signature + line
        signature = ""


def is_prose(line: str) -> bool:
    """Is this a sentence or several: most of it plain words, closed by punctuation."""
    words = line.split()
    plain = sum(_WORD.fullmatch(word) is not None for word in words)
    return len(words) >= 6 and plain >= 0.7 * len(words) and line.endswith(_END)


def _fill(found: Iterable[str]) -> Iterator[str]:
    """Passages from one topic's paragraphs."""
    held: list[str] = []
    size = 0
    for paragraph in found:
        for sentence in _SENTENCE_END.split(paragraph):
            num_words = len(sentence.split())
            if num_words > LONGEST_SENTENCE:
                continue
            if size >= MIN_WORDS and size + num_words > MAX_WORDS:
                yield " ".join(held)
                held, size = [], 0
            held.append(sentence)
            size += num_words
        if size >= MIN_WORDS:
            yield " ".join(held)
            held, size = [], 0
    if size >= SHORTEST:
        yield " ".join(held)
