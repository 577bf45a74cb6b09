import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from training_runs import config_for

from flashvec.runtime.encoder import Encoder
from flashvec.training import teacher as teacher_module
from flashvec.training.checkpoint import ResumeError
from flashvec.training.data import DataError
from flashvec.training.distill import Distill, with_crops
from flashvec.training.distributed import World
from flashvec.training.encode import encode, token_rows
from flashvec.training.loop import TrainingStopped, train
from flashvec.training.model import load_model
from flashvec.training.run import run_training
from flashvec.training.settings import ConfigError
from flashvec.training.teacher import frozen_encoder

TEXTS = ["a river", "two grey stones", "winter", "the lantern and the falcon"]


def objective_for(tmp_path, **values):
    config = config_for("distill", tmp_path, dtype="float32", **values)
    return Distill(load_model(config), config, World())


def cosines_of(teacher, rows):
    vectors = teacher.vectors(rows)
    return vectors @ vectors.T


def cosines(objective, rows):
    return cosines_of(objective.teacher, rows)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("whitening", [0.0, 0.35, 0.5])
def test_teacher_is_the_model_run_causally_under_its_prompts(whitening, centred, tmp_path):
    prompts = ['"{text}" means', "In a word, {text} is"]
    objective = objective_for(tmp_path, prompts=prompts, teacher_layers=1, whitening=whitening, centred=centred)
    base = tmp_path / "base"
    cut = objective.teacher.encoder.spec.max_length  # some of the file's texts are longer
    causal = Encoder.load(base, attention="causal", pooling="last", layers=1, dtype="float32", max_length=cut)
    of_prompts, floors = [], []
    for prompt in prompts:
        states = causal.embed(objective.texts, instruction=prompt, normalize=False)
        mean = states.mean(0)
        if centred:
            _, scales, axes = np.linalg.svd(states - mean, full_matrices=True)
            variances = np.zeros(len(axes))
            variances[: len(scales)] = scales**2 / len(states)
        else:
            mean, axes, variances = 0 * mean, np.eye(len(mean)), states.var(0)
        weights = 1.0 if not whitening else (variances + 0.05 * variances.mean()) ** -whitening
        unit = torch.nn.functional.normalize(torch.from_numpy((states - mean) @ axes.T * weights).float(), dim=1)
        of_prompts.append(unit @ unit.T)
        floors.append(float(of_prompts[-1][~torch.eye(len(unit), dtype=torch.bool)].mean()))
    shares = 1 / (1 - np.array(floors))
    shares /= shares.sum()
    want = sum(share * found for share, found in zip(shares.tolist(), of_prompts, strict=True))
    rows = np.array([3, 0, 5, 2])
    torch.testing.assert_close(cosines(objective, rows), want[rows][:, rows], rtol=0, atol=1e-5)
    assert objective.teacher.floor == pytest.approx(float(shares @ floors), abs=1e-5)
    assert abs(objective.teacher.floor) < 0.1 if centred else 0.1 < objective.teacher.floor < 1


def test_teacher_reads_a_text_once_and_says_the_same_later(tmp_path, monkeypatch):
    teacher, fresh = (objective_for(tmp_path, whitening_texts=2, **COSINES).teacher for _ in range(2))
    monkeypatch.setattr(teacher_module, "MAX_KNOWN_BYTES", 0)
    forgetful = objective_for(tmp_path, whitening_texts=2).teacher
    teacher.vectors(np.array([0, 1, 2, 3]))
    asked: list[str] = []
    ask = teacher._ask
    monkeypatch.setattr(teacher, "_ask", lambda texts, prompt: asked.extend(texts) or ask(texts, prompt))
    rows = np.array([7, 4, 2, 0, 5, 6])
    new = [row for row in rows.tolist() if row not in teacher.known]
    assert 2 <= len(new) <= 4
    for each in (teacher, forgetful):
        assert torch.equal(each.vectors(rows), fresh.vectors(rows))
    assert asked == [teacher.texts[row] for row in new] * len(teacher.config.prompts)
    teacher.vectors(rows)
    assert len(asked) == len(new) * len(teacher.config.prompts) and not forgetful.known


def test_every_file_has_its_own_mean_and_its_own_batches(tmp_path):
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, start in zip(files, ("the river", "a stone"), strict=True):
        file.write_text("".join(f"{start} number {i}\n" for i in range(12)))
    objective = objective_for(tmp_path, texts=[str(file) for file in files], batch_size=4, centred=True)
    alone = [objective_for(tmp_path, texts=[str(file)], batch_size=4, centred=True) for file in files]
    for source, single in enumerate(alone):
        rows = np.arange(4) + 12 * source
        torch.testing.assert_close(cosines(objective, rows), cosines(single, np.arange(4)), rtol=0, atol=1e-5)
    (tmp_path / "b.txt").write_text("too few\n")
    with pytest.raises(DataError, match=r"batch_size is 4, and b\.txt does not hold as many rows .*\(1 rows\)"):
        objective_for(tmp_path, texts=[str(file) for file in files], batch_size=4)
    drawn = [objective.sources[objective.batches.rows(step)] for step in range(6)]
    assert all(len(set(sources)) == 1 for sources in drawn) and len({int(sources[0]) for sources in drawn}) == 2


def test_one_text_is_told_from_nothing(tmp_path):
    (tmp_path / "texts.txt").write_text("stone\n")
    with pytest.raises(DataError, match="texts: there is one text"):
        objective_for(tmp_path, batch_size=1)


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
    rows = objective.batches.rows(1)
    lines = {objective.lines[line] for line in objective.origins[rows]}
    assert lines | {objective.texts[row] for row in rows} == set(objective.seen(1))


def test_what_the_teacher_read_before_the_first_step_was_seen_in_it(tmp_path):
    objective = objective_for(tmp_path, whitening_texts=32)
    sample = {objective.texts[row] for row in objective.teacher.sample}
    drawn = {objective.texts[row] for row in objective.batches.rows(0)}
    assert len(sample - drawn) > 20 and set(objective.seen(0)) == sample | drawn
    assert not sample <= set(objective.seen(1))


def test_teacher_stays_as_it_was_while_the_body_is_trained(tmp_path):
    config = config_for("distill", tmp_path, dtype="float32", train="body")
    model = load_model(config)
    teacher = frozen_encoder(model, config)
    before = teacher.embed(TEXTS)
    with torch.no_grad():
        for x in model.trainable.parameters().values():
            x.mul_(1.5)
    assert (teacher.embed(TEXTS) == before).all()


COSINES = {"vector_weight": 0.0, "divergence_weight": 1.0, "squared_weight": 1.0}


@pytest.mark.parametrize("centred", [True, False])
def test_loss_is_zero_where_the_student_agrees_with_the_teacher(centred, tmp_path):
    objective = objective_for(tmp_path, centred=centred)
    taught = objective.teacher.vectors(np.arange(6))
    (rotation,) = objective.rotations
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(32), rtol=0, atol=1e-5)
    assert float(objective.loss(3 * taught @ rotation, taught)) == pytest.approx(0, abs=1e-4)
    turned = torch.linalg.qr(torch.randn(32, 32))[0]
    assert float(objective.loss(taught @ turned, taught)) > 0.1  # cosines agree, vectors do not
    cosines_alone = objective_for(tmp_path, centred=centred, **COSINES)
    assert float(cosines_alone.loss(taught @ turned, taught)) == pytest.approx(0, abs=1e-4)
    assert float(cosines_alone.loss(torch.eye(6, 32), taught)) > 0.01


def test_loss_is_its_formula(tmp_path):
    """Away from zero, text by text: the weights, the mean that each term is, and the divergence's direction."""
    objective = objective_for(tmp_path, vector_weight=0.5, divergence_weight=2.0, squared_weight=3.0)
    taught = objective.teacher.vectors(np.arange(5)).double()
    students = F.normalize(torch.randn(5, 32, dtype=torch.float64))
    (rotation,), floor, t = objective.rotations, objective.teacher.floor, objective.config.temperature
    want = 0.5 * (1 - (students * (taught @ rotation.double())).sum(1)).mean()
    for i in range(5):
        others = [j for j in range(5) if j != i]
        T, S = (((x[others] @ x[i]) - floor) / (1 - floor) for x in (taught, students))
        p, q = (T / t).log_softmax(0), (S / t).log_softmax(0)
        want += (2 * (p.exp() * (p - q)).sum() + 3 * (T - S).square().mean()) / 5
    assert float(objective.loss(students, taught)) == pytest.approx(float(want), rel=1e-4)


def test_rotation_brings_the_teacher_nearest_to_the_student_at_its_start(tmp_path):
    objective = objective_for(tmp_path, depths=[1, 2])
    texts = [objective.texts[row] for row in objective.teacher.sample]
    taught = objective.teacher.vectors(objective.teacher.sample)
    assert len(texts) == len(objective.texts)
    model = objective.model
    with torch.no_grad():
        students = encode(model, token_rows(model, texts), range(len(texts)), model.trainable.training(), (1, 2))
    for student, rotation in zip(students.chunk(2, 1), objective.rotations, strict=True):
        unit = F.normalize(student)
        want = torch.linalg.matrix_norm((taught.T @ unit).double(), "nuc")  # the most that any rotation reaches
        assert float((taught @ rotation * unit).sum()) == pytest.approx(float(want), rel=1e-5)


def test_several_prompts_are_seen_along_their_first_axes(tmp_path):
    objective = objective_for(tmp_path, prompts=['"{text}" means', "In a word, {text} is"])
    taught = objective.teacher.vectors(objective.teacher.sample)
    (rotation,) = objective.rotations
    torch.testing.assert_close(rotation.T @ rotation, torch.eye(32), rtol=0, atol=1e-5)
    kept = float((taught @ rotation).square().sum() / taught.square().sum())
    most = float(torch.linalg.svdvals(taught)[:32].square().sum() / taught.square().sum())
    assert kept == pytest.approx(most, abs=1e-5) and taught.shape[1] == 64


def test_an_earlier_adapter_teaches_beside_the_prompt(tmp_path):
    run_training(config_for("distill", tmp_path, output=str(tmp_path / "first"), dtype="float32"))
    objective = objective_for(tmp_path, teachers=[str(tmp_path / "first")], output=str(tmp_path / "second"))
    alone = objective_for(tmp_path).teacher
    texts = [objective.texts[row] for row in objective.teacher.sample]
    earlier = torch.from_numpy(
        Encoder.load(tmp_path / "base", adapters=(tmp_path / "first",), max_length=24, dtype="float32").embed(texts)
    )
    others = ~torch.eye(len(texts), dtype=torch.bool)
    floor = float((earlier @ earlier.T)[others].mean())
    weights = np.array([1 / (1 - alone.floor), 1 / (1 - floor)])
    weights /= weights.sum()
    want = weights[0] * cosines_of(alone, alone.sample) + weights[1] * (earlier @ earlier.T)
    torch.testing.assert_close(cosines(objective, objective.teacher.sample), want, rtol=0, atol=1e-5)
    assert objective.teacher.floor == pytest.approx(weights @ [alone.floor, floor], abs=1e-5)
    twice = objective_for(tmp_path, teachers=[str(tmp_path / "first")] * 2, output=str(tmp_path / "second"))
    weights = np.array([1 / (1 - alone.floor), 2 / (1 - floor)])
    weights /= weights.sum()
    want = weights[0] * cosines_of(alone, alone.sample) + weights[1] * (earlier @ earlier.T)
    torch.testing.assert_close(cosines(twice, twice.teacher.sample), want, rtol=0, atol=1e-5)
    assert twice.teacher.vectors(np.arange(2)).shape[1] == 2 * 32  # it is read once
    run_training(objective.config)
    seen, before = (set(np.load(tmp_path / name / "seen.npy").tolist()) for name in ("second", "first"))
    assert before and before <= seen
    run_training(config_for("distill", tmp_path, output=str(tmp_path / "other"), dtype="float32", loop={"seed": 1}))
    shutil.copy(tmp_path / "other" / "adapter_model.safetensors", tmp_path / "first")
    with pytest.raises(ResumeError):  # the teacher has changed
        run_training(objective.config)


def test_an_earlier_adapter_alone_teaches_fewer_layers_what_all_of_its_say(tmp_path):
    run_training(config_for("distill", tmp_path, output=str(tmp_path / "first"), dtype="float32"))
    first = str(tmp_path / "first")
    objective = objective_for(
        tmp_path, prompts=[], teachers=[first], depths=[1, 2], lora={"start": first, "dropout": 0.0}
    )
    rows = objective.teacher.sample
    encoder = Encoder.load(tmp_path / "base", adapters=(first,), max_length=24, dtype="float32")
    texts = [objective.texts[row] for row in rows]
    taught = objective.teacher.vectors(rows)
    torch.testing.assert_close(taught, torch.from_numpy(encoder.embed(texts)), rtol=0, atol=1e-5)
    training = objective.model.trainable.training()
    start = encode(objective.model, token_rows(objective.model, texts), range(len(texts)), training, (1, 2))
    half, whole = (F.normalize(x.detach()) for x in start.chunk(2, 1))
    assert (
        float(objective._at(1, whole, taught)) < 1e-5 < float(objective._at(0, half, taught))
    )  # it is where it starts


def test_a_teacher_of_another_base_is_refused_and_one_over_adapters_stands_on_them(tmp_path):
    run_training(config_for("distill", tmp_path, output=str(tmp_path / "below"), dtype="float32"))
    over = {"adapters": [str(tmp_path / "below")]}
    run_training(config_for("distill", tmp_path, output=str(tmp_path / "first"), dtype="float32", **over))
    with pytest.raises(ConfigError, match=r"first is of base '\.\./below', the run's base is 'base'"):
        objective_for(tmp_path, teachers=[str(tmp_path / "first")])
    objective = objective_for(tmp_path, teachers=[str(tmp_path / "first")], **over)
    both = (tmp_path / "below", tmp_path / "first")
    want = Encoder.load(tmp_path / "base", adapters=both, max_length=24, dtype="float32").embed(
        objective.texts[:3], normalize=False
    )
    got = objective.teacher._readings[-1](objective.texts[:3], normalize=False)
    np.testing.assert_array_equal(got, want)


def test_depths_are_what_a_model_cut_there_gives_and_all_are_taught(tmp_path):
    weights = {**COSINES, "vector_weight": 10.0}
    objective = objective_for(tmp_path, depths=[1, 2], attention_dropout=0.0, lora={"dropout": 0.0}, **weights)
    model = objective.model
    rows = token_rows(model, TEXTS)
    both = encode(model, rows, range(4), model.trainable.training(), (1, 2))
    alone = [encode(model, rows, range(4), model.trainable.training())]
    layers, model.decoder.layers = model.decoder.layers, model.decoder.layers[:1]
    alone.insert(0, encode(model, rows, range(4), model.trainable.training()))
    model.decoder.layers = layers
    torch.testing.assert_close(both, torch.cat(alone, 1), rtol=0, atol=1e-5)
    taught = objective.teacher.vectors(np.arange(4))
    want = 0.0
    for unit, rotation in zip((F.normalize(x) for x in alone), objective.rotations, strict=True):
        want += objective._of_cosines(unit, taught) / 2 + 10 * (1 - (unit * (taught @ rotation)).sum(1).mean()) / 2
    torch.testing.assert_close(objective.loss(both, taught), want)
    objective.step(0)
    assert all(x.grad is not None for x in model.trainable.parameters().values())


def test_layers_after_the_last_depth_neither_run_nor_learn(tmp_path, monkeypatch):
    objective = objective_for(tmp_path, depths=[1])
    ran = []
    layer = objective.model.decoder._layer
    monkeypatch.setattr(
        objective.model.decoder, "_layer", lambda turn, *rest: ran.append(turn.number) or layer(turn, *rest)
    )
    objective.step(0)
    assert set(ran) == {0}
    trained = objective.model.trainable.parameters()
    assert trained and all(name.startswith("layers.0.") and x.grad is not None for name, x in trained.items())


def test_layers_after_the_last_depth_are_saved_as_they_were(tmp_path):
    """Decayed neither, which a parameter without a loss would be where several processes sum gradients."""
    values = {"depths": [1], "dtype": "float32", "optimizer": {"weight_decay": 0.1}}
    config = config_for("distill", tmp_path, **values)
    start = load_model(config).trainable.lora
    assert run_training(config, until=2)["step"] == 2 and run_training(config)["step"] == 4
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(stored) == 2 * 2 * 7
    for name, a_RC, b_nR in start.matrices():
        a, b = (stored[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        same = [torch.equal(a, a_RC), torch.equal(b, b_nR)]
        assert same == [name.startswith("layers.1.")] * 2, name


def test_a_bodys_layers_after_the_last_depth_are_saved_as_they_were(tmp_path):
    values = {"depths": [1], "dtype": "float32", "train": "body", "optimizer": {"weight_decay": 0.1}}
    run_training(config_for("distill", tmp_path, loop={"steps": 2}, **values))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "out/encoder"))
    changed = {name for name, x in after.items() if not torch.equal(x, before[name])}
    assert changed == {name for name in after if name.startswith("layers.0.") or name == "norm.weight"}


def test_a_taught_layer_that_stays_as_it_was_stops(tmp_path):
    objective = objective_for(tmp_path, depths=[1])
    objective.model.trainable.parameters()["layers.0.down.b"].register_hook(torch.zeros_like)
    with pytest.raises(TrainingStopped, match=r"step 1 left 1 parameters as they were, layers\.0\.mlp\.down_proj"):
        train(objective.config, objective, World())


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"depths": [1, 3]}, "depths are .1, 3., the model has 2 layers"),
        ({"teacher_layers": 3}, "teacher_layers is 3, the model has 2"),
        ({"depths": [2, 1]}, "depths is .2, 1.; expected rising numbers"),
        ({"depths": [0, 1]}, "expected rising numbers from 1 on"),
        ({"prompts": ["one word"]}, r"prompts is .*; expected one or more, each with \{text\} in it"),
        ({"prompts": []}, "prompts is ..; expected one or more, .*; none where teachers teach"),
        ({"whitening": 0.6}, "whitening is 0.6; expected a power from 0 to 0.5"),
        ({"vector_weight": -1.0}, "vector_weight, .* is .-1.0, .*; expected 0 or more, and not all 0"),
        ({"vector_weight": 0.0}, "not all 0"),
        ({"whitening_texts": 1}, "whitening_texts is 1; expected 2 or more"),
        (
            {"prompts": ["{text} is", "{text} means"], "whitening_texts": 9},
            "need 32 texts or more .*, here are 9: give more",
        ),
        ({"neighbours": 0}, "neighbours is 0; expected 1 or more"),
        ({"batch_size": 1, "squared_weight": 1.0}, "batch_size is 1; expected 2 or more, where cosines are taught"),
    ],
    ids=str,
)
def test_refuses(values, named, tmp_path):
    with pytest.raises(ConfigError, match=named):
        objective_for(tmp_path, **values)
