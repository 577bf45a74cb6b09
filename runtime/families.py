"""Decoder families: how each one's config.json becomes a `DecoderSpec`.

A family is a row of facts over one decoder. transformers' own configuration classes supply defaults and read the old
spellings; its modelling code is not used. A config is untrusted input: only known keys of known families are read,
and sizes are bounded before anything is built from them.
"""

import math
from dataclasses import dataclass
from typing import Any

from flashvec.kernels.rope import Rope
from flashvec.runtime.checkpoint.source import CheckpointError
from flashvec.runtime.spec import Attention, DecoderSpec


@dataclass(frozen=True)
class Family:
    """What a family's layers do beyond the common decoder, and which config keys say so."""

    activation_key: str = "hidden_act"
    qkv_bias: bool | str = False  # a fact, or the config key that states it
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    scaled_embedding: bool = False  # by sqrt(hidden size)
    windows: str = "none"  # none, all (sliding_window in every layer), layer_types
    attention_scale_key: str | None = None  # scores are scaled by its value ** -0.5, else by head size
    softcap_key: str | None = None


FAMILIES: dict[str, Family] = {
    "llama": Family(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family(windows="all"),
    "ministral": Family(windows="layer_types"),
    "ministral3": Family(windows="all"),
    "qwen2": Family(qkv_bias=True, windows="layer_types"),
    "qwen3": Family(qkv_bias="attention_bias", out_bias="attention_bias", qk_norm=True, windows="layer_types"),
    "gemma": Family(qkv_bias="attention_bias", out_bias="attention_bias", norm_offset=1.0, scaled_embedding=True),
    "gemma2": Family(
        activation_key="hidden_activation",
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        post_norms=True,
        norm_offset=1.0,
        scaled_embedding=True,
        windows="layer_types",
        attention_scale_key="query_pre_attn_scalar",
        softcap_key="attn_logit_softcapping",
    ),
    "gemma3_text": Family(
        activation_key="hidden_activation",
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        qk_norm=True,
        post_norms=True,
        norm_offset=1.0,
        scaled_embedding=True,
        windows="layer_types",
        attention_scale_key="query_pre_attn_scalar",
    ),
}

# Published embedding models that renamed their family only to switch the causal mask off.
BIDIRECTIONAL_NAMES = {
    "llama_bidirec": "llama",
    "ministral3_bidirec": "ministral3",
    "bidirectional_pplx_qwen3": "qwen3",
}
BIDIRECTIONAL_ARCHITECTURES = ("BiModel", "BiForMNTP", "EncoderModel", "BidirectionalModel")

ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}

LIMITS = {  # far above every model there is; a config beyond them is damaged or hostile
    "vocab_size": 2**24,
    "hidden_size": 2**17,
    "intermediate_size": 2**19,
    "num_hidden_layers": 1000,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**12,
    "max_position_embeddings": 2**31,
    "original_max_position_embeddings": 2**31,
    "sliding_window": 2**31,
}

# The keys that describe a decoder: all that transformers' class is given of a config.json. From others it builds things
# ("num_labels": a table of so many entries), and some name code, kernels or download sources.
READ_KEYS = (
    *LIMITS,
    *("rms_norm_eps", "hidden_act", "hidden_activation", "attention_bias", "mlp_bias", "tie_word_embeddings"),
    *("is_causal", "use_bidirectional_attention"),
    *("layer_types", "use_sliding_window", "max_window_layers", "sliding_window_pattern"),
    *("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq", "partial_rotary_factor"),
    *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
)


LAYER_KINDS = ("full_attention", "sliding_attention")
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
NORM_EPS = (1e-30, 1.0)  # beyond these fp32 divides by zero, or what is normalised is lost beside it
NUMBERS = (1e-6, 1e12)  # likewise for scales and factors: what they make of a vector stays finite
ROPE_BASE = (2.0, 1e12)  # 1 would turn all planes alike


def stated_attention(config: dict[str, Any], where: str = "config.json") -> Attention | None:
    """The attention direction a config.json states, or None where it says nothing.

    Raises:
        CheckpointError: it says it in a way that nobody can follow; names file and key.
    """
    for key in ("is_causal", "use_bidirectional_attention"):
        if not isinstance(config.get(key), bool | None):
            raise CheckpointError(f"{where}: {key} is {repr(config[key])[:80]}; expected true or false")
    names = config.get("architectures") or []
    if not isinstance(names, list):
        raise CheckpointError(f"{where}: architectures is {repr(names)[:80]}; expected a list of names")
    if config.get("is_causal") is False or config.get("use_bidirectional_attention") is True:
        return "bidirectional"
    if str(config.get("model_type")) in BIDIRECTIONAL_NAMES:
        return "bidirectional"
    if any(str(name).endswith(BIDIRECTIONAL_ARCHITECTURES) for name in names):
        return "bidirectional"
    return "causal" if config.get("is_causal") is True else None


def decoder_spec(config: dict[str, Any], attention: Attention, where: str = "config.json") -> DecoderSpec:
    """The decoder that a config.json describes, its windows resolved for the direction it will run in.

    Args:
        config: the parsed config.json.
        attention: direction that will run; a window's reach depends on it (see `_reach`).
        where: the file, for messages.

    Raises:
        CheckpointError: an unknown family, activation or RoPE rule, or a number out of bounds; names file and key.
    """
    model_type = config.get("model_type")
    name = BIDIRECTIONAL_NAMES.get(str(model_type), str(model_type))
    if name == "mistral" and "layer_types" in config:  # Ministral, as transformers reads such a file
        name = "ministral"
    family = FAMILIES.get(name)
    if family is None:
        hint = ", a multimodal family: only its text decoder runs" if "text_config" in config else ""
        raise CheckpointError(
            f"{where}: model_type is {repr(model_type)[:80]}{hint}; known families are {', '.join(FAMILIES)}"
        )
    if config.get("quantization_config"):
        raise CheckpointError(f"{where}: quantization_config: quantised safetensors are not read; use the original")
    hf = standard_config(name, config, where)

    head_size = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    num_kv_heads = hf.num_key_value_heads or hf.num_attention_heads
    if hf.num_attention_heads % num_kv_heads:
        raise CheckpointError(
            f"{where}: num_attention_heads {hf.num_attention_heads} is no multiple of num_key_value_heads "
            f"{num_kv_heads}"
        )
    if head_size % 2:
        raise CheckpointError(f"{where}: head_dim is {head_size}; rotary embedding needs an even one")
    activation = ACTIVATION_NAMES.get(str(getattr(hf, family.activation_key)))
    if activation is None:
        raise CheckpointError(
            f"{where}: {family.activation_key} is {getattr(hf, family.activation_key)!r}; "
            f"known are {', '.join(ACTIVATION_NAMES)}"
        )

    sliding = _sliding_layers(family, hf, where)
    ropes, layer_ropes = _ropes(hf, sliding, where)
    reach = _reach(hf, attention, config.get("sliding_window"))
    scale_by = _number_of(hf, family.attention_scale_key, where) if family.attention_scale_key else head_size
    beta, positions = _query_scale(hf, where) if name == "ministral3" else (0.0, 0)
    return DecoderSpec(
        family=name,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        mlp_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        max_positions=hf.max_position_embeddings,
        norm_eps=checked_number(hf.rms_norm_eps, f"{where}: rms_norm_eps", NORM_EPS),
        activation=activation,  # type: ignore[arg-type]
        qkv_bias=_fact(family.qkv_bias, hf),
        out_bias=_fact(family.out_bias, hf),
        mlp_bias=_fact(family.mlp_bias, hf),
        qk_norm=family.qk_norm,
        post_norms=family.post_norms,
        norm_offset=family.norm_offset,
        embedding_scale=math.sqrt(hf.hidden_size) if family.scaled_embedding else 1.0,
        attention_scale=float(scale_by) ** -0.5,
        softcap=_softcap(hf, family.softcap_key, where),
        ropes=ropes,
        layer_ropes=layer_ropes,
        layer_windows=tuple(reach if slides else None for slides in sliding),
        tied_head=bool(hf.tie_word_embeddings),
        head_softcap=_softcap(hf, "final_logit_softcapping", where),
        query_scale_beta=beta,
        query_scale_positions=positions,
    )


def standard_config(name: str, config: dict[str, Any], where: str) -> Any:
    """transformers' configuration object of a family: defaults filled in, old spellings read."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for key, limit in LIMITS.items():
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= limit:
            raise CheckpointError(f"{where}: {key} is {value!r}; expected a whole number from 1 to {limit}")
    try:
        hf = CONFIG_MAPPING[name](**{key: config[key] for key in READ_KEYS if key in config})
        hf.standardize_rope_params()  # as its models do: what stands beside the rule counts, too
        return hf
    except Exception as error:  # its validators raise types of their own
        raise CheckpointError(f"{where}: {' '.join(str(error).split())}") from None


def _fact(fact: bool | str, hf: Any) -> bool:
    return bool(getattr(hf, fact, False)) if isinstance(fact, str) else fact


def _sliding_layers(family: Family, hf: Any, where: str) -> list[bool]:
    """Which layers see a window only."""
    kinds = hf.layer_types if family.windows == "layer_types" else []
    if strange := sorted(set(kinds) - set(LAYER_KINDS)):
        raise CheckpointError(f"{where}: layer_types holds {strange[0]!r}; known are {', '.join(LAYER_KINDS)}")
    if family.windows == "none" or getattr(hf, "sliding_window", None) is None:
        return [False] * hf.num_hidden_layers
    if family.windows == "all":
        return [True] * hf.num_hidden_layers
    return [kind == "sliding_attention" for kind in kinds]


def _reach(hf: Any, attention: Attention, stated: int | None) -> int | None:
    """Tokens a windowed layer sees to each allowed side, itself not counted.

    transformers' masks, read from its source (5.23, `masking_utils.py`, `modeling_gemma3.py`): a causal layer sees
    i - j < window. With the causal mask switched off it sees |i - j| <= window. Gemma 3 with its own flag
    `use_bidirectional_attention` halves the window first (w // 2 + 1) and then sees |i - j| < that.
    """
    window = getattr(hf, "sliding_window", None)
    if window is None:
        return None
    if getattr(hf, "use_bidirectional_attention", False) and hf.model_type == "gemma3_text":
        # The configuration class has halved it already, and an odd width is not told from its half.
        return window - 1 if attention == "bidirectional" else (stated or 2 * (window - 1)) - 1
    return window if attention == "bidirectional" else window - 1


def _ropes(hf: Any, sliding: list[bool], where: str) -> tuple[tuple[Rope, ...], tuple[int, ...]]:
    """Rotary tables and which of them each layer reads: one for all, or one per kind of layer (Gemma 3)."""
    parameters = hf.rope_parameters
    if hf.model_type == "gemma3_text":
        tables = tuple(_rope(parameters[kind], hf, where) for kind in LAYER_KINDS)
        if not all(table.truncate for table in tables):  # transformers looks for it beside the kinds, and truncates
            raise CheckpointError(f"{where}: RoPE's truncate is false, which transformers' Gemma 3 does not read")
        # A layer of the sliding kind keeps its own table even where its window is switched off.
        kinds = [kind == "sliding_attention" for kind in hf.layer_types]
        return tables, tuple(int(kind) for kind in kinds)
    if nested := [key for key, value in parameters.items() if isinstance(value, dict)]:
        raise CheckpointError(
            f"{where}: rope_parameters holds a rule of its own for {nested[0]}; {hf.model_type} has one for all layers"
        )
    return (_rope(parameters, hf, where),), (0,) * len(sliding)


def checked_number(value: Any, name: str, bounds: tuple[float, float] = NUMBERS) -> float:
    """A number that a file states, or CheckpointError, which says what `name` is, and the bounds."""
    least, most = bounds
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise CheckpointError(f"{name} is {repr(value)[:80]}; expected a number from {least:g} to {most:g}")
    return float(value)


def _number_of(hf: Any, key: str, where: str) -> float:
    return checked_number(getattr(hf, key), f"{where}: {key}")


def _softcap(hf: Any, key: str | None, where: str) -> float | None:
    """Where a family has none, or the file says null, scores are not capped."""
    return None if key is None or getattr(hf, key, None) is None else _number_of(hf, key, where)


def _number(
    parameters: dict[str, Any],
    key: str,
    where: str,
    default: float | None = None,
    bounds: tuple[float, float] = NUMBERS,
) -> float:
    """A number of a RoPE rule; null stands for the default."""
    value = parameters.get(key)
    return checked_number(default if value is None else value, f"{where}: RoPE's {key}", bounds)


def _query_scale(hf: Any, where: str) -> tuple[float, int]:
    """Ministral 3's beta and positions; it has no such rule where the file states no beta."""
    parameters = hf.rope_parameters if isinstance(hf.rope_parameters, dict) else {}
    if not parameters.get("llama_4_scaling_beta"):
        return 0.0, 0
    positions = _number(parameters, "original_max_position_embeddings", where)
    return _number(parameters, "llama_4_scaling_beta", where), max(1, int(positions))


def _rope(parameters: dict[str, Any], hf: Any, where: str) -> Rope:
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_KINDS:
        raise CheckpointError(f"{where}: rope_type is {repr(kind)[:80]}; known are {', '.join(ROPE_KINDS)}")
    theta = _number(parameters, "rope_theta", where, 10_000.0, ROPE_BASE)
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"{where}: partial_rotary_factor is not 1: heads rotated in part are not supported")
    if kind in ("default", "dynamic"):  # dynamic changes nothing up to max_position_embeddings
        return Rope(theta)
    known = _number(parameters, "original_max_position_embeddings", where, hf.max_position_embeddings)
    original = max(1, int(known))
    # As transformers has it: yarn without a factor stretches to the model's own length.
    factor = _number(parameters, "factor", where, hf.max_position_embeddings / original if kind == "yarn" else None)
    if kind == "linear":
        return Rope(theta, "linear", factor)
    if kind == "llama3":
        low, high = (_number(parameters, f"{name}_freq_factor", where) for name in ("low", "high"))
        return Rope(theta, "llama3", factor, low, high, original)
    return Rope(
        theta,
        "yarn",
        factor,
        original_max_positions=original,
        beta_fast=_number(parameters, "beta_fast", where, 32),
        beta_slow=_number(parameters, "beta_slow", where, 1),
        attention_factor=_yarn_attention_factor(parameters, factor, where),
        truncate=bool(parameters.get("truncate", True)),
    )


def _yarn_attention_factor(parameters: dict[str, Any], factor: float, where: str) -> float:
    if parameters.get("attention_factor") is not None:
        return _number(parameters, "attention_factor", where)

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    mscale, mscale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if mscale and mscale_all:
        return magnitude(_number(parameters, "mscale", where)) / magnitude(_number(parameters, "mscale_all_dim", where))
    return magnitude(1.0)
