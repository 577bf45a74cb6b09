import dataclasses
import json
import mmap
import sys

import numpy as np
import pytest
import torch
from training_runs import config_for, write_pairs

from flashvec.runtime.encoder import Encoder
from flashvec.training.adapter import read_adapter
from flashvec.training.checkpoint import checkpoints
from flashvec.training.config import OptimizerConfig
from flashvec.training.contrastive import Contrastive
from flashvec.training.distributed import World
from flashvec.training.evaluate import embed_with, sts_score
from flashvec.training.events import FOLDER
from flashvec.training.loop import TrainingStopped, learning_rate, train
from flashvec.training.memory import used_bytes
from flashvec.training.mntp import Mntp
from flashvec.training.model import load_model
from flashvec.training.progress import TrainingBar
from flashvec.training.run import run_training
from flashvec.training.scored_pairs import read_scored_pairs
from flashvec.training.settings import ConfigError

OBJECTIVES = ["mntp", "contrastive", "distill"]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_leaves_an_encoder_a_log_and_the_names_of_what_it_saw(objective, tmp_path):
    own = {"pairs": [str(write_pairs(tmp_path / "pairs.jsonl"))]} if objective == "contrastive" else {}
    config = config_for(objective, tmp_path, loop={"steps": 12}, optimizer={"learning_rate": 3e-3}, **own)
    last = run_training(config)
    out = tmp_path / "out"
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 13)) and last["step"] == 12
    assert np.mean([line["loss"] for line in log[-3:]]) < np.mean([line["loss"] for line in log[:3]])
    seen = np.load(out / "seen.npy", allow_pickle=False)
    assert (np.diff(seen) > 0).all() and 36 <= len(seen) <= (120 if own else 40)
    trained, plain = Encoder.load(out), Encoder.load(config.model)
    assert (trained.spec.layout, trained.spec.attention, trained.spec.pooling) == (
        "llm2vec",
        "bidirectional",
        ("mean",),
    )
    text = "river willow winter"
    assert np.abs(trained.embed(text) - plain.embed(text)).max() > 1e-3


def test_tensorboard_shows_the_log_and_a_resumed_run_goes_on_in_it(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_for("contrastive", tmp_path, loop={"tensorboard": True})
    run_training(config, until=3)
    run_training(config)
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path / "out" / FOLDER))
    events.Reload()
    assert {"loss", "gradient_norm", "learning_rate", "tokens_per_s", "memory_gib"} <= set(events.Tags()["scalars"])
    curve = [(event.step, event.value) for event in events.Scalars("loss")]
    assert curve == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in log] and len(curve) == 4
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'flashvec\[tensorboard\]'"):
        run_training(config_for("contrastive", tmp_path, output=str(tmp_path / "again"), loop={"tensorboard": True}))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_resumed_is_uninterrupted_bit_for_bit(objective, tmp_path):
    whole = config_for(objective, tmp_path, output=str(tmp_path / "whole"), loop={"steps": 5})
    run_training(whole)
    parts = config_for(objective, tmp_path, output=str(tmp_path / "parts"), loop={"steps": 5})
    run_training(parts, until=3)
    run_training(parts)
    for name in ("adapter_model.safetensors", "checkpoint-00000005/optimizer.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    assert [json.loads(line)["loss"] for line in logs[0]] == [json.loads(line)["loss"] for line in logs[1]]
    assert [p.name for p in checkpoints(tmp_path / "parts")] == ["checkpoint-00000004", "checkpoint-00000005"]


def stopping(tmp_path, change, **values):
    """A run whose objective was changed by `change`; returns the error it stops with."""
    config = config_for("contrastive", tmp_path, **values)
    model = load_model(config)
    objective = Contrastive(model, config, World())
    change(objective)
    with pytest.raises(TrainingStopped) as error:
        train(config, objective, World())
    return str(error.value)


def test_a_loss_that_is_not_finite_stops_with_the_state_before_it(tmp_path):
    def change(objective):
        step = objective.step
        objective.step = lambda number: {**step(number), "loss": float("nan")} if number == 2 else step(number)

    assert "step 3: the loss is not finite" in stopping(tmp_path, change)
    assert [p.name for p in checkpoints(tmp_path / "out")] == ["checkpoint-00000002"]


def test_the_checkpoint_before_one_that_gave_no_number_stays(tmp_path):
    def change(objective):
        step = objective.step
        objective.step = lambda number: {**step(number), "loss": float("nan")} if number == 3 else step(number)

    stopping(tmp_path, change, loop={"keep_checkpoints": 1})
    assert [p.name for p in checkpoints(tmp_path / "out")] == ["checkpoint-00000002", "checkpoint-00000003"]


def test_a_gradient_that_is_not_finite_stops(tmp_path):
    def change(objective):
        loss = objective.loss
        objective.loss = lambda vectors, columns: loss(vectors, columns) + (vectors - vectors.detach()).sqrt().sum()

    assert "step 1: the gradient is not finite" in stopping(tmp_path, change)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_model_that_a_rate_too_high_has_ended_stops(objective, tmp_path, monkeypatch):
    """Overflowed states are zero behind a norm: the loss is finite, and stays as it is."""
    config = config_for(objective, tmp_path)
    config = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=1e9, schedule="constant"))
    with pytest.raises(TrainingStopped, match=r"steps 2 and 3: the loss is .* its gradient zero: .*, with a lower"):
        run_training(config)


def test_a_single_step_without_a_gradient_does_not_stop(tmp_path):
    config = config_for("contrastive", tmp_path)
    objective = Contrastive(load_model(config), config, World())
    step = objective.step

    def changed(number):
        found = step(number)
        for x in objective.model.trainable.parameters().values():
            x.grad.mul_(number % 2 == 0)
        return {**found, "loss": 1.0}

    objective.step = changed
    assert train(config, objective, World())["step"] == 4


def test_causal_attention_stops(tmp_path):
    def change(objective):
        run = objective.model.decoder.streams
        objective.model.decoder.streams = lambda ids, schedule, plan, _, *more, **rest: run(
            ids, schedule, plan, True, *more, **rest
        )

    assert "attention is still causal" in stopping(tmp_path, change)


def test_only_the_first_process_draws_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shown = []
    enter = TrainingBar.__enter__
    monkeypatch.setattr(TrainingBar, "__enter__", lambda bar: shown.append(bar.show) or enter(bar))
    config = config_for("mntp", tmp_path, loop={"steps": 1})
    objective = Mntp(load_model(config, wants_head=True), config, World())
    for rank in (0, 1):
        world = World()
        world.rank = rank
        train(config, objective, world, until=0)
    assert shown == [True, False]


def test_processes_are_compared_after_the_first_step_and_the_last(tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr(World, "check_equal", lambda world, parameters, step: compared.append(step))
    config = config_for("mntp", tmp_path)
    run_training(config, until=3)
    run_training(config)
    assert compared == [1, 3, 4]


def test_memory_of_the_log_is_this_processes_own():
    before = used_bytes(torch.device("cpu"))
    size = 1 << 26
    with mmap.mmap(-1, size) as held:  # from the system: numpy might give what the process has kept
        held.write(b"x" * size)
        assert 0.9 * size < used_bytes(torch.device("cpu")) - before < 2.5 * size


def test_while_layers_are_taught_up_to_a_depth_that_one_is_scored(tmp_path):
    model = load_model(config_for("distill", tmp_path, dtype="float32"))
    want = embed_with(model)(["a river", "x"])
    np.testing.assert_array_equal(embed_with(model, (2,))(["a river", "x"]), want)
    cut = embed_with(model, (1,))(["a river", "x"])
    model.decoder.layers = model.decoder.layers[:1]
    np.testing.assert_allclose(embed_with(model)(["a river", "x"]), cut, atol=1e-6)
    assert np.abs(cut - want).max() > 1e-3


def test_a_matrix_that_stays_zero_stops(tmp_path):
    def change(objective):
        lora = objective.model.trainable.lora
        lora.parameters()["layers.1.down.b"].register_hook(torch.zeros_like)

    assert "step 1 left 1 parameters as they were, layers.1.mlp.down_proj" in stopping(tmp_path, change)


def test_a_body_may_begin_with_steps_below_its_weights_last_bits(tmp_path):
    slow = {"learning_rate": 1e-9, "schedule": "linear", "warmup_steps": 1000}
    last = run_training(config_for("contrastive", tmp_path, train="body", optimizer=slow, loop={"steps": 1}))
    assert last["step"] == 1


def test_data_must_be_named_before_a_model_is_read(tmp_path):
    config = config_for("mntp", tmp_path, texts=[])
    with pytest.raises(ConfigError, match=r"no data: name files, such as texts=wiki\.txt; a data set's name alone"):
        run_training(dataclasses.replace(config, model=str(tmp_path / "nowhere")))


def test_rules_that_a_folder_states_are_kept_or_refused(tmp_path):
    """They hold again when the folder is opened with the adapter, whatever the run was told."""
    config = config_for("contrastive", tmp_path)
    Encoder.load(config.model, attention="causal", pooling="last").save(tmp_path / "causal")
    with pytest.raises(ConfigError, match="states causal attention"):
        load_model(dataclasses.replace(config, model=str(tmp_path / "causal")))
    Encoder.load(config.model).save(tmp_path / "mean")
    own = dataclasses.replace(config, model=str(tmp_path / "mean"), dtype="float32")
    with pytest.raises(ConfigError, match=r"pooling is last, but .* states mean"):
        load_model(dataclasses.replace(own, pooling="last"))
    run_training(own)
    model = load_model(own)
    read_adapter(tmp_path / "out", model.trainable.lora)
    want = embed_with(model)(["a river"])
    for loaded in (
        Encoder.load(tmp_path / "out", dtype="float32"),
        Encoder.load(tmp_path / "mean", adapters=(tmp_path / "out",), dtype="float32"),
    ):
        np.testing.assert_allclose(loaded.embed(["a river"]), want / np.linalg.norm(want), atol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "want"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.8536, 0.5, 0.1464]),
    ],
)
def test_schedules(schedule, want):
    config = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=2)
    assert [learning_rate(config, 6, step) for step in range(6)] == pytest.approx(want, abs=1e-4)
    longer = OptimizerConfig(learning_rate=1.0, decay_steps=60)
    assert learning_rate(longer, 6, 5) == pytest.approx(55 / 60)


def test_a_rate_that_only_rises_is_told(tmp_path, caplog):
    run_training(config_for("mntp", tmp_path, optimizer={"warmup_steps": 2, "schedule": "linear"}, loop={"steps": 2}))
    assert "optimizer.warmup_steps is 2 of 2 steps: the rate only rises" in caplog.text


@pytest.mark.parametrize(("every", "looked_at"), [(2, [2, 4, 5]), (9, [5])])
def test_the_last_step_is_always_evaluated(every, looked_at, tmp_path):
    lines = (f'{{"query": "{x}", "positive": "b", "score": 0.{x}}}\n' for x in (1, 2))
    (tmp_path / "dev.jsonl").write_text("".join(lines))
    loop = {"steps": 5, "evaluate_every": every, "log_every": 1}
    run_training(config_for("mntp", tmp_path, sts=str(tmp_path / "dev.jsonl"), loop=loop))
    log = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "sts" in line] == looked_at


def test_a_run_is_scored_under_the_instruction_that_it_trains_with(tmp_path):
    pairs = write_pairs(tmp_path / "pairs.jsonl", scored=True, negatives=0)
    renamed = pairs.read_text().replace("query", "sentence1").replace("positive", "sentence2")
    (tmp_path / "dev.jsonl").write_text(renamed)
    values = {"pairs": [str(pairs)], "loss": "cosent", "attention_dropout": 0.0, "instruction": "Is it so: "}
    scored = {"sts": str(tmp_path / "dev.jsonl"), "loop": {"steps": 2, "evaluate_every": 2}}
    last = run_training(config_for("contrastive", tmp_path, **values, **scored))
    encoder = Encoder.load(tmp_path / "out", dtype="float32", max_length=24)
    read = read_scored_pairs(tmp_path / "dev.jsonl")
    with_it, without = (
        sts_score(lambda texts, own=own: encoder.embed(texts, instruction=own), read)["spearman"]
        for own in ("Is it so: ", None)
    )
    assert last["sts"] == pytest.approx(with_it, abs=0.5) and abs(with_it - without) > 1
