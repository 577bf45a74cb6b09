import numpy as np
import pytest
import torch
from training_runs import config_for

from flashvec.runtime.encoder import Encoder
from flashvec.training import distill
from flashvec.training.config import ConfigError
from flashvec.training.data import DataError, text_hash
from flashvec.training.distill import Distill, frozen_teacher, with_crops
from flashvec.training.distributed import World
from flashvec.training.encode import encode, token_rows
from flashvec.training.model import load_model

TEXTS = ["a river", "two grey stones", "winter", "the lantern and the falcon"]


def objective_for(tmp_path, **values):
    config = config_for("distill", tmp_path, dtype="float32", **values)
    return Distill(load_model(config), config, World())


@pytest.mark.parametrize("whitening", [0.0, 0.35, 0.5])
def test_teacher_is_the_model_run_causally_under_its_prompts(whitening, tmp_path):
    prompts = ['"{text}" means', "In a word, {text} is"]
    objective = objective_for(tmp_path, prompts=prompts, teacher_layers=1, whitening=whitening)
    base = tmp_path / "base"
    cut = objective.teacher.spec.max_length  # some of the file's texts are longer
    causal = Encoder.load(base, attention="causal", pooling="last", layers=1, dtype="float32", max_length=cut)
    rows = np.array([3, 0, 5, 2])
    texts = [objective.texts[row] for row in rows]
    want = torch.zeros(len(rows), len(rows))
    for prompt in prompts:
        all_texts = causal.embed(objective.texts, instruction=prompt, normalize=False)
        _, scales, axes = np.linalg.svd(all_texts - all_texts.mean(0), full_matrices=True)
        variances = np.zeros(len(axes))
        variances[: len(scales)] = scales**2 / len(all_texts)
        weights = 1.0 if not whitening else (variances + 0.05 * variances.mean()) ** -whitening
        vectors = causal.embed(texts, instruction=prompt, normalize=False) - all_texts.mean(0)
        unit = torch.nn.functional.normalize(torch.from_numpy(vectors @ axes.T * weights).float(), dim=1)
        want += unit @ unit.T / 2
    torch.testing.assert_close(objective.teach(rows), want, rtol=0, atol=1e-5)


def test_teacher_reads_a_text_once_and_says_the_same_later(tmp_path, monkeypatch):
    objective, fresh = (objective_for(tmp_path, whitening_texts=2) for _ in range(2))
    monkeypatch.setattr(distill, "MAX_KNOWN_BYTES", 0)
    forgetful = objective_for(tmp_path, whitening_texts=2)
    objective.teach(np.array([0, 1, 2, 3]))
    asked: list[str] = []
    ask = objective._ask
    monkeypatch.setattr(objective, "_ask", lambda texts, prompt: asked.extend(texts) or ask(texts, prompt))
    rows = np.array([7, 4, 2, 0, 5, 6])
    new = [row for row in rows.tolist() if row not in objective.known]
    assert 2 <= len(new) <= 4
    for each in (objective, forgetful):
        assert torch.equal(each.teach(rows), fresh.teach(rows))
    assert asked == [objective.texts[row] for row in new] * len(objective.config.prompts)
    objective.teach(rows)
    assert len(asked) == len(new) * len(objective.config.prompts) and not forgetful.known


def test_every_file_has_its_own_mean_and_its_own_batches(tmp_path):
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, start in zip(files, ("the river", "a stone"), strict=True):
        file.write_text("".join(f"{start} number {i}\n" for i in range(12)))
    objective = objective_for(tmp_path, texts=[str(file) for file in files], batch_size=4)
    alone = [objective_for(tmp_path, texts=[str(file)], batch_size=4) for file in files]
    for source, single in enumerate(alone):
        rows = np.arange(4) + 12 * source
        torch.testing.assert_close(objective.teach(rows), single.teach(np.arange(4)), rtol=0, atol=1e-5)
    (tmp_path / "b.txt").write_text("too few\n")
    with pytest.raises(DataError, match=r"batch_size is 4, and b\.txt does not hold as many rows .*\(1 rows\)"):
        objective_for(tmp_path, texts=[str(file) for file in files], batch_size=4)
    drawn = [objective.sources[objective.batches.rows(step)] for step in range(6)]
    assert all(len(set(sources)) == 1 for sources in drawn) and len({int(sources[0]) for sources in drawn}) == 2


def test_crops_are_runs_of_a_texts_words_behind_it_and_the_same_again():
    texts = ["one two three four five six seven eight", "too short", "a b c d e f"]
    found, origins = with_crops(texts, seed=3)
    assert origins.tolist() == [0, 0, 1, 2, 2] and [found[i] for i in (0, 2, 3)] == texts
    for text, crop in ((texts[0], found[1]), (texts[2], found[4])):
        assert f" {crop} " in f" {text} "
        words = len(text.split())
        assert round(0.4 * words) <= len(crop.split()) <= round(0.8 * words)
    assert with_crops(texts, seed=3)[0] == found
    assert len({with_crops(texts, seed=seed)[0][1] for seed in range(9)}) > 3


def test_crops_and_neighbours_meet_in_a_batch(tmp_path):
    objective = objective_for(tmp_path, batch_size=4, crops=True, neighbours=2)
    rows = objective.batches.rows(0)
    line = objective.origins[rows[0]]
    together = np.flatnonzero(np.isin(objective.origins, (line, line + 1)))
    assert line % 2 == 0 and rows[: len(together)].tolist() == together.tolist() and len(together) >= 2
    seen = set(objective.seen(0))
    lines = {objective.lines[line] for line in objective.origins[rows]}
    assert {text_hash(text) for text in lines | {objective.texts[row] for row in rows}} == seen


def test_teacher_stays_as_it_was_while_the_body_is_trained(tmp_path):
    config = config_for("distill", tmp_path, dtype="float32", train="body")
    model = load_model(config)
    teacher = frozen_teacher(model, config)
    before = teacher.embed(TEXTS)
    with torch.no_grad():
        for x in model.trainable.parameters().values():
            x.mul_(1.5)
    assert (teacher.embed(TEXTS) == before).all()


def test_loss_is_zero_where_similarities_agree_and_positive_else(tmp_path):
    objective = objective_for(tmp_path)
    vectors = torch.randn(6, 32)
    unit = torch.nn.functional.normalize(vectors, dim=1)
    assert float(objective.loss(vectors, unit @ unit.T)) == pytest.approx(0, abs=1e-6)
    assert float(objective.loss(vectors, torch.eye(6))) > 0.01


def test_depths_are_what_a_model_cut_there_gives_and_all_are_taught(tmp_path):
    objective = objective_for(tmp_path, depths=[1, 2], attention_dropout=0.0, lora={"dropout": 0.0})
    model = objective.model
    rows = token_rows(model, TEXTS)
    both = encode(model, rows, range(4), model.trainable.training(), (1, 2))
    alone = [encode(model, rows, range(4), model.trainable.training())]
    layers, model.decoder.layers = model.decoder.layers, model.decoder.layers[:1]
    alone.insert(0, encode(model, rows, range(4), model.trainable.training()))
    model.decoder.layers = layers
    torch.testing.assert_close(both, torch.cat(alone, 1), rtol=0, atol=1e-5)
    target = torch.eye(4)
    want = (objective._loss(alone[0], target) + objective._loss(alone[1], target)) / 2
    torch.testing.assert_close(objective.loss(both, target), want)
    objective.step(0)
    assert all(x.grad is not None for x in model.trainable.parameters().values())


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"depths": [1, 3]}, "depths are .1, 3., expected rising numbers from 1 to 2"),
        ({"teacher_layers": 3}, "teacher_layers is 3, the model has 2"),
        ({"prompts": ["one word"]}, r"each with \{text\} in it"),
        ({"prompts": []}, "give at least one"),
        ({"whitening": 0.6}, "whitening is 0.6 over 2048 texts, expected a power from 0 to 0.5"),
        ({"whitening_texts": 1}, "and at least two texts"),
        ({"neighbours": 0}, "neighbours is 0, expected 1 or more"),
    ],
    ids=str,
)
def test_refuses(values, named, tmp_path):
    with pytest.raises(ConfigError, match=named):
        objective_for(tmp_path, **values)
