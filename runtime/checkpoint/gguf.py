"""Weights of a GGUF file (llama.cpp), read one tensor at a time, as Hugging Face names and lays them out.

llama.cpp's converter renames every tensor, and changes two kinds of them; both changes are undone here:

    q and k where it rotates in pairs (Llama, Mistral): rows of a head stored as 0, K/2, 1, K/2 + 1, ...
    norms of the Gemma family: stored as w + 1

Source: llama.cpp, conversion/llama.py (`permute`) and conversion/gemma.py.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashvec.runtime.checkpoint.gguf_config import architecture_of, head_count
from flashvec.runtime.checkpoint.gguf_file import GGUFFile
from flashvec.runtime.checkpoint.source import CheckpointError

CHUNK = 2**20  # values dequantised at a time: the package's temporaries are several times as large


MODEL_NAMES = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
    # EmbeddingGemma's linear layers after pooling; sentence-transformers numbers them so too
    "dense_2.weight": "dense_2.weight",
    "dense_3.weight": "dense_3.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORM_NAMES = {"ffn_norm": "post_attention_layernorm"}
POST_NORM_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
LAYER = re.compile(r"blk\.(0|[1-9]\d{0,3})\.([a-z_]+)\.(weight|bias)")
# Rotary tables: `gguf_config` turns the first into a rule, old files repeat what the rule says.
IGNORED = re.compile(r"rope_freqs\.weight|blk\.\d+\.(rope_freqs|attn_rot_embd)\.weight")


class GGUFSource:
    """`TensorSource` over one GGUF file: quantised tensors are given as fp32, others as they are stored."""

    def __init__(self, path: Path) -> None:
        """Raises:
        CheckpointError: a damaged file, an unknown architecture, tensor or type, or heads that do not fit q or k.
        """
        self._file = GGUFFile(path)
        self._architecture = architecture_of(self._file)
        self._stored = self._canonical_names()
        self._pairs = self._paired_heads() if self._architecture.permuted else {}
        _check_types(self._file)

    def names(self) -> frozenset[str]:
        """Every tensor this source can give."""
        return frozenset(self._stored)

    def place(self, name: str) -> str:
        """The file, for messages."""
        return str(self._file.path)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape without reading the data.

        Raises:
            KeyError: no such tensor.
        """
        return self._file.tensors[self._stored[name]].shape

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU: fp32, or bf16 or fp16 where it is stored so; norms of shifted families fp32.

        Takes little more memory than the tensor itself.

        Raises:
            KeyError: no such tensor.
        """
        info = self._file.tensors[self._stored[name]]
        stored = self._file.stored(self._stored[name])
        if name in self._pairs:
            # Rows are moved as stored bytes: each is whole blocks, and they are fewer than fp32's.
            num_heads = self._pairs[name]
            pairs = stored.view(num_heads, info.shape[0] // num_heads // 2, 2, -1)
            stored = pairs.transpose(1, 2).reshape(-1)
        tensor = _decoded(stored, info.kind).view(info.shape)
        if self._architecture.shifted_norms and name.endswith("norm.weight"):
            return tensor.float() - 1
        return tensor

    def close(self) -> None:
        """Release the mapped file. A later read maps it again."""
        self._file.close()

    def _canonical_names(self) -> dict[str, str]:
        """Hugging Face's name -> stored name."""
        layer_names = LAYER_NAMES | (POST_NORM_NAMES if self._architecture.post_norms else NORM_NAMES)
        names: dict[str, str] = {}
        for stored in self._file.tensors:
            layer = LAYER.fullmatch(stored)
            if stored in MODEL_NAMES:
                names[MODEL_NAMES[stored]] = stored
            elif layer and layer[2] in layer_names:
                names[f"layers.{layer[1]}.{layer_names[layer[2]]}.{layer[3]}"] = stored
            elif not IGNORED.fullmatch(stored):
                architecture = self._file.metadata["general.architecture"]
                raise CheckpointError(
                    f"{self._file.path}: tensor {stored} has no place in a {architecture} decoder; "
                    "mixtures of experts and fused projections are not supported"
                )
        return names

    def _paired_heads(self) -> dict[str, int]:
        """Number of heads of each q and k tensor whose rows are stored in pairs."""
        heads: dict[str, int] = {}
        for name, stored in self._stored.items():
            is_query = ".q_proj." in name
            if is_query or ".k_proj." in name:
                heads[name] = head_count(self._file, "head_count" if is_query else "head_count_kv")
                num_rows = self._file.tensors[stored].shape[0]
                if num_rows % (2 * heads[name]):
                    raise CheckpointError(f"{self._file.path}: {stored} has {num_rows} rows for {heads[name]} heads")
        return heads


def _check_types(file: GGUFFile) -> None:
    """Each storage type can be read, found out before the first tensor is."""
    from gguf import GGML_QUANT_SIZES

    for name, tensor in file.tensors.items():
        if tensor.kind.name not in ("F32", "F16", "BF16", "F64"):
            block_bytes = GGML_QUANT_SIZES[tensor.kind][1]
            try:
                _dequantised(torch.zeros(block_bytes, dtype=torch.uint8, device="cpu"), tensor.kind)
            except NotImplementedError:  # what the gguf package raises for a type it only knows by name
                raise CheckpointError(
                    f"{file.path}: {name} has type {tensor.kind.name}, which the gguf package does not decode"
                ) from None


def _decoded(stored: Tensor, kind: Any) -> Tensor:
    """Stored bytes as values, flat: a view where the type is one of torch's."""
    if kind.name == "F64":
        return stored.view(torch.float64).float()
    floats = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return stored.view(floats[kind.name]) if kind.name in floats else _dequantised(stored, kind)


def _dequantised(stored: Tensor, kind: Any) -> Tensor:
    """fp32 [values]. Blocks stand alone, so the tensor is cut into chunks without regard to its rows."""
    from gguf import GGML_QUANT_SIZES, dequantize

    block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = stored.view(-1, block_bytes)
    out = torch.empty(len(blocks), block, dtype=torch.float32, device="cpu")
    for piece, values in zip(blocks.split(CHUNK // block), out.split(CHUNK // block), strict=True):
        # One row: the package loops in Python over groups of 16 rows.
        values.view(-1).copy_(torch.from_numpy(dequantize(piece.reshape(1, -1).numpy(), kind)).view(-1))
    return out.view(-1)
