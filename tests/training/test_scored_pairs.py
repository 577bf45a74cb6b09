import json

import pytest

from flashvec.training.data import DataError, read_pairs
from flashvec.training.scored_pairs import read_scored_pairs

ROWS = [("a cat", "a dog", 1.5), ("the sea", "an ocean", 4.5), ("one", "two", 2.0), ("one", "one", 5.0)]
FILES = {
    "sts.csv": "".join(f"main\tfile\t2012\t{i}\t{s}\t{a}\t{b}\n" for i, (a, b, s) in enumerate(ROWS)),
    "sick.txt": "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tjudgment\n"
    + "".join(f"{i}\t{a}\t{b}\t{s}\tNEUTRAL\n" for i, (a, b, s) in enumerate(ROWS)),
    "own.tsv": "score\tsentence1\tsentence2\n" + "".join(f"{s}\t{a}\t{b}\n" for a, b, s in ROWS),
    "own.csv": "sentence1,sentence2,score\r\n" + "".join(f'"{a}",{b},{s}\r\n' for a, b, s in ROWS),
    "dpr.jsonl": "".join(json.dumps({"query": a, "positive": b, "score": s}) + "\n" for a, b, s in ROWS),
    "pairs.jsonl": "".join(json.dumps({"text1": a, "text2": b, "label": s}) + "\n" for a, b, s in ROWS),
    "own.jsonl": "".join(json.dumps({"sentence1": a, "sentence2": b, "score": s}) + "\n" for a, b, s in ROWS),
}


@pytest.mark.parametrize("name", FILES)
def test_reads_every_form(name, tmp_path):
    (tmp_path / name).write_text(FILES[name])
    pairs = read_scored_pairs(tmp_path / name)
    assert list(zip(*pairs, strict=True)) == ROWS


def test_quoted_texts_hold_commas_and_line_ends(tmp_path):
    rows = 'id,sentence1,sentence2,score\n1,"a, b\nc",d,1\n\n2,"say ""so""",e,2\n'
    (tmp_path / "own.csv").write_text(rows)
    assert read_scored_pairs(tmp_path / "own.csv")[:2] == (["a, b\nc", 'say "so"'], ["d", "e"])
    assert [pair.where for pair in read_pairs([str(tmp_path / "own.csv")])] == ["own.csv line 2", "own.csv line 5"]


def test_lines_end_at_line_feeds_alone(tmp_path):
    odd = "a\rb\u2028c\u0085d"
    rows = f"score\tsentence1\tsentence2\r\n1\t{odd}\tx\r\n2\ty\t{odd}\r\n"
    (tmp_path / "own.tsv").write_bytes(rows.encode())
    assert read_scored_pairs(tmp_path / "own.tsv")[:2] == ([odd, "y"], ["x", odd])


@pytest.mark.parametrize("name", FILES)
def test_every_form_is_trained_on_as_it_is(name, tmp_path):
    (tmp_path / name).write_text(FILES[name])
    pairs = read_pairs([str(tmp_path / name)])
    assert [(pair.query, pair.positive, pair.score) for pair in pairs] == ROWS
    first = 1 + name.endswith((".txt", ".tsv", "own.csv"))  # after a header
    assert pairs[0].where == f"{name} line {first}" and not pairs[0].negatives


def test_files_to_train_on_that_are_none_are_named(tmp_path):
    for name, text, named in (
        ("a.csv", "m\tf\t1\t2\t3\ta\tb\n" + "m\tf\t1\t2\t3\ta\t \n", "a.csv line 2: a text is empty"),
        (
            "a.txt",
            "Text without scores.\n",
            "a.txt line 1: 1 columns parted by tabs, and no header with sentence1, sentence2, score",
        ),
        ("a.xlsx", "x", "a.xlsx: pairs come in .jsonl files, scored ones in .csv, .tsv, .txt, too"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=named):
            read_pairs([str(tmp_path / name)])


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("a.csv", "one\ttwo\n", "line 1: 2 columns parted by tabs, and no header"),
        ("a.csv", "m\tf\t1\t2\thigh\ta\tb\n" * 2, "a.csv line 1: expected two texts and a score"),
        ("a.csv", "m\tf\t1\t2\t3\ta\tb\n" + "m\tf\t1\t2\t3\ta\n", "a.csv line 2: expected"),
        ("a.jsonl", "{}\n{}\n", "line 1: expected"),
        ("a.jsonl", "[" * 100_000 + "\n{}\n", "line 1: expected"),
        ("a.jsonl", '{"sentence1": null, "sentence2": "b", "score": 1}\n' * 2, "line 1: expected"),
        ("a.csv", "m\tf\t1\t2\t3\ta\tb\n" + "m\tf\t1\t2\tnan\ta\tb\n", "a.csv line 2: expected two texts and a score"),
        ("a.tsv", "score\tsentence1\tsentence2\n1\ta\tb\n", "1 pairs; a correlation needs two"),
        ("a.tsv", "", "holds no line"),
        ("a.csv", "sentence1,sentence2,score\na,b,1\nc,d\n", "a.csv line 3: 2 columns, the header has 3: a text that"),
        ("a.csv", "score,sentence1,sentence2\n5,A man, in a hat,b\n", "a.csv line 2: 4 columns, the header has 3"),
        ("a.tsv", "score\tsentence1\tsentence2\n5\tA man\tin a hat\tb\n", "a.tsv line 2: expected two texts"),
        ("a.jsonl", '{"query": "a", "score": 1}\n' * 2, "a.jsonl line 1: expected two texts"),
        ("a.jsonl", '{"text1": "a", "text2": "b", "label": 1}\n' * 2, "a.jsonl line 1: label is 1, a class: keep"),
        ("a.tsv", "score\tsentence1\tsentence2\n1\t \tb\n3\tc\td\n", "a.tsv line 2: a text is empty"),
        ("a.tsv", "score\tsentence1\tsentence2\n3\ta\tb\n3\tc\td\n", "a.tsv: all scores are 3: nothing correlates"),
    ],
    ids=lambda value: value[:80],
)
def test_bad_files_are_named(name, text, named, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=named):
        read_scored_pairs(tmp_path / name)
    with pytest.raises(DataError, match="no such file"):
        read_scored_pairs(tmp_path / "none.csv")
    with pytest.raises(DataError, match="a folder; name the file of scored pairs in it"):
        read_scored_pairs(tmp_path)
