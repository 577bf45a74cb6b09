"""Small GGUF files, written as llama.cpp's converter writes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Kind

VOCAB, HIDDEN, MLP, LAYERS, HEADS, KV_HEADS = 48, 64, 96, 2, 4, 2


def head_size(architecture: str) -> int:
    """A head of hidden size / heads, or what transformers takes for granted and does not read from the file."""
    if architecture in ("llama", "llama-embed", "qwen2"):
        return 16
    return {"qwen3": 128, "gemma2": 256, "gemma3": 256}.get(architecture, 32)


def is_gemma(architecture: str) -> bool:
    return architecture.startswith("gemma")


def hf_tensors(architecture: str) -> dict[str, torch.Tensor]:
    """Random weights of a small decoder under Hugging Face's names."""
    q, kv = HEADS * head_size(architecture), KV_HEADS * head_size(architecture)
    tensors = {"embed_tokens.weight": torch.randn(VOCAB, HIDDEN), "norm.weight": torch.randn(HIDDEN)}
    norms = ["input_layernorm", "post_attention_layernorm"]
    if is_gemma(architecture) and architecture != "gemma":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for layer in range(LAYERS):
        at = f"layers.{layer}"
        tensors |= {f"{at}.{norm}.weight": torch.randn(HIDDEN) for norm in norms}
        tensors[f"{at}.self_attn.q_proj.weight"] = torch.randn(q, HIDDEN)
        tensors[f"{at}.self_attn.k_proj.weight"] = torch.randn(kv, HIDDEN)
        tensors[f"{at}.self_attn.v_proj.weight"] = torch.randn(kv, HIDDEN)
        tensors[f"{at}.self_attn.o_proj.weight"] = torch.randn(HIDDEN, q)
        tensors[f"{at}.mlp.gate_proj.weight"] = torch.randn(MLP, HIDDEN)
        tensors[f"{at}.mlp.up_proj.weight"] = torch.randn(MLP, HIDDEN)
        tensors[f"{at}.mlp.down_proj.weight"] = torch.randn(HIDDEN, MLP)
        if architecture == "qwen2":
            for name, size in (("q", q), ("k", kv), ("v", kv)):
                tensors[f"{at}.self_attn.{name}_proj.bias"] = torch.randn(size)
        if architecture in ("qwen3", "gemma3", "gemma-embedding"):
            for name in ("q_norm", "k_norm"):
                tensors[f"{at}.self_attn.{name}.weight"] = torch.randn(head_size(architecture))
    return tensors


def convert(architecture: str, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Name and values as llama.cpp's converter stores them; the names are those of the gguf package."""
    arch = next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture)
    stem, _, suffix = name.rpartition(".")
    full = stem if stem == "lm_head" else f"model.{stem}"
    stored = gguf.get_tensor_name_map(arch, LAYERS).get_name(full)
    assert stored, name
    if architecture in ("llama", "llama-embed", "mistral3") and (".q_proj." in name or ".k_proj." in name):
        num_heads = HEADS if ".q_proj." in name else KV_HEADS
        halves = tensor.reshape(num_heads, 2, len(tensor) // num_heads // 2, *tensor.shape[1:])
        tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
    if is_gemma(architecture) and name.endswith("norm.weight"):
        tensor = tensor + 1
    return f"{stored}.{suffix}", tensor


def write_gguf(
    path: Path,
    architecture: str,
    tensors: dict[str, torch.Tensor],
    kind: Kind = Kind.F32,
    add: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Path:
    """A GGUF file of Hugging Face's tensors; vectors stay fp32 as in llama.cpp's own files."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("sample")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(head_size(architecture))
    writer.add_value_length(head_size(architecture))
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB)
    if is_gemma(architecture) and architecture != "gemma":
        writer.add_sliding_window(16)
    if add:
        add(writer)
    for name, tensor in tensors.items():
        stored_name, values = convert(architecture, name, tensor) if "rope" not in name else (name, tensor)
        stored_kind = kind if values.ndim == 2 else Kind.F32
        writer.add_tensor(stored_name, gguf.quants.quantize(values.numpy(), stored_kind), raw_dtype=stored_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def with_metadata(**values: Any) -> Callable[[gguf.GGUFWriter], None]:
    """Adds keys, `__` standing for a point; without `general` or `tokenizer` they get the architecture's prefix."""

    def add(writer: gguf.GGUFWriter) -> None:
        for name, value in values.items():
            key = name.replace("__", ".")
            if not key.startswith(("general.", "tokenizer.", "split.")):
                key = f"{writer.arch}.{key}"
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_array(key, value)

    return add


def override(values: dict[str, Any]) -> Callable[[gguf.GGUFWriter], None]:
    """Replaces keys that `write_gguf` sets itself."""

    def add(writer: gguf.GGUFWriter) -> None:
        for name in values:
            writer.kv_data[0].pop(f"{writer.arch}.{name.replace('__', '.')}", None)
        with_metadata(**values)(writer)

    return add


def write_quantised(path: Path, architecture: str = "llama", **metadata: Any) -> Path:
    """A GGUF file with Q8_0 matrices and a byte-level tokenizer."""
    alphabet = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    tokens = [*alphabet, "ab", "Ġa", "<s>", "</s>"]
    tensors = {name: tensor * 0.3 for name, tensor in hf_tensors(architecture).items()}
    tensors["embed_tokens.weight"] = torch.randn(len(tokens), HIDDEN)

    def add(writer: gguf.GGUFWriter) -> None:
        override({"vocab_size": len(tokens), "attention__layer_norm_rms_epsilon": 1e-2})(writer)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token.startswith("<") and len(token) > 1 else 1 for token in tokens])
        writer.add_token_merges(["a b", "Ġ a"])
        writer.add_bos_token_id(len(tokens) - 2)
        writer.add_eos_token_id(len(tokens) - 1)
        writer.add_add_bos_token(True)
        with_metadata(**metadata)(writer)

    return write_gguf(path, architecture, tensors, Kind.Q8_0, add)
