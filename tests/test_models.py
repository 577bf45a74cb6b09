"""The adapter that this repository carries: whole, small, openly described, and for the model it names."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_checkpoint

from flashvec import Encoder
from flashvec.training.adapter import read_adapter
from flashvec.training.config import ContrastiveConfig, DistillConfig, LoraConfig, build, read_config
from flashvec.training.data import text_hash
from flashvec.training.lora import Lora
from flashvec.training.recipe import MeanConfig
from flashvec.training.settings import read_values

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "models" / "smollm2-135m"
HIDDEN, QUERY, KV, MLP, LAYERS = 576, 576, 192, 1536, 30
SHAPES = {  # of SmolLM2-135M's products: outputs, inputs
    "self_attn.q_proj": (QUERY, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, QUERY),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}
MAX_BYTES = 25_000_000


def test_has_a_pair_for_every_product_and_is_small():
    config = json.loads((FOLDER / "adapter_config.json").read_text())
    assert "SmolLM2-135M-Instruct" in config["base_model_name_or_path"]
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= MAX_BYTES
    with safe_open(FOLDER / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
        assert len(names) == 2 * LAYERS * len(SHAPES)
        for layer in range(LAYERS):
            for product, (outputs, inputs) in SHAPES.items():
                a, b = (file.get_tensor(f"base_model.model.layers.{layer}.{product}.lora_{x}.weight") for x in "AB")
                assert a.shape == (config["r"], inputs) and b.shape == (outputs, config["r"])
                assert bool(a.isfinite().all() and b.isfinite().all() and b.any()), (layer, product)


def test_fills_the_updates_of_the_model_it_names():
    """Every tensor has its place in a decoder of these shapes, under the settings that trained it."""
    decoder: Any = SimpleNamespace(
        spec=SimpleNamespace(num_heads=9, num_kv_heads=3, head_size=64, hidden_size=HIDDEN, mlp_size=MLP),
        device=torch.device("cpu"),
        layers=[
            SimpleNamespace(
                qkv=torch.empty(QUERY + 2 * KV, HIDDEN, device="meta"),
                out=torch.empty(HIDDEN, QUERY, device="meta"),
                gate_up=torch.empty(2 * MLP, HIDDEN, device="meta"),
                down=torch.empty(HIDDEN, MLP, device="meta"),
            )
        ]
        * LAYERS,
    )
    lora = Lora(decoder, LoraConfig(r=32, alpha=32, dropout=0.0), seed=0)
    read_adapter(FOLDER, lora, "SmolLM2-135M-Instruct")
    assert not lora.untouched()


def test_opens_over_a_base_of_its_sizes(tmp_path):
    """Its first layers over as many of random weights, as `Encoder.load` would open all."""
    for name in ("adapter_config.json", "llm2vec_config.json"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    tensors = load_file(FOLDER / "adapter_model.safetensors")
    first = {name: x for name, x in tensors.items() if ".layers.0." in name}
    save_file(first, tmp_path / "adapter_model.safetensors")
    sizes = {"hidden_size": HIDDEN, "intermediate_size": MLP, "num_attention_heads": 9, "num_key_value_heads": 3}
    tiny_checkpoint(tmp_path / "base", "llama", num_hidden_layers=1, **sizes)
    adapted = Encoder.load(tmp_path / "base", adapters=(tmp_path,), dtype="float32")
    spec = adapted.spec
    assert (spec.layout, spec.attention, spec.pooling, spec.max_length) == ("llm2vec", "bidirectional", ("mean",), 512)
    plain = Encoder.load(tmp_path / "base", dtype="float32", attention="bidirectional", pooling="mean")
    weight, before = adapted.decoder.layers[0].down, plain.decoder.layers[0].down
    a, b = (first[f"base_model.model.layers.0.mlp.down_proj.lora_{letter}.weight"].float() for letter in "AB")
    torch.testing.assert_close(weight - before, b @ a, rtol=0, atol=1e-5)  # alpha is r
    assert np.isfinite(adapted.embed("A man is playing a guitar.")).all()


def test_says_how_it_is_pooled_and_how_it_was_made():
    settings = json.loads((FOLDER / "llm2vec_config.json").read_text())
    assert settings["pooling_mode"] == "mean" and settings["max_length"] == 512
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for word in ("license: apache-2.0", "flashvec train distill", "Wikipedia", "STS-B", "seed"):
        assert word in card, word


def test_its_settings_are_those_that_the_recipe_takes():
    """Each generation from earlier ones, with paths of nobody's machine, and a log of all its steps."""
    rank = json.loads((FOLDER / "adapter_config.json").read_text())["r"]
    made: list[str] = []
    for number in range(1, 1 + len(list(FOLDER.glob("generation-*.yaml")))):
        file = FOLDER / f"generation-{number}.yaml"
        values = read_values(file)
        if "mean" in values:
            mean = build(MeanConfig, values, file.name)
            assert len(mean.mean) > 1 and set(mean.mean) <= set(made)
            made.append(mean.output)
            continue
        config = read_config(ContrastiveConfig if "pairs" in values else DistillConfig, file)
        assert config.lora.start == (made[-1] if made else None) and config.lora.r == rank
        if isinstance(config, DistillConfig):
            assert set(config.teachers) <= set(made) and bool(config.teachers) == bool(made)
        data = config.pairs if isinstance(config, ContrastiveConfig) else config.texts
        assert data and not any(Path(name).is_absolute() for name in (config.model, config.output, *data))
        log = (FOLDER / f"generation-{number}.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in log] == list(range(1, config.loop.steps + 1))
        made.append(config.output)
    assert len(made) > 1 and [Path(name).name for name in made] == [f"generation-{i + 1}" for i in range(len(made))]


@pytest.mark.parametrize("name", ["a man is playing a guitar", "The woman is slicing onions.", "a dog"])
def test_the_texts_it_saw_are_named_by_their_hashes(name):
    seen = np.load(FOLDER / "seen.npy", allow_pickle=False)
    assert seen.dtype == np.int64 and (np.diff(seen) > 0).all() and len(seen) > 1000
    assert text_hash(name) not in seen
