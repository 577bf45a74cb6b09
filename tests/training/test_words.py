import json
import logging

import numpy as np
import pytest
import torch
import transformers
from tiny_models import tiny_checkpoint, tiny_tokenizer
from training_runs import tiny_base
from typer.testing import CliRunner

from flashvec.runtime.cli import app
from flashvec.runtime.encoder import Encoder
from flashvec.runtime.progress import Progress
from flashvec.training.data import DataError
from flashvec.training.hf_encoder import HfEncoder
from flashvec.training.word_files import TaggedSentence
from flashvec.training.words import WordSet, probe_words

NAMES = {"ann": "B-per", "lee": "I-per", "rome": "B-loc", "sees": "O", "in": "O", "and": "O"}
SENTENCES = ["ann lee sees rome", "rome and ann", "ann sees ann lee in rome", "in rome ann lee sees rome"]
VECTORS = {word: np.random.default_rng(i).normal(size=8).astype(np.float32) for i, word in enumerate(NAMES)}


def tagged(sentences, tags=NAMES):
    return [TaggedSentence(s.split(), [tags[word] for word in s.split()]) for s in sentences]


def embed(lists):
    """A vector for every word of its own; none for "lee" at the end of a sentence."""
    rows = [np.stack([VECTORS[word] for word in words]) for words in lists]
    for row, words in zip(rows, lists, strict=True):
        if words[-1] == "lee":
            row[-1] = 0
    return rows


def test_separable_words_are_all_found():
    found = probe_words(embed, tagged(SENTENCES * 10), tagged(SENTENCES), has_entities=True, seeds=2)
    for name in ("accuracy", "precision", "recall", "f1"):
        assert found[name] == 100 and found[f"{name}_std"] == 0
    assert found["words"] == 19 and found["entities"] == 10 and found["left_out"] == 0
    assert found["commonest"] == pytest.approx(100 * 6 / 19, abs=1e-3)
    assert [run["seed"] for run in found["runs"]] == [0, 1]


def test_parts_of_speech_have_no_entities_and_one_seed_no_deviation():
    found = probe_words(embed, tagged(SENTENCES * 10), tagged(SENTENCES), has_entities=False, seeds=1)
    assert found["accuracy"] == 100
    assert not found.keys() & {"f1", "precision", "entities", "accuracy_std"}


def test_a_tag_that_training_has_not_is_wrong_and_said_once(caplog):
    dev = tagged(SENTENCES, {**NAMES, "and": "B-org", "in": "I-org"})
    found = probe_words(embed, tagged(SENTENCES * 10), dev, has_entities=True, seeds=2)
    assert found["accuracy"] == pytest.approx(100 * 16 / 19, abs=1e-3)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == ["3 words have a tag that training has not (B-org, I-org): counted as wrong"]


def test_words_without_a_vector_are_left_out_and_said(caplog):
    found = probe_words(embed, tagged(SENTENCES * 10), tagged(["ann lee", "lee", "rome"]), has_entities=True)
    assert (found["words"], found["left_out"], found["accuracy"]) == (2, 2, 100)
    assert "0 training words and 2 others have no vector" in caplog.text


def test_sentences_stay_apart():
    words = WordSet(embed, tagged(["rome", "lee", "rome rome"]), Progress(3, False))
    assert words.by_sentence(words.tags) == [["B-loc"], ["B-loc", "B-loc"]]
    assert words.vectors.shape == (3, 8)


@pytest.mark.parametrize(
    ("train", "dev", "named"),
    [
        (["rome", "rome"], ["rome"], "1 different tags in 2 sentences"),
        (["rome and"], ["rome"], "2 different tags in 1 sentences"),
        (SENTENCES, ["lee"], "no word that is to be tagged"),
    ],
)
def test_too_little_to_learn_from(train, dev, named):
    with pytest.raises(DataError, match=named):
        probe_words(embed, tagged(train), tagged(dev), has_entities=True)


def test_progress_is_shown(capsys):
    probe_words(embed, tagged(SENTENCES * 3), tagged(SENTENCES), has_entities=False, seeds=1, show_progress=True)
    shown = capsys.readouterr().err
    assert "embedding" in shown and "probing" in shown


def write_conll(path, count):
    text = "\n\n".join("\n".join(f"{word}\t{NAMES[word]}" for word in s.split()) for s in SENTENCES * count)
    path.write_text(text + "\n")
    return str(path)


def test_command_runs_ours_and_hugging_faces_encoders(tmp_path):
    files = [write_conll(tmp_path / "train.conll", 5), write_conll(tmp_path / "dev.conll", 1)]
    tiny_base(tmp_path / "base")
    bert = transformers.BertConfig(
        vocab_size=420, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    transformers.BertModel(bert).save_pretrained(tmp_path / "bert")
    tiny_tokenizer(tmp_path / "bert")
    command = ["evaluate", "words", *files, "--task", "ner", "--model"]
    for model, more in (("base", ["--shift"]), ("bert", ["--backend", "hf"])):
        result = CliRunner().invoke(app, [*command, str(tmp_path / model), "--json", "--seeds", "2", *more])
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        assert found["accuracy"] > 90 and len(found["runs"]) == 2 and found["words"] == 19
    result = CliRunner().invoke(app, [*command, str(tmp_path / "base"), "--max-sentences", "2"])
    assert "F1" in result.stdout and "over 7 words, 3 seeds" in " ".join(result.stdout.split())
    result = CliRunner().invoke(app, [*command, str(tmp_path / "base"), "--column", "7"])
    assert result.exit_code == 1 and "train.conll line 1" in str(result.exception)
    assert "Example" in CliRunner().invoke(app, ["evaluate", "words", "--help"]).stdout


def test_words_are_read_without_a_chat_template(tmp_path):
    files = [write_conll(tmp_path / "train.conll", 5), write_conll(tmp_path / "dev.conll", 1)]
    tiny_base(tmp_path / "model")
    runs = []
    for keys in ({}, {"architectures": ["LlamaBiModel"], "_name_or_path": "meta-llama/Llama-2-7b-chat-hf"}):
        config = json.loads((tmp_path / "model" / "config.json").read_text()) | keys
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        model = str(tmp_path / "model")
        assert (Encoder.load(model).spec.template is not None) == bool(keys)
        command = ["evaluate", "words", *files, "--task", "ner", "--model", model, "--json", "--max-sentences", "3"]
        result = CliRunner().invoke(app, [*command, "--shift", "--dtype", "float32"])
        runs.append(json.loads(result.stdout))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("shift", [0, 1])
def test_hugging_faces_words_are_ours(shift, tmp_path):
    tiny_checkpoint(tmp_path, "llama")
    words = [["Mix", "flour", "unheardof"], ["x"], ["A", "decoder", "reads", "from", "left", "to", "right"]]
    ours = Encoder.load(tmp_path, attention="causal", dtype="float32").embed_words(words, shift=shift)
    for got, want in zip(HfEncoder(str(tmp_path)).embed_words(words, shift), ours, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_hugging_faces_words_need_characters(tmp_path, monkeypatch):
    tiny_checkpoint(tmp_path, "llama")
    encoder = HfEncoder(str(tmp_path))
    monkeypatch.setattr(type(encoder.tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match="need a fast tokenizer"):
        encoder.embed_words([["x"]])
