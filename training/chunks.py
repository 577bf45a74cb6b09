"""Base phrases of a dependency tree: chunk tags for treebanks that have none of their own.

Chunks in the sense of CoNLL-2000 (Tjong Kim Sang and Buchholz 2000), phrases that hold no other phrase: "the old man's
two dogs were barking at us" is [the old man] ['s two dogs] [were barking] [at] [us]. There they were cut from phrase
trees; here a word lies in the chunk of the word it depends on if its relation is one that stays within a base phrase
and nothing else stands between the two. That is a definition of ours beside theirs: it compares encoders on one
file, and its scores are not to be compared with those on CoNLL-2000.

Relations and parts of speech are those of Universal Dependencies 2.
"""

from collections.abc import Sequence
from typing import NamedTuple

NOMINAL = frozenset({"NOUN", "PROPN", "PRON", "NUM", "SYM", "X"})
BEFORE_NOMINAL = frozenset({"amod", "nmod:desc", "nmod:poss", "advmod"})  # and kinds of det and compound
EITHER_SIDE = frozenset({"flat", "fixed", "goeswith", "nummod"})  # "July 13", "because of"
KINDS = {
    **dict.fromkeys(NOMINAL, "NP"),
    "DET": "NP",  # one that stands alone: "all", "this"
    "VERB": "VP",
    "AUX": "VP",
    "PART": "VP",  # "to" or "not" whose verb is left out
    "ADJ": "ADJP",
    "ADV": "ADVP",
    "ADP": "PP",
    "SCONJ": "SBAR",
    "INTJ": "INTJ",
}  # conjunctions and punctuation are in no chunk but another word's


class Node(NamedTuple):
    """A word of a tree: `head` is the number, from 1, of the word that it depends on; 0 at the root."""

    word: str
    upos: str
    head: int
    relation: str


def chunk_tags(nodes: Sequence[Node]) -> list[str]:
    """O, B-kind or I-kind of each word; kinds are NP, VP, PP, ADJP, ADVP, SBAR, PRT and INTJ.

    Args:
        nodes: of one sentence, in order, with heads in it.
    """
    top = list(range(len(nodes)))  # of each word's chunk: the word that names its kind
    links = [(abs(word - to), word, to) for word in range(len(nodes)) if (to := _joins(nodes, word)) is not None]
    for _, word, to in sorted(links):  # near ones first: what lies between has found its chunk
        between = top[min(word, to) + 1 : max(word, to)]
        if top[word] == word and all(other in (word, top[to]) for other in between):
            top = [top[to] if other == word else other for other in top]
    tags = []
    for word, own in enumerate(top):
        kind = "PRT" if nodes[own].relation == "compound:prt" else KINDS.get(nodes[own].upos)
        begins = word == 0 or top[word - 1] != own
        tags.append("O" if kind is None else f"{'B' if begins else 'I'}-{kind}")
    return tags


def _joins(nodes: Sequence[Node], word: int) -> int | None:
    """The word, from 0, in whose chunk another lies if nothing else stands between them; None: in its own."""
    node = nodes[word]
    if node.relation == "cc" or (node.upos == "PUNCT" and node.word in ("-", "/")):  # "black and white", "e-mail"
        head = node.head - 1
        return head if node.head and _joins_as_conjunct(nodes, head) is not None else None
    return _joins_as_conjunct(nodes, word)


def _joins_as_conjunct(nodes: Sequence[Node], word: int) -> int | None:
    """A conjunct joins what the first one does: both of "black and white dogs"."""
    node = nodes[word]
    if node.relation == "conj" and node.head and nodes[node.head - 1].upos == node.upos:
        return _joins_alone(nodes, node.head - 1)
    return _joins_alone(nodes, word)


def _joins_alone(nodes: Sequence[Node], word: int) -> int | None:
    node, head = nodes[word], nodes[word].head - 1
    if not node.head:
        return None
    above, relation = nodes[head], node.relation
    if node.upos == "PART" and relation == "case":  # 's stands before what is owned
        return above.head - 1 if above.head and above.relation == "nmod:poss" else None
    if node.upos in ("AUX", "PART") and above.upos != "VERB":  # "will not be | good", "is n't | a dog"
        near = [i for i in (*range(word + 1, head), word - 1) if i >= 0 and nodes[i].upos == "AUX"]
        if same := [i for i in near if i == head or nodes[i].head == node.head]:
            return same[0]
    if relation.split(":")[0] in EITHER_SIDE:
        return head
    if head < word:  # phrases end with the word they are named for
        return None
    if above.upos in NOMINAL:
        whose = relation == "nmod:poss" and node.upos != "PRON"  # a phrase of its own, where "his" is none
        within = relation in BEFORE_NOMINAL or relation.split(":")[0] in ("det", "compound")
        return head if within and not whose else None
    if above.upos in ("ADJ", "ADV"):
        return head if relation == "advmod" else None
    if above.upos in ("VERB", "AUX"):
        helps = node.upos in ("AUX", "PART") or (relation == "advmod" and _follows_auxiliary(nodes, word, head))
        return head if helps else None
    return None


def _follows_auxiliary(nodes: Sequence[Node], word: int, verb: int) -> bool:
    """True in "has often said", not in "often said"."""
    return any(node.head - 1 == verb and node.upos in ("AUX", "PART") for node in nodes[:word])
