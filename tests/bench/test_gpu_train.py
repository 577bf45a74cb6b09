"""The training step of the GPU benchmark, tiny and on the CPU."""

import pytest
import torch

from flashvec.bench import compile_ahead, gpu_models, gpu_train
from flashvec.bench.device_time import HostStopwatch
from flashvec.bench.gpu_session import Budget, Session
from flashvec.kernels import backend

CPU = torch.device("cpu")
CONFIG = {"model_type": "qwen3", "max_position_embeddings": 256, **gpu_models._sizes(32, 48, 2, 4, 2, 16, 60)}
WANTED = gpu_train.Batches("tiny", 12, 150)


@pytest.fixture
def model():
    return gpu_models.random_model("tiny", CONFIG, CPU, torch.float32)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(gpu_train, "REPETITIONS", 2)


def session(folder) -> Session:
    return Session(CPU, HostStopwatch(), Budget(10), folder)


def test_rows_and_gradients_agree_with_peft(model, few, tmp_path):
    s = session(tmp_path)
    gpu_train.time_batches(s, WANTED, model, 60)
    assert [row["variant"] for row in s.rows] == [
        "transformers + PEFT, sdpa padded",
        "flashvec",
        "flashvec, dropout 0.1",
    ]
    assert not s.wrong and all(row["tokens_per_s"] > 0 for row in s.rows)
    assert s.rows[1]["gradient_cosine"] > 0.99999
    assert len(gpu_train.summary(s.rows)) == 4


def test_each_matrix_has_the_gradient_that_peft_gives_it(model):
    peft = gpu_train.Peft(model.module)
    ours, texts = gpu_train.Ours(model.decoder, peft.updates), gpu_train.pairs(WANTED, 0, 60)
    torch.testing.assert_close(ours.step(texts), peft.step(texts))
    mine, theirs = ours.gradients(), peft.gradients()
    assert mine.keys() == theirs.keys() and len(mine) == 2 * 7 * 2
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-6, rtol=1e-3, msg=name)
    assert mine["layers.0.self_attn.q_proj.lora_A"].abs().max() > 0


def test_a_side_that_is_wrong_or_missing_is_a_row(model, few, tmp_path, monkeypatch):
    step = gpu_train.Ours.step

    def other(self, texts):
        if self.dropout:
            raise torch.OutOfMemoryError("no room\nat all")
        loss = step(self, texts)
        for pair in self.pairs.values():
            pair.a_PRC.grad.neg_()
            pair.b_NR.grad.neg_()
        return loss

    monkeypatch.setattr(gpu_train.Ours, "step", other)
    s = session(tmp_path)
    gpu_train.time_batches(s, WANTED, model, 60)
    rows = {row["variant"]: row for row in s.rows}
    assert "cosine -1" in rows["flashvec"]["wrong"] and "tokens_per_s" not in rows["flashvec"]
    assert rows["flashvec, dropout 0.1"]["missing"] == "OutOfMemoryError: no room"
    assert rows["transformers + PEFT, sdpa padded"]["tokens_per_s"] > 0 and len(s.wrong) == 1


def test_models_are_run_while_there_is_time(monkeypatch, tmp_path):
    timed = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (20e9, 80e9))
    monkeypatch.setattr(gpu_train, "random_model", lambda name, *a: name)
    monkeypatch.setattr(gpu_train, "time_batches", lambda s, wanted, model: timed.append((wanted.name, model)))
    s = session(tmp_path)
    gpu_train.run(s, "log-normal 128")
    assert [model for _, model in timed] == ["qwen3-0.6b", "llama-3.2-1b"]
    assert len(s.skipped) == 1 and "llama-3-8b" in s.skipped[0]


@pytest.mark.parametrize("wanted", gpu_train.batches()[::2], ids=lambda b: b.model)
def test_steps_are_recorded_at_their_real_size(wanted):
    with backend.recording(backend.TARGETS["sm_90"]) as recorder, compile_ahead._Launchers():
        gpu_train.record(wanted)
    names = {launch.kernel.__name__ for launch in recorder.launches}
    assert {"_attention_fwd_kernel", "_low_rank_reduce_kernel", "_swiglu_bwd_kernel"} < names


def test_flops_of_a_step():
    spec = gpu_models.model_spec(CONFIG).decoder
    products = 4.0 * 100 * gpu_models.product_weights(spec) * 2
    assert gpu_train.step_flops(spec, [100]) == products + 3.5 * 4 * 100 * 100 * 16 * 4 * 2
