"""Adapters merged while reading, against peft's own merge."""

import json
import math
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import PROJECTIONS, tiny_adapter, tiny_checkpoint, tiny_model

from flashvec.runtime.checkpoint.peft import AdapterSource
from flashvec.runtime.checkpoint.safetensors_files import SafetensorsSource
from flashvec.runtime.checkpoint.source import CheckpointError

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PATTERNS = {
    "r": 4,
    "rank_pattern": {"layers.1.self_attn.q_proj": 7, "v_proj": 2, r"^layers\.2\.mlp\.(up|gate)_proj": 3},
    "alpha_pattern": {"layers.0.mlp.down_proj": 40, "o_proj": 1.5},
    "target_modules": PROJECTIONS,
}
CASES = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": PROJECTIONS},
    "few modules": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 8, "lora_alpha": 3, "use_rslora": True, "target_modules": PROJECTIONS},
    "patterns": PATTERNS,
    "patterns, rslora": {**PATTERNS, "use_rslora": True},
    "dora": {"r": 4, "use_dora": True, "target_modules": PROJECTIONS},
    "embedding": {"r": 4, "lora_alpha": 5, "target_modules": ["q_proj", "embed_tokens"]},
    "whole modules": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]},
}


def assert_merged(source, model):
    truth = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    truth.pop("lm_head.weight", None)
    assert source.names() - {"lm_head.weight"} == set(truth)
    for name, tensor in truth.items():
        got = source.read(name)
        assert got.shape == source.shape(name) == tensor.shape
        # two roundings of fp32: the sum is made in two steps there, in one here
        torch.testing.assert_close(got, tensor, rtol=2.5e-7, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def base(tmp_path):
    return tiny_model(tmp_path / "base"), tmp_path / "base"


@pytest.fixture
def adapter(base, tmp_path):
    tiny_adapter(base[0], tmp_path / "adapter", r=4, target_modules=PROJECTIONS)
    return tmp_path / "adapter"


def edit(path, **values):
    """Change a JSON file; a value of None is written as null."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("headless", [True, False])
def test_equals_pefts_merge(case, headless, tmp_path):
    model = tiny_model(tmp_path / "base", causal_lm=not headless)
    config = CASES[case]
    merged = tiny_adapter(model, tmp_path / "adapter", **config)
    assert_merged(AdapterSource(SafetensorsSource(tmp_path / "base"), tmp_path / "adapter"), merged)


def test_an_update_of_an_embedding_goes_over_the_one_that_was_saved_beside_it(tmp_path):
    model = tiny_model(tmp_path / "base")
    merged = tiny_adapter(model, tmp_path / "adapter", **CASES["embedding"])
    path = tmp_path / "base" / "model.safetensors"
    stored = load_file(path)
    (name,) = [key for key in stored if key.endswith("embed_tokens.weight")]
    save_file({**stored, name: stored[name] + 1}, path, {"format": "pt"})  # a base whose rows are others
    assert_merged(AdapterSource(SafetensorsSource(tmp_path / "base"), tmp_path / "adapter"), merged)


@pytest.mark.parametrize(("magnitude", "named"), [(True, "DoRA of embeddings is not"), (False, "use_dora does not")])
def test_dora_of_an_embedding_is_refused(magnitude, named, tmp_path):
    tiny_adapter(tiny_model(tmp_path / "base"), tmp_path / "adapter", r=4, target_modules=["embed_tokens"])
    edit(tmp_path / "adapter" / "adapter_config.json", use_dora=True)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    if magnitude:
        key = "base_model.model.embed_tokens.lora_magnitude_vector"
        save_file(load_file(path) | {key: torch.ones(32)}, path)
    with pytest.raises(CheckpointError, match=named):
        AdapterSource(SafetensorsSource(tmp_path / "base"), tmp_path / "adapter")


def test_a_module_under_two_prefixes_is_refused(base, adapter):
    path = adapter / "adapter_model.safetensors"
    stored = load_file(path)
    twice = {
        key.replace("base_model.model.layers", "base_model.model.model.layers"): x + 1 for key, x in stored.items()
    }
    save_file(stored | twice, path)
    with pytest.raises(CheckpointError, match=r"holds (model\.)?layers\.0\..* twice, under two prefixes"):
        AdapterSource(SafetensorsSource(base[1]), adapter)


def test_patterns_are_anchored_as_in_peft(tmp_path):
    """`^model...` matches under the language-model head only, `layers.1` not layer 11."""
    model = tiny_model(tmp_path / "base", causal_lm=True, num_hidden_layers=12)
    config = {"rank_pattern": {r"^model\.layers\.1\.self_attn\.q_proj": 2, "layers.11.self_attn.v_proj": 3}}
    merged = tiny_adapter(model, tmp_path / "adapter", r=4, target_modules=["q_proj", "v_proj"], **config)
    assert_merged(AdapterSource(SafetensorsSource(tmp_path / "base"), tmp_path / "adapter"), merged)


def test_two_adapters_one_over_the_other(base, tmp_path):
    model, folder = base
    model = tiny_adapter(model, tmp_path / "first", r=4, target_modules=PROJECTIONS)
    model = tiny_adapter(model, tmp_path / "second", r=2, target_modules=ATTENTION)
    source = AdapterSource(SafetensorsSource(folder), tmp_path / "first")
    assert_merged(AdapterSource(source, tmp_path / "second"), model)


def test_headless_adapter_fits_a_base_with_a_head_and_the_other_way_round(tmp_path):
    headless = tiny_model(tmp_path / "headless")
    full = tiny_model(None, causal_lm=True)
    full.model.load_state_dict(headless.state_dict())
    full.save_pretrained(tmp_path / "full")
    tiny_adapter(full, tmp_path / "from full", r=4, target_modules=PROJECTIONS)
    merged = tiny_adapter(headless, tmp_path / "from headless", r=4, target_modules=PROJECTIONS)
    assert_merged(AdapterSource(SafetensorsSource(tmp_path / "full"), tmp_path / "from headless"), merged)
    AdapterSource(SafetensorsSource(tmp_path / "headless"), tmp_path / "from full")


def test_keys_with_the_adapters_name_and_half_precision(base, adapter, tmp_path):
    """Old files keep `.default`; bf16 factors are multiplied in fp32."""
    _, folder = base
    path = adapter / "adapter_model.safetensors"
    stored = {key: tensor.bfloat16() for key, tensor in load_file(path).items()}
    save_file({key.replace(".weight", ".default.weight"): tensor for key, tensor in stored.items()}, path)
    source = AdapterSource(SafetensorsSource(folder), adapter)
    name = "layers.0.mlp.up_proj.weight"
    a, b = (stored[f"base_model.model.layers.0.mlp.up_proj.lora_{x}.weight"].float() for x in "AB")
    truth = SafetensorsSource(folder).read(name) + b @ a * (8 / 4)
    torch.testing.assert_close(source.read(name), truth, rtol=0, atol=1e-6)


def test_adapted_head_is_ignored(tmp_path):
    model = tiny_model(tmp_path / "base", causal_lm=True)
    merged = tiny_adapter(model, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert_merged(AdapterSource(SafetensorsSource(tmp_path / "base"), tmp_path / "adapter"), merged)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"r": 5000}, "rank of layers.0.mlp.down_proj is 5000"),
        ({"r": 0}, "expected 1 to 4096"),
        ({"lora_alpha": 10**400}, "lora_alpha of layers.0.mlp.down_proj is 1000"),
        ({"lora_alpha": 1e308}, "lora_alpha of layers.0.mlp.down_proj is 1e+308"),
        ({"lora_alpha": float("nan")}, "lora_alpha of layers.0.mlp.down_proj is nan"),
        ({"r": "four"}, "r of layers.0.mlp.down_proj is 'four'"),
        ({"r": 3}, "asks for (3, 48)"),
        ({"use_dora": True}, "use_dora does not agree"),
        ({"rank_pattern": {"(a+)+b": 1}}, "repeats a group"),
        ({"rank_pattern": {"(": 1}}, "no regular expression"),
        ({"rank_pattern": {"a)|(b": 1}}, "no regular expression"),
        ({"rank_pattern": {".*" * 60 + "X": 1}}, "in too many ways"),
        ({"alpha_pattern": {"(.|.)" * 30 + "X": 1}}, "alpha_pattern: '(.|.)"),
        ({"alpha_pattern": {".?" * 60 + "X": 1}}, "in too many ways"),
        ({"rank_pattern": {f".*.*.*{i}": 1 for i in range(20)}}, "in too many ways"),
        ({"rank_pattern": {"q_proj": 4, "(?=.*)q": 1}}, "rank_pattern: '(?=.*)q': '(' is not read"),
        ({"rank_pattern": {r"(.)\1": 1}}, "is not read in a pattern"),
        ({"rank_pattern": [1]}, "rank_pattern is"),
    ],
    ids=str,
)
def test_refuses_what_it_cannot_merge(values, named, base, adapter):
    edit(adapter / "adapter_config.json", **values)
    with pytest.raises(CheckpointError) as error:
        AdapterSource(SafetensorsSource(base[1]), adapter)
    assert named in str(error.value) and "adapter/adapter_" in str(error.value)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.self_attn\.(q|v)_proj$",
        r"^model\.layers\.(?:0|1|2)\.self_attn\.[qv]_proj",
        r"layers\.\d+\.self_attn\.q_proj",
        r"layers\.([0-9]|1[0-5])\..*_proj",
        r"(model\.)?layers\.\d{1,2}\.\w+\.q_proj",
        "model.layers.0.self_attn.v_proj",
    ],
)
def test_patterns_as_people_write_them_match_as_in_peft(pattern, tmp_path):
    model = tiny_model(tmp_path / "base", causal_lm=True)
    targets = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    merged = tiny_adapter(model, tmp_path / "adapter", **targets, rank_pattern={pattern: 2}, alpha_pattern={pattern: 9})
    assert_merged(AdapterSource(SafetensorsSource(tmp_path / "base"), tmp_path / "adapter"), merged)


@pytest.mark.parametrize("stranger", ["other sizes", "other layers", "other family"])
def test_refuses_an_adapter_for_another_model(stranger, adapter, tmp_path):
    keys: dict[str, Any] = {"other sizes": {"hidden_size": 64}, "other layers": {"num_hidden_layers": 2}}
    if stranger == "other family":
        save_file({"h.0.attn.c_attn.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    else:
        tiny_model(tmp_path / "other", **keys[stranger])
    source = SafetensorsSource(tmp_path if stranger == "other family" else tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"base_model\.model\.layers.*the adapter is for another model"):
        AdapterSource(source, adapter)


def test_refuses_half_a_pair_and_left_over_tensors(base, adapter):
    path = adapter / "adapter_model.safetensors"
    stored = load_file(path)
    key = "base_model.model.layers.1.mlp.up_proj.lora_B.weight"
    save_file({k: t for k, t in stored.items() if k != key}, path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.lora_A\.weight has no partner"):
        AdapterSource(SafetensorsSource(base[1]), adapter)
    save_file({**stored, "base_model.model.score.weight": torch.zeros(2, 32)}, path)
    with pytest.raises(CheckpointError, match=r"score\.weight fits nowhere in the base"):
        AdapterSource(SafetensorsSource(base[1]), adapter)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layers_to_transform", [0, 2], r"layers_to_transform leaves out .*layers\.1\."),
        ("layers_to_transform", 1, r"layers_to_transform leaves out .*layers\.0\."),
        ("exclude_modules", ["mlp.up_proj"], r"exclude_modules leaves out .*layers\.0\.mlp\.up_proj"),
        ("exclude_modules", ".*up_proj", "exclude_modules is '.*up_proj'; expected a list"),
        ("layers_pattern", "h", "layers_pattern is 'h'"),
    ],
)
def test_what_peft_would_leave_out_is_refused(base, adapter, key, value, message):
    edit(adapter / "adapter_config.json", **{key: value})
    with pytest.raises(CheckpointError, match=f"adapter/adapter_config.json: {message}"):
        AdapterSource(SafetensorsSource(base[1]), adapter)


def test_layers_that_peft_chose_are_merged(tmp_path):
    chosen = {
        "r": 4,
        "target_modules": ["q_proj", "up_proj"],
        "layers_to_transform": [0, 2],
        "layers_pattern": "layers",
    }
    merged = tiny_adapter(tiny_model(tmp_path / "base"), tmp_path / "adapter", **chosen, exclude_modules=["k_proj"])
    assert_merged(AdapterSource(SafetensorsSource(tmp_path / "base"), tmp_path / "adapter"), merged)


def test_missing_files_name_the_cure(base, adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing.*safe_serialization"):
        AdapterSource(SafetensorsSource(base[1]), adapter)
    shutil.rmtree(adapter)
    adapter.mkdir()
    with pytest.raises(CheckpointError, match=r"adapter/adapter_config\.json is missing"):
        AdapterSource(SafetensorsSource(base[1]), adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_tensor_is_held_once_also_in_a_chain(tmp_path, dtype):
    """7B models have tensors of 235 MB in fp32: what merging one takes beside it adds to the peak of loading."""
    model = tiny_checkpoint(tmp_path / "model", is_causal=False)
    model.to(dtype).save_pretrained(tmp_path / "model")
    tiny_adapter(model.float(), tmp_path / "adapter", target_modules=["down_proj"])
    one = AdapterSource(SafetensorsSource(tmp_path / "model"), tmp_path / "adapter")
    chain = AdapterSource(one, tmp_path / "adapter")
    name = "layers.0.mlp.down_proj.weight"
    size = 4 * math.prod(chain.shape(name))
    with torch.profiler.profile(profile_memory=True) as profile:
        merged = chain.read(name)
    taken = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert merged.dtype == torch.float32 and size <= taken < 1.5 * size
    a, b = (one.weights.read(key).float() for key in (one._updates[name].a, one._updates[name].b))
    base = SafetensorsSource(tmp_path / "model").read(name).float()
    torch.testing.assert_close(merged, base + 2 * one._updates[name].scale * (b @ a), rtol=1e-5, atol=1e-6)
    again = SafetensorsSource(tmp_path / "model").read(name).float()
    assert torch.equal(again, base), "the file's own pages were written into"
