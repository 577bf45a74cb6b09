"""The one transformer, in the order the mathematics is written.

    h = embed(ids)
    for each layer:  h += out(attention(rope(qkv(norm(h)))));  h += down(act(gate(norm(h))) * up(norm(h)))

Every family runs through these lines; what differs is a fact in `DecoderSpec`. All tensors are packed: T rows, the
tokens of all sequences end to end, no padding between them. The residual stream is fp32 whatever the weights are: a
bf16 stream loses far more of the vector than bf16 products do.

Shape letters: T = packed tokens, D = hidden size, H = query heads, G = kv heads, K = head size, F = MLP width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashvec.kernels.attention import attention
from flashvec.kernels.linear import linear
from flashvec.kernels.rms_norm import rms_norm
from flashvec.kernels.rope import rope, rope_table
from flashvec.kernels.schedule import Schedule
from flashvec.kernels.swiglu import swiglu
from flashvec.runtime.buckets import token_bucket
from flashvec.runtime.checkpoint.source import CheckpointError, TensorSource
from flashvec.runtime.row_counts import RowCounts
from flashvec.runtime.spec import DecoderSpec


@dataclass
class Layer:
    """Weights of one layer: products in the compute dtype, norms in fp32. Absent ones are None."""

    attention_norm: Tensor  # [D]
    qkv: Tensor  # [(H + 2 G) K, D]: query rows, key rows, value rows
    qkv_bias: Tensor | None
    query_norm: Tensor | None  # [K]
    key_norm: Tensor | None  # [K]
    out: Tensor  # [D, H K]
    out_bias: Tensor | None
    attention_post_norm: Tensor | None  # [D]
    mlp_norm: Tensor  # [D]
    gate_up: Tensor  # [2 F, D]: gate rows, then up rows
    gate_up_bias: Tensor | None
    down: Tensor  # [D, F]
    down_bias: Tensor | None
    mlp_post_norm: Tensor | None  # [D]


class Decoder:
    """A decoder's weights and its forward pass over packed tokens."""

    def __init__(self, spec: DecoderSpec, embedding_VD: Tensor, layers: Sequence[Layer], norm_D: Tensor) -> None:
        self.spec = spec
        self.embedding_VD = embedding_VD
        self.layers = list(layers)
        self.norm_D = norm_D
        first = self.layers[0]
        self.row_counts = RowCounts([first.qkv, first.out, first.gate_up, first.down])
        self._tables: list[tuple[Tensor, Tensor]] = []

    @property
    def device(self) -> torch.device:
        return self.embedding_VD.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding_VD.dtype

    def row_plan(self, num_tokens: int) -> tuple[int, ...]:
        """Row counts the products of a batch of `num_tokens` tokens run at; their sum is the batch's `T`."""
        return self.row_counts.plan(num_tokens) if self.device.type == "cpu" else (token_bucket(num_tokens),)

    @torch.inference_mode()
    def forward(self, ids_T: Tensor, schedule: Schedule, row_plan: Sequence[int], causal: bool) -> Tensor:
        """The residual stream after the last layer, before the final norm.

        Args:
            ids_T: int [num_tokens] token ids, sequences end to end; for a static schedule [T], negative where filling.
            schedule: of the batch, with as many rows as `row_plan` sums to.
            row_plan: see `row_plan`.
            causal: hide later tokens.

        Returns:
            fp32 [T, D]; rows past the tokens are filling.
        """
        h_TD = self._embed(ids_T, schedule)
        tables = self._rope_rows(schedule)
        query_scale_T = self._query_scale(schedule)
        for index, layer in enumerate(self.layers):
            cos_sin = tables[self.spec.layer_ropes[index]]
            window = self.spec.layer_windows[index]
            h_TD += self._attend(layer, h_TD, schedule, row_plan, causal, window, cos_sin, query_scale_T)
            h_TD += self._mlp(layer, h_TD, row_plan)
        return h_TD

    def _embed(self, ids_T: Tensor, schedule: Schedule) -> Tensor:
        if schedule.is_static:  # only the ids say which rows are filling: those stay zero
            h_TD = self.embedding_VD[ids_T.clamp(min=0)].float().masked_fill_(ids_T[:, None] < 0, 0.0)
        else:
            h_TD = torch.zeros(len(schedule.positions), self.spec.hidden_size, dtype=torch.float32, device=self.device)
            h_TD[: len(ids_T)] = self.embedding_VD[ids_T]
        return h_TD.mul_(self.spec.embedding_scale) if self.spec.embedding_scale != 1.0 else h_TD

    def _attend(
        self,
        layer: Layer,
        h_TD: Tensor,
        schedule: Schedule,
        row_plan: Sequence[int],
        causal: bool,
        window: int | None,
        cos_sin: tuple[Tensor, Tensor],
        query_scale_T: Tensor | None,
    ) -> Tensor:
        spec = self.spec
        H, G = spec.num_heads, spec.num_kv_heads
        x_TD = self._norm(h_TD, layer.attention_norm, self.dtype)
        qkv = linear(x_TD, layer.qkv, layer.qkv_bias, row_plan).unflatten(1, (H + 2 * G, spec.head_size))
        if layer.query_norm is None or layer.key_norm is None:
            q_THK, k_TGK = rope(qkv[:, : H + G], *cos_sin).split([H, G], 1)
        else:
            q_THK = self._norm(qkv[:, :H], layer.query_norm, torch.float32)
            k_TGK = self._norm(qkv[:, H : H + G], layer.key_norm, torch.float32)
            q_THK, k_TGK = (rope(x, *cos_sin).to(self.dtype) for x in (q_THK, k_TGK))
        if query_scale_T is not None:
            q_THK = (q_THK * query_scale_T[:, None, None]).to(self.dtype)
        mixed_THK = attention(
            q_THK,
            k_TGK,
            qkv[:, H + G :],
            schedule,
            scale=spec.attention_scale,
            causal=causal,
            window=window,
            softcap=spec.softcap,
        )
        y_TD = linear(mixed_THK.flatten(1), layer.out, layer.out_bias, row_plan)
        if layer.attention_post_norm is not None:
            y_TD = self._norm(y_TD, layer.attention_post_norm, torch.float32)
        return y_TD

    def _mlp(self, layer: Layer, h_TD: Tensor, row_plan: Sequence[int]) -> Tensor:
        x_TD = self._norm(h_TD, layer.mlp_norm, self.dtype)
        gate_up = linear(x_TD, layer.gate_up, layer.gate_up_bias, row_plan)
        y_TD = linear(swiglu(gate_up, self.spec.activation), layer.down, layer.down_bias, row_plan)
        if layer.mlp_post_norm is not None:
            y_TD = self._norm(y_TD, layer.mlp_post_norm, torch.float32)
        return y_TD

    def _norm(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return rms_norm(x, weight, self.spec.norm_eps, self.spec.norm_offset, dtype)

    def _rope_rows(self, schedule: Schedule) -> list[tuple[Tensor, Tensor]]:
        """Cosines and sines of every row's position, one pair per rotary table."""
        tables = self._tables  # workers share the decoder: another one may replace them while this one reads
        if not tables or len(tables[0][0]) < schedule.max_length:  # by doubling: a handful of times in a process
            size = 1 << max(10, (schedule.max_length - 1).bit_length())
            made = [rope_table(rope, self.spec.head_size, size) for rope in self.spec.ropes]
            tables = [(cos.to(self.device), sin.to(self.device)) for cos, sin in made]
            self._tables = tables
        return [(cos[schedule.positions], sin[schedule.positions]) for cos, sin in tables]

    def _query_scale(self, schedule: Schedule) -> Tensor | None:
        """Ministral 3: queries far into a text are scaled up, by a step every `query_scale_positions`."""
        if not self.spec.query_scale_beta or schedule.max_length <= self.spec.query_scale_positions:
            return None
        steps = torch.floor(schedule.positions.double() / self.spec.query_scale_positions)
        return (1 + self.spec.query_scale_beta * torch.log1p(steps)).float()


class DecoderLoader:
    """Reads a decoder's tensors from a source, merges what one product reads, and checks everything it reads."""

    IGNORED = ("lm_head.weight", "lm_head.bias")  # the language-model head: an encoder has no use for it
    IGNORED_ENDINGS = ("rotary_emb.inv_freq",)  # recomputed; old checkpoints carry it

    def __init__(self, spec: DecoderSpec, source: TensorSource, dtype: torch.dtype, device: torch.device) -> None:
        self.spec, self.source, self.dtype, self.device = spec, source, dtype, device
        self.unread = {
            name for name in source.names() if name not in self.IGNORED and not name.endswith(self.IGNORED_ENDINGS)
        }

    def load(self, num_layers: int | None = None) -> Decoder:
        """Read the whole decoder, or its first `num_layers` layers.

        Raises:
            CheckpointError: a tensor is missing, surplus, of a wrong shape or not finite.
        """
        spec = self.spec
        embedding_VD = self._read(["embed_tokens.weight"], [spec.vocab_size], spec.hidden_size)
        norm_D = self._vector("norm.weight", spec.hidden_size)
        keep = spec.num_layers if num_layers is None else num_layers
        layers = [self._layer(f"layers.{i}.") for i in range(keep)]
        for i in range(keep, spec.num_layers):
            self.unread = {name for name in self.unread if not name.startswith(f"layers.{i}.")}
        self.source.close()
        if self.unread:
            shown = ", ".join(sorted(self.unread)[:5])
            raise CheckpointError(
                f"{len(self.unread)} tensors fit nowhere in a {spec.family} decoder of {spec.num_layers} layers: "
                f"{shown}; config.json and weights do not belong together"
            )
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
        merged = torch.empty(sum(rows), *tail, dtype=dtype or self.dtype, device=self.device)
        for name, part in zip(names, merged.split(rows), strict=True):
            if name not in self.unread:
                raise CheckpointError(f"tensor {name} is missing; the checkpoint is incomplete or of another family")
            if self.source.shape(name) != tuple(part.shape):
                raise CheckpointError(
                    f"tensor {name} has shape {self.source.shape(name)}, config.json asks for {tuple(part.shape)}"
                )
            part.copy_(self.source.read(name))
            self.unread.discard(name)
            if part.numel() and not all(torch.isfinite(x) for x in torch.aminmax(part)):
                raise CheckpointError(f"tensor {name} holds NaN or infinity (as {part.dtype}); the file is damaged")
        return merged
