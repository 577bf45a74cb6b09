"""The benchmark of a training step: both sides compute one loss, and its rows hold what the page shows."""

import numpy as np
import pytest
import torch
from tiny_models import tiny_checkpoint
from transformers import AutoModel

from flashvec.bench import bench_train
from flashvec.bench.gpu_train import Peft


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sides_agree_and_are_timed(dtype, tmp_path, monkeypatch):
    tiny_checkpoint(tmp_path / "tiny", "llama")
    monkeypatch.setattr(bench_train, "TEXTS_PER_STEP", 4)
    rows = bench_train.bench(tmp_path / "tiny", "sentences", 1, dtype)
    assert all(row["dtype"] == dtype for row in rows)
    peers = ["transformers + PEFT, sdpa padded", bench_train.CACHED]
    assert [row["variant"] for row in rows] == [*peers, *bench_train.RATES, "bare products"]
    assert all(row["step_mib"] >= 0 for row in rows)
    assert all(row["tokens_per_s"] > 0 and row["model"] == "tiny" for row in rows)
    assert rows[0]["over_peft"] == 1 and rows[-1]["of_ceiling"] == 1


def test_another_loss_is_not_timed(tmp_path, monkeypatch):
    tiny_checkpoint(tmp_path / "tiny", "llama")
    monkeypatch.setattr(bench_train, "TEXTS_PER_STEP", 4)
    monkeypatch.setattr(bench_train, "load", lambda *given, load=bench_train.load: _moved(load(*given)))
    with pytest.raises(SystemExit, match="losses differ"):
        bench_train.bench(tmp_path / "tiny", "sentences", 1)


def test_the_cached_loss_gives_the_same_gradients(tmp_path):
    tiny_checkpoint(tmp_path / "tiny", "llama")
    module = AutoModel.from_pretrained(tmp_path / "tiny", dtype=torch.float32)
    peft = Peft(module)
    cached = bench_train.Cached(tmp_path / "tiny", peft)
    texts = [np.arange(1, n) for n in (9, 5, 12, 7)] * 2
    loss = peft.step(texts).item()
    expected = {name: gradient.clone() for name, gradient in peft.gradients().items()}
    assert cached.step(texts) == pytest.approx(loss, rel=1e-5)
    for name, gradient in peft.gradients().items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-3)


def test_a_cached_loss_that_is_another_is_not_timed(tmp_path, monkeypatch):
    tiny_checkpoint(tmp_path / "tiny", "llama")
    monkeypatch.setattr(bench_train, "TEXTS_PER_STEP", 4)
    monkeypatch.setattr(bench_train.Cached, "step", lambda self, texts: 3.0)
    with pytest.raises(SystemExit, match="losses differ"):
        bench_train.bench(tmp_path / "tiny", "sentences", 1)


def test_a_model_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench_train", "--model", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="nowhere: no folder of a model"):
        bench_train.main()


def test_memory_of_a_step_is_what_it_takes_at_most():
    held = []

    def step():
        held.append(np.ones(2**23, np.float64))  # 64 MiB

    assert 60 < bench_train.memory_of(step) < 100
    held.clear()
    np.ones(2**25, np.float64)
    assert 60 < bench_train.memory_of(step) < 100


def _moved(model):
    for _, a, _ in model.trainable.lora.matrices():
        a.mul_(3)
    return model
