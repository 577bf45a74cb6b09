"""Every family against Hugging Face's own model, and proof that each fact of a family's row matters."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from family_models import (
    BASE,
    CASES,
    CONFIGS,
    WINDOW,
    ModuleSource,
    final_states,
    hugging_face_states,
    in_fp64,
    models,
    oracle,
    our_states,
    run_packs,
    texts_of,
)
from parity import note
from torch import Tensor
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flashvec.kernels.mean_pool import MODES
from flashvec.kernels.rope import Rope
from flashvec.runtime.checkpoint.source import CheckpointError
from flashvec.runtime.decoder import Decoder
from flashvec.runtime.decoder_loader import DecoderLoader
from flashvec.runtime.families import FAMILIES, decoder_spec, standard_config, stated_attention
from flashvec.runtime.pooling import finish, pool
from flashvec.runtime.spec import DecoderSpec, ModelSpec

SCALED_QUERIES = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 64,
    "factor": 2,
    "llama_4_scaling_beta": -1,
}


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def pooled_by_hand(state: Tensor, mode: str, first: int) -> Tensor:
    part = state[first:]
    if mode == "weighted_mean":
        weights = torch.arange(1, len(part) + 1)[:, None]
        return (part * weights).sum(0) / weights.sum()
    if mode == "mean_sqrt_len":
        return part.sum(0) / len(part) ** 0.5
    return {"mean": part.mean(0), "max": part.max(0).values, "last": state[-1], "cls": state[0]}[mode]


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_matches_hugging_face(name, attention):
    _, decoder = models(name, attention)
    texts, theirs = oracle(name, attention)
    packs = run_packs(decoder, texts, attention == "causal")
    for got, want in zip(final_states(decoder, packs, texts), theirs, strict=True):
        assert note("family", name, attention, float((unit(got) - unit(want)).abs().max())) <= 1e-5

    for instruction in (0, 1):  # tokens of instruction in front, attended to and not pooled
        spans = np.array([[min(instruction, len(t) - 1), len(t)] for t in texts])
        for mode in MODES:
            spec = ModelSpec(decoder.spec, attention, (mode,), "hf")  # type: ignore[arg-type]
            for done in packs:
                pooled = pool(spec, decoder, done, torch.from_numpy(spans[done.indices]))
                vectors = finish(spec, pooled, (), None, None)
                for i, vector in zip(done.indices, vectors, strict=True):
                    want = unit(pooled_by_hand(theirs[i], mode, int(spans[i, 0])))
                    found = note("family", name, attention, float((vector - want).abs().max()))
                    assert found <= 1e-5, (mode, instruction, len(texts[i]))


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_fp32_resolves_the_limit(name, attention):
    """Hugging Face in fp32, and we, are within the limit of Hugging Face in fp64: what is compared above is the
    mathematics, not which rounding errors a badly conditioned model happens to blow up."""
    model, decoder = models(name, attention)
    texts, theirs = oracle(name, attention)
    # Eager attention holds all scores in memory: the longest text but one there; the soft-cap bounds its scores anyway.
    at = -2 if decoder.spec.softcap and attention == "bidirectional" else -1
    (truth,) = hugging_face_states(in_fp64(model), [texts[at]])
    (ours,) = our_states(decoder, [texts[at]], attention == "causal")
    assert truth.dtype == torch.float64
    assert (unit(theirs[at]) - unit(truth)).abs().max() <= 1e-5
    assert (unit(ours) - unit(truth)).abs().max() <= 1e-5


def changed_facts(spec: DecoderSpec, attention: str) -> dict[str, DecoderSpec]:
    """One fact of the row changed at a time, in each way that this row can be wrong."""
    changes = {
        "theta": replace(spec, ropes=tuple(replace(r, theta=r.theta * 1.5) for r in spec.ropes)),
        "norm offset": replace(spec, norm_offset=1.0 - spec.norm_offset),
        "embedding scale": replace(spec, embedding_scale=2.0 * spec.embedding_scale),
        "attention scale": replace(spec, attention_scale=spec.attention_scale * 1.1),
        "activation": replace(spec, activation="silu" if spec.activation != "silu" else "gelu_tanh"),
        "softcap": replace(spec, softcap=1.0 if spec.softcap is None else None),
        "head size": replace(
            spec,
            head_size=spec.head_size // 2,
            num_heads=spec.num_heads * 2,
            num_kv_heads=spec.num_kv_heads * 2,
        ),
        "eps": replace(spec, norm_eps=1e-1),
    }
    if spec.qk_norm:
        del changes["head size"]  # the norms' weights fix it
    if any(r.kind != "default" for r in spec.ropes):
        changes["rope scaling"] = replace(spec, ropes=tuple(Rope(r.theta) for r in spec.ropes))
    if any(w is not None for w in spec.layer_windows):
        for by in (-1, 1):
            windows = tuple(None if w is None else w + by for w in spec.layer_windows)
            changes[f"window {by:+d}"] = replace(spec, layer_windows=windows)
        changes["window in all layers"] = replace(spec, layer_windows=(WINDOW - 4,) * spec.num_layers)
    else:
        changes["window"] = replace(spec, layer_windows=(WINDOW,) * spec.num_layers)
    if len(spec.ropes) == 2:
        changes["rope of each layer"] = replace(spec, layer_ropes=tuple(1 - i for i in spec.layer_ropes))
    if spec.query_scale_beta:
        changes["query scale"] = replace(spec, query_scale_beta=0.0)
    return changes


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_every_fact_matters(name, attention):
    _, decoder = models(name, attention)
    texts, causal = texts_of([19, 40, 130] if decoder.spec.query_scale_beta else [19, 40]), attention == "causal"
    right = [unit(s.mean(0)) for s in our_states(decoder, texts, causal)]

    def moved(other: Decoder, causal: bool) -> float:
        wrong = [unit(s.mean(0)) for s in our_states(other, texts, causal)]
        return max(float((a - b).abs().max()) for a, b in zip(right, wrong, strict=True))

    for fact, spec in changed_facts(decoder.spec, attention).items():
        assert moved(Decoder(spec, decoder.embedding_VD, decoder.layers, decoder.norm_D), causal) > 1e-3, fact
    assert moved(decoder, not causal) > 1e-3, "direction"
    gone = ["qkv_bias", "out_bias", "gate_up_bias", "down_bias", "attention_post_norm", "mlp_post_norm"]
    turned = ["query_norm", "key_norm"]  # each alone: their weights in another order
    changes = [{name: lambda x: None} for name in gone] + [{name: lambda x: x.flip(0)} for name in turned]
    for change in [*changes, dict.fromkeys(turned, lambda x: None)]:
        if getattr(decoder.layers[0], next(iter(change))) is not None:
            layers = [
                replace(layer, **{name: wrong(getattr(layer, name)) for name, wrong in change.items()})
                for layer in decoder.layers
            ]
            other = Decoder(decoder.spec, decoder.embedding_VD, layers, decoder.norm_D)
            assert moved(other, causal) > 1e-3, list(change)


def test_every_family_is_compared():
    assert {name.split()[0] for name in CONFIGS} == set(FAMILIES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'; known families are llama"),
        ({"model_type": "gemma3", "text_config": {}}, "a multimodal family"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"hidden_size": "48"}, "hidden_size is '48'"),
        ({"num_key_value_heads": 4}, "no multiple of num_key_value_heads 4"),
        ({"head_dim": 15}, "head_dim.*15"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": None}}, "RoPE's factor is None"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "abc"}}, "RoPE's rope_theta is 'abc'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": float("inf")}}, "factor is inf"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2, "attention_factor": "abc"}},
            "attention_factor is 'abc'",
        ),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_type is 'spiral'; known are default"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0, "factor": 2}}, "RoPE's rope_theta is 1.0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "a rule of its own for full_attention; llama"),
        (
            {
                "model_type": "gemma3_text",
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 2,
                    "original_max_position_embeddings": 64,
                    "truncate": False,
                },
            },
            "RoPE's truncate is false",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; expected a number from 1e-30 to 1"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0; expected a number"),
        ({"model_type": "gemma3_text", "query_pre_attn_scalar": -4}, "query_pre_attn_scalar is -4"),
        ({"model_type": "gemma2", "attn_logit_softcapping": 0.0}, "attn_logit_softcapping is 0.0"),
        ({"model_type": "gemma2", "final_logit_softcapping": float("nan")}, "final_logit_softcapping is nan"),
        ({"model_type": "ministral3", "rope_parameters": SCALED_QUERIES}, "RoPE's llama_4_scaling_beta is -1"),
        ({"model_type": ["llama"]}, "model_type is ..llama..; known families"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "qwen3", "layer_types": ["linear_attention"] * 4}, "layer_types holds 'linear_attention'"),
    ],
)
def test_refuses_by_name(change, message):
    config = {**BASE, "model_type": "llama", **change}
    with pytest.raises(CheckpointError, match=message):
        decoder_spec(config, "bidirectional")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": 5}, "architectures is 5; expected a list of names"),
        ({"is_causal": 1}, "is_causal is 1; expected true or false"),
        ({"is_causal": "causal"}, "is_causal is 'causal'"),
        ({"use_bidirectional_attention": "true"}, "use_bidirectional_attention is 'true'"),
    ],
)
def test_a_direction_nobody_can_follow_is_refused(change, message):
    with pytest.raises(CheckpointError, match=f"config.json: {message}"):
        stated_attention({**BASE, "model_type": "llama", **change})


def test_yarn_without_a_factor_stretches_to_the_models_length():
    rule = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 16, "factor": None}
    config = {**BASE, "model_type": "llama", "max_position_embeddings": 64}
    (found,) = decoder_spec({**config, "rope_parameters": rule}, "causal").ropes
    assert found.factor == 4.0 and decoder_spec(
        {**config, "rope_parameters": {**rule, "factor": 4}}, "causal"
    ).ropes == (found,)


@pytest.mark.parametrize(("family", "kind"), [("llama", "llama3"), ("qwen3", "yarn"), ("ministral3", "yarn")])
def test_an_original_length_beside_the_rule_counts_as_in_transformers(family, kind):
    """Some files state it at the top, as Phi-3 does; transformers' models then take it, whatever the rule says."""
    rule = {"rope_type": kind, "rope_theta": 50.0, "factor": 4.0, "original_max_position_embeddings": 64}
    rule |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    rule |= {"llama_4_scaling_beta": 0.1} if family == "ministral3" else {}
    config = {**BASE, "hidden_size": 24, "original_max_position_embeddings": 32, "rope_parameters": rule}
    model = AutoModel.from_config(CONFIG_MAPPING[family](**deepcopy(config))).eval()
    spec = decoder_spec({**config, "model_type": family}, "causal")
    decoder = DecoderLoader(spec, ModuleSource(model), torch.float32, torch.device("cpu")).load()
    texts = texts_of([70, 200])
    for got, want in zip(our_states(decoder, texts, True), hugging_face_states(model, texts), strict=True):
        assert float((unit(got) - unit(want)).abs().max()) <= 1e-5


@pytest.mark.parametrize("width", [8, 9])
def test_a_flagged_window_is_whole_again_when_read_causally(width):
    config = {**BASE, "model_type": "gemma3_text", "sliding_window": width}
    flagged = decoder_spec({**config, "use_bidirectional_attention": True}, "causal")
    assert flagged.layer_windows == decoder_spec(config, "causal").layer_windows


def test_mistral_with_kinds_of_layers_is_ministral_as_in_transformers():
    config = {**BASE, "model_type": "ministral", "sliding_window": 8}
    config["layer_types"] = ["sliding_attention", "full_attention"] * (BASE["num_hidden_layers"] // 2)
    assert decoder_spec({**config, "model_type": "mistral"}, "causal") == decoder_spec(config, "causal")


def test_code_in_a_config_is_ignored():
    hostile = {
        "auto_map": {"AutoModel": "evil.Model"},
        "_attn_implementation_internal": "evil/kernel",
        "attn_implementation": "evil/kernel",
        "trust_remote_code": True,
    }
    config = {**BASE, "model_type": "llama"}
    assert decoder_spec({**config, **hostile}, "causal") == decoder_spec(config, "causal")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("labels", [{"num_labels": 1000}, {"id2label": {"one": "a"}}, {"num_labels": -1}], ids=str)
def test_labels_build_nothing(family, labels):
    """transformers' class makes a table of `num_labels` entries: ten thousand million of them are memory's end."""
    config = {**BASE, "model_type": family}
    plain, found = (standard_config(family, values, "config.json") for values in (config, {**config, **labels}))
    assert found.to_dict() == plain.to_dict() and len(found.id2label) == 2
