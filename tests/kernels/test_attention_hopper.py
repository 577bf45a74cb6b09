"""Attention's specialised kernels, emulated: right, and their barriers are, whatever the order in which warps run."""

import math
from pathlib import Path

import pytest
import torch
from gluon_emulated import emulated

from flashvec.kernels import (
    attention_hopper,
    attention_hopper_bwd,
    attention_hopper_dkv,
    attention_hopper_dq,
    attention_hopper_parts,
    backend,
)
from flashvec.kernels.attention import attention, attention_reference
from flashvec.kernels.attention_tiles import backward_configs, forward_configs, packed_heads
from flashvec.kernels.backend import TARGETS
from flashvec.kernels.norm_rope import norm_rope_reference
from flashvec.kernels.rope import rope_reference
from flashvec.kernels.schedule import TileClass, build_schedule

HOPPER = TARGETS["sm_90"]
LENGTHS = (70, 1, 0, 150, 64, 129, 257)
NAN = 3  # the sequence that is NaN: its neighbours must not notice
CASES = [  # head size, query heads, kv heads, rotation
    *((K, 4, 2, rotation) for K in (64, 128) for rotation in ("none", "rope", "norms")),
    (64, 7, 1, "rope"),  # packed heads that do not divide a tile
    (128, 2, 2, "none"),
]


class Problem:
    """Tensors of a batch in fp32, slices of a merged product, with rows of filling behind."""

    def __init__(self, K, H, G, rotation, lengths=LENGTHS):
        torch.manual_seed(K + H)
        self.T, self.lengths, self.packed, self.scale = sum(lengths) + 3, lengths, packed_heads(H, G), K**-0.5
        self.schedule = build_schedule(lengths, self.T)
        self.q, self.k, self.v = torch.randn(self.T, H + 2 * G, K).split([H, G, G], 1)
        self.cos = self.sin = self.norm = None
        if rotation != "none":
            angle = torch.randn(self.T, K // 2)
            self.cos, self.sin = angle.cos(), angle.sin()
        if rotation == "norms":
            self.norm = torch.rand(K) + 0.5

    @property
    def own(self):
        """Rows that must be right: not the filling, not the NaN sequence."""
        start = sum(self.lengths[:NAN])
        rows = torch.arange(sum(self.lengths))
        return rows[(rows < start) | (rows >= start + self.lengths[NAN])]

    def poison(self, *tensors):
        start = sum(self.lengths[:NAN])
        for x in tensors:
            x[start : start + self.lengths[NAN]] = math.nan

    def rotated(self, q):
        if self.norm is not None:
            return norm_rope_reference(q, self.cos, self.sin, self.norm, 1e-6, 1.0)
        return q if self.cos is None else rope_reference(q, self.cos, self.sin)


@pytest.mark.parametrize(("case", "seed"), [*((case, 0) for case in CASES), (CASES[1], 1), (CASES[1], 2)], ids=str)
def test_forward(case, seed):
    p = Problem(*case)
    expected, lse = attention_reference(p.rotated(p.q), p.k, p.v, p.schedule, scale=p.scale)
    p.poison(p.q, p.k, p.v)
    got, got_lse = torch.full(p.q.shape, math.nan), torch.full((p.q.shape[1], p.T), math.nan)
    configs = forward_configs(HOPPER, torch.bfloat16, case[0], p.packed, case[3] != "none", True)
    with emulated(seed=seed) as modules:
        for config in configs:
            modules.attention_hopper.launch_attention_hopper(
                *(config, p.q, p.k, p.v, got, got_lse, p.schedule.tiles(config.tile_class), p.packed),
                *(p.cos, p.sin, p.norm, 1e-6, 1.0, p.scale),
            )
    torch.testing.assert_close(got[p.own], expected[p.own], rtol=0, atol=2e-6)
    torch.testing.assert_close(got_lse[:, p.own] * math.log(2), lse[:, p.own], rtol=0, atol=4e-6)
    assert got[sum(p.lengths) :].isnan().all()  # rows of no sequence are not touched


PLAIN = [case for case in CASES if case[3] != "norms"]  # attention has no gradient through head norms


@pytest.mark.parametrize(("case", "seed"), [*((case, 0) for case in PLAIN), (PLAIN[1], 1), (PLAIN[1], 2)], ids=str)
def test_backward(case, seed):
    p = Problem(*case)
    q, k, v = (x.clone().requires_grad_() for x in (p.q, p.k, p.v))
    turned = (q, k) if p.cos is None else (rope_reference(x, p.cos, p.sin) for x in (q, k))
    out, lse = attention_reference(*turned, v, p.schedule, scale=p.scale)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v), dout)
    keys = p.k if p.cos is None else rope_reference(p.k, p.cos, p.sin)
    out, lse = out.detach(), (lse.detach() / math.log(2)).contiguous()
    p.poison(p.q, keys, p.v, out, dout)
    got = [torch.full(x.shape, math.nan) for x in (p.q, p.k, p.v)]
    delta, rotated = torch.full_like(lse, math.nan), None if p.cos is None else torch.full(p.q.shape, math.nan)
    configs = backward_configs(HOPPER, torch.bfloat16, case[0], p.packed, p.cos is not None, False, False, False, True)
    dq, dkv = configs[-2:]
    assert (dq.form, dkv.form) == ("dq", "dkv") and dq.ring and dkv.ring
    tiles = [p.schedule.tiles(TileClass(config.tile_class.tokens)) for config in (dq, dkv)]  # short ones, too
    with emulated(seed=seed) as modules:
        for config, tile_list in zip((dq, dkv), tiles, strict=True):
            modules.attention_hopper_bwd.launch_attention_hopper_bwd(
                *(config, dout, p.q, keys, p.v, out, lse, delta, got, rotated, tile_list, p.packed),
                *(p.cos, p.sin, p.scale),
            )
    for name, a, b in zip(("dq", "dk", "dv"), got, expected, strict=True):
        torch.testing.assert_close(a[p.own], b[p.own], rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_filling_tiles_are_passed_over():
    p = Problem(64, 2, 1, "none", (40, 7, 0, 5))
    static = build_schedule(p.lengths, p.T, is_static=True)
    got, lse = torch.full(p.q.shape, math.nan), torch.full((2, p.T), math.nan)
    configs = forward_configs(HOPPER, torch.bfloat16, 64, 2, False, True)
    with emulated(num_multiprocessors=2) as modules:
        for config in configs:
            tiles = static.tiles(config.tile_class)
            assert (tiles[:, 3] < 0).any()
            modules.attention_hopper.launch_attention_hopper(
                *(config, p.q, p.k, p.v, got, lse, tiles, 2, None, None, None, 0.0, 0.0, p.scale)
            )
    expected, _ = attention_reference(p.q, p.k, p.v, p.schedule, scale=p.scale)
    torch.testing.assert_close(got[:52], expected[:52], rtol=0, atol=2e-6)


# --- the emulation finds what it promises to find ----------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        # a slot is given back before the product that reads it is done
        (
            "                s = warpgroup_mma_wait(1, deps=[s])\n"
            "                mbarrier.arrive(empty.index(k_fill % RING), count=1)\n",
            "                mbarrier.arrive(empty.index(k_fill % RING), count=1)\n"
            "                mbarrier.arrive(empty.index(v_fill % RING), count=1)\n"
            "                s = warpgroup_mma_wait(1, deps=[s])\n",
            None,
        ),
        # a slot is never given back
        ("            mbarrier.arrive(empty.index(fill % RING), count=1)\n", "", "wait for each other"),
    ],
    ids=["given back too early", "never given back"],
)
def test_wrong_barriers_are_found(before, after, message):
    source = Path(attention_hopper.__file__).read_text()
    assert source.count(before) == 1
    p = Problem(64, 4, 2, "none", (600, 300, 0, 0))
    got, lse = torch.zeros(p.q.shape), torch.zeros(4, p.T)
    (config,) = (c for c in forward_configs(HOPPER, torch.bfloat16, 64, 2, False, True) if c.tile_class.longest is None)
    with emulated(num_multiprocessors=1) as modules:
        exec(compile(source.replace(before, after), "changed", "exec"), modules.attention_hopper.__dict__)
        call = modules.attention_hopper.launch_attention_hopper
        arguments = (
            config,
            p.q,
            p.k,
            p.v,
            got,
            lse,
            p.schedule.tiles(TileClass(64)),
            2,
            *[None] * 3,
            0.0,
            0.0,
            p.scale,
        )
        if message is None:
            try:
                call(*arguments)
            except AssertionError:
                return
            assert not got[:900].isfinite().all()
        else:
            with pytest.raises(AssertionError, match=message):
                call(*arguments)


def test_what_no_fence_shows_is_found():
    p = Problem(64, 4, 2, "rope", (40, 30, 0, 0))
    out, lse = torch.zeros(p.q.shape), torch.zeros(4, p.T)
    config = forward_configs(HOPPER, torch.bfloat16, 64, 2, True, True)[0]
    arguments = (config, p.q, p.k, p.v, out, lse, p.schedule.tiles(config.tile_class), 2, p.cos, p.sin, None)
    with emulated() as modules:
        parts = modules.attention_hopper_parts
        parts.hopper = type("NoFence", (), {**vars(parts.hopper), "fence_async_shared": staticmethod(lambda: None)})
        with pytest.raises(AssertionError, match="no fence"):
            modules.attention_hopper.launch_attention_hopper(*arguments, 0.0, 0.0, p.scale)


# --- who runs them ------------------------------------------------------------------------------------------


def test_what_they_take():
    q, k, v = torch.empty(10, 8, 64, dtype=torch.bfloat16).split([4, 2, 2], 1)
    takes = attention_hopper.takes
    assert takes(q, k, v, False, False)
    assert not takes(q, k, v, False, True)
    assert not takes(q.float(), k.float(), v.float())
    assert not takes(q, k, torch.empty(10, 2, 72, dtype=torch.bfloat16)[..., 8:])  # heads with gaps between them
    assert not takes(*(x[..., 1:] for x in (q, k, v)))  # not aligned
    assert not takes(q, k, v[:1].expand_as(v))
    for num_tokens, fits in ((2**23, False), (2**22, True)):  # each head's tokens in a place of their own
        heads_TK = torch.empty(4, num_tokens, 64, dtype=torch.bfloat16, device="meta").transpose(0, 1)
        assert takes(heads_TK, k, v) == fits
    for num_tokens, fits in ((2**16 + 8, False), (2**16 - 8, True)):  # one text may have them all
        rows_HK = torch.empty(num_tokens, 2**15, dtype=torch.bfloat16, device="meta")[:, :256].unflatten(1, (4, 64))
        assert takes(rows_HK, k, v) == takes(q, rows_HK[:, :2], v) == takes(q, k, rows_HK[:, :2]) == fits
    one_row = torch.empty(128, 128, dtype=torch.bfloat16, device="meta").expand(2**17, 128, 128)
    assert not takes(one_row, k, v)  # the output's rows lie apart
    turned = torch.empty(4, 10, 64, dtype=torch.bfloat16).transpose(0, 1)
    assert takes(turned, k, v) and not attention_hopper_bwd.takes(turned, k, v, False)
    assert attention_hopper_bwd.takes(turned, k, v, True)
    spread = torch.empty(10, 2, 2, 64, dtype=torch.bfloat16)[:, :, 0]
    assert not attention_hopper_bwd.takes(q, spread, v, False) and attention_hopper_bwd.takes(q, spread, v, True)


def test_they_run_on_hopper_alone(interpreted):
    q, k, v = torch.randn(10, 8, 64).half().split([4, 2, 2], 1)
    assert not attention_hopper.takes(q, k, v), "the interpreter runs Triton's own kernels"
    schedule = build_schedule((4, 6))
    before = backend.launches.copy()
    attention(q, k, v, schedule, scale=0.125)
    assert set(backend.launches - before) == {"_attention_fwd_kernel"}
    for name, target in TARGETS.items():
        configs = forward_configs(target, torch.bfloat16, 128, 4, False, True)
        assert any(c.ring for c in configs) == (name == "sm_90")
        assert all(c.rows == 64 * attention_hopper_parts.GROUPS.value for c in configs if c.ring)
        assert not any(c.ring for c in forward_configs(target, torch.bfloat16, 96, 4, False, True))


@pytest.mark.parametrize(
    "module", [attention_hopper, attention_hopper_dq, attention_hopper_dkv], ids=lambda m: m.__name__
)
def test_warps_share_all_registers(module):
    groups = attention_hopper_parts.GROUPS.value * module.REGISTERS.value + module.COPIER_REGISTERS.value
    per_thread = HOPPER.registers // 384 // 8 * 8  # of three times four warps, allotted by eights
    assert groups == 3 * per_thread
    assert module.REGISTERS.value % 8 == module.COPIER_REGISTERS.value % 8 == 0
