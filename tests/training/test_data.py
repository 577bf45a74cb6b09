import json
from pathlib import Path

import numpy as np
import pytest

from flashvec.training.data import (
    DataError,
    SourceBatches,
    epoch_order,
    read_pairs,
    read_texts,
    rows_of_step,
    text_files,
    text_hash,
)


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def test_texts_of_both_kinds_of_files(tmp_path):
    first = write(tmp_path / "a.txt", "one", "", "  two ")
    second = write(tmp_path / "b.jsonl", {"text": "three", "id": 7})
    assert read_texts([first, second]) == ["one", "two", "three"]


def test_columns_of_negatives_may_be_null_where_a_row_has_fewer(tmp_path):
    rows = [{"anchor": "q", "positive": "p", "negative_1": "n1", "negative_2": other} for other in ("n2", None)]
    assert [pair.negatives for pair in read_pairs([write(tmp_path / "a.jsonl", *rows)])] == [("n1", "n2"), ("n1",)]


def test_pairs_in_the_forms_that_people_have(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"query": "q", "pos": ["p"], "neg": ["n1", "n2"]},
        {"anchor": "q", "positive": "p", "negative_1": "n1", "negative_2": "n2", "instruction": "find"},
        {"sentence1": "q", "sentence2": "p"},
    )
    other = write(tmp_path / "b.jsonl", {"text1": "q", "text2": "p"})
    pairs = read_pairs([path, other])
    assert [(p.query, p.positive, p.negatives, p.instruction, p.source) for p in pairs] == [
        ("q", "p", ("n1", "n2"), None, 0),
        ("q", "p", ("n1", "n2"), "find", 0),
        ("q", "p", (), None, 0),
        ("q", "p", (), None, 1),
    ]
    scored = write(tmp_path / "c.jsonl", {"sentence1": "a", "sentence2": "b", "score": 3})
    assert read_pairs([scored])[0].score == 3


def test_a_mistyped_key_is_named_once(tmp_path, caplog):
    line = {"query": "q", "positive": "p", "id": 1, "positive_id": 2, "negative_1": "n", "source": "s"}
    path = write(tmp_path / "a.jsonl", line, line | {"negatves": ["n"]}, line | {"negatves": ["n"], "Score": 1})
    assert len(read_pairs([path])) == 3
    negatives, score = (record.getMessage() for record in caplog.records)
    assert negatives == "a.jsonl line 2: key 'negatves' is not read; is 'negatives' meant?"
    assert score == "a.jsonl line 3: key 'Score' is not read; is 'score' meant?"


def test_each_positive_of_a_line_is_a_pair(tmp_path):
    path = write(
        tmp_path / "a.jsonl", {"query": "q", "pos": ["p1", "p2", "p3"], "neg": ["n"]}, {"query": "r", "pos": "p4"}
    )
    pairs = read_pairs([path])
    assert [(p.query, p.positive, p.negatives) for p in pairs] == [
        *(("q", f"p{i}", ("n",)) for i in (1, 2, 3)),
        ("r", "p4", ()),
    ]
    assert pairs[2].where == "a.jsonl line 1" and pairs[3].where == "a.jsonl line 2"
    with pytest.raises(DataError, match=r"a\.jsonl line 1: a text is empty"):
        read_pairs([write(tmp_path / "a.jsonl", {"query": "q", "pos": ["p1", " "]})])
    with pytest.raises(DataError, match=r"a\.jsonl line 1: has 2 queries; give each a line"):
        read_pairs([write(tmp_path / "a.jsonl", {"query": ["q", "r"], "pos": ["p1"]})])
    with pytest.raises(DataError, match="line 1: has a score and negatives"):
        read_pairs([write(tmp_path / "a.jsonl", {"text1": "q", "text2": "r", "score": 1, "neg": ["n"]})])


def test_marks_of_encodings_and_half_characters(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    assert read_texts([str(file)]) == ["one", "two"]
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "ok \\ud83d"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl line 2: holds half of a surrogate pair, '\\ud83d'"):
        read_texts([str(file)])
    pair = {"query": "q", "positive": "p", "instruction": "\udc00"}
    with pytest.raises(DataError, match=r"b\.jsonl line 1: holds half"):
        read_pairs([write(tmp_path / "b.jsonl", pair)])


def test_an_epoch_that_fills_no_batch_is_named():
    """Row 0 keeps both others out of its batch; where one of those comes first, they make one."""
    names = [frozenset(own) for own in ({0, 1}, {0, 2}, {1, 3})]
    seeds = [seed for seed in range(40) if epoch_order(3, seed, 0)[0] != 0 and epoch_order(3, seed, 1)[0] == 0]
    batches = SourceBatches(np.zeros(3, int), names, 2, seeds[0])
    assert sorted(batches.rows(0)) == [1, 2]
    with pytest.raises(DataError, match="batch_size is 2: epoch 2 fills no batch"):
        batches.rows(1)


def test_a_folder_stands_for_its_files_and_queries_take_the_instructions_of_theirs(tmp_path):
    (tmp_path / "echo").mkdir()
    write(tmp_path / "echo" / "notes.txt", "no pair")
    write(tmp_path / "echo" / "nq.jsonl", {"query": "q3", "positive": "p", "negative": "n"})
    write(
        tmp_path / "echo" / "allnli.jsonl",
        *({"query": f"q{i}", "positive": "p"} for i in range(2)),
        {"query": "q2", "positive": "p", "instruction": "own"},
    )
    turns = {"allnli": ("one", "two"), "fever": ("three",)}
    pairs = read_pairs([str(tmp_path / "echo")], turns)
    assert [(p.query, p.source, p.instruction) for p in pairs] == [
        ("q0", 0, "one"),
        ("q1", 0, "two"),
        ("q2", 0, "own"),
        ("q3", 1, None),
    ]
    assert text_files([str(tmp_path / "echo"), "x.txt"])[1:] == [tmp_path / "echo" / "nq.jsonl", Path("x.txt")]
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"pairs: .*none: a folder without \.jsonl files"):
        read_pairs([str(tmp_path / "none")])


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "a.jsonl line 2: not valid JSON"),
        ("[1]", "line 2: expected a JSON object"),
        ({"query": "q"}, "line 2: has none of positive"),
        ({"positive": "q"}, "line 2: has none of query"),
        ({"query": "q", "anchor": "q", "positive": "p"}, "line 2: has more than one of query"),
        ({"query": "", "positive": "p"}, "line 2: a text is empty"),
        ({"query": "q", "positive": 3}, "line 2: a text is empty or no text"),
        ({"query": "q", "positive": "p", "neg": ["", "x"]}, "line 2: a text is empty"),
        ({"query": "q", "positive": "p", "score": "high"}, "line 2: score is not a number"),
        ('{"query": "q", "positive": "p", "score": Infinity}', "line 2: score is not a number"),
        (
            {"query": "q", "positive": "p", "label": 2},
            "line 2: label is 2, a class: keep the lines of pairs that match",
        ),
        ({"query": "q", "positive": "p", "label": 0.5}, "some lines have a score and some have none"),
        ({"query": "q", "positive": "p", "score": 1}, "some lines have a score and some have none"),
        ({"query": "q", "positive": "p", "instruction": 1}, "line 2: instruction is not a text"),
    ],
    ids=str,
)
def test_bad_lines_are_named(line, named, tmp_path):
    path = write(tmp_path / "a.jsonl", {"query": "q", "positive": "p"}, line)
    with pytest.raises(DataError, match=named):
        read_pairs([path])


def test_bad_files_are_named(tmp_path):
    with pytest.raises(DataError, match="texts is empty: name the files"):
        read_texts([])
    with pytest.raises(DataError, match="no such file"):
        read_texts([str(tmp_path / "none.txt")])
    with pytest.raises(DataError, match="hold no text"):
        read_texts([write(tmp_path / "a.txt", "", " ")])
    with pytest.raises(DataError, match=r"give \.txt"):
        read_texts([write(tmp_path / "a.csv", "x")])
    with pytest.raises(DataError, match=r'b\.jsonl line 1: "text" is missing'):
        read_texts([write(tmp_path / "b.jsonl", {"body": "x"})])
    (tmp_path / "c.txt").write_bytes(b"fine\n\xff\n")
    with pytest.raises(DataError, match=r"c\.txt line 2: not UTF-8"):
        read_texts([str(tmp_path / "c.txt")])


def test_rows_are_a_function_of_seed_and_step_and_cover_every_epoch():
    per_epoch = [np.concatenate([rows_of_step(23, 5, 1, step) for step in range(e * 4, e * 4 + 4)]) for e in (0, 1)]
    for rows in per_epoch:
        assert len(set(rows)) == 20
    assert not np.array_equal(*per_epoch)
    assert np.array_equal(rows_of_step(23, 5, 1, 6), rows_of_step(23, 5, 1, 6))
    with pytest.raises(DataError, match="batch_size is 24, the files hold 23 rows"):
        rows_of_step(23, 24, 1, 0)


def test_batches_are_of_one_file_and_hold_no_text_twice():
    sources = np.array([0] * 20 + [1] * 11)
    names = [frozenset([i // 2]) for i in range(31)]  # every text comes twice
    batches = SourceBatches(sources, names, 4, seed=3)
    for epoch in range(2):
        seen: list[int] = []
        for step in range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch):
            rows = batches.rows(step)
            assert len(rows) == 4 and len({int(sources[r]) for r in rows}) == 1
            assert len({i for r in rows for i in names[r]}) == 4
            seen += rows.tolist()
        assert len(seen) >= len(set(seen)) >= 20
    assert np.array_equal(batches.rows(2), SourceBatches(sources, names, 4, seed=3).rows(2))
    with pytest.raises(DataError, match=r"file 1 does not hold as many rows with different texts \(20 rows\)"):
        SourceBatches(sources, [frozenset([0])] * 31, 2, seed=3)


def test_neighbours_stay_together_and_every_row_comes_once_an_epoch():
    groups = np.split(np.arange(26), range(4, 26, 4))
    batches = SourceBatches(np.zeros(26, np.int64), [frozenset([i]) for i in range(26)], 8, seed=1, groups=groups)
    epochs = [[batches.rows(3 * epoch + step).tolist() for step in range(3)] for epoch in range(2)]
    for epoch in epochs:
        rows = [row for batch in epoch for row in batch]
        assert len(rows) == len(set(rows)) == 24
        whole = [row for row in rows if row % 4 == 0 and row < 24]
        assert sum(rows[rows.index(row) :][:4] == [row, row + 1, row + 2, row + 3] for row in whole) >= 4
    assert epochs[0] != epochs[1]


def test_hashes_go_by_what_is_read():
    assert text_hash("Ａ  cat\n") == text_hash("a cat") != text_hash("a cot")
    assert 0 <= text_hash("x") < 1 << 63
