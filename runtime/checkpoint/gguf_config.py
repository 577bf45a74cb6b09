"""A GGUF file's metadata as the config.json that Hugging Face would have beside the same weights.

Three facts are nowhere in the metadata and are filled in as llama.cpp does: which Gemma layers see a window,
the attention scale of the 27B Gemmas, and the rotary base of Gemma 3's windowed layers.

Source: llama.cpp, conversion/*.py (what is written) and src/models/*.cpp (what is assumed).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashvec.runtime.checkpoint.gguf_file import GGUFFile, StoredArray
from flashvec.runtime.checkpoint.source import CheckpointError

MAX_LAYERS = 1000
MAX_SIZE = 2**24
MAX_POSITIONS = 2**31
POOLING = {1: "mean", 2: "cls", 3: "last"}  # 0: not stated, 4: a reranker
WINDOW_PERIOD = {"gemma2": 2, "gemma3_text": 6}  # every so many layers, the last sees everything
NUM_LAYERS_27B = {
    "gemma2": 46,
    "gemma3_text": 62,
}  # they scale scores by hidden_size / num_heads, not by head size
FACTOR_TOLERANCE = 1e-4  # relative; the factors are stored in fp32 and were computed in it


@dataclass(frozen=True)
class Architecture:
    """How one of llama.cpp's architectures is stored."""

    model_type: str  # Hugging Face's family
    permuted: bool = False  # rows of q and k are interleaved
    shifted_norms: bool = False  # norms are stored as w + 1
    post_norms: bool = False  # ffn_norm is the norm before the MLP, and both blocks have one after
    causal: bool | None = None  # direction the architecture itself stands for


ARCHITECTURES = {
    "llama": Architecture("llama", permuted=True),  # Mistral 7B and Nemo too
    "llama-embed": Architecture("llama", permuted=True, causal=False),
    "mistral3": Architecture("ministral3", permuted=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", shifted_norms=True),
    "gemma2": Architecture("gemma2", shifted_norms=True, post_norms=True),
    "gemma3": Architecture("gemma3_text", shifted_norms=True, post_norms=True),
    "gemma-embedding": Architecture("gemma3_text", shifted_norms=True, post_norms=True, causal=False),
}


def gguf_config(file: GGUFFile | Path) -> dict[str, Any]:
    """A config.json of a GGUF file, as Hugging Face spells it, and three keys of ours.

    Returns:
        Hugging Face's keys, and:
        `_gguf_causal`: True, False or, where the file is silent, None; sets the family's own switch too.
        `_gguf_pooling`: "mean", "cls", "last" or None.
        `_gguf_dense`: names of the linear layers after pooling, in order (EmbeddingGemma).
        `rope_factors`, only if the file stretches its rotary table by factors that no known rule gives: one
        number per plane, by which its frequency is divided. Without the key the table is described in full.

    Raises:
        CheckpointError: a damaged file, an unknown architecture or rule, a key missing or out of bounds.
    """
    if not isinstance(file, GGUFFile):
        file = GGUFFile(file)
    facts = _Facts(file)
    architecture = architecture_of(file)
    if facts.whole("expert_count", 0, lowest=0):
        raise CheckpointError(f"{file.path}: a mixture of experts, which is not supported")
    config: dict[str, Any] = {
        "model_type": architecture.model_type,
        "vocab_size": _vocab_size(file),
        "hidden_size": facts.whole("embedding_length"),
        "intermediate_size": facts.whole("feed_forward_length"),
        "num_hidden_layers": facts.whole("block_count", limit=MAX_LAYERS),
        "num_attention_heads": head_count(file, "head_count"),
        "num_key_value_heads": head_count(file, "head_count_kv"),
        "max_position_embeddings": facts.whole("context_length", limit=MAX_POSITIONS),
        "rms_norm_eps": facts.real("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }
    config["head_dim"] = _head_size(facts, config)
    if architecture.shifted_norms:
        config |= _gemma(facts, architecture, config)
    config |= _rope(facts, architecture, config)
    config |= _token_ids(file, config["vocab_size"])
    config |= _encoder_facts(facts, architecture)
    return config


def architecture_of(file: GGUFFile) -> Architecture:
    """Raises CheckpointError: none stated, or one that is not supported."""
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise CheckpointError(f"{file.path}: general.architecture is {name!r}; known are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def head_count(file: GGUFFile, key: str) -> int:
    """`<architecture>.attention.<key>`: head_count, or head_count_kv, which falls back to it.

    Raises:
        CheckpointError: missing, out of bounds, or not the same in every layer.
    """
    prefix = f"{file.metadata['general.architecture']}.attention"
    value = file.metadata.get(f"{prefix}.{key}", file.metadata.get(f"{prefix}.head_count"))
    if isinstance(value, StoredArray):  # one per layer
        values = set(file.array(f"{prefix}.{key}"))
        value = values.pop() if len(values) == 1 else value
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 2**12:
        raise CheckpointError(f"{file.path}: {prefix}.{key} is {value!r}; expected one number for all layers")
    return value


class _Facts:
    """Metadata under the architecture's own prefix, each value checked as it is taken."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.prefix = file.metadata.get("general.architecture")

    def get(self, key: str) -> Any:
        return self.file.metadata.get(f"{self.prefix}.{key}")

    def whole(self, key: str, default: int | None = None, limit: int = MAX_SIZE, lowest: int = 1) -> int:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= limit:
            raise self.error(key, value, f"a whole number from {lowest} to {limit}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.error(key, value, "a positive number")
        return float(value)

    def error(self, key: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: {self.prefix}.{key} is {value!r}; expected {expected}")


def _vocab_size(file: GGUFFile) -> int:
    """Rows of the embedding: what the tokens really index, whatever the metadata says."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path}: token_embd.weight is missing; this is no model's file")
    return embedding.shape[0]


def _head_size(facts: _Facts, config: dict[str, Any]) -> int:
    even = config["hidden_size"] // config["num_attention_heads"]
    rotary = facts.whole("rope.dimension_count", 0, lowest=0)
    head_size = facts.whole("attention.key_length", rotary or even)
    if rotary not in (0, head_size):
        raise CheckpointError(f"{facts.file.path}: {rotary} of {head_size} head dimensions rotate; only all can")
    if facts.whole("attention.value_length", head_size) != head_size:
        raise CheckpointError(f"{facts.file.path}: keys and values differ in size, which is not supported")
    return head_size


def _gemma(facts: _Facts, architecture: Architecture, config: dict[str, Any]) -> dict[str, Any]:
    """What only Gemma 1, 2 and 3 have."""
    family = architecture.model_type
    gemma: dict[str, Any] = {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh"}
    if family not in WINDOW_PERIOD:
        return gemma
    num_layers = config["num_hidden_layers"]
    is_27b = num_layers == NUM_LAYERS_27B[family]
    gemma["query_pre_attn_scalar"] = (
        config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]
    )
    gemma["sliding_window"] = facts.whole(
        "attention.sliding_window", 4096 if family == "gemma2" else None, limit=MAX_POSITIONS
    )
    gemma["layer_types"] = [
        "sliding_attention" if slides else "full_attention" for slides in _windowed(facts, family, num_layers)
    ]
    if family == "gemma2":
        gemma["attn_logit_softcapping"] = facts.real("attn_logit_softcapping", 50.0)
        gemma["final_logit_softcapping"] = facts.real("final_logit_softcapping", 30.0)
    return gemma


def _windowed(facts: _Facts, family: str, num_layers: int) -> list[bool]:
    """Per layer: does it see a window only."""
    key = "attention.sliding_window_pattern"
    if isinstance(facts.get(key), StoredArray):
        pattern = [bool(slides) for slides in facts.file.array(f"{facts.prefix}.{key}")]
        if len(pattern) != num_layers:
            raise facts.error(key, f"{len(pattern)} entries", f"{num_layers}, one per layer")
        return pattern
    period = facts.whole(key, WINDOW_PERIOD[family], limit=MAX_LAYERS)
    return [layer % period < period - 1 for layer in range(num_layers)]


def _rope(facts: _Facts, architecture: Architecture, config: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling; Gemma 3's windowed layers have their own base and are not stretched."""
    gemma3 = architecture.model_type == "gemma3_text"
    rope: dict[str, Any] = {"rope_theta": facts.real("rope.freq_base", 10_000.0)}
    if gemma3:
        rope["rope_local_base_freq"] = facts.real("rope.freq_base_swa", 10_000.0)
    kind = facts.get("rope.scaling.type")
    factor = facts.real("rope.scaling.factor", facts.real("rope.scale_linear", 1.0))  # the second: old files
    if kind in (None, "linear") and factor != 1:
        rope["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        rope["rope_scaling"] = _yarn(facts, architecture, factor)
    elif kind not in (None, "none", "linear"):
        raise facts.error("rope.scaling.type", kind, "none, linear or yarn")
    if "rope_freqs.weight" in facts.file.tensors:
        if "rope_scaling" in rope:
            raise facts.error("rope.scaling.type", kind, "none beside rope_freqs.weight")
        rope |= _stretched(_factors(facts.file, config["head_dim"]), rope["rope_theta"])
    return rope


def _yarn(facts: _Facts, architecture: Architecture, factor: float) -> dict[str, Any]:
    if facts.real("rope.scaling.yarn_ext_factor", 1.0) != 1:
        raise facts.error("rope.scaling.yarn_ext_factor", facts.get("rope.scaling.yarn_ext_factor"), "1")
    yarn: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": facts.whole("rope.scaling.original_context_length", limit=MAX_POSITIONS),
        "beta_fast": facts.real("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": facts.real("rope.scaling.yarn_beta_slow", 1.0),
    }
    if facts.get("rope.scaling.yarn_attn_factor") is not None:
        yarn["attention_factor"] = facts.real("rope.scaling.yarn_attn_factor")
    if facts.get("rope.scaling.yarn_log_multiplier") is not None:
        yarn["mscale"] = 1.0
        yarn["mscale_all_dim"] = facts.real("rope.scaling.yarn_log_multiplier")
    if architecture.model_type == "ministral3":
        yarn["llama_4_scaling_beta"] = facts.real("attention.temperature_scale", 0.1)
    return yarn


def _factors(file: GGUFFile, head_size: int) -> list[float]:
    """rope_freqs.weight: what each plane's frequency is divided by."""
    import torch

    tensor = file.tensors["rope_freqs.weight"]
    if tensor.kind.name != "F32" or math.prod(tensor.shape) != head_size // 2:
        raise CheckpointError(
            f"{file.path}: rope_freqs.weight is {tensor.kind.name} {list(tensor.shape)}, expected F32 "
            f"[{head_size // 2}]"
        )
    factors = file.stored("rope_freqs.weight").view(torch.float32).tolist()
    if not all(0 < factor < math.inf for factor in factors):
        raise CheckpointError(f"{file.path}: rope_freqs.weight holds numbers that are not positive")
    return factors


def _stretched(factors: list[float], theta: float) -> dict[str, Any]:
    """Llama 3's rule from the factors that a converter made with it, or else the factors themselves.

    1 / factor of a plane is s + (1 - s) / f with s = (turns - low) / (high - low), clamped to 0 .. 1, of the
    plane's full turns over the original context. The factors show s alone, so the rule is found up to a
    scale of (context, low, high) that changes nothing; Llama 3's published numbers are tried first.
    """
    if all(factor == 1 for factor in factors):
        return {}
    frequencies = [theta ** (-plane / len(factors)) / (2 * math.pi) for plane in range(len(factors))]
    stretch = max(factors)

    def matches(low: float, high: float, context: float) -> bool:
        for factor, frequency in zip(factors, frequencies, strict=True):
            blend = min(max((context * frequency - low) / (high - low), 0.0), 1.0)
            if abs(factor * (blend + (1 - blend) / stretch) - 1) > FACTOR_TOLERANCE:
                return False
        return True

    def rule(high: float, context: int) -> dict[str, Any]:
        scaling = {
            "rope_type": "llama3",
            "factor": stretch,
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": context,
        }
        return {"rope_scaling": scaling}

    if matches(1.0, 4.0, 8192):
        return rule(4.0, 8192)
    # Two planes on the ramp fix the line s = slope * frequency + start; low = 1 fixes the scale.
    ramp = [
        (frequency, (1 / factor - 1 / stretch) / (1 - 1 / stretch))
        for factor, frequency in zip(factors, frequencies, strict=True)
        if 1 < factor < stretch
    ]
    if len(ramp) >= 2:
        (fast, high_blend), (slow, low_blend) = ramp[0], ramp[-1]
        slope = (high_blend - low_blend) / (fast - slow)
        start = low_blend - slope * slow
        if slope > 0 and start < 0:
            high = 1 - 1 / start
            context = round(slope * (high - 1))
            if matches(1.0, high, context):
                return rule(high, context)
    return {"rope_factors": factors}


def _token_ids(file: GGUFFile, vocab_size: int) -> dict[str, int | None]:
    ids: dict[str, int | None] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        token = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None and (not isinstance(token, int) or not 0 <= token < vocab_size):
            raise CheckpointError(
                f"{file.path}: tokenizer.ggml.{key}_token_id is {token!r}, the vocabulary has {vocab_size}"
            )
        ids[f"{name}_token_id"] = token
    return ids


def _encoder_facts(facts: _Facts, architecture: Architecture) -> dict[str, Any]:
    """Direction, pooling and the layers after it."""
    causal = facts.get("attention.causal")
    if causal is not None and not isinstance(causal, bool):
        raise facts.error("attention.causal", causal, "true or false")
    if architecture.causal is not None:
        causal = architecture.causal
    pooling = facts.whole("pooling_type", 0, limit=4, lowest=0)
    if causal is None and pooling in POOLING:
        causal = True  # an encoder that does not say: llama.cpp runs it so, and leaves the key out when it writes one
    found: dict[str, Any] = {
        "_gguf_causal": causal,
        "_gguf_pooling": POOLING.get(pooling),
        "_gguf_dense": [name for name in ("dense_2.weight", "dense_3.weight") if name in facts.file.tensors],
    }
    if causal is not None and architecture.model_type == "gemma3_text":
        found["use_bidirectional_attention"] = not causal  # its windows differ with it, too
    elif causal is not None:
        found["is_causal"] = causal
    return found
