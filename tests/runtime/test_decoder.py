"""Loading a decoder's tensors: what is missing, surplus or damaged is named; memory stays within its bound."""

import sys

import gguf_samples
import pytest
import torch
from family_models import ModuleSource, config_of, models

from flashvec.bench import bench_load
from flashvec.runtime.checkpoint.source import CheckpointError
from flashvec.runtime.decoder_loader import DecoderLoader
from flashvec.runtime.families import decoder_spec

CPU = torch.device("cpu")


def loader(change=None):
    module, _ = models("llama", "bidirectional")
    source = ModuleSource(module)
    if change:
        change(source.tensors)
    return DecoderLoader(decoder_spec(config_of("llama", "bidirectional"), "bidirectional"), source, torch.float32, CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj.weight is missing"),
        (
            lambda t: t.update({f"language_model.{name}": t.pop(name) for name in list(t)}),
            "embed_tokens.weight is missing; it is there as language_model.embed_tokens.weight, a part",
        ),
        (lambda t: t.update({"layers.9.x": torch.zeros(1)}), "1 tensors fit nowhere .* layers.9.x"),
        (lambda t: t.update({"score.weight": torch.zeros(1)}), "score.weight; .* save the decoder by itself"),
        (
            lambda t: t.update({"embed_tokens.weight": t["embed_tokens.weight"] * torch.nan}),
            "embed_tokens.weight holds NaN or infinity",
        ),
        (lambda t: t.update({"norm.weight": torch.zeros(3)}), r"norm.weight has shape \(3,\), .* asks for \(48,\)"),
        (lambda t: t.update({"norm.weight": t["norm.weight"] + torch.inf}), "norm.weight holds NaN or infinity"),
    ],
)
def test_refuses_by_name(change, message):
    with pytest.raises(CheckpointError, match=message):
        loader(change).load()


def test_the_language_model_head_and_old_buffers_are_ignored():
    extra = {"lm_head.weight": torch.zeros(1), "layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    assert loader(lambda t: t.update(extra)).load() is not None


def test_first_layers():
    assert len(loader().load(2).layers) == 2


def test_one_product_reads_one_merged_weight():
    module, decoder = models("llama", "bidirectional")
    own = module.layers[0].self_attn
    want = torch.cat([own.q_proj.weight, own.k_proj.weight, own.v_proj.weight])
    assert torch.equal(decoder.layers[0].qkv, want)


def test_a_number_too_large_for_the_dtype_is_no_damage():
    module, _ = models("llama", "bidirectional")
    source = ModuleSource(module)
    source.tensors["layers.0.mlp.up_proj.weight"] = source.tensors["layers.0.mlp.up_proj.weight"] * 1e6
    spec = decoder_spec(config_of("llama", "bidirectional"), "bidirectional")
    with pytest.raises(
        ValueError, match=r"up_proj\.weight holds values up to .*, more than torch\.float16 can: choose"
    ):
        DecoderLoader(spec, source, torch.float16, CPU).load()


def check_peak(model, dtype, *adapters):
    """While it is loaded, anonymous memory stays within its weights and 300 MB."""
    load = bench_load.load_once(model, dtype, adapters)
    weights, peak = load["weights_bytes"], load["peak_bytes"]
    assert weights > 150e6
    assert peak <= weights + 300e6, f"peak {peak / 1e6:.0f} MB for {weights / 1e6:.0f} MB of weights"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["safetensors", "adapter", "gguf"])
def test_loading_holds_the_weights_once(kind, dtype, tmp_path, monkeypatch):
    from tiny_models import tiny_checkpoint

    if kind == "gguf":
        for name, size in {"HIDDEN": 512, "MLP": 4096, "LAYERS": 12}.items():
            monkeypatch.setattr(gguf_samples, name, size)
        check_peak(gguf_samples.write_quantised(tmp_path / "model.gguf"), dtype)
        return
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 12, "vocab_size": 40_000}
    model = tiny_checkpoint(tmp_path / "base", "llama", **sizes)
    adapters = []
    if kind == "adapter":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
        adapters = [tmp_path / "adapter"]
    del model
    check_peak(tmp_path / "base", dtype, *adapters)
