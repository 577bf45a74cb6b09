"""Entities of BIO-tagged words, and how many of them a tagger finds exactly."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Entity(NamedTuple):
    """Words [start, stop) of a sentence and what they name."""

    start: int
    stop: int
    kind: str


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities that a sentence's tags spell: O, B-kind and I-kind.

    As conlleval reads them: an I- that continues nothing of its kind begins an entity, as a B- does.
    """
    found, start = set(), 0
    for i, tag in enumerate(tags):
        kind = _kind(tag)
        if kind and (i == 0 or tag.startswith("B-") or _kind(tags[i - 1]) != kind):
            start = i
        after = tags[i + 1] if i + 1 < len(tags) else "O"
        if kind and (after.startswith("B-") or _kind(after) != kind):
            found.add(Entity(start, i + 1, kind))
    return found


def _kind(tag: str) -> str:
    return "" if tag == "O" else tag[2:]


def entity_scores(gold: Iterable[Sequence[str]], predicted: Iterable[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of entities over all sentences, times 100; one counts if start, stop and kind agree.

    Args:
        gold, predicted: tags of the same sentences.

    Returns:
        `precision`, `recall`, `f1` and `entities`, the number there are; a measure with nothing to divide by is 0.
    """
    right = num_gold = num_predicted = 0
    for own, other in zip(gold, predicted, strict=True):
        if len(own) != len(other):
            raise ValueError(f"a sentence has {len(own)} tags and {len(other)} predicted ones")
        wanted, got = entities(own), entities(other)
        right, num_gold, num_predicted = right + len(wanted & got), num_gold + len(wanted), num_predicted + len(got)
    precision, recall = right / max(num_predicted, 1), right / max(num_gold, 1)
    f1 = 2 * right / max(num_gold + num_predicted, 1)
    return {"precision": 100 * precision, "recall": 100 * recall, "f1": 100 * f1, "entities": num_gold}
