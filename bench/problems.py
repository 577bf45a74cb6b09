"""One call of every op with fresh inputs: what is checked on a GPU and then timed there.

A `Problem` holds an op's float inputs, how to run it, its definition, and how to take some of its rows or sequences
alone, in any order: an op's result for a row may not depend on what else is in the batch. `bench/gpu_checks.py` judges
problems, `bench/gpu_ops.py` and `bench/gpu_attention.py` time them. On the device `meta` problems are built without
storage, to record what a GPU will have to compile.

Shape letters: T = packed tokens, B = sequences, D = hidden size, H = query heads, G = kv heads, K = head size,
F = MLP width, S = spans.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashvec.kernels.attention import Rotation, attention, attention_reference
from flashvec.kernels.dropout import Dropout
from flashvec.kernels.rms_norm import rms_norm_reference
from flashvec.kernels.rope import Rope, rope_reference, rope_table
from flashvec.kernels.schedule import Schedule, build_schedule, select_queries

Tensors = dict[str, Tensor]
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Problem:
    """An op's call.

    `run` and `reference` map `tensors` to outputs; gradients are taken in `differentiable`. `take(units)` is the same
    call on some rows or sequences, with the rows of the original that its outputs and gradients (those in `by_row`)
    hold. `torch_form` is how torch's users write it, where the definition, which is wider inside, would be unfair.
    `cost` holds FLOPs and bytes of the forward and the backward.
    """

    name: str
    tensors: Tensors
    run: Callable[[Tensors], Outputs]
    reference: Callable[[Tensors], Outputs]
    differentiable: tuple[str, ...] = ()
    num_units: int = 0
    take: Callable[[Sequence[int]], tuple["Problem", dict[str, Tensor]]] | None = None
    torch_form: Callable[[Tensors], Outputs] | None = None
    cost: dict[str, float] = field(default_factory=dict)

    @property
    def input_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.tensors.values())


@dataclass(frozen=True)
class Maker:
    """Draws inputs: where they live, in which dtype, and from which seed."""

    device: torch.device
    dtype: torch.dtype
    seed: int = 0
    drawn: list[int] = field(default_factory=lambda: [0], compare=False)

    def randn(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        dtype = dtype or self.dtype
        if self.device.type == "meta":
            return torch.empty(*shape, dtype=dtype, device="meta")
        self.drawn[0] += 1
        generator = torch.Generator(self.device).manual_seed(self.seed * 1000 + self.drawn[0])
        x = torch.empty(*shape, dtype=dtype, device=self.device)
        return x.normal_(0.0, scale, generator=generator)

    def integers(self, values: Any, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.as_tensor(np.asarray(values), dtype=dtype).to(self.device)


def rows_of(lengths: Sequence[int], units: Sequence[int]) -> np.ndarray:
    """Rows of some sequences of a packed batch, in that order."""
    starts = np.cumsum(lengths) - lengths
    parts = [np.arange(starts[i], starts[i] + lengths[i]) for i in units]
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)


# --- attention --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionShape:
    """A batch's lengths and heads, and the options of its attention.

    `rotate`: none, rope, or norms (RoPE after head norms); `drop`: dropout's rate; `selected`: only some tokens attend.
    """

    lengths: tuple[int, ...]
    H: int
    G: int
    K: int
    causal: bool = False
    window: int | tuple[int, int] | None = None
    softcap: float | None = None
    rotate: str = "none"
    drop: float = 0.0
    selected: bool = False
    identities: tuple[int, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        dropout = Dropout(self.drop, seed=5, step=1, site=2) if self.drop else None
        scale = self.K**-0.5
        return {
            "scale": scale,
            "causal": self.causal,
            "window": self.window,
            "softcap": self.softcap,
            "dropout": dropout,
        }

    @property
    def flops(self) -> float:
        """Useful ones of the forward."""
        return 4.0 * float(np.square(np.asarray(self.lengths, np.float64)).sum()) * self.K * self.H

    def schedule(self, device: torch.device) -> Schedule:
        names = self.identities or tuple(range(7, 7 + len(self.lengths)))
        return build_schedule(self.lengths, device=device, identities=names)

    def taken(self, units: Sequence[int]) -> "AttentionShape":
        names = self.identities or tuple(range(7, 7 + len(self.lengths)))
        chosen = {"lengths": tuple(self.lengths[i] for i in units), "identities": tuple(names[i] for i in units)}
        return AttentionShape(**{**self.__dict__, **chosen})


def attention_tensors(shape: AttentionShape, maker: Maker) -> Tensors:
    """Query, key and value heads as slices of one merged product; tables and norms where the shape rotates."""
    T, (H, G, K) = sum(shape.lengths), (shape.H, shape.G, shape.K)
    q, k, v = maker.randn(T, H + 2 * G, K).split([H, G, G], 1)
    tensors = {"q": q, "k": k, "v": v}
    if shape.rotate == "norms":
        tensors |= {name: maker.randn(K, dtype=torch.float32) for name in ("query_norm", "key_norm")}
    if shape.rotate != "none":
        cos, sin = rope_table(Rope(), K, max(shape.lengths, default=1))
        positions = shape.schedule(torch.device("cpu")).positions
        tensors |= {"cos": cos[positions].to(maker.device), "sin": sin[positions].to(maker.device)}
    return tensors


def attention_problem(shape: AttentionShape, maker: Maker, tensors: Tensors | None = None) -> Problem:
    """`attention` and its definition."""
    tensors = attention_tensors(shape, maker) if tensors is None else tensors
    schedule = shape.schedule(maker.device)
    queries = None
    if shape.selected:
        spans = np.array([(n // 3, max(n // 3, n - 1)) for n in shape.lengths])
        queries = select_queries(schedule, spans)

    def run(t: Tensors) -> Outputs:
        q = t["q"] if queries is None else t["q"][queries.rows]
        more: dict[str, Any] = {"rotation": rotation_of(t), "queries": queries}
        return (attention(q, t["k"], t["v"], schedule, **shape.options, **more),)

    def reference(t: Tensors) -> Outputs:
        q, k = rotated_reference(t, "q", "query_norm"), rotated_reference(t, "k", "key_norm")
        out, _ = attention_reference(q, k, t["v"], schedule, **shape.options)
        return (out if queries is None else out[queries.rows],)

    def take(units: Sequence[int]) -> tuple[Problem, dict[str, Tensor]]:
        rows = maker.integers(rows_of(shape.lengths, units))
        own = {name: x if name.endswith("norm") else x[rows] for name, x in tensors.items()}
        by_row = {} if shape.selected else dict.fromkeys(("out 0", "d q", "d k", "d v"), rows)
        return attention_problem(shape.taken(units), maker, own), by_row

    wanted = ("q", "k", "v", *(name for name in tensors if name.endswith("norm")))
    moved = 2.0 * sum(shape.lengths) * shape.K * (2 * shape.H + 2 * shape.G)
    cost = {"forward flops": shape.flops, "backward flops": 2.5 * shape.flops, "forward bytes": moved}
    return Problem(
        "attention", tensors, run, reference, () if shape.selected else wanted, len(shape.lengths), take, None, cost
    )


def rotation_of(t: Tensors) -> Rotation | None:
    """What `attention_tensors` drew for it."""
    if "cos" not in t:
        return None
    return Rotation(t["cos"], t["sin"], t.get("query_norm"), t.get("key_norm"), norm_eps=1e-2, norm_offset=1.0)


def rotated_reference(t: Tensors, name: str, norm: str) -> Tensor:
    """As the definition of `Rotation` has it, by the references of norm and rotation."""
    x = t[name]
    if "cos" not in t:
        return x
    if norm in t:
        x = rms_norm_reference(x, t[norm], 1e-2, 1.0, torch.promote_types(x.dtype, torch.float32))
    return rope_reference(x, t["cos"], t["sin"]).to(t[name].dtype)
