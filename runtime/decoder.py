"""The one transformer, in the order the mathematics is written.

    h = embed(ids)
    for each layer:  h += out(attention(rope(qkv(norm(h)))));  h += down(act(gate(norm(h))) * up(norm(h)))

Every family runs through these lines; what differs is a fact in `DecoderSpec`. All tensors are packed: T rows, the
tokens of all sequences end to end, no padding between them. The residual stream is fp32 whatever the weights are: a
bf16 stream loses far more of the vector than bf16 products do. What a block adds to it is added by the norm that
follows, in one pass.

Shape letters: T = packed tokens, D = hidden size, H = query heads, G = kv heads, K = head size, F = MLP width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flashvec.kernels.add_rms_norm import add_rms_norm
from flashvec.kernels.attention import Rotation, attention, rotate
from flashvec.kernels.backend import implementation
from flashvec.kernels.dropout import Dropout
from flashvec.kernels.linear import linear, pack
from flashvec.kernels.lora import lora, mask_keys_of_sites
from flashvec.kernels.rms_norm import rms_norm
from flashvec.kernels.rope import rope_table
from flashvec.kernels.schedule import Queries, Schedule
from flashvec.kernels.swiglu import swiglu
from flashvec.runtime.buckets import token_bucket
from flashvec.runtime.heap import keep_freed_memory
from flashvec.runtime.remade import remade
from flashvec.runtime.row_counts import RowCounts
from flashvec.runtime.spec import DecoderSpec

SITES_PER_LAYER = 5  # of dropout: attention, then the inputs of the updates
ATTENTION_SITE, QKV_SITE, OUT_SITE, GATE_UP_SITE, DOWN_SITE = range(SITES_PER_LAYER)
PRODUCTS = ("qkv", "out", "gate_up", "down")


@dataclass
class Layer:
    """Weights of one layer: products in the compute dtype, plain or packed, norms in fp32. Absent ones are None."""

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


def packed(layer: Layer) -> Layer:
    """The layer with its products' weights packed (`kernels/linear.py`), for forward passes on a CPU."""
    return replace(layer, **{name: pack(getattr(layer, name)) for name in PRODUCTS})


class Parts(Protocol):
    """Where a decoder's products are when its layers hold their shapes alone."""

    def whole(self, number: int, product: str) -> Tensor:
        """The weight of one of `PRODUCTS` of a layer."""


@dataclass(frozen=True)
class LoraPair:
    """A low-rank update of one merged product, see `kernels/lora.py`; `scales` has one factor for each projection."""

    a_PRC: Tensor
    b_NR: Tensor
    scales: tuple[float, ...]


@dataclass(frozen=True)
class LayerLora:
    """The updates of one layer's products; None leaves a product as it is."""

    qkv: LoraPair | None = None
    out: LoraPair | None = None
    gate_up: LoraPair | None = None
    down: LoraPair | None = None


@dataclass(frozen=True)
class Training:
    """What a training pass adds to the forward: updates of the products, and what is dropped.

    With `recompute` a layer keeps its inputs alone, and backward runs it again; masks, keyed by identity, come out the
    same.
    """

    lora: Sequence[LayerLora] = ()
    attention_dropout: Dropout | None = None
    lora_dropout: Dropout | None = None
    recompute: bool = False


class Stream(NamedTuple):
    """The residual stream after the last layer, its last addition still to be made: h + delta, or h + norm(delta)."""

    hidden_TD: Tensor  # fp32
    delta_TD: Tensor
    post_norm_D: Tensor | None


class Rows(NamedTuple):
    """The rows that products run over: all of a batch, or those that a last layer needs."""

    plan: Sequence[int]
    positions_T: Tensor
    identities_T: Tensor | None = None  # for dropout of updates' inputs
    keys: Sequence[Tensor] | None = None  # for it on a CPU: int32 [2, T] each, of all layers' sites in their order


class Turn(NamedTuple):
    """The layer whose turn it is: read once a pass, because a decoder may make its layers as they are read."""

    number: int
    layer: Layer
    updates: LayerLora


class Context(NamedTuple):
    """What every layer of a pass reads."""

    schedule: Schedule
    rows: Rows
    causal: bool
    tables: list[tuple[Tensor, Tensor]]
    query_scale_T: Tensor | None
    training: Training


class Decoder:
    """A decoder's weights and its forward pass over packed tokens."""

    def __init__(self, spec: DecoderSpec, embedding_VD: Tensor, layers: Sequence[Layer], norm_D: Tensor) -> None:
        self.spec = spec
        self.embedding_VD = embedding_VD
        self.layers = list(layers)
        self.norm_D = norm_D
        self.parts: Parts | None = None
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
        h_TD, y_TD, post_norm_D = self.run(ids_T, schedule, row_plan, causal)
        return h_TD + (y_TD if post_norm_D is None else self._norm(y_TD, post_norm_D, torch.float32))

    def run(
        self,
        ids_T: Tensor,
        schedule: Schedule,
        row_plan: Sequence[int],
        causal: bool,
        *,
        queries: Queries | None = None,
        training: Training | None = None,
    ) -> Stream:
        """All layers; differentiable where gradients are enabled (with a row plan of one count).

        Args:
            ids_T, schedule, row_plan, causal: see `forward`.
            queries: tokens whose output is wanted. The last layer then computes its output product and MLP, and on a
                GPU its queries, for these rows alone; the result has `len(queries.rows)` rows.
            training: low-rank updates and dropout.

        Returns:
            The residual stream and what the last block adds to it, for `mean_pool` to add.
        """
        last = (len(self.layers),)
        return self.streams(ids_T, schedule, row_plan, causal, last, queries=queries, training=training)[0]

    def streams(
        self,
        ids_T: Tensor,
        schedule: Schedule,
        row_plan: Sequence[int],
        causal: bool,
        depths: Sequence[int],
        *,
        queries: Queries | None = None,
        training: Training | None = None,
    ) -> list[Stream]:
        """As `run`, of several depths: the stream after each of these numbers of layers, rising."""
        if self.device.type == "cpu":
            keep_freed_memory()
        training = training or Training()
        rows = self._named(Rows(row_plan, schedule.positions), schedule, training.lora_dropout, max(depths))
        tables, query_scale_T = self._rope_rows(schedule), self._query_scale(schedule)
        context = Context(schedule, rows, causal, tables, query_scale_T, training)
        h_TD, y_TD, post_norm_D = self._embed(ids_T, schedule), None, None
        found: list[Stream] = []
        for index, layer in zip(range(max(depths)), self.layers, strict=False):  # range first: none beyond is made
            turn = Turn(index, layer, training.lora[index] if training.lora else LayerLora())
            last = queries if index == len(self.layers) - 1 else None
            if training.recompute and torch.is_grad_enabled():
                h_TD, y_TD = checkpoint(
                    *(self._layer, turn, h_TD, y_TD, post_norm_D, context, last),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                h_TD, y_TD = self._layer(turn, h_TD, y_TD, post_norm_D, context, last)
            post_norm_D = layer.mlp_post_norm
            if index + 1 in depths:
                found.append(Stream(h_TD, y_TD, post_norm_D))
        return found

    def _layer(
        self,
        turn: Turn,
        h_TD: Tensor,
        y_TD: Tensor | None,
        post_norm_D: Tensor | None,
        context: Context,
        queries: Queries | None,
    ) -> tuple[Tensor, Tensor]:
        """The stream within a layer, and what its MLP adds to it."""
        layer, rows = turn.layer, context.rows
        h_TD, x_TD = self._add_norm(h_TD, y_TD, post_norm_D, layer.attention_norm)
        again = self._again(h_TD, layer.attention_norm, context.training)
        if queries is not None:
            h_TD, rows = h_TD[queries.rows], self._select(rows, queries)
        with remade(x_TD, again):
            y_TD = self._attend(turn, x_TD, context, rows, queries)
        h_TD, x_TD = self._add_norm(h_TD, y_TD, layer.attention_post_norm, layer.mlp_norm)
        with remade(x_TD, self._again(h_TD, layer.mlp_norm, context.training)):
            return h_TD, self._mlp(turn, x_TD, rows, context.training)

    def _again(self, h_TD: Tensor, weight_D: Tensor, training: Training) -> Callable[[], Tensor] | None:
        """How a backward makes the norm of the stream again; None where it is kept."""
        return partial(self._norm, h_TD.detach(), weight_D.detach(), self.dtype) if _remakes(training, h_TD) else None

    def _named(self, rows: Rows, schedule: Schedule, dropout: Dropout | None, depth: int) -> Rows:
        """Rows with what names them in dropout's keys, where there is any."""
        if dropout is None or not dropout.p:
            return rows
        identities_T, keys = schedule.identity_of_rows(), None
        if implementation(identities_T) == "cpu":
            keys = mask_keys_of_sites(dropout, range(depth * SITES_PER_LAYER), identities_T, rows.positions_T)
        return rows._replace(identities_T=identities_T, keys=keys)

    def _select(self, rows: Rows, queries: Queries) -> Rows:
        at = queries.rows
        identities = None if rows.identities_T is None else rows.identities_T[at]
        return Rows(self.row_plan(len(at)), rows.positions_T[at], identities)

    def _embed(self, ids_T: Tensor, schedule: Schedule) -> Tensor:
        if schedule.is_static:  # only the ids say which rows are filling: those stay zero
            h_TD = self.embedding_VD[ids_T.clamp(min=0)].float().masked_fill_(ids_T[:, None] < 0, 0.0)
        else:
            h_TD = torch.zeros(len(schedule.positions), self.spec.hidden_size, dtype=torch.float32, device=self.device)
            h_TD[: len(ids_T)] = self.embedding_VD[ids_T]
        return h_TD.mul_(self.spec.embedding_scale) if self.spec.embedding_scale != 1.0 else h_TD

    def _add_norm(
        self, h_TD: Tensor, y_TD: Tensor | None, post_norm_D: Tensor | None, weight_D: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The stream with a block's output added, and its norm in the compute dtype."""
        eps, offset = self.spec.norm_eps, self.spec.norm_offset
        if y_TD is None:
            return h_TD, rms_norm(h_TD, weight_D, eps, offset, self.dtype)
        return add_rms_norm(h_TD, y_TD, weight_D, eps, offset, self.dtype, post_weight_D=post_norm_D)

    def _attend(self, turn: Turn, x_TD: Tensor, context: Context, rows: Rows, queries: Queries | None) -> Tensor:
        """A layer's attention block; its result has the rows of `rows`."""
        spec = self.spec
        q_THK, k_TGK, v_TGK = self._queries_keys_values(turn, x_TD, context, queries)
        cos_TK, sin_TK = context.tables[spec.layer_ropes[turn.number]]
        norms = turn.layer.query_norm, turn.layer.key_norm
        rotation = Rotation(cos_TK, sin_TK, *norms, spec.norm_eps, spec.norm_offset)
        scale_T = context.query_scale_T
        if scale_T is not None:  # of rotated queries
            q_THK, k_TGK = rotate(q_THK, k_TGK, rotation, queries)
            scale_T = scale_T if queries is None else scale_T[queries.rows]
            q_THK = (q_THK * scale_T[:, None, None]).to(self.dtype)
        mixed_THK = attention(
            q_THK,
            k_TGK,
            v_TGK,
            context.schedule,
            scale=spec.attention_scale,
            causal=context.causal,
            window=spec.layer_windows[turn.number],
            softcap=spec.softcap,
            rotation=rotation if scale_T is None else None,
            dropout=_at(context.training.attention_dropout, turn.number, ATTENTION_SITE),
            queries=queries,
        )
        return self._product(turn, "out", mixed_THK.flatten(1), [spec.hidden_size], OUT_SITE, rows, context.training)

    def _queries_keys_values(
        self, turn: Turn, x_TD: Tensor, context: Context, queries: Queries | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of all rows, or queries of the selected ones."""
        H, G, K = self.spec.num_heads, self.spec.num_kv_heads, self.spec.head_size
        layer = turn.layer
        # On the CPU the merged product stays whole: another shape would have other safe row counts.
        if queries is not None and implementation(x_TD) != "cpu" and turn.updates.qkv is None:
            biases = (None, None) if layer.qkv_bias is None else layer.qkv_bias.split([H * K, 2 * G * K])
            weight = self._weight(turn, "qkv")
            q_THK = linear(x_TD[queries.rows], weight[: H * K], biases[0]).unflatten(1, (H, K))
            k_TGK, v_TGK = linear(x_TD, weight[H * K :], biases[1]).unflatten(1, (2 * G, K)).split(G, 1)
            return q_THK, k_TGK, v_TGK
        qkv = self._product(turn, "qkv", x_TD, [H * K, G * K, G * K], QKV_SITE, context.rows, context.training)
        q_THK, k_TGK, v_TGK = qkv.unflatten(1, (H + 2 * G, K)).split([H, G, G], 1)
        return q_THK if queries is None else q_THK[queries.rows], k_TGK, v_TGK

    def _mlp(self, turn: Turn, x_TD: Tensor, rows: Rows, training: Training) -> Tensor:
        F, D = self.spec.mlp_size, self.spec.hidden_size
        gate_up = self._product(turn, "gate_up", x_TD, [F, F], GATE_UP_SITE, rows, training)
        activated = swiglu(gate_up, self.spec.activation)
        again = partial(swiglu, gate_up.detach(), self.spec.activation) if _remakes(training, gate_up) else None
        with remade(activated, again):
            return self._product(turn, "down", activated, [D], DOWN_SITE, rows, training)

    def _product(
        self, turn: Turn, name: str, x: Tensor, splits: list[int], site: int, rows: Rows, training: Training
    ) -> Tensor:
        """One of a layer's merged products, with its low-rank update where a training pass has one."""
        weight, bias = self._weight(turn, name), getattr(turn.layer, f"{name}_bias")
        pair = getattr(turn.updates, name)
        again = partial(self._weight, turn, name) if self.parts is not None and _keeps(training) else None
        with remade(weight, again):
            if pair is None:
                return linear(x, weight, bias, rows.plan)
            return lora(
                x,
                weight,
                pair.a_PRC,
                pair.b_NR,
                scales=pair.scales,
                splits=splits,
                bias_N=bias,
                dropout=_at(training.lora_dropout, turn.number, site),
                identities_T=rows.identities_T,
                positions_T=rows.positions_T,
                keys_2T=None if rows.keys is None else rows.keys[turn.number * SITES_PER_LAYER + site],
            )

    def _weight(self, turn: Turn, name: str) -> Tensor:
        return getattr(turn.layer, name) if self.parts is None else self.parts.whole(turn.number, name)

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


def _keeps(training: Training) -> bool:
    """Whether a layer's graph lives until its backward: not where that runs whole layers again."""
    return torch.is_grad_enabled() and not training.recompute


def _remakes(training: Training, x: Tensor) -> bool:
    """Whether a backward makes cheap tensors again, which spares a third of a graph: not on a CPU.

    There it would take 3 % of a step, and memory is what a CPU has more of.
    """
    return _keeps(training) and implementation(x) != "cpu"


def _at(dropout: Dropout | None, index: int, site: int) -> Dropout | None:
    """A pass's dropout at one place of one layer."""
    return None if dropout is None else dropout.at(index * SITES_PER_LAYER + site)
