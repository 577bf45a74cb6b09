"""Shared words as a teacher, beside the formula written out."""

import math

import numpy as np
import pytest
import torch

from flashvec.training import overlap
from flashvec.training.overlap import WordOverlap, overlap_loss, stems

DOCUMENTS = [f"the river of v{i} flows past mill m{i % 20} to the sea" for i in range(40)]
TEXTS = [
    "rivers flow past mills",
    "the mill m3 of v3 flows",
    "flowing, flows: a Flow!",
    "nothing shared",
    "the of to",
]


def by_formula(texts, documents):
    of_documents = [stems(document) for document in documents]
    mean_length = sum(map(len, of_documents)) / len(documents)
    found = np.zeros((len(texts), len(texts)))
    for i, left in enumerate(map(stems, texts)):
        for j, right in enumerate(map(stems, texts)):
            for word in left:  # as often as it comes
                f, n = sum(word in own for own in of_documents), right.count(word)
                rarity = 0 if f > len(documents) / 10 else math.log(1 + (len(documents) - f + 0.5) / (f + 0.5))
                found[i, j] += rarity * n * 2.5 / (n + 1.5 * (0.25 + 0.75 * len(right) / mean_length))
    return found


def test_words_lose_case_and_endings():
    assert stems("Rivers flowing, a RIVER: naïve") == ["rivers", "flowin", "a", "river", "naïve"]
    assert stems("") == stems("... !") == []


@pytest.mark.parametrize("block", [overlap.BLOCK_WORDS, 3])
def test_overlap_is_bm25_of_each_text_for_each(block, monkeypatch):
    monkeypatch.setattr(overlap, "BLOCK_WORDS", block)
    found = WordOverlap(DOCUMENTS)(TEXTS)
    np.testing.assert_allclose(found, by_formula(TEXTS, DOCUMENTS), rtol=1e-5)
    assert found[0, 1] == 0 < found[1, 1]  # "past" and "mill" are in every document, "mills" is in none
    assert not found[4].any() and not found[3, [0, 1, 2, 4]].any()


def test_rare_words_say_more_than_frequent_ones_and_common_ones_nothing():
    known = WordOverlap(DOCUMENTS)
    assert known.rarity("unheard") > known.rarity("v3") > known.rarity("m3") > 0 == known.rarity("river")
    assert WordOverlap([]).mean_length == 1  # no document: every word is as rare


def test_loss_is_the_divergence_of_cosines_from_standardised_rows():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(6, 8, generator=generator, requires_grad=True)
    shared = torch.rand(6, 6, generator=generator)
    shared[2] = 1.0  # shares as much with each: says nothing
    want = 0.0
    unit = torch.nn.functional.normalize(vectors, dim=1)
    for i in (0, 1, 3, 4, 5):
        others = [j for j in range(6) if j != i]
        row = shared[i, others]
        target = ((row - row.mean()) / row.std(correction=0)).softmax(0)
        want += (target * (target.log() - (unit[others] @ unit[i] / 0.1).log_softmax(0))).sum() / 5
    loss = overlap_loss(vectors, shared, 0.1)
    torch.testing.assert_close(loss, want)
    loss.backward()
    assert torch.isfinite(vectors.grad).all() and vectors.grad.abs().sum() > 0


def test_texts_that_share_nothing_teach_nothing_and_give_no_nan():
    vectors = torch.randn(2, 8, requires_grad=True)
    for n, shared in ((2, torch.ones(2, 2)), (2, torch.zeros(2, 2))):
        loss = overlap_loss(vectors[:n], shared, 0.05)
        loss.backward()
        assert loss == 0 and not vectors.grad.any()
