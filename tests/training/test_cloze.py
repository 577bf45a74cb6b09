import json

import pytest
from typer.testing import CliRunner

from flashvec.runtime.cli import app
from flashvec.training.cloze import MIN_ASKING_WORDS, cloze_pairs, paragraph_pairs
from flashvec.training.data import DataError, read_pairs

NAMES = ("Alder", "Birch", "Cedar", "Dogwood", "Elm", "Fir")


def paragraph(name):
    return f"{name} grows beside the old river. {name} is cut down in late winter. {name} burns slowly and very hot."


def write(path, *documents):
    blocks = ["\n".join(['<doc id="1" title="t">', "A heading.", *lines, "</doc>"]) for lines in documents]
    path.write_text("\n".join(blocks) + "\n", encoding="utf-8")
    return str(path)


def name_of(text):
    (found,) = {name for name in NAMES if name in text}
    return found


def test_a_sentence_asks_for_its_paragraph_against_one_of_its_document(tmp_path):
    trees = [paragraph(name) for name in NAMES[:4]]
    files = [
        write(tmp_path / "a.txt", trees[:3], [trees[3]]),
        write(tmp_path / "b.txt", [paragraph("Elm"), "One line."]),
    ]
    pairs = cloze_pairs(files)
    assert [name_of(pair.query) for pair in pairs] == list(NAMES[:5])  # in the order of the source
    for pair in pairs:
        whole = paragraph(name := name_of(pair.query))
        assert pair.query in whole and name_of(pair.positive) == name
        rest = " ".join(whole.replace(pair.query, "").split())
        assert pair.positive in (rest, whole)
    others = [[name_of(text) for text in pair.negatives] for pair in pairs]
    assert all(len(found) == 1 for found in others[:3]) and others[3:] == [[], []]  # of another document: none
    assert all(found[0] in NAMES[:3] and found[0] != name for found, name in zip(others, NAMES[:3], strict=False))


def test_one_of_ten_keeps_its_sentence_and_negatives_are_any_other(tmp_path):
    numbers = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
    lines = [paragraph(f"The {a} and {b} tree") for a in numbers for b in numbers]
    pairs = cloze_pairs([write(tmp_path / "a.txt", lines)])
    kept = sum(pair.query in pair.positive for pair in pairs)
    assert len(pairs) == 100 and 3 <= kept <= 20
    assert len({pair.negatives for pair in pairs}) > 40
    assert all(pair.positive.split(" grows")[0] not in pair.negatives[0] for pair in pairs)


def test_several_sentences_may_ask_and_two_are_left(tmp_path):
    lines = [
        " ".join(f"{name} number {i} grows beside river {j}." for j in range(5)) for i, name in enumerate(NAMES * 5)
    ]
    pairs = cloze_pairs([write(tmp_path / "a.txt", lines)], max_asking=4)
    counts = [pair.query.count("grows") for pair in pairs]
    assert set(counts) == {1, 2, 3}  # of five sentences two answer
    for pair, count in zip(pairs, counts, strict=True):
        assert any(pair.query in line for line in lines) and pair.positive.count("grows") in (5 - count, 5)


def test_a_paragraph_asks_for_the_one_it_stands_beside(tmp_path):
    lines = [" ".join(f"{name} number {i} grows beside the river." for i in range(9)) for name in NAMES]
    file = write(tmp_path / "a.txt", lines[:5], lines[5:], ["One line."])
    pairs = [pair for seed in range(20) for pair in paragraph_pairs([file], max_words=30, seed=seed)]
    found = {(name_of(pair.query), name_of(pair.positive), *map(name_of, pair.negatives)) for pair in pairs}
    # Two by two, the fifth of its document alone; either asks; any other of the document is what does not match.
    both = [("Alder", "Birch"), ("Birch", "Alder"), ("Cedar", "Dogwood"), ("Dogwood", "Cedar")]
    assert found == {(*two, other) for two in both for other in NAMES[:5] if other not in two}
    lengths = {len(pair.query.split()) for pair in pairs}
    assert lengths == set(range(MIN_ASKING_WORDS, 31)) and {len(pair.positive.split()) for pair in pairs} == {30}
    for pair in pairs:
        assert any(line.startswith(pair.query) for line in lines)
        assert any(line.startswith(pair.positive) for line in lines)
    alone = paragraph_pairs([write(tmp_path / "b.txt", lines[:2])])
    assert len(alone) == 1 and alone[0].negatives == ()  # the document has no third
    assert [len(paragraph_pairs([file], max_words=8, limit=n)) for n in (1, 2, 9)] == [1, 2, 2]


def test_a_limit_and_a_seed_draw(tmp_path):
    file = write(tmp_path / "a.txt", [paragraph(name) for name in NAMES])
    draws = [cloze_pairs([file], limit=3, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2] and [len(draw) for draw in draws] == [3, 3, 3]
    assert all(len(pair.positive.split()) == 4 for pair in cloze_pairs([file], max_words=4))
    same = write(tmp_path / "b.txt", [paragraph("Fir")] * 9)
    assert len({pair.query for pair in cloze_pairs([same])}) == len(cloze_pairs([same])) <= 3


def test_a_line_of_json_is_a_document(tmp_path):
    rows = [[paragraph("Alder"), "A caption.", paragraph("Birch")], [paragraph("Cedar")], [paragraph("Elm")]]
    file = tmp_path / "trees.jsonl"
    file.write_text("".join(json.dumps({"text": "\n".join(lines)}) + "\n" for lines in rows))
    pairs = cloze_pairs([str(file)])
    assert [(name_of(p.query), *map(name_of, p.negatives)) for p in pairs] == [
        ("Alder", "Birch"), ("Birch", "Alder"), ("Cedar",), ("Elm",)
    ]  # fmt: skip
    assert [{name_of(p.query), name_of(p.positive)} for p in paragraph_pairs([str(file)])] == [{"Alder", "Birch"}]


def test_bad_input(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt: no such file"):
        cloze_pairs([str(tmp_path / "nowhere.txt")])
    file = write(tmp_path / "a.txt", ["Two sentences are here now. That is one too few."])
    assert cloze_pairs([file]) == []
    for bad in ({"max_words": 0}, {"limit": 0}, {"max_asking": 0}):
        with pytest.raises(ValueError, match="expected at least 1"):
            cloze_pairs([file], **bad)
    for bad in ({"max_words": 0}, {"limit": 0}):
        with pytest.raises(ValueError, match=r"max_words is \d+, limit is \w+; expected at least 1"):
            paragraph_pairs([file], **bad)


def test_the_command_writes_what_training_reads(tmp_path):
    file = write(tmp_path / "trees.txt", [paragraph(name) for name in NAMES])
    out = tmp_path / "pairs.jsonl"
    done = CliRunner().invoke(app, ["pairs", file, "--out", str(out), "--json"])
    assert done.exit_code == 0 and json.loads(done.output) == {"out": str(out), "pairs": 6, "negatives": 6}
    assert [(p.query, p.positive, p.negatives) for p in read_pairs([str(out)])] == [
        (p.query, p.positive, p.negatives) for p in cloze_pairs([file])
    ]
    told = CliRunner().invoke(app, ["pairs", file, "--out", str(out), "--limit", "2"])
    assert told.output == f"{out}: 2 pairs, 2 with a negative\n"  # on one line, however long the name
    told = CliRunner().invoke(app, ["pairs", file, "--out", str(out), "--no-negatives"])
    assert told.output == f"{out}: 6 pairs, 0 with a negative\n"
    alone = [(p.query, p.positive) for p in read_pairs([str(out)])]
    assert alone == [(p.query, p.positive) for p in cloze_pairs([file])]
    file = write(tmp_path / "short.txt", ["Nothing here."])
    failed = CliRunner().invoke(app, ["pairs", file, "--out", str(tmp_path / "none.jsonl")])
    assert failed.exit_code == 1 and not (tmp_path / "none.jsonl").exists()
    assert str(failed.exception) == "short.txt: no paragraph (a line) has 3 whole sentences"
    failed = CliRunner().invoke(app, ["pairs", file, "--out", str(tmp_path / "none.jsonl"), "--paragraphs"])
    assert str(failed.exception) == "short.txt: no document has two paragraphs of 3 whole sentences"
    failed = CliRunner().invoke(app, ["pairs", file, "--out", str(out), "--paragraphs", "--max-asking", "2"])
    assert "--max-asking is 2: with --paragraphs a whole paragraph asks" in str(failed.exception)


def test_the_command_brings_topics_together(tmp_path):
    """A name is the one word that few texts have; here they come in turns."""
    names = (*NAMES, "Ginkgo", "Hazel", "Iroko", "Juniper", "Larch", "Maple")
    lines = [paragraph(f"{name} {place}") for place in range(5) for name in names]
    file, out = write(tmp_path / "a.txt", lines), tmp_path / "pairs.jsonl"
    told = CliRunner().invoke(app, ["pairs", file, "--out", str(out), "--no-negatives", "--topics", "5"])
    plain = [(p.query, p.positive) for p in cloze_pairs([file])]
    assert told.output == f"{out}: {len(plain)} pairs, 0 with a negative\n"
    found = [(p.query, p.positive) for p in read_pairs([str(out)])]
    assert sorted(found) == sorted(plain)
    asked = [query.split()[0] for query, _ in found]
    assert [set(asked[start : start + 5]) for start in range(0, 60, 5)] == [{asked[start]} for start in range(0, 60, 5)]
    assert sorted(asked[::5]) == sorted(names)


def test_the_command_takes_paragraphs(tmp_path):
    file = write(tmp_path / "trees.txt", [paragraph(name) for name in NAMES])
    out = tmp_path / "pairs.jsonl"
    told = CliRunner().invoke(app, ["pairs", file, "--out", str(out), "--paragraphs", "--max-words", "12"])
    assert told.output == f"{out}: 3 pairs, 3 with a negative\n"
    assert [(p.query, p.positive, p.negatives) for p in read_pairs([str(out)])] == [
        (p.query, p.positive, p.negatives) for p in paragraph_pairs([file], max_words=12)
    ]
