"""The mean of adapters: the mean of their updates, as one adapter that PEFT and `Encoder.load` read."""

import json

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import tiny_adapter, tiny_checkpoint
from typer.testing import CliRunner

from flashvec.runtime.checkpoint.source import CheckpointError
from flashvec.runtime.cli import app
from flashvec.training.average import average_adapters


@pytest.fixture
def base(tmp_path):
    tiny_checkpoint(tmp_path / "base", "llama", num_hidden_layers=2)
    return tmp_path / "base"


def trained(base, name, **config):
    """An adapter of random factors, and the weights it makes of the base."""
    folder = base.parent / name
    merged = tiny_adapter(transformers.AutoModel.from_pretrained(base, dtype=torch.float32), folder, **config)
    return folder, {key: value.detach().clone() for key, value in merged.state_dict().items()}


def test_a_base_that_is_named_by_a_path_from_the_folder_is_found_from_the_mean(base, tmp_path):
    folders = []
    for name in ("one", "two"):
        folder, _ = trained(base, f"runs/{name}", r=4)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "../../base"}))
        folders.append(folder)
    average_adapters(folders, base.parent / "mean")
    assert json.loads((base.parent / "mean/adapter_config.json").read_text())["base_model_name_or_path"] == "../base"


def assert_peft_finds_the_mean(base, first, second):
    model = transformers.AutoModel.from_pretrained(base, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(model, str(base.parent / "mean")).merge_and_unload().state_dict()
    moved = 0
    for name, value in merged.items():
        expected, apart = (first[name] + second[name]) / 2, float((first[name] - second[name]).abs().max())
        torch.testing.assert_close(value, expected, atol=2e-2 * (apart + 1e-6), rtol=0)
        moved += bool(apart)
    assert moved == 14


@pytest.mark.parametrize("others", [{"r": 4, "lora_alpha": 8}, {"r": 6, "lora_alpha": 3, "use_rslora": True}])
def test_it_is_the_mean_of_the_updates(base, others):
    torch.manual_seed(0)
    (one, first), (two, second) = trained(base, "one", r=4), trained(base, "two", **others)
    rank = 4 + others["r"]
    lost = average_adapters([one, two], base.parent / "mean", rank)
    assert lost < 1e-10
    assert_peft_finds_the_mean(base, first, second)


def test_a_rank_above_a_products_smaller_side_loses_nothing(base):
    torch.manual_seed(3)
    (one, first), (two, second) = trained(base, "one", r=24), trained(base, "two", r=24)  # sides of 16 and 32
    assert average_adapters([one, two], base.parent / "mean", 48) < 1e-10
    assert_peft_finds_the_mean(base, first, second)


def test_the_mean_of_adapters_of_causal_models_is_one_that_peft_finds_the_weights_of(base):
    torch.manual_seed(4)
    folders = []
    for name in ("one", "two"):
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        peft.get_peft_model(model, lora).save_pretrained(base.parent / name)
        folders.append(base.parent / name)
    average_adapters(folders, base.parent / "mean")
    assert json.loads((base.parent / "mean/adapter_config.json").read_text())["task_type"] is None
    model = transformers.AutoModel.from_pretrained(base, dtype=torch.float32)
    before = model.layers[0].self_attn.q_proj.weight.detach().clone()
    merged = peft.PeftModel.from_pretrained(model, str(base.parent / "mean")).merge_and_unload()
    assert (merged.layers[0].self_attn.q_proj.weight - before).abs().max() > 1e-3


def test_a_smaller_rank_keeps_the_largest_part(base):
    torch.manual_seed(1)
    (one, first), (two, second) = trained(base, "one", r=4), trained(base, "two", r=4)
    lost = average_adapters([one, two], base.parent / "mean")
    written = json.loads((base.parent / "mean" / "adapter_config.json").read_text())
    assert written["r"] == written["lora_alpha"] == 4 and 0.05 < lost < 0.6
    tensors = load_file(base.parent / "mean" / "adapter_model.safetensors")
    start = transformers.AutoModel.from_pretrained(base, dtype=torch.float32).state_dict()
    name = "layers.0.mlp.up_proj.weight"
    update = (first[name] + second[name]) / 2 - start[name]
    key = "base_model.model.layers.0.mlp.up_proj.lora_{}.weight"
    a, b = (tensors[key.format(letter)].float() for letter in "AB")
    values = torch.linalg.svdvals(update)
    nearest = float(values[4:].square().sum().sqrt())  # Eckart and Young: no product of this rank is nearer
    assert float((b @ a - update).norm()) == pytest.approx(nearest, rel=1e-2)


def test_hashes_are_those_of_all_or_none(base):
    torch.manual_seed(2)
    folders = [trained(base, name)[0] for name in ("one", "two")]
    np.save(folders[0] / "seen.npy", np.array([1, 5], np.int64))
    average_adapters(folders, base.parent / "some")
    assert not (base.parent / "some" / "seen.npy").exists()
    np.save(folders[1] / "seen.npy", np.array([3, 5], np.int64))
    (folders[0] / "llm2vec_config.json").write_text('{"pooling_mode": "mean"}')
    result = CliRunner().invoke(app, ["train", "average", *map(str, folders), "--output", str(base.parent / "all")])
    assert result.exit_code == 0 and "the mean of 2 adapters" in " ".join(result.output.split())
    assert np.load(base.parent / "all" / "seen.npy", allow_pickle=False).tolist() == [1, 3, 5]
    assert (base.parent / "all" / "llm2vec_config.json").is_file()


def test_adapters_of_bases_with_different_names_have_no_mean(base):
    """A hub id and a path that end alike are one; an adapter that names none fits any."""
    folders = [trained(base, name)[0] for name in ("one", "two", "three")]

    def name_bases(*names):
        for folder, name in zip(folders, names, strict=True):
            config = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))

    name_bases("owner/base", "owner/base-instruct", None)
    with pytest.raises(CheckpointError, match=r"one of owner/base, two of owner/base-instruct, three of None"):
        average_adapters(folders, base.parent / "mean")
    name_bases("owner/base", str(base), "../base")
    average_adapters(folders, base.parent / "mean")
    name_bases("owner/base", str(base.parent / "models--owner--base" / "snapshots" / "12ab"), None)
    average_adapters(folders, base.parent / "again")


def test_what_has_no_mean_is_refused(base):
    torch.manual_seed(3)
    one, two = trained(base, "one")[0], trained(base, "two")[0]
    few = trained(base, "few", target_modules=["q_proj"])[0]
    dora = trained(base, "dora", use_dora=True)[0]
    tiny_checkpoint(base.parent / "wide" / "base", "llama", num_hidden_layers=2, intermediate_size=96)
    wide = trained(base.parent / "wide" / "base", "one")[0]
    out = base.parent / "mean"
    for folders, said in (
        ([one], "a mean is of two adapters or more; named: 1"),
        ([one, few], r"few/adapter_model.safetensors: .* is in one adapter and not in the other"),
        ([one, dora], "dora/adapter_config.json: use_dora is set; only plain LoRA"),
        ([one, wide], "for models of different sizes"),
        ([one, base.parent / "nowhere"], "nowhere"),
    ):
        with pytest.raises(CheckpointError, match=said):
            average_adapters(folders, out)
        assert not out.exists()
    out.mkdir()
    with pytest.raises(CheckpointError, match="is there already"):
        average_adapters([one, two], out)
