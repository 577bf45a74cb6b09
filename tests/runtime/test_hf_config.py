"""config.json as `save` and `convert` write it: the same decoder, for every reader."""

import json
from dataclasses import replace

import pytest
import torch
import transformers

from flashvec.kernels.rope import Rope
from flashvec.runtime.checkpoint.hf import plain_spec
from flashvec.runtime.checkpoint.hf_config import hf_config
from flashvec.runtime.checkpoint.open import Overrides
from flashvec.runtime.families import decoder_spec, stated_attention

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


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("family", ["ministral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_transformers_runs_a_model_none_of_whose_layers_has_a_window(family, attention):
    own = {"sliding_window": 7, "layer_types": ["full_attention"] * SIZES["num_hidden_layers"]}
    spec, _ = plain_spec({"model_type": family, **SIZES, **own}, Overrides(attention=attention))
    written = hf_config(spec, "float32")
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**written))
    assert model(torch.tensor([[1, 2, 3]])).last_hidden_state.isfinite().all()
    assert decoder_spec(written, attention) == spec.decoder


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
