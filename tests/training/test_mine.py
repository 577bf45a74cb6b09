import json
from dataclasses import replace

import numpy as np
import pytest
from training_runs import tiny_base, write_pairs
from typer.testing import CliRunner

from flashvec.runtime.cli import app
from flashvec.training.data import Pair, read_pairs
from flashvec.training.mine import _nearest, mine
from flashvec.training.mine import write_pairs as write_mined


class Table:
    """An encoder of vectors that are known: texts name angles in degrees."""

    def embed(self, texts, instruction=None, normalize=None):
        angles = np.radians([float(text.split()[-1]) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


PAIRS = [Pair("q 0", "p 20"), Pair("q 90", "p 95"), Pair("q 0", "other 30")]
CORPUS = ["near 10", "same 21", "mid 40", "p 20", "far 80", "other 30", "q 0", "Q  0", "behind 180"]


def test_closest_that_are_no_answers():
    found = mine(Table(), PAIRS, corpus=CORPUS, num_negatives=2, share=0.95)
    # cos 20 = 0.94, of which 0.95 is 0.893, cos 26.8: 10, 21 and 0 are too close; 20 and 30 are answers of that query.
    assert found[0].negatives == ("mid 40", "far 80")
    # cos 5 = 0.996, of which 0.95 is 0.946, cos 18.9: 80 is 10 degrees from the query, too close
    assert found[1].negatives == ("mid 40", "other 30")
    # cos 30 = 0.866, 0.95 of it is cos 34.6
    assert found[2].negatives == ("mid 40", "far 80")
    assert mine(Table(), PAIRS, corpus=CORPUS, num_negatives=2, skip=1)[0].negatives == ("far 80", "behind 180")


def test_without_limits_the_closest_of_all_are_taken_and_with_a_margin_less():
    free = mine(Table(), PAIRS, corpus=CORPUS, num_negatives=1, share=None)
    assert free[0].negatives == ("near 10",)
    apart = mine(Table(), PAIRS, corpus=CORPUS, num_negatives=1, share=None, margin=0.5)
    assert apart[0].negatives == ("far 80",)  # cos 40 is 0.77, within 0.5 of 0.94


def test_blocks_change_nothing(monkeypatch):
    whole = mine(Table(), PAIRS, corpus=CORPUS)
    monkeypatch.setattr("flashvec.training.mine.BLOCK_SCORES", 1)
    assert mine(Table(), PAIRS, corpus=CORPUS) == whole


def test_the_nearest_come_in_the_order_of_a_stable_sort():
    rng = np.random.default_rng(0)
    for count in (1, 3, 9, 40, 50):
        cosines = rng.integers(-3, 4, 40).astype(np.float32) / 4  # many are equal
        cosines[rng.random(40) < 0.3] = -np.inf
        whole = [i for i in np.argsort(-cosines, kind="stable") if np.isfinite(cosines[i])]
        found = _nearest(cosines, count).tolist()
        assert found == whole[: len(found)] and len(found) >= min(count, len(whole))


def test_no_text_is_embedded_twice():
    read = []

    class Counting(Table):
        def embed(self, texts, instruction=None, normalize=None):
            read.extend(texts)
            return super().embed(texts)

    mine(Counting(), PAIRS[:2], corpus=CORPUS[:4])
    assert sorted(read) == sorted(["q 0", "q 90", *CORPUS[:4], "p 95"])


def test_queries_are_searched_under_the_instruction_they_train_with():
    asked = []

    class Listening(Table):
        def embed(self, texts, instruction=None, normalize=None):
            asked.append(instruction)
            return super().embed(texts)

    own = [PAIRS[0], replace(PAIRS[1], instruction="find: "), replace(PAIRS[2], instruction="")]
    mine(Listening(), own, instruction="search: ")
    assert asked == [["search: ", "find: ", ""], None]  # queries; then candidates and answers together, each once
    asked.clear()
    assert mine(Listening(), own)[1].instruction == "find: " and asked[0] == ["", "find: ", ""]
    asked.clear()
    mine(Listening(), PAIRS)
    assert asked == [None, None]


def test_refuses():
    for values, named in (
        ({"num_negatives": 0}, "num_negatives is 0"),
        ({"share": 1.5}, "share is 1.5"),
        ({"margin": -1.0}, "margin is -1"),
        ({"margin": float("nan")}, "margin is nan"),
        ({"corpus": ["one 1", "One  1"]}, "1 different candidates"),
    ):
        with pytest.raises(ValueError, match=named):
            mine(Table(), PAIRS, **values)
    with pytest.raises(ValueError, match=r"a\.jsonl line 3: a pair with a score; mine"):
        mine(Table(), [*PAIRS, replace(PAIRS[0], score=0.0, where="a.jsonl line 3")])


def test_command_writes_what_training_reads(tmp_path):
    tiny_base(tmp_path / "base")
    pairs = write_pairs(tmp_path / "pairs.jsonl", count=6, negatives=0)
    out = tmp_path / "triples.jsonl"
    command = ["mine", str(tmp_path / "base"), str(pairs), str(out), "--negatives", "2", "--share", "1.0", "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    counts = json.loads(result.stdout)
    read = read_pairs([str(out)])
    assert counts["pairs"] == len(read) == 6 and counts["negatives"] == sum(len(p.negatives) for p in read) > 0
    write_mined(tmp_path / "again.jsonl", read)
    assert (tmp_path / "again.jsonl").read_text() == out.read_text()
