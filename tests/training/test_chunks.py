"""Base phrases of dependency trees."""

import random

import pytest

from flashvec.training.chunks import Node, chunk_tags

# Word, part of speech, number of the word it depends on, relation.
TREES = {
    "[NP the old man] [NP 's two dogs] [VP were barking] [PP at] [NP us] .": """
        the|DET|3|det old|ADJ|3|amod man|NOUN|6|nmod:poss 's|PART|3|case two|NUM|6|nummod dogs|NOUN|8|nsubj
        were|AUX|8|aux barking|VERB|0|root at|ADP|10|case us|PRON|8|obl .|PUNCT|8|punct""",
    "[NP his black and white cat] [VP has often slept] [ADVP here]": """
        his|PRON|5|nmod:poss black|ADJ|5|amod and|CCONJ|4|cc white|ADJ|2|conj cat|NOUN|8|nsubj has|AUX|8|aux
        often|ADV|8|advmod slept|VERB|0|root here|ADV|8|advmod""",
    "[NP She] [ADVP often] [VP says] [SBAR that] [NP it] [VP is] [ADJP very easy] [VP to give] [PRT up]": """
        She|PRON|3|nsubj often|ADV|3|advmod says|VERB|0|root that|SCONJ|8|mark it|PRON|8|expl is|AUX|8|cop
        very|ADV|8|advmod easy|ADJ|3|ccomp to|PART|10|mark give|VERB|8|csubj up|ADP|10|compound:prt""",
    "[NP President Bush] and [NP Laura] [VP left] [PP because of] [NP July 13] , [INTJ please]": """
        President|NOUN|2|nmod:desc Bush|PROPN|5|nsubj and|CCONJ|4|cc Laura|PROPN|2|conj left|VERB|0|root
        because|ADP|8|case of|ADP|6|fixed July|PROPN|5|obl 13|NUM|8|nummod ,|PUNCT|11|punct please|INTJ|5|discourse""",
    "[NP It] [VP is n't] [NP a dog]": "It|PRON|5|nsubj is|AUX|5|cop n't|PART|5|advmod a|DET|5|det dog|NOUN|0|root",
    "[NP They] [VP will not have been] [ADJP easy] [VP to please]": """
        They|PRON|6|nsubj will|AUX|6|aux not|PART|6|advmod have|AUX|6|aux been|AUX|6|cop easy|ADJ|0|root
        to|PART|8|mark please|VERB|6|csubj""",
    "[VP Will] [NP it] [VP be] [ADJP easy] ?": """
        Will|AUX|4|aux it|PRON|4|nsubj be|AUX|4|cop easy|ADJ|0|root ?|PUNCT|4|punct""",
    "[NP a decision - maker] ( [NP all] )": """
        a|DET|4|det decision|NOUN|4|compound -|PUNCT|2|punct maker|NOUN|0|root (|PUNCT|6|punct all|DET|4|appos
        )|PUNCT|6|punct""",
    '[NP the] " [NP big house]': 'the|DET|4|det "|PUNCT|4|punct big|ADJ|4|amod house|NOUN|0|root',  # a quote between
}


def tree(text):
    fields = [word.split("|") for word in text.split()]
    return [Node(word, upos, int(head), relation) for word, upos, head, relation in fields]


def brackets(nodes):
    shown = ""
    for node, tag in zip(nodes, chunk_tags(nodes), strict=True):
        if not tag.startswith("I-") and shown.count("[") > shown.count("]"):
            shown += "]"
        shown += " " * bool(shown) + (f"[{tag[2:]} " if tag.startswith("B-") else "") + node.word
    return shown + "]" * (shown.count("[") - shown.count("]"))


@pytest.mark.parametrize("wanted", TREES)
def test_phrases_of_a_tree(wanted):
    assert brackets(tree(TREES[wanted])) == wanted


def test_any_heads_give_tags_that_fit_together():
    """Trees or not: one tag a word, and none goes on where nothing of its kind was."""
    rng = random.Random(0)
    parts = ["NOUN", "VERB", "ADJ", "ADV", "AUX", "PART", "PUNCT", "CCONJ", "DET"]
    relations = ["det", "amod", "conj", "cc", "punct", "aux", "advmod", "flat", "nmod:poss", "case", "compound"]
    for _ in range(300):
        n = rng.randint(1, 12)
        nodes = [Node(rng.choice("-a"), rng.choice(parts), rng.randint(0, n), rng.choice(relations)) for _ in range(n)]
        tags = chunk_tags(nodes)
        assert len(tags) == n
        for before, tag in zip(["O", *tags], tags, strict=False):
            assert not tag.startswith("I-") or before[2:] == tag[2:]


def test_a_word_without_its_sentence_is_no_phrase():
    assert chunk_tags([]) == [] and chunk_tags([Node("!", "PUNCT", 0, "root")]) == ["O"]
