import json

import pytest
from typer.testing import CliRunner

from flashvec.runtime.cli import app
from flashvec.training.data import DataError, text_hash
from flashvec.training.sentences import MAX_WORDS, sentences_of, text_hashes, training_lines

PARAGRAPHS = """<doc id="1" title="Rivers">
Rivers

The river rises in the hills above the town. It was dammed in 1912 by J. R. Marsh, whose mill stood there! Why not?
Its water is "cold and clear all year round." Dr. Ash measured it twice every winter. It reaches the sea at Greyport.
</doc>
"""


@pytest.mark.parametrize(
    ("paragraph", "want"),
    [
        ("One two three four five. Six, seven, eight and nine.", ["One two three four five.",
         "Six, seven, eight and nine."]),
        ("It was built by J. R. Marsh in a year of want.", ["It was built by J. R. Marsh in a year of want."]),
        ("Dr. Ash, of St. Ives, met Mrs. Low there.", ["Dr. Ash, of St. Ives, met Mrs. Low there."]),
        ("He said it was \"cold at night.\" Then he went away again.", ["He said it was \"cold at night.\"",
         "Then he went away again."]),
        ("Too short. See also", []),
        ("A line of words that has no end at all", []),
        ("12, 13, 14 (15), 16; 17, 18 = 19 + 20 * 21.", []),
        ("word " * MAX_WORDS + "word.", []),
        ("", []),
    ],
    ids=range(9),
)  # fmt: skip
def test_whole_sentences_are_found(paragraph, want):
    assert sentences_of(paragraph) == want


def test_a_passage_is_known_by_itself_and_by_each_sentence_in_it():
    """Short ones too, which are no sentences to train on."""
    passage = "A man plays.  Two dogs run through the snow!\nno end"
    want = [passage, "a man plays.", "Two dogs run through the snow!", "no end"]
    assert text_hashes(passage) == {text_hash(text) for text in want}
    assert text_hashes("One alone.") == {text_hash("One alone.")}


def test_lines_keep_their_order_and_come_once(tmp_path):
    file = tmp_path / "rivers.txt"
    file.write_text(PARAGRAPHS * 2, encoding="utf-8")
    lines = training_lines([str(file)], passages=0)
    assert len(lines) == len(set(lines)) == 5
    assert lines[0].startswith("The river rises") and lines[-1] == "It reaches the sea at Greyport."
    joined = training_lines([str(file)], passages=1.0, seed=1)
    assert len(joined) < 5 and lines[0] + " " + lines[1] in joined[0]
    mixed = " ".join(training_lines([str(file)], passages=0.5, seed=2))
    assert all(mixed.count(line) == 1 for line in lines)  # alone or in a passage, not both


def test_a_limit_draws_whole_paragraphs(tmp_path):
    file = tmp_path / "many.txt"
    numbers = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    file.write_text(
        "".join(f"The first line of part {n} is this. The second line of part {n} is this.\n" for n in numbers)
    )
    draws = [training_lines([str(file)], limit=5, passages=0, seed=seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2] and len(draws[0]) == 5
    whole = training_lines([str(file)], passages=0)
    assert [whole.index(line) for line in draws[0]] == sorted(whole.index(line) for line in draws[0])
    firsts = [line for line in draws[0] if "first" in line]
    assert sum(line.replace("first", "second") in draws[0] for line in firsts) == 2


def test_bad_input(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt: no such file"):
        training_lines([str(tmp_path / "nowhere.txt")])
    file = tmp_path / "a.txt"
    file.write_text("no sentence here\n")
    assert training_lines([str(file)]) == []
    for bad in ({"passages": 2.0}, {"limit": 0}):
        with pytest.raises(ValueError, match="expected a share from 0 to 1, and at least 1"):
            training_lines([str(file)], **bad)


def test_command_writes_the_file(tmp_path):
    file, out = tmp_path / "rivers.txt", tmp_path / "out.txt"
    file.write_text(PARAGRAPHS, encoding="utf-8")
    done = CliRunner().invoke(app, ["sentences", str(file), "--out", str(out), "--passages", "0", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output) == {"out": str(out), "lines": 5, "words": sum(map(len, map(str.split, out.open())))}
    file.write_text("no sentence here\n")
    failed = CliRunner().invoke(app, ["sentences", str(file), "--out", str(tmp_path / "none.txt")])
    assert failed.exit_code and not (tmp_path / "none.txt").exists()
