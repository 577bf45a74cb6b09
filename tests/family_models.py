"""One random model of every family: Hugging Face's own, and our decoder with the same weights.

Weights and norms are drawn wide (std 0.2), eps is 1e-2, theta small, the soft-cap near 1, lengths lie at a window's
edge and far past it: a fact of a family's row that is wrong shows at once. Wider weights would make attention so sharp
that fp32 itself loses the digits the comparison needs: `in_fp64` shows how many are left.
"""

from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flashvec.kernels.rms_norm import rms_norm
from flashvec.kernels.schedule import build_schedule
from flashvec.runtime.batches import Batch, TokenRows
from flashvec.runtime.decoder import Decoder
from flashvec.runtime.decoder_loader import DecoderLoader
from flashvec.runtime.engine import Engine
from flashvec.runtime.families import FAMILIES, decoder_spec, stated_attention
from flashvec.runtime.pooling import States
from flashvec.runtime.program import Program

WINDOW = 9
STD = 0.2
LONGEST = 4000  # tokens of the longest text compared
VOCABULARY = 300
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-2,
    "max_position_embeddings": 8192,
    "rope_theta": 10.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10.0,
    "factor": 128.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
    "llama_4_scaling_beta": 0.1,
}
GEMMA3 = {
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 20,
    "sliding_window_pattern": 2,
    "rope_theta": 100.0,
    "rope_local_base_freq": 10.0,
}
CONFIGS: dict[str, dict] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    "llama linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "mistral": {"sliding_window": WINDOW},
    "ministral": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2},
    # Narrower: YaRN and the query scale together multiply scores by 1.6 at position 4,000.
    "ministral3": {"sliding_window": None, "rope_parameters": YARN, "hidden_size": 32},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "head_dim": None,
    },
    "qwen3": {"attention_bias": True},
    "gemma": {},
    "gemma2": {"sliding_window": WINDOW, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 20},
    "gemma3_text": GEMMA3,
    "gemma3_text flag": {**GEMMA3, "use_bidirectional_attention": True},  # EmbeddingGemma
}
CASES = [
    (name, a) for name in CONFIGS for a in ("bidirectional", "causal") if not (name.endswith("flag") and a == "causal")
]
LENGTHS = [1, 2, 4, 5, 6, 8, 9, 10, 11, 17, 18, 19, 63, 64, 65, 130]


class ModuleSource:
    """A Hugging Face module's parameters as a tensor source."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.tensors = dict(module.state_dict())

    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def place(self, name: str) -> str:
        return "memory"

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def close(self) -> None:
        pass


def config_of(name: str, attention: str) -> dict:
    config = {**BASE, **CONFIGS[name], "model_type": name.split()[0]}
    if "rope_parameters" in config:
        del config["rope_theta"]
    if config["head_dim"] is None:
        del config["head_dim"]
    if attention == "bidirectional" and not name.endswith("flag"):
        config["is_causal"] = False
    return config


@cache
def models(name: str, attention: str) -> tuple[torch.nn.Module, Decoder]:
    config = config_of(name, attention)
    hf_config = CONFIG_MAPPING[config["model_type"]](**{k: v for k, v in config.items() if k != "model_type"})
    # transformers' SDPA path knows no soft-cap
    eager = config["model_type"] == "gemma2"
    model = AutoModel.from_config(hf_config, attn_implementation="eager" if eager else "sdpa").eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(0, STD, generator=generator)
            if "norm" in key and not FAMILIES[config["model_type"]].norm_offset:
                parameter.add_(1.0)  # around one, where a norm's effective weight lies in every family
    assert stated_attention(config) == ("bidirectional" if attention == "bidirectional" else None)
    spec = decoder_spec(config, attention)  # type: ignore[arg-type]
    decoder = DecoderLoader(spec, ModuleSource(model), torch.float32, torch.device("cpu")).load()
    return model, decoder


def texts_of(lengths: list[int]) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, VOCABULARY, n, dtype=np.int32) for n in lengths]


def hugging_face_states(model: torch.nn.Module, texts: list[np.ndarray]) -> list[Tensor]:
    with torch.inference_mode():
        return [model(torch.from_numpy(t.astype(np.int64))[None]).last_hidden_state[0] for t in texts]


@cache
def oracle(name: str, attention: str) -> tuple[list[np.ndarray], list[Tensor]]:
    """The texts a family is compared on, and its states by Hugging Face in fp32."""
    is_slow = name.startswith("gemma2") and attention == "causal"  # eager attention: the longest text once is enough
    texts = texts_of(LENGTHS if is_slow else [*LENGTHS, LONGEST])
    return texts, hugging_face_states(models(name, attention)[0], texts)


def in_fp64(model: torch.nn.Module) -> torch.nn.Module:
    """Hugging Face's model in fp64; its norms too, which by themselves compute in fp32 whatever the model's dtype.

    The rotary tables stay what they are, fp32: models are trained with them.
    """

    def forward(norm: Any, x: Tensor) -> Tensor:
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        weight = norm.weight + (1 if type(norm).__name__.startswith("Gemma") else 0)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    wide = deepcopy(model).double()
    for module in wide.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(forward, module)
    return wide


@dataclass(frozen=True)
class Pack(States):
    """Texts that ran together, and the residual stream before the final norm."""

    indices: np.ndarray = field(kw_only=True)  # int64 [B] positions of these texts in the call's list


def run_packs(
    decoder: Decoder, texts: list[np.ndarray], causal: bool, budget: int = 512, workers: int = 1
) -> list[Pack]:
    lengths = np.array([len(t) for t in texts], dtype=np.int32)
    rows = TokenRows(np.concatenate(texts), lengths, np.zeros((len(texts), 2), np.int64))

    def run(decoder: Decoder, batch: Batch) -> tuple[Tensor, ...]:
        return (decoder.forward(batch.ids_T, batch.schedule, batch.row_plan, causal),)

    packs, program = [], Program("states", run, ("rows",))
    for ran in Engine(decoder, graphs=False).run(rows, budget, program, workers, on_device=True):
        (hidden_TD,) = ran.outputs
        schedule = build_schedule(lengths[ran.indices].tolist(), len(hidden_TD), decoder.device)
        packs.append(Pack(hidden_TD, schedule, indices=ran.indices))
    return packs


def our_states(decoder: Decoder, texts: list[np.ndarray], causal: bool) -> list[Tensor]:
    return final_states(decoder, run_packs(decoder, texts, causal), texts)


def final_states(decoder: Decoder, packs: list[Pack], texts: list[np.ndarray]) -> list[Tensor]:
    states: list[Tensor] = [torch.empty(0)] * len(texts)
    for done in packs:
        spec = decoder.spec
        x = rms_norm(done.hidden_TD[: done.schedule.num_tokens], decoder.norm_D, spec.norm_eps, spec.norm_offset)
        for i, part in zip(done.indices, x.split([len(texts[i]) for i in done.indices]), strict=True):
            states[i] = part
    return states
