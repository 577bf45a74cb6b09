import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from flashvec.training.evaluate import sts_score
from flashvec.training.scored_pairs import ScoredPairs


def test_correlations_are_scipys():
    pairs = ScoredPairs(
        ["a cat", "the sea", "one", "one"], ["a dog", "an ocean", "two", "one"], np.array([1.5, 4.5, 2, 5])
    )
    rng = np.random.default_rng(0)
    table = {text: rng.normal(size=5) for text in {*pairs.left, *pairs.right}}
    cosines = [
        table[a] @ table[b] / np.linalg.norm(table[a]) / np.linalg.norm(table[b])
        for a, b in zip(pairs.left, pairs.right, strict=True)
    ]
    found = sts_score(lambda texts: np.stack([table[t] * 3 for t in texts]), pairs)
    assert found["spearman"] == pytest.approx(100 * spearmanr(cosines, pairs.scores).statistic, abs=1e-3)
    assert found["pearson"] == pytest.approx(100 * pearsonr(cosines, pairs.scores).statistic, abs=1e-3)
    assert found["pairs"] == 4


def test_equal_vectors_tie():
    """Not by the last bits of their products: such cosines have no order."""
    rng = np.random.default_rng(0)
    texts = [f"{i}" for i in range(40)]
    table = {text: rng.normal(size=64) for text in texts}
    right = [*texts[:30], *texts[:10]]  # thirty equal pairs
    unit = {text: x / np.linalg.norm(x) for text, x in table.items()}
    cosines = [1.0 if a == b else unit[a] @ unit[b] for a, b in zip(texts, right, strict=True)]
    scores = rng.normal(size=40)
    found = sts_score(lambda given: np.stack([table[t] for t in given]), ScoredPairs(texts, right, scores))
    assert found["spearman"] == pytest.approx(100 * spearmanr(cosines, scores).statistic, abs=1e-3)


def test_vectors_that_are_all_alike_correlate_with_nothing(caplog):
    one = np.random.default_rng(0).normal(size=64).astype(np.float32)
    texts = [f"{i}" for i in range(20)]
    with caplog.at_level("WARNING", logger="flashvec"):
        found = sts_score(
            lambda given: np.stack([one * (1 + i % 3) for i in range(len(given))]),
            ScoredPairs(texts, texts[::-1], np.arange(20.0)),
        )
    assert found == {"spearman": 0.0, "pearson": 0.0, "pairs": 20}
    assert "are the vectors all alike?" in caplog.text
