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
