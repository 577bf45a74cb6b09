"""Texts of the lengths that embedding meets: queries, sentences, passages, pages, and a tail of long ones."""

import random
import re
from pathlib import Path

from flashvec.runtime.encoder import Encoder

PROFILES = {  # mean tokens of a text: what it stands for
    "queries": 12,
    "sentences": 25,
    "passages": 87,
    "pages": 400,
    "long tail": 0,
}
LONGEST_TEXT = 8000  # tokens, of a long tail
LEAST_WORDS = 1000  # of prose; of fewer, most texts of a page would be mostly the same


class Texts:
    """Texts of a wanted length, new ones at every draw, cut from running prose at word boundaries.

    Raises:
        ValueError: too little prose.
    """

    def __init__(self, path: Path | None, tokens_per_word: float) -> None:
        if path is None:
            from pydoc_data.topics import topics

            prose = "\n\n".join(topics.values())
        else:
            files = sorted(file for file in path.glob("*") if file.is_file()) if path.is_dir() else [path]
            prose = "\n\n".join(f.read_text(encoding="utf-8", errors="replace") for f in files)
        prose = re.sub(r"<[^>\n]*>", " ", prose)
        self.words = prose.split()
        if len(self.words) < LEAST_WORDS:
            raise ValueError(f"{path} holds {len(self.words)} words: texts are cut from {LEAST_WORDS:,} or more")
        self.tokens_per_word = tokens_per_word

    @classmethod
    def for_encoder(cls, path: Path | None, encoder: Encoder) -> "Texts":
        """Texts whose lengths are counted in this encoder's tokens."""
        sample = cls(path, 1.0).draw("passages", 2000, -2)
        return cls(path, float(encoder.count_tokens(sample).sum() / sum(len(text.split()) for text in sample)))

    def draw(self, profile: str, num_tokens: int, seed: int) -> list[str]:
        """Texts of a profile, about `num_tokens` in all; lengths spread log-normally around the mean."""
        rng = random.Random(f"{profile} {seed}")
        texts, total = [], 0.0
        while total < num_tokens:
            mean = PROFILES[profile]
            length = rng.lognormvariate(0, 0.4) * mean if mean else min(rng.paretovariate(0.9) * 20, LONGEST_TEXT)
            words = max(1, round(length / self.tokens_per_word))
            texts.append(self._cut(words, rng))
            total += words * self.tokens_per_word
        return texts

    def of_length(self, num_tokens: int, count: int, seed: int) -> list[str]:
        """Texts of about `num_tokens` each."""
        rng = random.Random(f"{num_tokens} {count} {seed}")
        words = max(1, round(num_tokens / self.tokens_per_word))
        return [self._cut(words, rng) for _ in range(count)]

    def _cut(self, words: int, rng: random.Random) -> str:
        start = rng.randrange(max(1, len(self.words) - words))
        return " ".join(self.words[start : start + words])
