import json

import numpy as np
import pytest
from training_runs import config_for, write_pairs

from flashvec.runtime.encoder import Encoder
from flashvec.training.checkpoint import checkpoints
from flashvec.training.run import run_training

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
    assert (np.diff(seen) > 0).all() and len(seen) == (120 if own else 40)
    trained, plain = Encoder.load(out), Encoder.load(config.model)
    assert (trained.spec.layout, trained.spec.attention, trained.spec.pooling) == (
        "llm2vec",
        "bidirectional",
        ("mean",),
    )
    text = "river willow winter"
    assert np.abs(trained.embed(text) - plain.embed(text)).max() > 1e-3


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
