"""Whole models in the GPU benchmark, tiny and on the CPU."""

import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from flashvec.bench import compile_ahead, gpu_embed, gpu_models, peers_embed
from flashvec.bench.device_time import HostStopwatch
from flashvec.bench.gpu_models import CONFIGS, draw_texts, flops_of, model_spec, product_weights, weight_bytes
from flashvec.bench.gpu_session import Budget, Session
from flashvec.kernels import backend

CPU = torch.device("cpu")
TINY = {
    "qwen3": gpu_models._sizes(32, 48, 2, 4, 2, 16, 60),
    "gemma3_text": {**gpu_models._sizes(32, 48, 3, 2, 1, 16, 60), "sliding_window": 6, "query_pre_attn_scalar": 16},
}


@pytest.fixture(scope="module", params=TINY)
def model(request):
    config = {"model_type": request.param, "max_position_embeddings": 256, **TINY[request.param]}
    return gpu_models.random_model("tiny", config, CPU, torch.float32)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(gpu_embed, "BUDGETS", (64, 128))
    monkeypatch.setattr(gpu_embed, "REPETITIONS", 2)
    monkeypatch.setattr(gpu_embed, "COMPARED_TEXTS", 8)


def session(folder) -> Session:
    return Session(CPU, HostStopwatch(), Budget(10), folder, repetitions=2)


PROFILE = gpu_embed.Profile("tiny", 12, 200)


def test_everyone_gives_the_same_vectors(model):
    texts = draw_texts(300, 20, 1, 60)
    ours = peers_embed.Ours(model, 64).embed(texts)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)
    for budget in (None, 64):
        np.testing.assert_allclose(peers_embed.HuggingFacePadded(model.module, budget).embed(texts), ours, atol=1e-5)
    theirs = peers_embed.SentenceTransformers(model.module, 60, "sdpa")
    np.testing.assert_allclose(theirs.embed(texts), ours, atol=1e-5)


def test_vllm_is_given_ids_and_a_share_of_the_memory(model, monkeypatch):
    """A stand-in of its shape; vLLM itself runs on a GPU alone."""
    settings = {}

    class LLM:
        def __init__(self, folder, **given):
            loaded = transformers.AutoModel.from_pretrained(folder)  # vLLM reads the folder in this call, as here
            settings.update(given, ours=peers_embed.HuggingFacePadded(loaded.eval(), None))

        def embed(self, prompts, use_tqdm):
            vectors = settings["ours"].embed([np.array(prompt["prompt_token_ids"]) for prompt in prompts])
            return [
                types.SimpleNamespace(outputs=types.SimpleNamespace(embedding=vector.tolist())) for vector in vectors
            ]

    config = types.ModuleType("vllm.config")
    config.PoolerConfig = lambda **given: given
    vllm = types.ModuleType("vllm")
    vllm.LLM = LLM
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.config", config)
    memory = types.SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    texts = draw_texts(300, 20, 1, 60)
    theirs = peers_embed.Vllm(model.module).embed(texts)
    np.testing.assert_allclose(theirs, peers_embed.Ours(model, 64).embed(texts), atol=1e-5)
    assert settings["pooler_config"] == {"pooling_type": "MEAN", "use_activation": True}
    assert settings["dtype"] == "float32" and 0.07 < settings["gpu_memory_utilization"] < 0.08


def test_rows_of_a_profile(model, small, tmp_path):
    s = session(tmp_path)
    gpu_embed.time_profile(s, PROFILE, model, 60)
    rows = {row["variant"]: row for row in s.rows}
    timed = [name for name, row in rows.items() if "tokens_per_s" in row]
    assert len(timed) == 5 and timed[0].startswith("flashvec") and not s.wrong, rows
    assert "missing" in rows["sentence-transformers, flattened"]  # flash attention wants a GPU
    for name in timed:
        assert rows[name]["median_cosine"] > 0.999 and rows[name]["share_of_products"] > 0
    lines = gpu_embed.summary(s.rows)
    assert "missing" in rows["vllm, pooling runner"]
    assert len(lines) == 8 and all("Error" in line for line in lines[1:3]) and "tokens/s" in lines[3]


def test_another_model_is_not_timed(model, small, tmp_path, monkeypatch):
    class Other(peers_embed.Ours):
        def embed(self, texts):
            return -super().embed(texts)

    monkeypatch.setattr(gpu_embed, "contenders", lambda m, n, v: {"flashvec": lambda: Other(m, 64), "peer": crash})

    def crash():
        raise ImportError("no such package")

    s = session(tmp_path)
    gpu_embed.time_profile(s, PROFILE, model, 60)
    assert len(s.wrong) == 1 and "median cosine -1" in s.wrong[0]
    assert [row["variant"] for row in s.rows] == ["peer", "flashvec"] and all("tokens_per_s" not in r for r in s.rows)
    assert len(gpu_embed.summary(s.rows)) == 3


def test_models_are_run_in_turn_while_there_is_time(monkeypatch, tmp_path):
    made, timed = [], []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (80e9, 80e9))
    monkeypatch.setattr(gpu_embed, "random_model", lambda name, *a: made.append(name) or replace_name(name))
    monkeypatch.setattr(gpu_embed, "time_profile", lambda s, profile, m: timed.append(profile.name))
    s = session(tmp_path)
    gpu_embed.run(s, "qwen3")
    assert made == ["qwen3-0.6b"] and len(timed) == 2
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (10e9, 80e9))
    gpu_embed.run(s, "llama-3-8b")
    assert len(timed) == 2 and len(s.skipped) == 2 and "memory" in s.skipped[0]


def replace_name(name):
    return replace(gpu_models.RandomModel("x", torch.nn.Module(), None, None), name=name)  # type: ignore[arg-type]


@pytest.mark.parametrize("profile", gpu_embed.profiles()[::2], ids=lambda p: p.model)
def test_models_are_recorded_at_their_real_size(profile):
    with backend.recording(backend.TARGETS["sm_90"]) as recorder, compile_ahead._Launchers():
        gpu_embed.record(profile)
    attention = "_attention_fwd_kernel" if profile.model == "gemma-3-270m" else "_attention_hopper_fwd_kernel"
    assert any(launch.kernel.__name__ == attention for launch in recorder.launches)


def test_sizes_are_the_published_ones():
    billions = {name: weight_bytes(config, 1) / 1e9 for name, config in CONFIGS.items()}
    assert {name: round(b, 2) for name, b in billions.items()} == {
        "qwen3-0.6b": 0.60,
        "llama-3-8b": 7.50,  # 8.03 with a head of its own
        "llama-3.2-1b": 1.24,
        "gemma-3-270m": 0.27,
    }


def test_flops_count_what_attention_sees():
    spec = model_spec({"model_type": "gemma3_text", "max_position_embeddings": 256, **TINY["gemma3_text"]}).decoder
    full = 2.0 * 100 * product_weights(spec) * 3
    distance = np.abs(np.arange(100)[:, None] - np.arange(100))
    pairs = [int((distance <= (100 if w is None else w)).sum()) for w in spec.layer_windows]
    assert min(pairs) < 100 * 100 and flops_of(spec, [100]) == full + sum(4.0 * n * 16 * 2 for n in pairs)


def test_texts_are_new_for_every_seed():
    first, again, other = (draw_texts(5000, 50, seed, 1000) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert len(first) != len(other) or not np.array_equal(first[0], other[0])
    assert 35 < np.mean([len(t) for t in first]) < 65 and sum(map(len, first)) >= 5000
