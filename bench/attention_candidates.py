"""Tiles of attention that the tables do not choose, for a GPU to choose among.

A candidate runs all sequences of a batch with one configuration, or is a whole table of classes. Without options none
spills on sm_90 (bf16, four query heads to a kv head), so that what differs is how the work is cut and what overlaps.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Literal
from unittest import mock

from flashvec.bench.problems import AttentionShape
from flashvec.kernels import attention_bwd, attention_fwd
from flashvec.kernels.attention_tiles import BackwardConfig, TileConfig, packed_heads
from flashvec.kernels.schedule import TileClass

Tile = tuple[int, int, int, int]  # rows of queries, keys, warps, stages
Ring = tuple[int, int, int, int, int]
Classes = list[tuple[int | None, Tile]]
ForwardClasses = list[tuple[int | None, Tile | Ring]]  # the longest sequence of each class, and its tile; None: any
ByLength = dict[int | None, list[Tile]]  # by the longest sequence; None: any

# By head size: the kernel that any GPU runs. Its other tiles are timed where they are chosen, in classes of lengths.
FORWARD: dict[int, ByLength] = {
    128: {64: [(64, 64, 4, 1)], 128: [(64, 128, 4, 1)], None: [(64, 64, 4, 3), (128, 64, 8, 3)]},
    64: {64: [(128, 64, 8, 1), (64, 64, 4, 1)], 128: [(64, 128, 4, 1)], None: [(128, 64, 8, 3), (64, 64, 4, 3)]},
}
ONE_TILE: dict[int, ByLength] = {  # of the backward: all gradients by one program
    128: {
        64: [(16, 64, 4, 2), (32, 64, 4, 2), (16, 64, 8, 2)],
        128: [(16, 128, 8, 2), (32, 128, 8, 2), (32, 128, 8, 1)],
    },
    64: {
        64: [(16, 64, 4, 2), (32, 64, 4, 2), (64, 64, 4, 1)],
        128: [(16, 128, 8, 2), (32, 128, 8, 2), (64, 128, 8, 1)],
        256: [(16, 256, 8, 2)],
    },
}
DQ: dict[int, list[Tile]] = {  # the first is the usual one: the other kernel's candidates run beside it
    128: [(128, 64, 8, 2), (128, 32, 8, 2), (64, 128, 8, 2), (128, 64, 8, 3)],
    64: [(128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 2), (64, 128, 8, 2), (128, 128, 8, 1)],
}
DKV: dict[int, list[Tile]] = {
    128: [(32, 128, 8, 2), (16, 128, 8, 2), (32, 64, 4, 2), (64, 64, 8, 2), (16, 64, 4, 2)],
    64: [(64, 128, 8, 2), (32, 128, 8, 2), (16, 128, 8, 2), (32, 64, 4, 2), (64, 64, 4, 2)],
}
# Of mixed lengths: short sequences by tiles that hold all their keys, the others by a loop, or all by one. Five numbers
# are the kernel with specialised warps: the last is the slots of its ring.
FORWARD_TABLES: dict[int, dict[str, ForwardClasses]] = {
    128: {
        "any GPU's": [(64, (64, 64, 4, 1)), (128, (64, 128, 4, 1)), (None, (64, 64, 4, 3))],
        "specialised 64": [(None, (128, 64, 4, 1, 8))],
        "specialised 128": [(None, (128, 128, 4, 1, 4))],
        "specialised 64, from 128 on 128": [(128, (128, 64, 4, 1, 8)), (None, (128, 128, 4, 1, 4))],
        "specialised 64, from 256 on 128": [(256, (128, 64, 4, 1, 8)), (None, (128, 128, 4, 1, 4))],
    },
    64: {
        "any GPU's": [(64, (128, 64, 8, 1)), (128, (64, 128, 4, 1)), (None, (128, 64, 8, 3))],
        "specialised 64": [(None, (128, 64, 4, 1, 16))],
        "specialised 128": [(None, (128, 128, 4, 1, 8))],
        "any GPU's to 128, specialised 64": [
            (64, (128, 64, 8, 1)),
            (128, (64, 128, 4, 1)),
            (None, (128, 64, 4, 1, 16)),
        ],
        "any GPU's to 128, specialised 128": [
            (64, (128, 64, 8, 1)),
            (128, (64, 128, 4, 1)),
            (None, (128, 128, 4, 1, 8)),
        ],
    },
}
BACKWARD_TABLES: dict[int, dict[str, tuple[Classes, Tile | Ring, Tile | Ring]]] = {  # of one tile, then dq and dkv
    128: {
        "64, 128, specialised": (
            [(64, (32, 64, 4, 2)), (128, (32, 128, 8, 2))],
            (128, 64, 4, 1, 6),
            (64, 128, 4, 1, 8),
        ),
        "64, specialised": ([(64, (32, 64, 4, 2))], (128, 64, 4, 1, 6), (64, 128, 4, 1, 8)),
        "64, 128, rest": ([(64, (32, 64, 4, 2)), (128, (32, 128, 8, 2))], (128, 64, 8, 3), (32, 64, 4, 2)),
        "64, rest": ([(64, (32, 64, 4, 2))], (128, 64, 8, 3), (32, 64, 4, 2)),
        "128, rest": ([(128, (32, 128, 8, 2))], (128, 64, 8, 3), (32, 64, 4, 2)),
        "rest": ([], (128, 64, 8, 3), (32, 64, 4, 2)),
        "64, rest, smaller dq": ([(64, (32, 64, 4, 2))], (64, 64, 4, 3), (32, 64, 4, 2)),
    },
    64: {
        "64, 128, specialised": (
            [(64, (32, 64, 4, 2)), (128, (64, 128, 8, 1))],
            (128, 64, 4, 1, 12),
            (64, 128, 4, 1, 16),
        ),
        "64, specialised": ([(64, (32, 64, 4, 2))], (128, 64, 4, 1, 12), (64, 128, 4, 1, 16)),
        "64, 128, rest": ([(64, (32, 64, 4, 2)), (128, (64, 128, 8, 1))], (64, 64, 4, 2), (32, 64, 4, 2)),
        "64, rest": ([(64, (32, 64, 4, 2))], (64, 64, 4, 2), (32, 64, 4, 2)),
        "64, rest, 3 stages": ([(64, (32, 64, 4, 2))], (64, 64, 4, 3), (32, 64, 4, 3)),
        "rest": ([], (64, 64, 4, 2), (32, 64, 4, 2)),
    },
}


@dataclass(frozen=True)
class Candidate:
    """Configurations in the place of the tables'; None leaves a table as it is."""

    forward: tuple[TileConfig, ...] | None = None
    backward: tuple[BackwardConfig, ...] | None = None


@contextmanager
def chosen(candidate: Candidate | None) -> Iterator[None]:
    """Attention with these configurations."""
    with ExitStack() as stack:
        for module, name, configs in (
            (attention_fwd, "forward_configs", candidate and candidate.forward),
            (attention_bwd, "backward_configs", candidate and candidate.backward),
        ):
            if configs is not None:
                stack.enter_context(mock.patch.object(module, name, lambda *_, configs=configs: configs))
        yield


def candidates(shape: AttentionShape, direction: str) -> dict[str, Candidate]:
    """What could run all of a batch's sequences, by name."""
    return _forward(shape) if direction == "forward" else _backward(shape)


def _forward(shape: AttentionShape) -> dict[str, Candidate]:
    longest, packed = max(shape.lengths), packed_heads(shape.H, shape.G)
    found = {}
    for rows, keys, warps, stages in _up_to(FORWARD[_nearest(shape.K)], longest):
        one_tile = keys >= longest
        config = TileConfig(TileClass(rows // packed), rows, keys, warps, stages, one_tile)
        found[f"{'one tile ' if one_tile else ''}{name_of((rows, keys, warps, stages))}"] = Candidate((config,))
    for name, classes in FORWARD_TABLES[_nearest(shape.K)].items():
        found[f"table {name}"] = Candidate(_classes(classes, packed))
    return found


def _classes(classes: ForwardClasses, packed: int) -> tuple[TileConfig, ...]:
    """Configurations of a forward in classes of lengths."""
    found: list[TileConfig] = []
    shorter = 0
    for longest, (rows, keys, warps, stages, *ring) in classes:
        tile_class = TileClass(rows // packed, shorter, longest)
        one_tile = longest is not None and not ring
        found.append(TileConfig(tile_class, rows, keys, warps, stages, one_tile, ring=sum(ring)))
        shorter = longest or shorter
    return tuple(found)


def _backward(shape: AttentionShape) -> dict[str, Candidate]:
    K, longest = _nearest(shape.K), max(shape.lengths)
    found = {}
    for tile in _up_to(ONE_TILE[K], longest) if longest <= max(n for n in ONE_TILE[K] if n is not None) else []:
        found[f"one tile {name_of(tile)}"] = Candidate(backward=(_part("one tile", tile, shape),))
    if longest > 64:
        pairs = [(dq, DKV[K][0]) for dq in DQ[K]] + [(DQ[K][0], dkv) for dkv in DKV[K][1:]]
        for dq, dkv in pairs:
            both = (_part("dq", dq, shape), _part("dkv", dkv, shape))
            found[f"dq {name_of(dq)}; dkv {name_of(dkv)}"] = Candidate(backward=both)
    for name, (classes, *long) in BACKWARD_TABLES[K].items():
        configs: list[BackwardConfig] = []
        shorter: int = 0
        for own, short in classes:
            configs.append(replace(_part("one tile", short, shape), tile_class=TileClass(short[1], shorter, own)))
            shorter = own or shorter
        for part in (_part("dq", long[0], shape), _part("dkv", long[1], shape)):
            configs.append(replace(part, tile_class=TileClass(part.tile_class.tokens, shorter)))
        found[f"table {name}"] = Candidate(backward=tuple(configs))
    return found


def _part(form: Literal["one tile", "dq", "dkv"], tile: Tile | Ring, shape: AttentionShape) -> BackwardConfig:
    rows, keys, warps, stages, *ring = tile
    tokens = rows // packed_heads(shape.H, shape.G) if form == "dq" else keys
    return BackwardConfig(form, TileClass(tokens), rows, keys, warps, stages, ring=sum(ring))


def name_of(tile: Tile) -> str:
    rows, keys, warps, stages = tile
    return f"{rows}x{keys} {warps}w {stages}s"


def _nearest(K: int) -> int:
    return min(FORWARD, key=lambda known: abs(known - K))


def _up_to(lists: ByLength, longest: int) -> Sequence[Tile]:
    return lists[next((n for n in lists if n is not None and longest <= n), None)]
