"""Scored pairs of texts (STS): how well cosines of vectors follow people's scores, Spearman and Pearson x 100.

.csv   the STS benchmark's own columns, tab-separated: genre, file, year, number, score, text, text
.txt   SICK's: a header that names sentence_A, sentence_B and relatedness_score
.tsv   a header that names score, sentence1 and sentence2
.jsonl objects with sentence1, sentence2 and score
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from flashvec.training.data import DataError
from flashvec.training.encode import encode, micro_batches, token_rows
from flashvec.training.model import Model

Embed = Callable[[Sequence[str]], np.ndarray]
STSB_COLUMNS = 7
HEADERS = (("sentence_A", "sentence_B", "relatedness_score"), ("sentence1", "sentence2", "score"))
MAX_FILE_BYTES = 1 << 30


class ScoredPairs(NamedTuple):
    """Two columns of texts and their scores, fp64 [n]."""

    left: list[str]
    right: list[str]
    scores: np.ndarray


def read_scored_pairs(path: Path) -> ScoredPairs:
    """A file of scored pairs.

    Raises:
        DataError: missing, of an unknown form, or a line without two texts and a score; names file and line.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise DataError(f"{path.name}: {path.stat().st_size} bytes, more than a set of pairs can have")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # other line ends may stand in a text
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: not UTF-8 ({error.reason})") from None
    numbered = [(number, line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f"{path.name}: holds no line")
    read = _json_row if path.suffix == ".jsonl" else _table_row(numbered, path.name)
    rows = []
    for number, line in numbered:
        try:
            left, right, score = read(line)
            rows.append((str(left), str(right), _finite(score)))
        except (ValueError, IndexError, KeyError, TypeError):
            raise DataError(f"{path.name} line {number}: expected two texts and a score") from None
    if len(rows) < 2:
        raise DataError(f"{path.name}: {len(rows)} pairs; a correlation needs two")
    left_texts, right_texts, scores = zip(*rows, strict=True)
    return ScoredPairs(list(left_texts), list(right_texts), np.array(scores))


def _finite(score: str | float) -> float:
    if not math.isfinite(number := float(score)):
        raise ValueError("not a number to rank by")
    return number


def _json_row(line: str) -> tuple[str, str, float]:
    values = json.loads(line)
    left, right = values["sentence1"], values["sentence2"]
    if not isinstance(left, str) or not isinstance(right, str):
        raise TypeError("no text")
    return left, right, values["score"]


def _table_row(numbered: list[tuple[int, str]], name: str) -> Callable[[str], tuple[str, str, str]]:
    """How a row is read; takes the header, where there is one, off the lines."""
    header = numbered[0][1].split("\t")
    for left, right, score in HEADERS:
        if {left, right, score} <= set(header):
            del numbered[0]
            places = header.index(left), header.index(right), header.index(score)
            return lambda line: tuple(line.split("\t")[place] for place in places)  # type: ignore[return-value]
    if len(header) < STSB_COLUMNS:
        raise DataError(f"{name} line 1: {len(header)} columns and no header with {', '.join(HEADERS[1])}")
    return lambda line: (line.split("\t")[5], line.split("\t")[6], line.split("\t")[4])


def sts_score(embed: Embed, pairs: ScoredPairs) -> dict[str, float]:
    """Correlations of cosines with scores.

    Args:
        embed: texts to vectors [n, d], of any length.

    Returns:
        `spearman` and `pearson`, times 100, and `pairs`.
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
    cosines = (vectors[left] * vectors[right]).sum(1)
    return {
        "spearman": round(100 * float(spearmanr(cosines, pairs.scores).statistic), 4),
        "pearson": round(100 * float(pearsonr(cosines, pairs.scores).statistic), 4),
        "pairs": len(pairs.scores),
    }


def embed_with(model: Model, depths: Sequence[int] = ()) -> Embed:
    """Vectors of a model that is being trained, without dropout; after its last layer, or as many as `depths` says."""

    def embed(texts: Sequence[str]) -> np.ndarray:
        rows = token_rows(model, texts)
        vectors = np.zeros((len(texts), model.decoder.spec.hidden_size * len(model.spec.pooling)), np.float32)
        with torch.no_grad():
            for pack in micro_batches(rows.lengths, None, model.decoder.device):
                found = encode(model, rows.take(pack), pack, model.trainable.training(), depths)
                vectors[pack] = found.cpu().numpy()
        return vectors

    return embed
