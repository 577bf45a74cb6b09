"""Shared words as a teacher: two texts are alike as far as they say the same rare words.

    W[i, j] = sum over words w of n_i(w) r(w) n_j(w) (k + 1) / (n_j(w) + k (1 - b + b |j| / mean length))

    n_i(w), |i|  how often text i has a word, and how many words it has
    r(w)         log(1 + (N - f + 1/2) / (f + 1/2)) where f of N documents have the word; 0 where more than a tenth have

That is BM25 (Robertson and Zaragoza 2009) of every text of a batch for every other. Each row, at mean 0 and deviation
1, is taught to cosines:

    loss = mean over texts i of KL(softmax of z(W[i, j]), softmax of cosine[i, j] / temperature), over j other than i

Contrastive learning alone tells a batch's texts apart by what they are about; this tells the model what BM25 knows of
them, that rare words count (Chen et al. 2022, "Salient Phrase Aware Dense Retrieval"). No label, and no other model.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

STEM_LETTERS = 6  # the rest of a word is mostly its ending
SATURATION, LENGTH_SHARE = 1.5, 0.75  # k and b
COMMON = 0.1  # share of documents from which on a word says nothing
BLOCK_WORDS = 4096  # that are counted at a time


class WordOverlap:
    """How much the texts of a batch overlap, by the words' rarity in some documents."""

    def __init__(self, documents: Iterable[str]) -> None:
        frequencies: Counter[str] = Counter()
        lengths = []
        for document in documents:
            words = stems(document)
            lengths.append(len(words))
            frequencies.update(set(words))
        self.frequencies, self.num_documents = frequencies, len(lengths)
        self.mean_length = max(1.0, sum(lengths) / max(1, len(lengths)))

    def rarity(self, word: str) -> float:
        """r above; a word that no document has is as rare as can be."""
        f, n = self.frequencies[word], self.num_documents
        return 0.0 if f > COMMON * n else math.log(1 + (n - f + 0.5) / (f + 0.5))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """W, fp32 [n, n]."""
        counts = [Counter(stems(text)) for text in texts]
        lengths = np.array([[sum(own.values())] for own in counts], np.float32)
        damping = SATURATION * (1 - LENGTH_SHARE + LENGTH_SHARE * lengths / self.mean_length)
        words = [word for word in dict.fromkeys(w for own in counts for w in own) if self.rarity(word)]
        found = np.zeros((len(texts), len(texts)), np.float32)
        for start in range(0, len(words), BLOCK_WORDS):
            place = {word: i for i, word in enumerate(words[start : start + BLOCK_WORDS])}
            n = np.zeros((len(texts), len(place)), np.float32)
            for row, own in zip(n, counts, strict=True):
                for word in own.keys() & place.keys():
                    row[place[word]] = own[word]
            rarities = np.array([self.rarity(word) for word in place], np.float32)
            found += n @ (rarities * n * (SATURATION + 1) / (n + damping)).T
        return found


def stems(text: str) -> list[str]:
    """Its words in lower case, cut where endings begin: rough stemming, for languages that put spaces between words."""
    return [word[:STEM_LETTERS] for word in re.findall(r"\w+", text.lower())]


def overlap_loss(vectors_ND: Tensor, overlap_NN: Tensor, temperature: float) -> Tensor:
    """The loss above; texts that share no rare word with one other more than with the rest teach nothing.

    Args:
        vectors_ND: of the texts, any length.
        overlap_NN: of `WordOverlap`.
    """
    n = len(vectors_ND)
    other = ~torch.eye(n, dtype=torch.bool, device=vectors_ND.device)
    unit = F.normalize(vectors_ND.float(), dim=-1)
    cosines, wanted = ((x[other].view(n, n - 1)) for x in (unit @ unit.T, overlap_NN.to(unit)))
    spread = wanted.std(1, correction=0, keepdim=True)
    wanted = (wanted - wanted.mean(1, keepdim=True)) / spread.clamp(min=torch.finfo(torch.float32).tiny)
    rows = F.kl_div((cosines / temperature).log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="none")
    teaches = spread > 0
    return (rows.sum(1, keepdim=True) * teaches).sum() / teaches.sum().clamp(min=1)
