"""A decoder's tensors under Hugging Face's names: which there are, of what shape, and what is refused of a file's."""

from collections.abc import Iterator

import torch
from torch import Tensor

from flashvec.kernels.linear import unpacked
from flashvec.runtime.checkpoint.source import CheckpointError, TensorSource
from flashvec.runtime.decoder import Decoder
from flashvec.runtime.spec import DecoderSpec

IGNORED = ("lm_head.weight", "lm_head.bias")  # the language-model head: an encoder has no use for it
IGNORED_ENDINGS = ("rotary_emb.inv_freq",)  # recomputed; old checkpoints carry it


class CheckedTensors:
    """A source's tensors, taken one by one; what does not belong to a decoder of `spec` is refused by name."""

    def __init__(self, spec: DecoderSpec, source: TensorSource) -> None:
        self.spec, self.source = spec, source
        self.untaken = {name for name in source.names() if name not in IGNORED and not name.endswith(IGNORED_ENDINGS)}

    def take(self, name: str, shape: tuple[int, ...]) -> None:
        """Nothing is read yet.

        Raises:
            CheckpointError: the tensor is missing or has another shape.
        """
        if name not in self.untaken:
            within = next((other for other in sorted(self.untaken) if other.endswith(f".{name}")), None)
            cure = "the checkpoint is incomplete (fetch it again), or its configuration is another family's"
            if within is not None:
                cure = f"it is there as {within}, a part of another model: save the decoder by itself"
            raise CheckpointError(f"{self.source.place(name)}: tensor {name} is missing; {cure}")
        if self.source.shape(name) != shape:
            raise CheckpointError(
                f"{self.source.place(name)}: tensor {name} has shape {self.source.shape(name)}, the configuration asks "
                f"for {shape}; they do not belong together"
            )
        self.untaken.discard(name)

    def leave(self, prefix: str) -> None:
        """Tensors that are not wanted."""
        self.untaken = {name for name in self.untaken if not name.startswith(prefix)}

    def check_all_taken(self) -> None:
        """Raises CheckpointError if tensors are left: they fit nowhere."""
        if self.untaken:
            raise CheckpointError(
                f"{len(self.untaken)} tensors fit nowhere in a {self.spec.family} decoder of {self.spec.num_layers} "
                f"layers: {', '.join(sorted(self.untaken)[:5])}; configuration and weights do not belong together, or "
                "the model is more than a decoder (a classifier has score.weight): save the decoder by itself, as "
                "transformers' AutoModel reads it"
            )

    def check_finite(self, name: str, converted: Tensor) -> None:
        """Refuse NaN and infinity in a tensor as it was read and converted.

        Raises:
            CheckpointError: the file is damaged.
            ValueError: the file is sound; one of its numbers is more than `converted`'s dtype holds.
        """
        if not converted.numel() or all(torch.isfinite(x) for x in torch.aminmax(converted)):
            return
        stored, dtype, place = self.source.read(name), converted.dtype, self.source.place(name)
        if bool(torch.isfinite(stored).all()):
            raise ValueError(
                f"{place}: tensor {name} holds values up to {float(stored.abs().max()):g}, more than {dtype} can: "
                "choose another dtype"
            )
        raise CheckpointError(
            f"{place}: tensor {name} holds NaN or infinity (as {stored.dtype}); the file is damaged: fetch or train it "
            "again"
        )


def decoder_tensors(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """A decoder's weights under Hugging Face's names, as `DecoderLoader` reads them."""
    spec = decoder.spec
    query_rows, kv_rows = spec.num_heads * spec.head_size, spec.num_kv_heads * spec.head_size
    after_attention, before_mlp = "post_attention_layernorm", "pre_feedforward_layernorm"
    if not spec.post_norms:
        before_mlp = after_attention
    yield "embed_tokens.weight", decoder.embedding_VD
    for i, layer in enumerate(decoder.layers):
        found: dict[str, Tensor | None] = {
            "input_layernorm.weight": layer.attention_norm,
            f"{before_mlp}.weight": layer.mlp_norm,
            "self_attn.q_norm.weight": layer.query_norm,
            "self_attn.k_norm.weight": layer.key_norm,
            "self_attn.o_proj.weight": unpacked(layer.out),
            "self_attn.o_proj.bias": layer.out_bias,
            "mlp.down_proj.weight": unpacked(layer.down),
            "mlp.down_proj.bias": layer.down_bias,
        }
        if spec.post_norms:
            found[f"{after_attention}.weight"] = layer.attention_post_norm
            found["post_feedforward_layernorm.weight"] = layer.mlp_post_norm
        for kind, qkv, gate_up in (
            ("weight", unpacked(layer.qkv), unpacked(layer.gate_up)),
            ("bias", layer.qkv_bias, layer.gate_up_bias),
        ):
            if qkv is not None:
                parts = qkv.split([query_rows, kv_rows, kv_rows])
                found |= {f"self_attn.{x}_proj.{kind}": part for x, part in zip("qkv", parts, strict=True)}
            if gate_up is not None:
                parts = gate_up.split([spec.mlp_size, spec.mlp_size])
                found |= {f"mlp.{x}_proj.{kind}": part for x, part in zip(("gate", "up"), parts, strict=True)}
        yield from ((f"layers.{i}.{name}", tensor) for name, tensor in found.items() if tensor is not None)
    yield "norm.weight", decoder.norm_D


def decoder_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor a decoder has under Hugging Face's names, and its shape."""
    D, F, K = spec.hidden_size, spec.mlp_size, spec.head_size
    rows = {"q": spec.num_heads * K, "k": spec.num_kv_heads * K, "v": spec.num_kv_heads * K}
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
        "self_attn.o_proj.weight": (D, rows["q"]),
        "mlp.gate_proj.weight": (F, D),
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
    }
    layer |= {f"self_attn.{x}_proj.weight": (n, D) for x, n in rows.items()}
    if spec.qkv_bias:
        layer |= {f"self_attn.{x}_proj.bias": (n,) for x, n in rows.items()}
    if spec.out_bias:
        layer["self_attn.o_proj.bias"] = (D,)
    if spec.mlp_bias:
        layer |= {"mlp.gate_proj.bias": (F,), "mlp.up_proj.bias": (F,), "mlp.down_proj.bias": (D,)}
    if spec.qk_norm:
        layer |= {"self_attn.q_norm.weight": (K,), "self_attn.k_norm.weight": (K,)}
    if spec.post_norms:
        layer |= {"pre_feedforward_layernorm.weight": (D,), "post_feedforward_layernorm.weight": (D,)}
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (spec.vocab_size, D)}
    for i in range(spec.num_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes | {"norm.weight": (D,)}
