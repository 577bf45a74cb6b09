"""Folders written by `save` and `convert`: opened by this package, by transformers and by sentence-transformers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from gguf_samples import write_quantised
from parity import note
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tiny_models import CLASSES, TEXTS, tiny_adapter, tiny_checkpoint, tiny_model, tiny_tokenizer

from flashvec import Encoder
from flashvec.kernels.rope import Rope
from flashvec.runtime.checkpoint import export, placing
from flashvec.runtime.checkpoint.export import convert, decoder_shapes, unheld_rules
from flashvec.runtime.checkpoint.hf import plain_spec
from flashvec.runtime.checkpoint.hf_config import hf_config
from flashvec.runtime.checkpoint.open import Overrides, open_checkpoint
from flashvec.runtime.checkpoint.saved import read_spec
from flashvec.runtime.checkpoint.source import CheckpointError
from flashvec.runtime.families import decoder_spec, stated_attention
from flashvec.runtime.spec import ModelSpec

TOLERANCE = 1e-5
SIZES: dict[str, int] = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 0.8, "llama_4_scaling_beta": 0.1}
CONFIGS: dict[str, dict] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama 3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, **LLAMA3}},
    "llama linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "mistral": {"sliding_window": 7},
    "mistral v0.2": {"sliding_window": None, "head_dim": None, "num_attention_heads": 4},
    "ministral": {"sliding_window": 7, **MIXED},
    "ministral3": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, **YARN}},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    "qwen3": {"attention_bias": True},
    "gemma": {},
    "gemma2": {"sliding_window": 7, "query_pre_attn_scalar": 224, "attn_logit_softcapping": 50.0},
    "gemma3_text": {"sliding_window": 7, "query_pre_attn_scalar": 168},
    "gemma3_text flag": {"sliding_window": 512, "use_bidirectional_attention": True},
}


def texts(encoder):
    return encoder.embed(list(TEXTS))


def same_bits(a, b, dtype):
    return np.array_equal(texts(Encoder.load(a, dtype=dtype)), texts(Encoder.load(b, dtype=dtype)))


def library_difference(folder, of="a decoder", **settings):
    """Largest absolute difference between sentence-transformers and this package over one folder, fp32.

    Args:
        folder: that `convert` or `save` wrote.
        of: what it was written from.
    """
    kwargs = {"dtype": torch.float32}
    theirs = SentenceTransformer(str(folder), device="cpu", model_kwargs=kwargs).encode(list(TEXTS), **settings)
    ours = Encoder.load(folder, dtype="float32").encode(list(TEXTS), **settings)
    assert ours.shape == theirs.shape and np.abs(theirs).max() > 0.01
    found = np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())
    return note("layout", f"converted folder, from {of}", "sentence-transformers", found)


# --- config.json --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("case", CONFIGS)
def test_config_describes_the_same_decoder(case, attention):
    config = {"model_type": case.split()[0], **SIZES, **CONFIGS[case]}
    config = {key: value for key, value in config.items() if value is not None or key == "sliding_window"}
    spec, _ = plain_spec(config, Overrides(attention=attention))
    written = json.loads(json.dumps(hf_config(spec, "float32")))
    assert stated_attention(written) == ("bidirectional" if attention == "bidirectional" else None)
    for direction in ("bidirectional", "causal"):  # a window is right in the other one, too
        if direction == "bidirectional" and attention == "causal" and "flag" in case:
            continue  # the flag is gone with the direction it stated
        again, theirs = decoder_spec(written, direction), decoder_spec(config, direction)
        # query_scale_positions is read in every family and used in one
        assert replace(again, query_scale_positions=theirs.query_scale_positions) == theirs


def test_config_refuses_what_its_family_cannot_state():
    for config, change, named in (
        ({"model_type": "llama"}, {"qkv_bias": True}, "out_bias is False"),
        ({"model_type": "llama"}, {"attention_scale": 0.1}, "attention_scale is 0.1"),
        ({"model_type": "ministral", **MIXED}, {"layer_windows": (1, 2, None, None)}, "2 different windows"),
        ({"model_type": "mistral", "sliding_window": 7}, {"layer_windows": (1, None, 1, 1)}, "some layers only"),
    ):
        spec, _ = plain_spec({**SIZES, **config}, Overrides())
        with pytest.raises(ValueError, match=named):
            hf_config(replace(spec, decoder=replace(spec.decoder, **change)), "float32")


# --- conversion ---------------------------------------------------------------------------------------------


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


def library_model(folder, **keys):
    tiny_checkpoint(folder / "base", "gemma3", use_bidirectional_attention=True)
    heads = [Dense(32, 96, bias=False, activation_function=torch.nn.Identity()), Dense(96, 24, bias=True)]
    modules = [Transformer(str(folder / "base")), Pooling(32, "mean", include_prompt=False), *heads, Normalize()]
    SentenceTransformer(modules=modules, device="cpu", **keys).save(str(folder / "model"))


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
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["layers.0.self_attn.q_proj.weight"].dtype == torch.float32
    assert stored["layers.0.self_attn.k_proj.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    for dtype in ("float32", "bfloat16"):
        chain = Encoder.load(tmp_path / "model", adapters=tmp_path / "adapter", dtype=dtype)
        assert np.array_equal(texts(chain), texts(Encoder.load(tmp_path / "out", dtype=dtype)))
    assert library_difference(tmp_path / "out", "a decoder and an adapter") < TOLERANCE


def llm2vec_model(folder, base, *, bos=True):
    tiny_checkpoint(folder, "qwen2", bos=bos)
    config = json.loads((folder / "config.json").read_text()) | {"_name_or_path": base}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "llm2vec_config.json").write_text('{"pooling_mode": "mean"}')


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
    decoder = decoder_spec({"model_type": "llama", **SIZES}, "causal")
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


# --- save ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_restores_bit_for_bit(family, dtype, tmp_path):
    tiny_checkpoint(tmp_path / "model", family)
    encoder = Encoder.load(tmp_path / "model", dtype=dtype, max_length=77)
    encoder.calibrate(list(TEXTS))
    encoder.save(tmp_path / "saved")
    again = Encoder.load(tmp_path / "saved", dtype=dtype)
    assert again.spec == encoder.spec and again.spec.int8_ranges is not None
    assert np.array_equal(texts(encoder), texts(again))
    assert np.array_equal(encoder.embed(["x"], precision="int8"), again.embed(["x"], precision="int8"))
    if dtype == "float32":
        assert library_difference(tmp_path / "saved") < TOLERANCE


def test_save_keeps_heads_and_fewer_layers(tmp_path):
    library_model(tmp_path)
    encoder = Encoder.load(tmp_path / "model", layers=2, dtype="float32")
    encoder.save(tmp_path / "saved")
    again = Encoder.load(tmp_path / "saved", dtype="float32")
    assert len(again.decoder.layers) == again.spec.decoder.num_layers == len(again.spec.decoder.layer_windows) == 2
    assert np.array_equal(texts(encoder), texts(again))
    assert library_difference(tmp_path / "saved") < TOLERANCE


@pytest.mark.parametrize("compat", [None, "llm2vec"])
def test_save_keeps_rules_that_fit_in_no_other_folder(compat, tmp_path, caplog):
    llm2vec_model(tmp_path / "model", "Qwen/Qwen2-7B-Instruct")
    encoder = Encoder.load(tmp_path / "model", dtype="float32", compat=compat)
    encoder.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "modules.json").exists()
    assert "opens with this package only, because" in caplog.text and "the template" in caplog.text
    again = Encoder.load(tmp_path / "saved", dtype="float32")
    assert again.spec == encoder.spec
    instructions = ["find:", ""] * (len(TEXTS) // 2)
    ours, theirs = (e.embed(list(TEXTS), instruction=instructions) for e in (encoder, again))
    assert np.array_equal(ours, theirs)
    assert Encoder.load(tmp_path / "saved", compat="llm2vec").spec.span == "count_from_right"


def test_overrides_on_a_saved_folder(tmp_path):
    tiny_checkpoint(tmp_path / "model", "gemma3")
    Encoder.load(tmp_path / "model").save(tmp_path / "saved")
    loaded = Encoder.load(tmp_path / "saved", attention="causal", pooling="last", max_length=9, truncate_dim=8).spec
    direct = Encoder.load(tmp_path / "model", attention="causal", pooling="last", max_length=9, truncate_dim=8).spec
    assert loaded == direct and loaded.decoder.layer_windows != read_spec(tmp_path / "saved").decoder.layer_windows
    with pytest.raises(ValueError, match="compat='llm2vec' is for LLM2Vec models and plain decoders"):
        Encoder.load(tmp_path / "saved", compat="llm2vec")


# --- the folder itself --------------------------------------------------------------------------------------


@pytest.fixture
def encoder(tmp_path):
    tiny_checkpoint(tmp_path / "model")
    return Encoder.load(tmp_path / "model", dtype="float32")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_existing_folder_is_replaced_only_on_demand(encoder, tmp_path):
    target = tmp_path / "deep" / "saved"
    encoder.save(target)
    with pytest.raises(ValueError, match="exists and is not empty"):
        encoder.save(target)
    (target / "old").touch()
    encoder.save(target, overwrite=True)
    assert not (target / "old").exists() and names(target.parent) == ["saved"]
    (tmp_path / "empty").mkdir()
    encoder.save(tmp_path / "empty")
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not a model folder, so it is not replaced"):
        encoder.save(tmp_path / "papers", overwrite=True)
    with pytest.raises(ValueError, match="is the model's own folder"):
        convert(tmp_path / "model", tmp_path / "model", overwrite=True)


def test_nothing_half_written_stays(encoder, tmp_path, monkeypatch):
    encoder.save(tmp_path / "saved")
    before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir() if path.is_file()}

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(encoder.tokenizer, "save", fail, raising=False)
    for folder in ("saved", "fresh"):
        with pytest.raises(OSError, match="no space left"):
            encoder.save(tmp_path / folder, overwrite=True)
    assert names(tmp_path) == ["model", "saved"]
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (["attention"], "sideways", "attention"),
        (["pooling"], ["median"], "pooling"),
        (["pooling"], [], "pooling"),
        (["span"], "all", "span"),
        (["layout"], "pickle", "layout is 'pickle'"),
        (["similarity"], "maxsim", "similarity is 'maxsim'"),
        (["compat"], "v1", "compat is 'v1'"),
        (["template"], "no place", "template holds {text} 0 times"),
        (["prompts"], {"query": 3}, "prompts"),
        (["prompts"], {"query": "x" * 70_000}, "longer than"),
        (["max_length"], 10**6, "max_length is 1000000"),
        (["max_length"], "512", "max_length"),
        (["truncate_dim"], 33, "truncate_dim is 33"),
        (["int8_ranges"], [[0.0], [1.0, 2.0]], "int8_ranges has 1 minima and 2 maxima"),
        (["int8_ranges"], [[0.0] * 33, [1.0] * 33], "int8_ranges has 33 minima"),
        (["int8_ranges"], [[], []], "int8_ranges has 0 minima"),
        (["dense"], [{"in_features": 7, "out_features": 3, "bias": False, "activation": "tanh"}], "takes 7 features"),
        (["dense"], [{"in_features": 32, "out_features": 3, "bias": False, "activation": "exec"}], "dense.activation"),
        (["decoder", "family"], "bert", "decoder.family is 'bert'"),
        (["decoder", "num_layers"], 10**9, "decoder.num_layers is 1000000000"),
        (["decoder", "vocab_size"], -1, "decoder.vocab_size is -1"),
        (["decoder", "norm_eps"], float("nan"), "norm_eps"),
        (["decoder", "num_kv_heads"], 3, "num_kv_heads"),
        (["decoder", "layer_ropes"], [0, 0, 7], "layer_ropes names a table"),
        (["decoder", "layer_windows"], [None], "layer_windows has 1 entries, not 3"),
        (["decoder", "ropes"], [{"theta": 1e4, "kind": "spiral"}], "kind"),
        (["surplus"], 1, "surplus"),
        (["decoder"], None, "not a flashvec model spec"),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, list) and value and isinstance(value[0], str) else None,
)
def test_saved_facts_are_checked(path, value, named, encoder, tmp_path):
    encoder.save(tmp_path / "saved")
    file = tmp_path / "saved" / "flashvec.json"
    values = json.loads(file.read_text())
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path / "saved", Overrides())
    assert named in str(error.value) and "flashvec.json" in str(error.value)


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


def test_files_of_others_stay_where_a_model_is_written_among_them(encoder, tmp_path, monkeypatch):
    folder = tmp_path / "notes"
    (folder / ".git").mkdir(parents=True)
    for name in (".git/HEAD", "README.md", "modules.json"):
        (folder / name).write_text("mine")
    with monkeypatch.context() as small:
        small.setattr(export, "SHARD_BYTES", 30_000)
        export.save(encoder, folder, among_others=True)
    export.save(encoder, folder, among_others=True, spec=replace(encoder.spec, template="a {text}"))
    assert (folder / ".git/HEAD").read_text() == (folder / "README.md").read_text() == "mine"
    # what the sharded model before it said of its files and modules is gone
    assert {"model.safetensors.index.json", "modules.json"} <= set(placing.REPLACED_FILES)
    assert set(placing.REPLACED_FILES) & set(names(folder)) == {"model.safetensors"}
    assert Encoder.load(folder, dtype="float32").spec.template == "a {text}"
    assert not [name for name in names(folder) if name.startswith(".flashvec")]


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


def test_rope_tables_are_written_in_full():
    spec, _ = plain_spec({"model_type": "llama", **SIZES, **CONFIGS["llama 3"]}, Overrides())
    assert spec.decoder.ropes == (Rope(5e5, "llama3", 8.0, 1.0, 4.0, 64),)
    assert hf_config(spec, "float32")["rope_parameters"] == CONFIGS["llama 3"]["rope_parameters"]


def test_readers_before_transformers_5_find_the_rotary_base():
    """They look for it beside `rope_parameters`, and take 10,000 without a word where they do not find it."""
    spec, _ = plain_spec({"model_type": "llama", **SIZES, "rope_theta": 5e5}, Overrides())
    config = hf_config(spec, "float32")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
    assert transformers.LlamaConfig(**config).rope_parameters == config["rope_parameters"]
    stretched, _ = plain_spec({"model_type": "llama", **SIZES, **CONFIGS["llama 3"]}, Overrides())
    assert "rope_theta" not in hf_config(stretched, "float32")  # its base alone would be wrong as quietly
