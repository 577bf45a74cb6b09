import math
import re
from collections import Counter

import numpy as np
import pytest

from flashvec.training.overlap import WordOverlap
from flashvec.training.topics import DIMENSIONS, group_vectors, topic_order, topic_vectors

TOPICS = [f"topic {n}" for n in range(12)]  # a word counts where at most a tenth of the texts have it


def texts_of(topics, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(["the", "and", *(f"{n}{topic[6:]}th" for n in rng.choice(list("abcdef"), 6))]) for topic in topics]


def test_groups_hold_one_topic_whatever_the_order_of_the_source():
    topics = np.random.default_rng(1).permutation(TOPICS * 12)
    order = topic_order(texts_of(topics), 6)
    assert sorted(order.tolist()) == list(range(144))
    groups = [set(topics[order[start : start + 6]]) for start in range(0, 144, 6)]
    assert all(len(group) == 1 for group in groups)
    assert all(a == b for a, b in zip(groups[::2], groups[1::2], strict=True))  # alike ones side by side


def _weight(count, rarity):
    return (1 + math.log(count)) * rarity if count else 0.0


def test_the_last_group_is_what_is_left():
    for count, sizes in ((120, [10] * 12), (118, [10] * 11 + [8])):
        vectors = topic_vectors(texts_of((TOPICS * 10)[:count]))
        assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)  # all have words that count
        groups = group_vectors(vectors, 10)
        assert [len(group) for group in groups] == sizes
        assert sorted(np.concatenate(groups).tolist()) == list(range(count))
    assert [group.tolist() for group in group_vectors(np.ones((3, 2), np.float32), 5)] == [[0, 1, 2]]
    assert group_vectors(np.zeros((0, 2), np.float32), 5) == []


def test_the_order_is_the_seeds_alone():
    texts = texts_of(TOPICS * 5)
    orders = [topic_order(texts, 5, seed).tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    as_sets = [[set(order[i : i + 5]) for i in range(0, 60, 5)] for order in orders]
    assert as_sets[0] == as_sets[2]  # the groups are the same, their insides are drawn


def test_vectors_are_those_of_numpys_singular_values():
    texts = texts_of(TOPICS * 30)
    vectors = topic_vectors(texts)
    words = [re.findall(r"\w+", text) for text in texts]
    frequencies = Counter(word for own in words for word in set(own))
    columns = sorted(word for word, count in frequencies.items() if 3 <= count <= len(texts) / 10)
    weights = WordOverlap(texts)
    table = np.array([[_weight(own.count(word), weights.rarity(word)) for word in columns] for own in words])
    left, scale, _ = np.linalg.svd(table, full_matrices=False)
    exact = left[:, :DIMENSIONS] * scale[:DIMENSIONS]
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors @ vectors.T, exact @ exact.T, atol=1e-4)
    within = np.mean([vectors[i::12] @ vectors[i::12].T for i in range(12)])
    assert within > 0.3 and abs(np.mean(vectors[::12] @ vectors[1::12].T)) < 0.05


def test_texts_that_share_no_word_and_bad_sizes():
    assert sorted(topic_order(["one", "two", "three", "four", "five"], 2).tolist()) == [0, 1, 2, 3, 4]
    assert topic_order([], 3).tolist() == []
    assert topic_order(["the only text"], 3).tolist() == [0]
    with pytest.raises(ValueError, match="size is 0, expected at least 1"):
        topic_order(["a"], 0)
