import json

import numpy as np
import pytest
from scipy.stats import spearmanr

from flashvec.training.data import DataError
from flashvec.training.evaluate import read_scored_pairs, sts_score

ROWS = [("a cat", "a dog", 1.5), ("the sea", "an ocean", 4.5), ("one", "two", 2.0), ("one", "one", 5.0)]
FILES = {
    "sts.csv": "".join(f"main\tfile\t2012\t{i}\t{s}\t{a}\t{b}\n" for i, (a, b, s) in enumerate(ROWS)),
    "sick.txt": "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tjudgment\n"
    + "".join(f"{i}\t{a}\t{b}\t{s}\tNEUTRAL\n" for i, (a, b, s) in enumerate(ROWS)),
    "own.tsv": "score\tsentence1\tsentence2\n" + "".join(f"{s}\t{a}\t{b}\n" for a, b, s in ROWS),
    "own.jsonl": "".join(json.dumps({"sentence1": a, "sentence2": b, "score": s}) + "\n" for a, b, s in ROWS),
}


@pytest.mark.parametrize("name", FILES)
def test_reads_every_form(name, tmp_path):
    (tmp_path / name).write_text(FILES[name])
    pairs = read_scored_pairs(tmp_path / name)
    assert list(zip(*pairs, strict=True)) == ROWS


def test_lines_end_at_line_feeds_alone(tmp_path):
    odd = "a\rb\u2028c\u0085d"
    rows = f"score\tsentence1\tsentence2\r\n1\t{odd}\tx\r\n2\ty\t{odd}\r\n"
    (tmp_path / "own.tsv").write_bytes(rows.encode())
    assert read_scored_pairs(tmp_path / "own.tsv")[:2] == ([odd, "y"], ["x", odd])


def test_correlations_are_scipys(tmp_path):
    (tmp_path / "own.tsv").write_text(FILES["own.tsv"])
    pairs = read_scored_pairs(tmp_path / "own.tsv")
    rng = np.random.default_rng(0)
    table = {text: rng.normal(size=5) for text in {*pairs.left, *pairs.right}}
    cosines = [
        table[a] @ table[b] / np.linalg.norm(table[a]) / np.linalg.norm(table[b])
        for a, b in zip(pairs.left, pairs.right, strict=True)
    ]
    found = sts_score(lambda texts: np.stack([table[t] * 3 for t in texts]), pairs)
    assert found["spearman"] == pytest.approx(100 * spearmanr(cosines, pairs.scores).statistic, abs=1e-3)
    assert found["pairs"] == 4


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("a.csv", "one\ttwo\n", "line 1: 2 columns and no header"),
        ("a.csv", "m\tf\t1\t2\thigh\ta\tb\n" * 2, "a.csv line 1: expected two texts and a score"),
        ("a.csv", "m\tf\t1\t2\t3\ta\tb\n" + "m\tf\t1\t2\t3\ta\n", "a.csv line 2: expected"),
        ("a.jsonl", "{}\n{}\n", "line 1: expected"),
        ("a.jsonl", '{"sentence1": null, "sentence2": "b", "score": 1}\n' * 2, "line 1: expected"),
        ("a.csv", "m\tf\t1\t2\t3\ta\tb\n" + "m\tf\t1\t2\tnan\ta\tb\n", "a.csv line 2: expected two texts and a score"),
        ("a.tsv", "score\tsentence1\tsentence2\n1\ta\tb\n", "1 pairs; a correlation needs two"),
        ("a.tsv", "", "holds no line"),
    ],
    ids=str,
)
def test_bad_files_are_named(name, text, named, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=named):
        read_scored_pairs(tmp_path / name)
    with pytest.raises(DataError, match="no such file"):
        read_scored_pairs(tmp_path / "none.csv")
