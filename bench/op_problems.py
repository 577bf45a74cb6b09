"""Problems of the ops around attention: norms, rotation, activation, pooling, LoRA. See `bench/problems.py`.

`OPS` names a builder for each; a builder takes a `Size` and a `Maker`. Bytes of a problem's cost count each input read
once and each output written once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flashvec.bench.problems import Maker, Outputs, Problem, Tensors
from flashvec.kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from flashvec.kernels.cross_entropy import cross_entropy, cross_entropy_reference
from flashvec.kernels.info_nce import info_nce, info_nce_reference
from flashvec.kernels.lora import lora, lora_reference
from flashvec.kernels.mean_pool import mean_pool, mean_pool_reference
from flashvec.kernels.norm_rope import norm_rope, norm_rope_reference
from flashvec.kernels.rms_norm import rms_norm, rms_norm_reference
from flashvec.kernels.rope import Rope, rope, rope_reference, rope_table
from flashvec.kernels.swiglu import swiglu, swiglu_reference

EPS = 1e-6
RANK = 16
TEMPERATURE = 0.05


@dataclass(frozen=True)
class Size:
    """Rows of a batch, the lengths of its sequences, and a layer's sizes."""

    lengths: tuple[int, ...]
    D: int
    F: int
    H: int
    G: int
    K: int
    V: int = 128_256

    @property
    def T(self) -> int:
        return sum(self.lengths)

    @property
    def spans(self) -> np.ndarray:
        stops = np.cumsum(self.lengths)
        return np.stack([stops - self.lengths, stops], 1)


def row_problem(
    name: str,
    tensors: Tensors,
    run: Callable[[Tensors], Outputs],
    reference: Callable[[Tensors], Outputs],
    rows: Sequence[str],
    num_outputs: int = 1,
    fixed: Sequence[str] = (),
    cost: dict[str, float] | None = None,
) -> Problem:
    """A problem whose outputs' rows depend on the same rows of the tensors named in `rows` alone.

    `fixed` are tensors that no gradient is taken in.
    """

    def take(units: Sequence[int]) -> tuple[Problem, dict[str, Tensor]]:
        first = tensors[rows[0]]
        index = torch.as_tensor(np.asarray(units, np.int64)).to(first.device)
        own = {key: x[index] if key in rows else x for key, x in tensors.items()}
        names = [f"out {i}" for i in range(num_outputs)] + [f"d {key}" for key in rows if key not in fixed]
        return row_problem(name, own, run, reference, rows, num_outputs, fixed, cost), dict.fromkeys(names, index)

    wanted = tuple(key for key in tensors if key not in fixed)
    return Problem(name, tensors, run, reference, wanted, len(tensors[rows[0]]), take, None, cost or {})


def _bytes(*pieces: tuple[float, int]) -> float:
    """Sum of elements times bytes of an element."""
    return float(sum(count * size for count, size in pieces))


def rms_norm_problem(size: Size, maker: Maker) -> Problem:
    T, D, half = size.T, size.D, maker.dtype.itemsize
    tensors = {"x": maker.randn(T, D), "weight": maker.randn(D, dtype=torch.float32)}
    cost = {"forward bytes": _bytes((2 * T * D, half)), "backward bytes": _bytes((3 * T * D, half))}
    return row_problem(
        "rms_norm",
        tensors,
        lambda t: (rms_norm(t["x"], t["weight"], EPS, 1.0),),
        lambda t: (rms_norm_reference(t["x"], t["weight"], EPS, 1.0),),
        ["x"],
        cost=cost,
    )


def add_rms_norm_problem(size: Size, maker: Maker) -> Problem:
    """A layer's step: fp32 residual stream, what is added in halves."""
    T, D, half = size.T, size.D, maker.dtype.itemsize
    tensors = {
        "h": maker.randn(T, D, dtype=torch.float32),
        "y": maker.randn(T, D),
        "weight": maker.randn(D, dtype=torch.float32),
    }
    cost = {
        "forward bytes": _bytes((2 * T * D, 4), (2 * T * D, half)),  # stream and y in, stream and normed out
        "backward bytes": _bytes((3 * T * D, 4), (2 * T * D, half)),  # both gradients and the sum in, both out
    }
    return row_problem(
        "add_rms_norm",
        tensors,
        lambda t: add_rms_norm(t["h"], t["y"], t["weight"], EPS),
        lambda t: add_rms_norm_reference(t["h"], t["y"], t["weight"], EPS),
        ["h", "y"],
        num_outputs=2,
        cost=cost,
    )


def post_add_rms_norm_problem(size: Size, maker: Maker) -> Problem:
    """The step of Gemma 2 and 3, which norm what they add."""
    plain = add_rms_norm_problem(size, maker)
    tensors = plain.tensors | {"post_weight": maker.randn(size.D, dtype=torch.float32)}
    more = _bytes((size.T * size.D, maker.dtype.itemsize))  # backward reads y
    cost = plain.cost | {"backward bytes": plain.cost["backward bytes"] + more}
    return row_problem(
        "add_rms_norm, post norm",
        tensors,
        lambda t: add_rms_norm(t["h"], t["y"], t["weight"], EPS, 1.0, post_weight_D=t["post_weight"]),
        lambda t: add_rms_norm_reference(t["h"], t["y"], t["weight"], EPS, 1.0, post_weight_D=t["post_weight"]),
        ["h", "y"],
        num_outputs=2,
        cost=cost,
    )


def _heads(size: Size, maker: Maker, norm: bool) -> tuple[Tensors, dict[str, float]]:
    """Key heads as a slice of a merged product, and the tables' rows."""
    T, (H, G, K) = size.T, (size.H, size.G, size.K)
    cos, sin = rope_table(Rope(), K, max(size.lengths))
    positions = torch.from_numpy(np.concatenate([np.arange(n) for n in size.lengths]))
    tensors = {"x": maker.randn(T, H + 2 * G, K)[:, H : H + G]}
    if norm:
        tensors["weight"] = maker.randn(K, dtype=torch.float32)
    tensors |= {"cos": cos[positions].to(maker.device), "sin": sin[positions].to(maker.device)}
    elements, half = T * G * K, maker.dtype.itemsize
    cost = {
        "forward bytes": _bytes((2 * elements, half), (T * K, 4)),
        "backward bytes": _bytes(((3 if norm else 2) * elements, half), (T * K, 4)),
    }
    return tensors, cost


def rope_problem(size: Size, maker: Maker) -> Problem:
    tensors, cost = _heads(size, maker, norm=False)
    return row_problem(
        "rope",
        tensors,
        lambda t: (rope(t["x"], t["cos"], t["sin"]),),
        lambda t: (rope_reference(t["x"], t["cos"], t["sin"]),),
        ["x", "cos", "sin"],
        fixed=("cos", "sin"),
        cost=cost,
    )


def norm_rope_problem(size: Size, maker: Maker) -> Problem:
    tensors, cost = _heads(size, maker, norm=True)
    return row_problem(
        "norm_rope",
        tensors,
        lambda t: (norm_rope(t["x"], t["cos"], t["sin"], t["weight"], EPS),),
        lambda t: (norm_rope_reference(t["x"], t["cos"], t["sin"], t["weight"], EPS),),
        ["x", "cos", "sin"],
        fixed=("cos", "sin"),
        cost=cost,
    )


def swiglu_problem(size: Size, maker: Maker, activation: str = "silu") -> Problem:
    elements, half = size.T * size.F, maker.dtype.itemsize
    return row_problem(
        "swiglu" if activation == "silu" else f"swiglu, {activation}",
        {"gate_up": maker.randn(size.T, 2 * size.F)},
        lambda t: (swiglu(t["gate_up"], activation),),
        lambda t: (swiglu_reference(t["gate_up"], activation),),
        ["gate_up"],
        cost={"forward bytes": _bytes((3 * elements, half)), "backward bytes": _bytes((5 * elements, half))},
    )


def geglu_problem(size: Size, maker: Maker) -> Problem:
    return swiglu_problem(size, maker, "gelu_tanh")


def mean_pool_problem(size: Size, maker: Maker, mode: str = "mean", spans: np.ndarray | None = None) -> Problem:
    """Final norm and pooling of the fp32 residual stream; units are spans."""
    spans = size.spans if spans is None else spans
    spans_S2 = maker.integers(spans)
    tensors = {
        "x": maker.randn(size.T, size.D, dtype=torch.float32),
        "weight": maker.randn(size.D, dtype=torch.float32),
    }
    return _pooling(size, maker, mode, spans_S2, tensors)


def _pooling(size: Size, maker: Maker, mode: str, spans_S2: Tensor, tensors: Tensors) -> Problem:
    def take(units: Sequence[int]) -> tuple[Problem, dict[str, Tensor]]:
        index = maker.integers(units)
        return _pooling(size, maker, mode, spans_S2[index], tensors), {"out 0": index}

    rows = size.T * size.D
    return Problem(
        f"mean_pool, {mode}",
        tensors,
        lambda t: (mean_pool(t["x"], spans_S2, t["weight"], EPS, mode=mode),),
        lambda t: (mean_pool_reference(t["x"], spans_S2, t["weight"], EPS, mode=mode),),
        ("x", "weight"),
        len(spans_S2),
        take,
        None,
        {"forward bytes": _bytes((rows, 4)), "backward bytes": _bytes((2 * rows, 4))},
    )


def weighted_pool_problem(size: Size, maker: Maker) -> Problem:
    return mean_pool_problem(size, maker, "weighted_mean")


def lora_problem(size: Size, maker: Maker) -> Problem:
    """Query, key and value products with their low-rank updates; the base's own product is most of the FLOPs."""
    D, T = size.D, size.T
    splits = [size.H * size.K, size.G * size.K, size.G * size.K]
    N = sum(splits)
    tensors = {
        "x": maker.randn(T, D),
        "weight": maker.randn(N, D, scale=D**-0.5),
        "a": maker.randn(3, RANK, D, scale=D**-0.5),
        "b": maker.randn(N, RANK, scale=RANK**-0.5),
    }
    scales = [2.0] * 3

    def torch_form(t: Tensors) -> Outputs:
        out = F.linear(t["x"], t["weight"]).split(splits, 1)
        b = t["b"].split(splits)
        return (torch.cat([out[p] + (t["x"] @ t["a"][p].T @ b[p].T) * scales[p] for p in range(3)], 1),)

    base, update = 2.0 * T * N * D, 2.0 * T * RANK * (3 * D + N)
    problem = row_problem(
        "lora",
        tensors,
        lambda t: (lora(t["x"], t["weight"], t["a"], t["b"], scales=scales, splits=splits),),
        lambda t: (lora_reference(t["x"], t["weight"], None, t["a"], t["b"], splits, scales),),
        ["x"],
        fixed=("weight",),
        cost={"forward flops": base + update, "backward flops": base + 2 * update},
    )
    return Problem(**{**problem.__dict__, "torch_form": torch_form, "take": None})


def cross_entropy_problem(size: Size, maker: Maker) -> Problem:
    """Masked language modelling with a frozen head: a fifth of the tokens is predicted."""
    T, D, V = size.T, size.D, size.V
    generator = np.random.default_rng(maker.seed)
    R = -(-T // 5)
    rows_R = maker.integers(np.sort(generator.choice(T, R, replace=False)))
    targets_R = maker.integers(generator.integers(0, V, R))
    tensors = {"h": maker.randn(T, D), "weight": maker.randn(V, D, scale=D**-0.5)}

    def torch_form(t: Tensors) -> Outputs:
        logits = F.linear(t["h"][rows_R], t["weight"])
        return (F.cross_entropy(logits.float(), targets_R, reduction="none"),)

    flops = 2.0 * R * V * D
    return Problem(
        "cross_entropy",
        tensors,
        lambda t: (cross_entropy(t["h"], t["weight"], rows_R, targets_R, reduction="none"),),
        lambda t: (cross_entropy_reference(t["h"], t["weight"], rows_R, targets_R),),
        ("h",),
        torch_form=torch_form,
        cost={"forward flops": flops, "backward flops": flops},  # the head is frozen; logits made again are no use
    )


def info_nce_problem(size: Size, maker: Maker) -> Problem:
    """A contrastive batch: a query for each sequence, its document, and seven negatives that stand before or behind."""
    B, D = len(size.lengths), size.D
    M = 8 * B
    positives_B = maker.integers(np.arange(B) * 8 + 3)
    tensors = {"queries": maker.randn(B, D), "documents": maker.randn(M, D)}

    def torch_form(t: Tensors) -> Outputs:
        scores = F.normalize(t["queries"], dim=-1) @ F.normalize(t["documents"], dim=-1).T / TEMPERATURE
        return (F.cross_entropy(scores.float(), positives_B, reduction="none"),)

    flops = 2.0 * B * M * D
    return Problem(
        "info_nce",
        tensors,
        lambda t: (info_nce(t["queries"], t["documents"], positives_B, TEMPERATURE),),
        lambda t: (info_nce_reference(t["queries"], t["documents"], positives_B, TEMPERATURE),),
        ("queries", "documents"),
        torch_form=torch_form,
        cost={"forward flops": flops, "backward flops": 2 * flops},
    )


OPS: dict[str, Callable[[Size, Maker], Problem]] = {
    "add_rms_norm": add_rms_norm_problem,
    "swiglu": swiglu_problem,
    "mean_pool": mean_pool_problem,
    "rope": rope_problem,
    "norm_rope": norm_rope_problem,
    "lora": lora_problem,
    "cross_entropy": cross_entropy_problem,
    "info_nce": info_nce_problem,
    "rms_norm": rms_norm_problem,
    "add_rms_norm, post norm": post_add_rms_norm_problem,
    "swiglu, gelu_tanh": geglu_problem,
    "mean_pool, weighted_mean": weighted_pool_problem,
}
