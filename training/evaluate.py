"""STS: how well cosines of vectors follow people's scores of pairs (`scored_pairs.py`), Spearman and Pearson x 100."""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch

from flashvec.training.encode import encode, micro_batches, token_rows
from flashvec.training.model import Model
from flashvec.training.scored_pairs import ScoredPairs

logger = logging.getLogger("flashvec")

Embed = Callable[[Sequence[str]], np.ndarray]


def sts_score(embed: Embed, pairs: ScoredPairs) -> dict[str, float]:
    """Correlations of cosines with scores.

    Args:
        embed: texts to vectors [n, d], of any length.

    Returns:
        `spearman` and `pearson`, times 100, and `pairs`; both 0, with a warning, where all cosines are alike.
    """
    try:
        from scipy.stats import pearsonr, spearmanr
    except ImportError:
        raise ImportError("evaluation needs scipy: pip install 'flashvec[eval]'") from None
    texts = list(dict.fromkeys([*pairs.left, *pairs.right]))
    vectors = np.asarray(embed(texts), np.float64)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    place = {text: i for i, text in enumerate(texts)}
    left, right = ([place[text] for text in column] for column in (pairs.left, pairs.right))
    # To fp32, as exact as vectors are: equal vectors tie at 1, whatever the last bits of their products.
    cosines = (vectors[left] * vectors[right]).sum(1).astype(np.float32).astype(np.float64)
    if np.ptp(cosines) == 0:
        logger.warning("all cosines are %.6g: nothing correlates with them; are the vectors all alike?", cosines[0])
        return {"spearman": 0.0, "pearson": 0.0, "pairs": len(pairs.scores)}
    return {
        "spearman": round(100 * float(spearmanr(cosines, pairs.scores).statistic), 4),
        "pearson": round(100 * float(pearsonr(cosines, pairs.scores).statistic), 4),
        "pairs": len(pairs.scores),
    }


def embed_with(model: Model, depths: Sequence[int] = (), instruction: str | None = None) -> Embed:
    """Vectors of a model that is being trained, without dropout.

    Args:
        depths: number of layers after which they are read; default all.
        instruction: before each text.
    """

    def embed(texts: Sequence[str]) -> np.ndarray:
        rows = token_rows(model, texts, None if instruction is None else [instruction] * len(texts))
        vectors = np.zeros((len(texts), model.decoder.spec.hidden_size * len(model.spec.pooling)), np.float32)
        with torch.no_grad():
            for pack in micro_batches(rows.lengths, None, model.decoder.device):
                found = encode(model, rows.take(pack), pack, model.trainable.training(), depths)
                vectors[pack] = found.cpu().numpy()
        return vectors

    return embed
