"""Reads a decoder's weights from a checkpoint, and checks everything it reads."""

from collections.abc import Callable

import torch
from torch import Tensor

from flashvec.runtime.checkpoint.source import TensorSource
from flashvec.runtime.checkpoint.tensors import CheckedTensors
from flashvec.runtime.decoder import Decoder, Layer
from flashvec.runtime.spec import DecoderSpec


class DecoderLoader:
    """Reads a decoder's tensors from a source, merges what one product reads, and checks everything it reads."""

    def __init__(self, spec: DecoderSpec, source: TensorSource, dtype: torch.dtype, device: torch.device) -> None:
        self.spec, self.source, self.dtype, self.device = spec, source, dtype, device
        self.checked = CheckedTensors(spec, source)

    def load(self, num_layers: int | None = None, each: Callable[[int, Layer], Layer] | None = None) -> Decoder:
        """Read the whole decoder, or its first `num_layers` layers.

        Args:
            each: what to keep of a layer, given its number and the whole of it, before the next one is read.

        Raises:
            CheckpointError: a tensor is missing, surplus, of a wrong shape or not finite.
        """
        spec = self.spec
        embedding_VD = self._read(["embed_tokens.weight"], [spec.vocab_size], spec.hidden_size)
        norm_D = self._vector("norm.weight", spec.hidden_size)
        keep = spec.num_layers if num_layers is None else num_layers
        layers = []
        for i in range(keep):
            layer = self._layer(f"layers.{i}.")
            layers.append(layer if each is None else each(i, layer))
        for i in range(keep, spec.num_layers):
            self.checked.leave(f"layers.{i}.")
        self.source.close()
        self.checked.check_all_taken()
        return Decoder(spec, embedding_VD, layers, norm_D)

    def _layer(self, at: str) -> Layer:
        spec = self.spec
        D, F, K = spec.hidden_size, spec.mlp_size, spec.head_size
        query_rows, kv_rows = spec.num_heads * K, spec.num_kv_heads * K
        # Gemma 2 and 3 name the norm before the MLP differently: "post_attention" is there what it says.
        mlp_norm = "pre_feedforward_layernorm" if spec.post_norms else "post_attention_layernorm"
        qkv_names = [f"{at}self_attn.{x}_proj" for x in "qkv"]
        qkv_rows = [query_rows, kv_rows, kv_rows]
        gate_up_names = [f"{at}mlp.gate_proj", f"{at}mlp.up_proj"]
        out, down = f"{at}self_attn.o_proj", f"{at}mlp.down_proj"
        return Layer(
            attention_norm=self._vector(f"{at}input_layernorm.weight", D),
            qkv=self._read([f"{n}.weight" for n in qkv_names], qkv_rows, D),
            qkv_bias=self._read([f"{n}.bias" for n in qkv_names], qkv_rows) if spec.qkv_bias else None,
            query_norm=self._vector(f"{at}self_attn.q_norm.weight", K) if spec.qk_norm else None,
            key_norm=self._vector(f"{at}self_attn.k_norm.weight", K) if spec.qk_norm else None,
            out=self._read([f"{out}.weight"], [D], query_rows),
            out_bias=self._read([f"{out}.bias"], [D]) if spec.out_bias else None,
            attention_post_norm=(self._vector(f"{at}post_attention_layernorm.weight", D) if spec.post_norms else None),
            mlp_norm=self._vector(f"{at}{mlp_norm}.weight", D),
            gate_up=self._read([f"{n}.weight" for n in gate_up_names], [F, F], D),
            gate_up_bias=self._read([f"{n}.bias" for n in gate_up_names], [F, F]) if spec.mlp_bias else None,
            down=self._read([f"{down}.weight"], [D], F),
            down_bias=self._read([f"{down}.bias"], [D]) if spec.mlp_bias else None,
            mlp_post_norm=(self._vector(f"{at}post_feedforward_layernorm.weight", D) if spec.post_norms else None),
        )

    def _vector(self, name: str, size: int) -> Tensor:
        return self._read([name], [size], dtype=torch.float32)

    def _read(
        self, names: list[str], rows: list[int], columns: int | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Read tensors one under the other into one; each is copied and converted in one step, never held twice."""
        tail = () if columns is None else (columns,)
        for name, size in zip(names, rows, strict=True):  # before memory is taken for what a configuration says
            self.checked.take(name, (size, *tail))
        merged = torch.empty(sum(rows), *tail, dtype=dtype or self.dtype, device=self.device)
        for name, part in zip(names, merged.split(rows), strict=True):
            part.copy_(self.source.read(name))
            self.checked.check_finite(name, part)
        return merged
