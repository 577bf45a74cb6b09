"""Which launches `kernels/aot.py` compiles: each op at the shapes of models that people embed with.

A case calls an op's launcher on tensors without storage; what it would launch is recorded. Long option lists are
compiled at one shape, plain forms at every head size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flashvec.kernels import attention, attention_tma, info_nce
from flashvec.kernels.attention_tiles import forward_configs, packed_heads
from flashvec.kernels.backend import Target
from flashvec.kernels.schedule import build_schedule

# (target, part of a case's name) -> why its spills stay and what was tried instead
ALLOWED_SPILLS = {
    ("sm_90", "attention 256 fp32"): "tiles of 16 by 16 are the smallest there are; fp32 is a path for checks",
    ("sm_80", "attention 96"): "8 bytes of 64 + 32 columns; one stage instead of two spills as much",
    ("sm_80", "attention 80"): "as 96",
} | {
    (target, "info_nce 4096"): "at most 64 bytes with ids and four prefixes at once; four warps spill too"
    for target in ("sm_80", "sm_89", "sm_120", "gfx942")
}


@dataclass(frozen=True)
class Case:
    """One call whose launches are compiled; `multiplies` names the kernels that must use matrix instructions."""

    name: str
    run: Callable[[], object]
    multiplies: frozenset[str] = frozenset()
    extra: bool = False  # compiled by --all only


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without storage."""
    return torch.empty(*shape, dtype=dtype, device="meta")


HEADS = {  # head size -> query heads, kv heads: Llama 3.2 1B; Phi-like 80 and 96; Llama 3 8B; Gemma 3 270M
    64: (32, 8),
    80: (32, 8),
    96: (32, 8),
    128: (32, 8),
    256: (4, 1),
}
OPTIONS: dict[str, dict[str, float | int | bool]] = {
    "plain": {},
    "causal": {"right": 0},
    "window": {"left": 256, "right": 256},
    "softcap": {"softcap": 50.0},
    "dropout": {"threshold": 26},
    "queries": {"subset": True},
    "rotation": {"rotate": True},
    "rotation, norms": {"rotate": True, "norm": True},
}


def _attention_forward(target: Target, K: int, dtype: torch.dtype, options: dict) -> None:
    H, G = HEADS[K]
    T = 16_384
    q, k, v = meta(T, H + 2 * G, K, dtype=dtype).split([H, G, G], 1)
    configs = forward_configs(target, dtype, K, packed_heads(H, G))
    tiles = [meta(600, 4, dtype=torch.int32) for _ in configs]
    table = meta(T, K // 2, dtype=torch.float32) if options.get("rotate") else None
    norm = meta(K, dtype=torch.float32) if options.get("norm") else None
    identities = meta(64, dtype=torch.int32) if options.get("threshold") else None
    shift_stop = meta(64, 2, dtype=torch.int32) if options.get("subset") else None
    attention._attention_fwd(
        *(q, k, v, tiles, T, table, table, norm, 1e-6, 0.0, identities, shift_stop, K**-0.5),
        *(options.get("left", -1), options.get("right", -1), options.get("softcap", 0.0)),
        *(options.get("threshold", 0), 12345, 6789),
    )


def _attention_tma(K: int) -> None:
    q, k, v = meta(16_384, 48, K).split([32, 8, 8], 1)
    schedule = build_schedule([4096] * 4)
    attention_tma.attention_tma(q, k, v, schedule, scale=K**-0.5)


def _info_nce(D: int, prefixes: list[int], ids: bool) -> None:
    q, c = meta(1024, D), meta(8192, D)
    positives = meta(1024, dtype=torch.int64)
    ids_M = meta(8192, dtype=torch.int64) if ids else None
    loss = info_nce._forward(q, c, positives, ids_M, 0.05, 0.1, prefixes)
    info_nce._backward(meta(*loss.shape, dtype=torch.float32), q, c, positives, ids_M, loss, 0.05, 0.1, prefixes)


def cases(target: Target) -> Iterator[Case]:
    """All cases of a target."""
    for K in HEADS:
        for name, options in OPTIONS.items():
            run = partial(_attention_forward, target, K, torch.bfloat16, options)
            common = K in (64, 128) or (K == 256 and name in ("plain", "window", "rotation, norms")) or name == "plain"
            yield Case(f"attention {K} {name}", run, frozenset({"_attention_fwd_kernel"}), extra=not common)
    if target.name == "sm_90":
        for K in attention_tma.KEYS:
            run = partial(_attention_tma, K)
            yield Case(f"attention tma {K}", run, frozenset({"_attention_tma_fwd_kernel"}))
    nce = frozenset({"_info_nce_fwd_kernel", "_info_nce_bwd_kernel"})
    yield Case("info_nce 1024", partial(_info_nce, 1024, [1024], False), nce)
    yield Case("info_nce 4096 ids, prefixes", partial(_info_nce, 4096, [64, 256, 1024, 4096], True), nce)
    for K in (64, 128, 256):
        run = partial(_attention_forward, target, K, torch.float32, {})
        yield Case(f"attention {K} fp32", run, frozenset({"_attention_fwd_kernel"}), extra=K == 256)
