"""Attention's time on a GPU: ours, tiles that the tables do not choose, and other libraries, on the same batches.

Batches of 16,384 tokens: equal lengths from 64 to 8,192 and log-normal ones (`roofline.lengths_of`), heads of 64 and
128, four query heads to a kv head and one. Useful FLOPs are counted: 4 n² K a head forward, 10 n² K backward, whatever
a variant computes for padding. Before a variant is timed, its output (backward: dq) for some sequences and heads is
compared with the definition: ours by the criterion, a peer by whether it computes the same thing at all.

`candidate` variants (bench/attention_candidates.py) run all sequences of a batch with one configuration, named rows x
keys, warps, stages. Where one is faster than `flashvec` at the lengths of a class, it is what
`kernels/attention_tiles.py` should choose there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashvec.bench.attention_candidates import Candidate, candidates, chosen
from flashvec.bench.criterion import Distance, distance
from flashvec.bench.device_time import num_sets
from flashvec.bench.gpu_session import Row, Run, Session, Wrong, compare
from flashvec.bench.peers_gpu import PEERS, Call, Peer
from flashvec.bench.problems import (
    AttentionShape,
    Maker,
    Tensors,
    attention_tensors,
    rotated_reference,
    rotation_of,
    rows_of,
)
from flashvec.kernels.attention import attention, attention_reference, rotate
from flashvec.kernels.roofline import lengths_of

TOKENS = 16_384
SAME_THING = 0.05  # of the truth's norm: a peer farther off computes something else, not the same less exactly
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Group:
    """Variants of one batch in one direction."""

    shape: AttentionShape
    lengths: str  # equal ones by their number, else their distribution
    direction: str  # forward or backward

    @property
    def name(self) -> str:
        s = self.shape
        rotated = "" if s.rotate == "none" else f", {s.rotate}"
        return f"attention {self.direction} K {s.K} heads {s.H}/{s.G} lengths {self.lengths}{rotated}"


def groups(tokens: int = TOKENS) -> list[Group]:
    """What is timed, most valuable first."""
    equal = {str(n): (n,) * (tokens // n) for n in (128, 512, 256, 2048, 64, 8192)}
    spread_out = {f"log-normal {n}": tuple(lengths_of(tokens, n)) for n in (256, 64, 128, 512)}
    heads = {"grouped": {128: (32, 8), 64: (32, 8)}, "single": {128: (16, 16), 64: (32, 32)}}
    order: list[tuple[str, dict[str, tuple[int, ...]], str]] = [
        ("grouped", equal, "forward"),
        ("grouped", spread_out, "forward"),
        ("grouped", equal, "backward"),
        ("grouped", spread_out, "backward"),
        ("single", equal, "forward"),
        ("single", equal, "backward"),
    ]
    found = [
        Group(AttentionShape(lengths, *heads[kind][K], K), name, direction)
        for kind, batches, direction in order
        for name, lengths in batches.items()
        for K in (128, 64)
    ]
    mixed = spread_out["log-normal 256"]
    rotated = [(32, 8, 128, "rope"), (32, 8, 64, "rope"), (16, 8, 128, "norms")]  # Llama 3 8B, 1B, Qwen3 0.6B
    after = 2 * len(equal | spread_out)
    found[after:after] = [
        Group(AttentionShape(mixed, H, G, K, rotate=rotate), "log-normal 256", "forward") for H, G, K, rotate in rotated
    ]
    return found


# --- ours, as tables choose and as they might ---------------------------------------------------------------


def ours(shape: AttentionShape, t: Tensors, candidate: Candidate | None = None, before: bool = False) -> Call:
    """`attention` over slices of a merged product, as the decoder calls it; `before` rotates in passes of their own."""
    schedule, rotation = shape.schedule(t["q"].device), rotation_of(t)
    q, k, v = (t[name].detach() for name in "qkv")

    def run() -> Tensor:
        with chosen(candidate):
            if rotation is not None and before:
                return attention(*rotate(q, k, rotation), v, schedule, scale=shape.K**-0.5)
            return attention(q, k, v, schedule, scale=shape.K**-0.5, rotation=rotation)

    return Call(run, (q, k, v), lambda x: x, partial(chosen, candidate))


def variants(group: Group) -> dict[str, Peer]:
    """Ours first, then candidates, then peers."""
    found: dict[str, Peer] = {"flashvec": ours}
    for name, candidate in candidates(group.shape, group.direction).items():
        found[f"candidate {name}"] = partial(ours, candidate=candidate)
        if group.shape.rotate != "none":
            found[f"candidate {name}, rotated before"] = partial(ours, candidate=candidate, before=True)
    if group.shape.rotate != "none":
        return found
    peers = dict(PEERS)
    if group.shape.H == group.shape.G:
        del peers["torch flex, document mask"]  # it compiles for half a minute at each new shape
    return found | peers


# --- timing -----------------------------------------------------------------------------------------------


def backward_call(call: Call, dout: Tensor | None = None) -> Callable[[], tuple[Tensor, ...]]:
    """The gradients of a prepared forward, which runs now."""
    for x in call.leaves:
        x.requires_grad_()
    with torch.enable_grad():
        out = call.run()
    seed = torch.randn_like(out) if dout is None else dout.expand_as(out).contiguous()

    def run() -> tuple[Tensor, ...]:
        with call.around():
            return torch.autograd.grad(out, call.leaves, seed, retain_graph=True)

    return run


class Sample:
    """Some sequences and heads of a batch, and what attention must give there."""

    def __init__(self, group: Group, t: Tensors) -> None:
        shape, device = group.shape, t["q"].device
        units = sorted({0, max(range(len(shape.lengths)), key=lambda i: shape.lengths[i]), len(shape.lengths) - 1})
        per_group, kv_heads = shape.H // shape.G, sorted({0, shape.G - 1})
        self.rows = torch.as_tensor(rows_of(shape.lengths, units)).to(device)
        self.heads = torch.as_tensor([g * per_group + j for g in kv_heads for j in range(per_group)]).to(device)
        taken = shape.taken(units)
        schedule = taken.schedule(device)
        self.dout = torch.randn(shape.K, device=device).to(t["q"].dtype)  # one row for all: it fits every layout
        groups_of = torch.as_tensor(kv_heads).to(device)
        own = {name: x if name.endswith("norm") else x[self.rows] for name, x in t.items()}
        q = rotated_reference(own, "q", "query_norm")[:, self.heads]
        k, v = rotated_reference(own, "k", "key_norm")[:, groups_of], own["v"][:, groups_of]
        self.same, self.truth = (
            self._reference([x.to(dtype) for x in (q, k, v)], schedule, shape.K**-0.5, group.direction)
            for dtype in (q.dtype, torch.float32)
        )

    def _reference(self, tensors: list[Tensor], schedule: Any, scale: float, direction: str) -> Tensor:
        q, k, v = tensors
        q.requires_grad_(direction == "backward")
        out, _ = attention_reference(q, k, v, schedule, scale=scale)
        if direction == "forward":
            return out
        return torch.autograd.grad(out, q, self.dout.to(out.dtype).expand_as(out).contiguous())[0]

    def judge(self, call: Call, direction: str) -> Distance:
        """A variant's output, or its dq, at this sample."""
        if direction == "forward":
            with torch.no_grad():
                result = call.run()
        else:
            result = backward_call(call, self.dout)()[0]
        return distance(call.packed(result)[self.rows][:, self.heads], self.same, self.truth)

    def is_same_thing(self, found: Distance) -> bool:
        return found.error <= max(found.allowed, SAME_THING * float(self.truth.abs().max()))


def build(variant: Peer, group: Group, sets: Sequence[Tensors], sample: Sample, is_ours: bool, session: Session) -> Run:
    """Check a variant on the first input set, then make it ready on all of them."""
    with session.watch.on_stream():
        calls = [variant(group.shape, t) for t in sets]
        found = sample.judge(calls[0], group.direction)
        if not (found.passed if is_ours else sample.is_same_thing(found)):
            raise Wrong(str(found))
        if group.direction == "backward":
            backwards = [backward_call(call) for call in calls]
            return lambda i: backwards[i]()

    def forward(i: int) -> Tensor:
        with torch.no_grad():
            return calls[i].run()

    return forward


def is_ours(name: str) -> bool:
    return name == "flashvec" or name.startswith("candidate")


def time_group(session: Session, group: Group, dtype: torch.dtype = DTYPE, who: dict[str, Peer] | None = None) -> None:
    """Rows of one group; `who` takes part in the place of `variants`."""
    shape, maker = group.shape, Maker(session.device, dtype)
    moved = 2.0 * sum(shape.lengths) * shape.K * (2 * shape.H + 2 * shape.G)
    sets = [attention_tensors(shape, maker) for _ in range(num_sets(moved))]
    sample = Sample(group, sets[0])
    builders = {
        name: partial(build, variant, group, sets, sample, is_ours(name), session)
        for name, variant in (variants(group) if who is None else who).items()
    }
    found = compare(session, builders, len(sets))
    session.keep([row_of(session, group, name, measured, dtype) for name, measured in found.items()])
    for name, measured in found.items():
        if "wrong" in measured and is_ours(name):
            session.fail(f"{group.name}: {name}: {measured['wrong']}")
    del sets, sample, builders
    session.settle()


def row_of(session: Session, group: Group, variant: str, measured: Row, dtype: torch.dtype) -> Row:
    """A variant's row: what ran, how long, and its rate of useful FLOPs beside the device's own for products."""
    shape = group.shape
    row: Row = {
        "benchmark": "gpu attention",
        "variant": variant,
        "direction": group.direction,
        "lengths": group.lengths,
        "tokens": sum(shape.lengths),
        "sequences": len(shape.lengths),
        "heads": f"{shape.H}/{shape.G}",
        "head_size": shape.K,
        "rotation": shape.rotate,
        "dtype": str(dtype).removeprefix("torch."),
        **measured,
    }
    if "us" in measured:
        flops = shape.flops * (1.0 if group.direction == "forward" else 2.5)
        row["tflops"] = float(f"{flops / measured['us'] / 1e6:.4g}")
        if "tflops" in session.ceilings:
            row["share_of_matmul"] = round(row["tflops"] / session.ceilings["tflops"], 3)
    return row


def record(group: Group, dtype: torch.dtype = DTYPE) -> None:
    """Run ours and the candidates on meta tensors, for the kernels' recording."""
    t = attention_tensors(group.shape, Maker(torch.device("meta"), dtype))
    for name, variant in variants(group).items():
        if is_ours(name):
            call = variant(group.shape, t)
            if group.direction == "backward":
                backward_call(call)()
            else:
                call.run()


def summary(rows: Sequence[Row]) -> list[str]:
    """One line per group: ours, the best candidate, the best peer, and ours over that peer."""
    grouped: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row["benchmark"] == "gpu attention":
            key = (row["direction"], row["head_size"], row["heads"], row["lengths"], row.get("rotation", "none"))
            grouped.setdefault(key, {})[row["variant"]] = row
    lines = []
    for (direction, head_size, heads, lengths, rotation), found in grouped.items():
        lengths = lengths if rotation == "none" else f"{lengths}, {rotation}"
        timed = {name: row["tflops"] for name, row in found.items() if "tflops" in row}
        line = f"{direction:8} K {head_size:3} {heads:5} {lengths:14} {_rate(timed, ['flashvec'])}"
        candidates = [name for name in timed if name.startswith("candidate")]
        peers = [name for name in timed if not is_ours(name)]
        line += f"  candidate {_rate(timed, candidates)}  peer {_rate(timed, peers)}"
        if "flashvec" in timed and peers:
            line += f"  {timed['flashvec'] / max(timed[name] for name in peers):.2f}x"
        lines.append(line)
    title = "attention, useful TFLOP/s: flashvec, best candidate, best peer, flashvec over that peer"
    return [title, *lines] if lines else []


def _rate(timed: dict[str, float], names: Sequence[str]) -> str:
    names = [name for name in names if name in timed]
    if not names:
        return "    -"
    best = max(names, key=lambda name: timed[name])
    return f"{timed[best]:5.0f}" + ("" if best == "flashvec" else f" ({best.removeprefix('candidate ')})")
