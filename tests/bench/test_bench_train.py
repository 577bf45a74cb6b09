"""The benchmark of a training step: both sides compute one loss, and its rows hold what the page shows."""

import pytest
from tiny_models import tiny_checkpoint

from flashvec.bench import bench_train


def test_sides_agree_and_are_timed(tmp_path, monkeypatch):
    tiny_checkpoint(tmp_path / "tiny", "llama")
    monkeypatch.setattr(bench_train, "TEXTS_PER_STEP", 4)
    rows = bench_train.bench(tmp_path / "tiny", "sentences", 1)
    assert [row["variant"] for row in rows] == ["transformers + PEFT, sdpa padded", *bench_train.RATES, "bare products"]
    assert all(row["tokens_per_s"] > 0 and row["model"] == "tiny" for row in rows)
    assert rows[0]["over_peft"] == 1 and rows[-1]["of_ceiling"] == 1


def test_another_loss_is_not_timed(tmp_path, monkeypatch):
    tiny_checkpoint(tmp_path / "tiny", "llama")
    monkeypatch.setattr(bench_train, "TEXTS_PER_STEP", 4)
    monkeypatch.setattr(bench_train, "load", lambda folder, peft, load=bench_train.load: _moved(load(folder, peft)))
    with pytest.raises(SystemExit, match="losses differ"):
        bench_train.bench(tmp_path / "tiny", "sentences", 1)


def _moved(model):
    for _, a, _ in model.trainable.lora.matrices():
        a.mul_(3)
    return model
