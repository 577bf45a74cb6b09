"""Folders written by `convert`: opened by this package, by transformers and by sentence-transformers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from gguf_samples import write_quantised
from safetensors.torch import load_file
from tiny_models import CLASSES, SIZES, tiny_adapter, tiny_checkpoint, tiny_model, tiny_tokenizer
from written_folders import TOLERANCE, library_difference, library_model, llm2vec_model, names, same_bits, texts

from flashvec import Encoder
from flashvec.runtime.checkpoint import export
from flashvec.runtime.checkpoint.export import convert, unheld_rules
from flashvec.runtime.checkpoint.open import Overrides
from flashvec.runtime.checkpoint.source import CheckpointError
from flashvec.runtime.checkpoint.tensors import decoder_shapes
from flashvec.runtime.families import decoder_spec
from flashvec.runtime.spec import ModelSpec


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_plain_decoders(family, attention, tmp_path, recwarn):
    keys: dict = {"sliding_window": 5} if family == "mistral" else {}
    tiny_checkpoint(tmp_path / "model", family, causal_lm=family == "llama", **keys)
    convert(tmp_path / "model", tmp_path / "out", overrides=Overrides(attention=attention))
    assert library_difference(tmp_path / "out") < TOLERANCE

    _, info = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("is_causal") is (False if attention == "bidirectional" else None)
    assert not config.get("use_bidirectional_attention")
    for dtype in ("float32", "bfloat16"):
        model = Encoder.load(tmp_path / "model", attention=attention, dtype=dtype)
        assert np.array_equal(texts(model), texts(Encoder.load(tmp_path / "out", dtype=dtype)))


def test_sentence_transformers_folder(tmp_path):
    keys = {"prompts": {"query": "find: ", "document": ""}, "default_prompt_name": "query", "truncate_dim": 16}
    library_model(tmp_path, **keys, similarity_fn_name="dot")
    assert convert(tmp_path / "model", tmp_path / "out") == []
    assert json.loads((tmp_path / "out" / "config.json").read_text())["use_bidirectional_attention"] is True
    assert same_bits(tmp_path / "model", tmp_path / "out", "float32")
    assert Encoder.load(tmp_path / "model").spec == Encoder.load(tmp_path / "out").spec
    for settings in ({}, {"prompt_name": "document"}, {"truncate_dim": 5}):
        assert library_difference(tmp_path / "out", "a sentence-transformers folder", **settings) < TOLERANCE
    (tmp_path / "out" / "flashvec.json").unlink()  # the rest of the folder says the same
    assert same_bits(tmp_path / "model", tmp_path / "out", "float32")
    assert Encoder.load(tmp_path / "model").spec == Encoder.load(tmp_path / "out").spec


def test_no_folder_that_holds_what_a_model_is_made_of_is_replaced(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    tiny_checkpoint(base, "llama")
    file = write_quantised(base / "model.gguf")
    for adapter in (folder, base / "adapter"):
        tiny_adapter(transformers.AutoModel.from_pretrained(base), adapter, target_modules=["q_proj"])
    before = names(base)
    held = r"base: holds model\.gguf, of which the model is made; write to another folder"
    for model, adapters, named in (
        (file, (), held),
        (file, [base / "adapter"], held),
        (folder, (), "is the model's own folder"),
    ):
        with pytest.raises(ValueError, match=named):
            convert(model, base, adapters=adapters, overwrite=True)
    with pytest.raises(ValueError, match=r"model\.gguf: is a file; name a folder to write"):
        convert(base, file)
    assert names(base) == before


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_gguf(architecture, tmp_path):
    path = write_quantised(tmp_path / "model.gguf", architecture)
    convert(path, tmp_path / "out")
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}
    for dtype in ("float32", "bfloat16"):
        assert same_bits(path, tmp_path / "out", dtype)
    assert library_difference(tmp_path / "out", "a GGUF file") < TOLERANCE
    convert(path, tmp_path / "small", dtype="bfloat16")
    assert same_bits(path, tmp_path / "small", "bfloat16")
    assert not same_bits(path, tmp_path / "small", "float32")


def test_gguf_that_states_direction_and_pooling(tmp_path):
    path = write_quantised(tmp_path / "model.gguf", "qwen2", attention__causal=False, pooling_type=1)
    spec = Encoder.load(path).spec
    assert (spec.layout, spec.attention, spec.pooling, spec.span) == (
        "gguf",
        "bidirectional",
        ("mean",),
        "prompt_tokens",
    )
    spec = Encoder.load(write_quantised(tmp_path / "last.gguf", "qwen2", attention__causal=True, pooling_type=3)).spec
    assert (spec.attention, spec.pooling) == ("causal", ("last",))


def test_merged_adapters_keep_fp32(tmp_path):
    model = tiny_checkpoint(tmp_path / "model", is_causal=False)
    model.bfloat16().save_pretrained(tmp_path / "model")
    tiny_adapter(model.float(), tmp_path / "adapter", target_modules=["q_proj"])
    convert(tmp_path / "model", tmp_path / "out", adapters=[tmp_path / "adapter"])
    with pytest.raises(ValueError, match="is the model's own folder"):
        convert(tmp_path / "model", tmp_path / "adapter", adapters=[tmp_path / "adapter"], overwrite=True)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["layers.0.self_attn.q_proj.weight"].dtype == torch.float32
    assert stored["layers.0.self_attn.k_proj.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    for dtype in ("float32", "bfloat16"):
        chain = Encoder.load(tmp_path / "model", adapters=tmp_path / "adapter", dtype=dtype)
        assert np.array_equal(texts(chain), texts(Encoder.load(tmp_path / "out", dtype=dtype)))
    assert library_difference(tmp_path / "out", "a decoder and an adapter") < TOLERANCE


def test_rules_that_do_not_fit_stop_the_conversion(tmp_path):
    llm2vec_model(tmp_path / "model", "Qwen/Qwen2-7B-Instruct")
    with pytest.raises(ValueError, match=r"the template '<\|im_start.*the span 'template'.*plain=True"):
        convert(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (notice,) = convert(tmp_path / "model", tmp_path / "out", plain=True)
    assert "written without: the template" in notice
    assert library_difference(tmp_path / "out") < TOLERANCE
    spec = Encoder.load(tmp_path / "out").spec
    assert spec.template is None and spec.layout == "sentence-transformers"


def test_llm2vec_without_template_and_bos_fits(tmp_path):
    llm2vec_model(tmp_path / "model", "Qwen/Qwen2.5-0.5B", bos=False)
    convert(tmp_path / "model", tmp_path / "out")
    assert same_bits(tmp_path / "model", tmp_path / "out", "float32")
    assert library_difference(tmp_path / "out") < TOLERANCE


def test_each_rule_is_named():
    decoder = decoder_spec({"model_type": "llama", "vocab_size": 420, **SIZES}, "causal")
    spec = ModelSpec(decoder=decoder, attention="causal", pooling=("mean",), layout="hf")
    assert unheld_rules(spec, True) == []
    for change, named in (
        ({"template": "a {text}"}, "template"),
        ({"text_suffix": " </s>"}, "' </s>'"),
        ({"span": "count_from_right", "compat": "llm2vec"}, "compat='llm2vec'"),
        ({"span": "template"}, "BOS is not pooled"),
        ({"prompts": {"query": "q: "}}, "prompts (query)"),
        ({"truncate_dim": 8}, "truncate_dim"),
    ):
        (rule,) = unheld_rules(replace(spec, **change), True)
        assert named in rule
    for change in ({"span": "template"}, {"prompts": {"query": "q: "}}):  # no matter where one token is pooled
        assert unheld_rules(replace(spec, pooling=("last",), **change), True) == []


def test_shards(tmp_path, monkeypatch):
    tiny_checkpoint(tmp_path / "model")
    monkeypatch.setattr(export, "SHARD_BYTES", 30_000)
    convert(tmp_path / "model", tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shapes = decoder_shapes(Encoder.load(tmp_path / "out").spec.decoder)
    assert set(index["weight_map"]) == set(shapes) and set(index["weight_map"].values()) == set(files)
    assert same_bits(tmp_path / "model", tmp_path / "out", "float32")
    assert library_difference(tmp_path / "out") < TOLERANCE


def test_a_damaged_model_is_not_converted(tmp_path):
    model = tiny_checkpoint(tmp_path / "model")
    with torch.no_grad():
        model.get_parameter("layers.1.mlp.up_proj.weight")[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        convert(tmp_path / "model", tmp_path / "out")
    tiny_model(tmp_path / "model", num_hidden_layers=2)
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | {"num_hidden_layers": 3}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"tensor layers\.2\..* is missing"):
        convert(tmp_path / "model", tmp_path / "out")
    with pytest.raises(ValueError, match="dtype is 'int4'"):
        convert(tmp_path / "model", tmp_path / "out", dtype="int4")
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("keys", "stated"),
    [
        ({"attention_bias": True}, {"attention_bias": False}),
        ({"num_hidden_layers": 4}, {"num_hidden_layers": 2}),
        ({"num_hidden_layers": 2}, {"num_hidden_layers": 3}),
        ({}, {"intermediate_size": 40}),
    ],
    ids=str,
)
def test_what_is_not_loaded_is_not_converted(keys, stated, tmp_path):
    tiny_checkpoint(tmp_path / "model", **keys)
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | stated
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as loaded:
        Encoder.load(tmp_path / "model")
    with pytest.raises(CheckpointError) as converted:
        convert(tmp_path / "model", tmp_path / "out")
    assert str(converted.value) == str(loaded.value)
    assert names(tmp_path) == ["model"]


def test_a_number_too_large_for_the_chosen_dtype_is_no_damage(tmp_path):
    model = tiny_checkpoint(tmp_path / "model")
    with torch.no_grad():
        model.get_parameter("layers.1.mlp.up_proj.weight")[3, 4] = -1e6
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor layers\.1\S+ holds values up to 1e\+06, more"):
        convert(tmp_path / "model", tmp_path / "out", dtype="float16")
    convert(tmp_path / "model", tmp_path / "out", dtype="bfloat16")


def test_pad_token_is_named(tmp_path):
    """sentence-transformers pads its batches: a tokenizer without a pad token gets one."""
    (tmp_path / "model").mkdir()
    tiny_tokenizer(tmp_path / "model")
    tiny_model(tmp_path / "model", "llama")
    for name in ("tokenizer_config.json",):
        config = json.loads((tmp_path / "model" / name).read_text())
        del config["pad_token"]
        (tmp_path / "model" / name).write_text(json.dumps(config))
    convert(tmp_path / "model", tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").pad_token is not None
    assert library_difference(tmp_path / "out") < TOLERANCE
