"""Which launches `kernels/aot.py` compiles: each op at the shapes of models that people embed with.

A case calls an op's launcher on tensors without storage; what it would launch is recorded. Long option lists are
compiled at one shape, plain forms at every head size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashvec.kernels import (
    add_rms_norm,
    attention,
    attention_bwd,
    attention_fwd,
    attention_hopper,
    attention_hopper_bwd,
    cross_entropy,
    info_nce,
    lora,
    mean_pool_bwd,
    mean_pool_fwd,
    norm_rope,
    rms_norm,
    rope,
    swiglu,
)
from flashvec.kernels.attention_tiles import backward_configs, forward_configs, packed_heads
from flashvec.kernels.backend import Target


class Spill(NamedTuple):
    """Registers that the chosen options write to memory, and why nothing else was chosen."""

    cases: str  # part of their names
    most: dict[str, int]  # target -> bytes a thread
    reason: str  # what causes it, what was compiled instead and what speaks against that


ONE_STAGE = "one stage does not, and waits for each copy"
THREE_PRODUCTS = "a path for checks, not for speed: three TF32 products hold three copies of their operands"
ALLOWED_SPILLS = (
    Spill("attention 64 fp32", {"sm_80": 160, "sm_89": 8, "sm_100": 24, "sm_120": 176}, THREE_PRODUCTS),
    Spill("attention 256 fp32", {"sm_80": 96, "sm_89": 88, "sm_90": 112, "sm_100": 112, "sm_120": 112}, THREE_PRODUCTS),
    Spill(
        "attention 64 window",
        {"sm_80": 8, "sm_89": 24, "sm_120": 40},
        f"three loops over keys; {ONE_STAGE}; 32 keys do not, in twice the steps and with 6 % more exponentials",
    ),
    Spill(
        "attention 128 window",
        {"sm_80": 8, "sm_120": 32},
        f"three loops over keys; {ONE_STAGE}; 16 keys do not, and compute scores twice",
    ),
    Spill(
        "attention 128 rotation, norms",
        {"sm_80": 104, "sm_89": 72, "sm_120": 48},
        "before the products; 128 rows by eight warps spill 8 bytes, on sm_80 alone, and are one block for two; 32 "
        "rows do not, and compute scores twice; in the loop one stage or 16 keys still spill 40 on sm_80",
    ),
    Spill("attention 128 rotation, window", {"sm_80": 24}, f"{ONE_STAGE}; 16 keys or eight warps compute scores twice"),
    Spill("attention 80", {"sm_120": 24}, "as 96"),
    Spill(
        "attention 96",
        {"sm_80": 8, "sm_89": 16, "sm_120": 56},
        f"{ONE_STAGE} (with the soft-cap on sm_89 24 bytes); 16 keys do not, in twice the steps and with 12 % more "
        "exponentials",
    ),
    Spill("attention bwd 80", {"sm_120": 16}, f"{ONE_STAGE}; 64 keys compute scores twice"),
    Spill("attention bwd 96", {"sm_80": 8, "sm_120": 32}, f"{ONE_STAGE}; 64 keys, or rows of dq, compute scores twice"),
    Spill("attention bwd 64 window", {"sm_120": 8}, f"{ONE_STAGE}; 64 keys a step instead of 32 spill 24"),
    Spill("attention 96 softcap", {"sm_100": 16}, f"{ONE_STAGE}; 32 keys do not, in twice the steps"),
    Spill("attention 128 rotation", {"sm_100": 56}, f"{ONE_STAGE}; 32 keys do not, in twice the steps"),
    Spill("attention 256 dropout", {"sm_100": 16}, "16 keys do not, in twice the steps; one stage does"),
    Spill("attention bwd 128 dropout", {"sm_100": 32}, f"{ONE_STAGE}; 16 rows do not, in twice the steps"),
    Spill(
        "cross_entropy",
        {"sm_100": 16},
        f"{ONE_STAGE}; 64 columns do not, in twice the tiles; steps of 32 do not, and wait twice as often; four "
        "stages, or 64 rows by four warps, do",
    ),
    Spill(
        "info_nce 4096 ids, prefixes",
        {"sm_80": 64, "sm_89": 48, "sm_120": 56, "gfx942": 12},
        "ids and four prefixes at once; four warps do, too",
    ),
)

# What an older compiler spills beyond that: options are chosen with the newest, and it gets the same ones.
CLOSE = "the newest compiler just holds it"
OLDER_SPILLS = {
    "3.6.0": (
        Spill("attention bwd 128 dropout", {"sm_90": 8}, CLOSE),
        Spill("attention bwd 128 rotation, dropout", {"sm_90": 24}, CLOSE),
        Spill("attention 128 dropout", {"sm_90": 24}, CLOSE),
        Spill(
            "attention bwd 128",
            {"sm_90": 80},
            "once a tile, outside the loop; 208 or 216 registers for the warps that multiply spill 216 to 272 bytes, "
            "232 or 240 spill 24 to 40, and 16 to 64 with the newest, of the warps that copy",
        ),
        Spill("attention 64 fp32", {"sm_80": 168, "sm_89": 152}, THREE_PRODUCTS),
        Spill("attention bwd 64 plain", {"sm_100": 16}, CLOSE),
        Spill("attention bwd 256 plain", {"gfx942": 16}, CLOSE),
    )
}


def allowed_spill(target: str, case: str, triton_version: str) -> int:
    """Bytes that a case's kernels may spill on a target."""
    listed = (*OLDER_SPILLS.get(triton_version, ()), *ALLOWED_SPILLS)
    return next((spill.most[target] for spill in listed if target in spill.most and spill.cases in case), 0)


@dataclass(frozen=True)
class Case:
    """One call whose launches are compiled; `multiplies` names the kernels that must use matrix instructions."""

    name: str
    run: Callable[[], object]
    multiplies: frozenset[str] = frozenset()
    extra: bool = False  # compiled with --all only


FORWARD, BACKWARD = {"_attention_fwd_kernel"}, {"_attention_bwd_dkv_kernel", "_attention_bwd_dq_kernel"}
SPECIALISED = {"_attention_hopper_fwd_kernel"}  # on Hopper, without a window, soft-cap, dropout or selected queries
BACKWARD_SPECIALISED = {"_attention_bwd_dkv_kernel", "_attention_hopper_dkv_kernel", "_attention_hopper_dq_kernel"}
LOW_RANK = frozenset({"_low_rank_shrink_kernel", "_low_rank_expand_kernel", "_low_rank_reduce_kernel"})


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
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"right": 0},
    "window": {"left": 256, "right": 256},
    "softcap": {"softcap": 50.0},
    "dropout": {"threshold": 26},
    "queries": {"subset": True},
    "rotation": {"rotate": True},
    "rotation, norms": {"rotate": True, "norm": True},
}
# What models ask for together, at their head sizes: Llama and Mistral with their own masks, Gemma 2, training.
TOGETHER: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "rotation, causal": ((64, 128), {"rotate": True, "right": 0}),
    "rotation, window": ((128,), {"rotate": True, "left": 4095, "right": 0}),
    "rotation, dropout": ((128,), {"rotate": True, "threshold": 26}),
    "softcap, window": ((256,), {"softcap": 50.0, "left": 4095, "right": 0}),
}


def _attention(target: Target, K: int, dtype: torch.dtype, options: dict[str, Any], backward: bool = False) -> None:
    """Forward, or backward, of one option at a head size."""
    H, G = HEADS[K]
    T = 16_384
    q, k, v = meta(T, H + 2 * G, K, dtype=dtype).split([H, G, G], 1)
    packed = packed_heads(H, G)
    table = meta(T, K // 2, dtype=torch.float32) if options.get("rotate") else None
    norm = meta(K, dtype=torch.float32) if options.get("norm") else None
    identities = meta(64, dtype=torch.int32) if options.get("threshold") else None
    shift_stop = meta(64, 2, dtype=torch.int32) if options.get("subset") else None
    softcap, threshold = options.get("softcap", 0.0), options.get("threshold", 0)
    numbers: Any = options.get("left", -1), options.get("right", -1), softcap, threshold, 12345, 6789
    asked = max(numbers[:2]) >= 0, softcap > 0, threshold > 0
    if backward:
        specialised = attention_hopper_bwd.takes(q, k, v, table is not None, *asked)
        configs = backward_configs(target, dtype, K, packed, table is not None, *asked, specialised)
        out, lse = meta(T, H, K, dtype=dtype), meta(H, T, dtype=torch.float32)
        attention_bwd.launch_attention_bwd(
            out,
            q,
            k,
            v,
            out,
            lse,
            [meta(600, 4, dtype=torch.int32) for _ in configs],
            T,
            table,
            table,
            identities,
            K**-0.5,
            *(*numbers, specialised),
        )
        return
    specialised = attention_hopper.takes(q, k, v, *asked, shift_stop is not None)
    classes = forward_configs(target, dtype, K, packed, table is not None, specialised)
    tiles = [meta(600, 4, dtype=torch.int32) for _ in classes]
    attention_fwd.launch_attention(
        q, k, v, None, tiles, [], T, table, table, norm, 1e-6, 0.0, identities, shift_stop, K**-0.5, *numbers
    )


def _info_nce(D: int, prefixes: list[int], ids: bool) -> None:
    q, c = meta(1024, D), meta(8192, D)
    positives = meta(1024, dtype=torch.int64)
    ids_M = meta(8192, dtype=torch.int64) if ids else None
    loss = info_nce._forward(q, c, positives, ids_M, 0.05, 0.1, prefixes)
    info_nce._backward(meta(*loss.shape, dtype=torch.float32), q, c, positives, ids_M, loss, 0.05, 0.1, prefixes)


def _cross_entropy(T: int, D: int, V: int, softcap: float, trained: bool) -> None:
    h, weight = meta(T, D), meta(V, D)
    rows, targets = (meta(-(-T // 5), dtype=torch.int64) for _ in range(2))
    loss, lse = cross_entropy._forward(h, weight, rows, targets, None, softcap, 1.0)
    cross_entropy._backward(loss, h, weight, rows, targets, None, lse, softcap, 1.0, [True, trained, False])


def _lora(T: int, C: int, splits: list[int], R: int, dropped: bool) -> None:
    x, weight = meta(T, C), meta(sum(splits), C)
    a, b = (meta(*shape, dtype=torch.float32) for shape in [(len(splits), R, C), (sum(splits), R)])
    keys = meta(2, T, dtype=torch.int32) if dropped else None
    threshold, scales = 13 if dropped else 0, [2.0] * len(splits)
    y, h, _ = lora._forward(x, weight, None, a, b, splits, scales, keys, threshold)
    lora._backward(y, x, weight, a, b, h, splits, scales, keys, threshold, [True, True, True])


def _row_ops(D: int, F: int, H: int, G: int, K: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """The ops around the products, at one model's sizes."""
    T, fp32 = 16_384, torch.float32
    h, y, w, x = meta(T, D, dtype=fp32), meta(T, D), meta(D, dtype=fp32), meta(T, D)
    table, head_weight = meta(T, K // 2, dtype=fp32), meta(K, dtype=fp32)
    keys = meta(T, H + 2 * G, K)[:, H : H + G]
    spans, gate_up, pooled = meta(64, 2, dtype=torch.int64), meta(T, 2 * F), meta(64, D, dtype=fp32)
    ours = add_rms_norm
    yield "rms_norm", lambda: rms_norm.launch_rms_norm(h, w, 1e-6, 0.0, torch.bfloat16)
    yield "rms_norm bwd", lambda: rms_norm.launch_rms_norm_bwd(x, h, w, 1e-6, 0.0, True)
    yield "add_rms_norm", lambda: ours.launch_add_rms_norm(h, y, w, None, 1e-6, 0.0, torch.bfloat16)
    yield "add_rms_norm post", lambda: ours.launch_add_rms_norm(h, y, w, w, 1e-6, 1.0, torch.bfloat16)
    yield (
        "add_rms_norm bwd",
        lambda: ours.launch_add_rms_norm_bwd(h, x, h, y, w, None, 1e-6, 0.0, fp32, False, False),
    )
    yield (
        "add_rms_norm bwd post",
        lambda: ours.launch_add_rms_norm_bwd(h, x, h, y, w, w, 1e-6, 1.0, fp32, True, True),
    )
    yield "rope", lambda: rope.launch_rope(keys, table, table, False)
    yield "norm_rope", lambda: norm_rope.launch_norm_rope(keys, table, table, head_weight, 1e-6, 0.0)
    yield (
        "norm_rope bwd",
        lambda: norm_rope.launch_norm_rope_bwd(keys, keys, table, table, head_weight, 1e-6, 0.0, True),
    )
    yield "swiglu", lambda: swiglu.launch_swiglu(gate_up, "silu")
    yield "swiglu bwd", lambda: swiglu.launch_swiglu_bwd(meta(T, F), gate_up, "silu")
    yield "geglu", lambda: swiglu.launch_swiglu(gate_up, "gelu_tanh")
    yield "geglu bwd", lambda: swiglu.launch_swiglu_bwd(meta(T, F), gate_up, "gelu_tanh")
    for mode, post in (("mean", None), ("last", w)):
        facts = y, post, w, spans, None, 1e-6, 0.0, mode
        yield f"mean_pool {mode}", partial(mean_pool_fwd.launch_mean_pool, h, *facts, D, True, 2048)
        yield f"mean_pool bwd {mode}", partial(mean_pool_bwd.launch_mean_pool_bwd, pooled, h, *facts, False, False)


def cases(target: Target) -> Iterator[Case]:
    """All cases of a target; by default options of attention on Hopper alone, and the other ops on three targets."""
    main = target.name == "sm_90"
    for K in HEADS:
        for name, options in OPTIONS.items():
            if options.get("rotate") and K > attention.MAX_ROTATED_HEAD:
                continue
            run = partial(_attention, target, K, torch.bfloat16, options)
            common = (K in (64, 128, 256) and name == "plain") or (main and K in (64, 128))
            specialised = main and K in (64, 128) and name in ("plain", "rotation", "rotation, norms")
            forward, backward = (SPECIALISED, BACKWARD_SPECIALISED) if specialised else (FORWARD, BACKWARD)
            yield Case(f"attention {K} {name}", run, frozenset(forward), extra=not common)
            if name in ("queries", "rotation, norms"):
                continue  # neither has a backward of its own
            yield Case(f"attention bwd {K} {name}", partial(run, True), frozenset(backward), extra=not common)
    for name, (sizes, options) in TOGETHER.items():
        for K in sizes:
            run = partial(_attention, target, K, torch.bfloat16, options)
            extra = not main or K < 128 or name == "rotation, window"  # compiled much as with a causal mask
            yield Case(f"attention {K} {name}", run, frozenset(FORWARD), extra=extra)
            yield Case(f"attention bwd {K} {name}", partial(run, True), frozenset(BACKWARD), extra=extra)
    for K in (64, 128, 256):
        run = partial(_attention, target, K, torch.float32, {})
        yield Case(f"attention {K} fp32", run, frozenset(FORWARD), extra=K != 64)
    near = target.name in ("sm_89", "sm_100", "sm_120")  # beside attention they get what sm_80 and sm_90 get
    nce = frozenset({"_info_nce_fwd_kernel", "_info_nce_bwd_kernel"})
    yield Case("info_nce 1024", partial(_info_nce, 1024, [1024], False), nce, extra=near)
    yield Case("info_nce 4096 ids, prefixes", partial(_info_nce, 4096, [64, 256, 1024, 4096], True), nce, extra=True)
    head = frozenset({"_cross_entropy_fwd_kernel", "_cross_entropy_bwd_kernel", "_panel_product_kernel"})
    yield Case("cross_entropy 4096", partial(_cross_entropy, 16_384, 4096, 128_256, 0.0, False), head, extra=near)
    yield Case("cross_entropy 576", partial(_cross_entropy, 2048, 576, 49_152, 30.0, True), head, extra=True)
    yield Case("lora 4096", partial(_lora, 8192, 4096, [4096, 1024, 1024], 16, False), LOW_RANK, extra=True)
    yield Case("lora 4096 dropout", partial(_lora, 8192, 4096, [4096, 1024, 1024], 16, True), LOW_RANK, extra=near)
    yield Case("lora 576 dropout", partial(_lora, 8192, 576, [1536, 1536], 16, True), LOW_RANK, extra=True)
    for R in (64, 128):
        yield Case(f"lora 4096 rank {R}", partial(_lora, 8192, 4096, [4096], R, True), LOW_RANK, extra=True)
    for model, sizes in (("llama 8b", (4096, 14336, 32, 8, 128)), ("gemma 270m", (640, 2048, 4, 1, 256))):
        for name, launch_op in _row_ops(*sizes):
            yield Case(f"{name}, {model}", launch_op, extra=near or model != "llama 8b")
