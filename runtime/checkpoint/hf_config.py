"""A decoder's facts as Hugging Face's config.json: the inverse of `runtime/families.py`."""

from typing import Any

from flashvec.kernels.rope import Rope
from flashvec.runtime.families import FAMILIES
from flashvec.runtime.spec import Attention, DecoderSpec, ModelSpec

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def hf_config(spec: ModelSpec, dtype: str) -> dict[str, Any]:
    """config.json with which transformers' own class of the family computes what our decoder computes.

    A bidirectional model says so by the key it came with: `use_bidirectional_attention` where Gemma 3 had it, which
    halves the window, else `is_causal`. A causal one says nothing.

    Args:
        dtype: float32, bfloat16 or float16: what the weights are stored in.

    Raises:
        ValueError: a decoder that no configuration of its family describes; names the fact.
    """
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    decoder = spec.decoder
    family = FAMILIES[decoder.family]
    own_key = decoder.family == "gemma3_text" and spec.direction_key == "use_bidirectional_attention"
    config: dict[str, Any] = {
        "architectures": [MODEL_MAPPING_NAMES[decoder.family]],
        "model_type": decoder.family,
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.mlp_size,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "head_dim": decoder.head_size,
        "max_position_embeddings": decoder.max_positions,
        "rms_norm_eps": decoder.norm_eps,
        family.activation_key: ACTIVATIONS[decoder.activation],
        "dtype": dtype,
        "use_cache": False,
        "tie_word_embeddings": decoder.tied_head,  # no head is written: whoever wants an untied one must miss it
        "bos_token_id": None,  # texts get theirs from the tokenizer
        "eos_token_id": None,
        "pad_token_id": None,
    }
    for fact in ("qkv_bias", "out_bias", "mlp_bias"):
        key, value = getattr(family, fact), getattr(decoder, fact)
        if config.setdefault(key, value) != value if isinstance(key, str) else key != value:
            raise ValueError(f"{fact} is {value}, which {decoder.family} cannot state")
    if family.attention_scale_key:
        config[family.attention_scale_key] = _inverse_square(decoder.attention_scale)
    elif decoder.attention_scale != float(decoder.head_size) ** -0.5:
        raise ValueError(f"attention_scale is {decoder.attention_scale}, {decoder.family} cannot state its own")
    if family.softcap_key:
        config[family.softcap_key] = decoder.softcap
        config["final_logit_softcapping"] = decoder.head_softcap
    config |= _windows(decoder, spec.attention, family.windows, halved=own_key)
    config["rope_parameters"] = _rope_parameters(decoder)
    if len(decoder.ropes) == 1 and decoder.ropes[0].kind == "default":
        config["rope_theta"] = decoder.ropes[0].theta  # where transformers before 5 looks: it would take 10,000
    if spec.attention == "bidirectional":
        config |= {"use_bidirectional_attention": True} if own_key else {"is_causal": False}
    return config


def _inverse_square(scale: float) -> float:
    """The number x with x ** -0.5 == scale: a whole one where it gives the same bits."""
    whole = round(scale**-2)
    return whole if float(whole) ** -0.5 == scale else scale**-2


def _windows(decoder: DecoderSpec, attention: Attention, rule: str, halved: bool) -> dict[str, Any]:
    """sliding_window and layer_types; see `families._reach` for the meaning of the width.

    Args:
        halved: the configuration class halves the width when the model is bidirectional.
    """
    if rule == "none":
        return {}
    reaches = {reach for reach in decoder.layer_windows if reach is not None}
    if len(reaches) > 1:
        raise ValueError(f"layer_windows holds {len(reaches)} different windows; config.json states one")
    sliding = [reach is not None for reach in decoder.layer_windows]
    if len(decoder.ropes) == 2:  # a layer of the sliding kind keeps its rotary table where its window is off
        sliding = [table == 1 for table in decoder.layer_ropes]
    forgets = decoder.family in ("qwen2", "qwen3")  # their class has no width unless told to use it
    if rule == "layer_types" and not reaches and not forgets:  # the others' models make a mask of it, needed or not
        reaches = {decoder.max_positions}
    width: int | None = None
    if reaches:
        reach = reaches.pop()
        width = reach + 1 if attention == "causal" else reach
        if halved and attention == "bidirectional":
            width = 2 * reach
    if rule == "all":
        if any(sliding) and not all(sliding):
            raise ValueError(f"layer_windows is set in some layers only, which {decoder.family} cannot state")
        return {"sliding_window": width}
    kinds = ["sliding_attention" if slides else "full_attention" for slides in sliding]
    config: dict[str, Any] = {"sliding_window": width, "layer_types": kinds}
    if forgets:
        config["use_sliding_window"] = width is not None
    return config


def _rope_parameters(decoder: DecoderSpec) -> dict[str, Any]:
    tables = [_rope(rope) for rope in decoder.ropes]
    if len(tables) == 2:
        return {"full_attention": tables[0], "sliding_attention": tables[1]}
    if decoder.query_scale_beta:
        tables[0]["llama_4_scaling_beta"] = decoder.query_scale_beta
        tables[0]["original_max_position_embeddings"] = decoder.query_scale_positions
    return tables[0]


def _rope(rope: Rope) -> dict[str, Any]:
    parameters: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        parameters["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = rope.original_max_positions
    if rope.kind == "llama3":
        parameters |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        parameters |= {
            "beta_fast": rope.beta_fast,
            "beta_slow": rope.beta_slow,
            "attention_factor": rope.attention_factor,
            "truncate": rope.truncate,
        }
    return parameters
