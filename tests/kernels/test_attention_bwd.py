import math

import numpy as np
import pytest
import torch
from compare import assert_as_close_as_torch, enough, wider
from gradients import far_apart, heads_far_apart
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashvec.kernels import attention_bwd as bwd
from flashvec.kernels import backend
from flashvec.kernels.attention import Rotation, attention, attention_reference, rotate
from flashvec.kernels.attention_bwd import attention_bwd, backward_tiles
from flashvec.kernels.attention_bwd_kernels import _attention_bwd_dkv_kernel, _attention_bwd_dq_kernel
from flashvec.kernels.attention_fwd import attention_op
from flashvec.kernels.attention_tiles import BackwardConfig, backward_configs, forward_configs
from flashvec.kernels.dropout import Dropout
from flashvec.kernels.schedule import TileClass, build_schedule, select_queries

HALVES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": 3},
    "window of two sizes": {"window": (20, 50)},
    "window past any text": {"window": 2**31 - 1},
    "softcap causal window": {"softcap": 0.7, "causal": True, "window": 40},
}
DROPOUT = Dropout(0.3, seed=5, step=1, site=2)
DKV, DQ = _attention_bwd_dkv_kernel.__name__, _attention_bwd_dq_kernel.__name__
ON_HOPPER = {"_attention_hopper_dq_kernel": DQ, "_attention_hopper_dkv_kernel": DKV}
ONE_TILE, SPLIT = {DKV}, {DQ, DKV}


def merged_heads(lengths, H, G, K, dtype, device, filling=5):
    """One tensor of query, key and value heads, as the merged product gives them, and its schedule."""
    schedule = build_schedule(lengths, sum(lengths) + filling, device, identities=range(7, 7 + len(lengths)))
    merged = torch.randn(len(schedule.positions), H + 2 * G, K, dtype=dtype, device=device)
    return merged.requires_grad_(), (H, G, G), schedule


def rotation_for(schedule, K, device, norm=False):
    angle = torch.randn(len(schedule.positions), K // 2, device=device) * 3
    query_norm, key_norm = (torch.randn(2, K, device=device)) if norm else (None, None)
    return Rotation(angle.cos(), angle.sin(), query_norm, key_norm, norm_eps=1e-2, norm_offset=1.0)


def gradient(merged, parts, schedule, dout, **options):
    q, k, v = merged.split(parts, 1)
    return torch.autograd.grad(attention(q, k, v, schedule, scale=merged.shape[2] ** -0.5, **options), merged, dout)[0]


def reference_gradient(merged, parts, schedule, dout, dtype, rotation=None, **options):
    merged = merged.detach().to(dtype).requires_grad_()
    q, k, v = merged.split(parts, 1)
    if rotation:
        q, k = rotate(q, k, rotation)
    out, _ = attention_reference(q, k, v, schedule, scale=merged.shape[2] ** -0.5, **options)
    return torch.autograd.grad(out, merged, dout.to(dtype))[0]


def assert_matches_reference(merged, parts, schedule, kernels=None, **options):
    dout = torch.randn(len(merged), parts[0], merged.shape[2], device=merged.device).to(merged.dtype)
    before = backend.launches.copy()
    got = gradient(merged, parts, schedule, dout, **options)
    ran = {
        name for name, count in (backend.launches - before).items() if ("_bwd_" in name or name in ON_HOPPER) and count
    }
    assert ran and (kernels is None or {ON_HOPPER.get(name, name) for name in ran} == kernels)
    same = reference_gradient(merged, parts, schedule, dout, merged.dtype, **options)
    truth = reference_gradient(merged, parts, schedule, dout, wider(merged.dtype), **options)
    assert_as_close_as_torch(got, same, truth)
    if merged.dtype != torch.float32:  # there a part's few roundings differ too much by chance to be compared alone
        for part, want_same, want in zip(*(x.split(parts, 1) for x in (got, same, truth)), strict=True):
            if want.any():
                assert_as_close_as_torch(part, want_same, want)
            else:  # every query sees one key: what cancels is a sum of K products in fp32, in another order
                rounding = torch.finfo(torch.float32).eps * merged.shape[2]
                assert part.abs().max() <= rounding * dout.abs().max() * merged.abs().max()
    assert not got[schedule.num_tokens :].any()


@pytest.fixture
def small_tiles(monkeypatch, interpreted):
    """Tiles of 16 and 32 instead of the table's: short sequences reach every path, which spares the interpreter."""

    def configs(target, dtype, head_size, packed, *options):
        one_tile = [BackwardConfig("one tile", TileClass(32, 0, 32), 16, 32, 4, 1)] if head_size in (8, 16, 32) else []
        shorter = 32 if one_tile else 0
        dq = BackwardConfig("dq", TileClass(32 // packed, shorter), 32, 16, 4, 1)
        return *one_tile, dq, BackwardConfig("dkv", TileClass(16, shorter), 16, 16, 4, 1)

    monkeypatch.setattr(bwd, "backward_configs", configs)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask, dtype, device, small_tiles):
    assert_matches_reference(*merged_heads([5, 0, 30], 4, 2, 16, dtype, device), ONE_TILE, **MASKS[mask])
    assert_matches_reference(*merged_heads([50], 4, 2, 16, dtype, device), SPLIT, **MASKS[mask])


@pytest.mark.parametrize("window", [20, (0, 40), (40, 10)], ids=str)
def test_windows_wider_than_a_tile(window, device, small_tiles):
    assert_matches_reference(*merged_heads([70], 2, 1, 16, torch.float32, device), SPLIT, window=window)


@pytest.mark.parametrize(
    "shape", [(1, 1, 8), (3, 1, 64), (4, 1, 80), (7, 1, 96), (6, 2, 20), (20, 1, 16), (2, 2, 256)], ids=str
)
def test_head_counts_and_sizes(shape, device, small_tiles):
    assert_matches_reference(*merged_heads([1, 40], *shape, torch.float16, device))


@pytest.mark.parametrize("K", [64, 80, 256])
def test_head_sizes_in_full_precision(K, device, small_tiles):
    # No sequence of one token: its gradient in q and k is zero, and the rounding of dp - delta would be judged by that.
    assert_matches_reference(*merged_heads([40], 2, 1, K, torch.float32, device))


@pytest.mark.parametrize(("K", "dtype"), [(16, torch.float16), (128, torch.float16), (64, torch.float32)], ids=str)
def test_lengths_at_edges_of_classes_and_tiles(K, dtype, device, interpreted):
    """With the table's own tiles."""
    table = backward_configs(backend.target(torch.empty(0, device=device)), dtype, K, 2, False, False, False, False)
    edges = {c.tile_class.longest or c.tile_class.shorter + c.keys for c in table}
    lengths = [0, 1, 2, *(n + 1 for n in sorted(edges)), max(edges)]
    assert_matches_reference(*merged_heads(lengths, 2, 1, K, dtype, device), SPLIT)


def test_one_long_among_many_short(device, small_tiles):
    assert_matches_reference(*merged_heads([3] * 12 + [150] + [2] * 12, 2, 1, 16, torch.float32, device), SPLIT)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("K", [8, 16, 24, 80, 256])
def test_rotates_back(K, dtype, device, small_tiles):
    """In registers where the head is one power of two, else by a pass of its own."""
    merged, parts, schedule = merged_heads([1, 20, 50], 4, 2, K, dtype, device)
    assert_matches_reference(merged, parts, schedule, rotation=rotation_for(schedule, K, device))


def test_differentiates_head_norms_outside(device, small_tiles):
    merged, parts, schedule = merged_heads([1, 20], 4, 2, 16, torch.float32, device)
    assert_matches_reference(merged, parts, schedule, rotation=rotation_for(schedule, 16, device, norm=True))


@pytest.mark.parametrize("lengths", [[1, 30], [50]], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 0.7, "window": 30}], ids=str)
def test_drops_what_the_forward_dropped(options, lengths, device, small_tiles):
    assert_matches_reference(*merged_heads(lengths, 4, 2, 16, torch.float32, device), dropout=DROPOUT, **options)


def test_gives_a_sequence_the_same_bits_again_and_in_any_batch(device, small_tiles):
    lengths, options = [3, 50, 32, 33, 1], {"window": 20, "dropout": DROPOUT}
    merged, parts, schedule = merged_heads(lengths, 4, 2, 16, torch.float16, device, filling=0)
    dout = torch.randn(len(merged), 4, 16, dtype=torch.float16, device=device)
    together = gradient(merged, parts, schedule, dout, **options)
    assert torch.equal(together, gradient(merged, parts, schedule, dout, **options))
    for order in ([4, 1, 0], [3, 2]):
        apart = build_schedule([lengths[i] for i in order], device=device, identities=[7 + i for i in order])
        own, own_dout, want = (torch.cat([x.split(lengths)[i] for i in order]) for x in (merged, dout, together))
        assert torch.equal(gradient(own, parts, apart, own_dout, **options), want)


def test_does_not_read_neighbours_or_filling_rows(device, small_tiles):
    merged, parts, schedule = merged_heads([5, 20, 3, 50, 2], 2, 1, 16, torch.float16, device, filling=9)
    rotation = rotation_for(schedule, 16, device)
    dout = torch.randn(len(merged), 2, 16, dtype=torch.float16, device=device)
    want = gradient(merged, parts, schedule, dout, rotation=rotation)
    own = torch.zeros(len(merged), dtype=torch.bool, device=device)
    own[5:25] = own[28:78] = True
    merged, dout = merged.detach().clone(), dout.clone()
    merged[~own] = dout[~own] = math.nan
    got = gradient(merged.requires_grad_(), parts, schedule, dout, rotation=rotation)
    assert torch.equal(got[own], want[own]) and not got[80:].any()


def test_keys_that_do_not_exist_stay_out_where_all_scores_are_low(device, small_tiles):
    """A row's log-sum-exp is so low that exp(0 - lse) overflows for them. In halves: fp32 has few digits so low."""
    merged, parts, schedule = merged_heads([3, 50], 2, 1, 16, torch.float16, device)
    with torch.no_grad():
        merged[:, :2] += 6.0
        merged[:, 2:3] -= 6.0
    assert_matches_reference(merged, parts, schedule)


def test_queries_that_see_one_key_pull_at_nothing(device, small_tiles):
    for _ in range(8):
        assert_matches_reference(*merged_heads([1, 1, 1], 4, 1, 13, torch.float16, device))


@pytest.mark.parametrize("rotate_", [False, True])
@pytest.mark.parametrize("move", [heads_far_apart, far_apart], ids=lambda move: move.__name__)
@pytest.mark.parametrize("length", [20, 50])
def test_reads_queries_past_2_31_elements(length, move, rotate_, device, small_tiles):
    """The last of such rows is far from its own sequence's first one already."""
    merged, parts, schedule = merged_heads([length], 3, 1, 16, torch.float32, device, filling=0)
    rotation = rotation_for(schedule, 16, device) if rotate_ else None
    q, k, v = merged.detach().split(parts, 1)
    dout = torch.randn(len(merged), 3, 16, device=device)
    found = []
    for queries in (q, move(q.contiguous())):
        leaves = [x.detach().requires_grad_() for x in (queries, k, v)]
        out = attention(*leaves, schedule, scale=0.25, rotation=rotation)
        found.append(torch.autograd.grad(out, leaves, dout))
    assert all(map(torch.equal, *found))


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 2)]),
    K=st.integers(1, 20),
    left=st.none() | st.integers(0, 50),
    right=st.none() | st.integers(0, 50),
)
def test_shapes(lengths, heads, K, left, right, device, small_tiles):
    if sum(lengths):
        merged = merged_heads(enough(lengths, heads[1] * K), *heads, K, torch.float16, device)
        assert_matches_reference(*merged, window=(left, right))


@pytest.mark.parametrize(("K", "classes"), [(16, 2), (128, 3)])  # up to 64 tokens, (up to 128,) longer
def test_one_launch_for_each_class_in_the_batch(K, classes, device, interpreted):
    merged, parts, schedule = merged_heads([3, 60, 100, 300], 2, 1, K, torch.float16, device)
    dout = torch.ones(len(merged), 2, K, dtype=torch.float16, device=device)
    before = backend.launches.copy()
    gradient(merged, parts, schedule, dout, dropout=DROPOUT)
    ran = backend.launches - before
    assert ran[DQ] == 1
    assert ran[DKV] == classes


LAUNCHED = {  # and the tiles of 40 and of 300 tokens that each walks
    "interleaved": [(DKV, 1), (DQ, 5), (DKV, 5)],
    "apart": [(DKV, 1), *((name, 3) for name in ON_HOPPER)],
}


@pytest.mark.parametrize("layout", LAUNCHED)
def test_saved_tensors_of_other_strides_do_not_change_how_tiles_are_walked(layout):
    """`save_on_cpu` brings rows back contiguous; the tile lists were cut for the kernels chosen before."""
    schedule = build_schedule([40, 300])
    q, k, v = torch.randn(340, 2, 3, 64, dtype=torch.bfloat16, requires_grad=True).unbind(2)
    if layout == "apart":
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    with backend.recording(backend.TARGETS["sm_90"]) as recorder:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().contiguous(), lambda x: x):
            out = attention(q, k, v, schedule, scale=0.125)
        recorder.launches.clear()
        out.sum().backward()
    ran = [(launch.kernel.__name__, len(launch.arguments["tile_ptr"])) for launch in recorder.launches]
    assert ran == LAUNCHED[layout]


@pytest.mark.parametrize("rotate_", [False, True])
def test_is_a_well_behaved_torch_op(rotate_, device, small_tiles):
    merged, parts, schedule = merged_heads([2, 20], 2, 1, 16, torch.float32, device)
    q, k, v = (x.detach().clone().requires_grad_() for x in merged.split(parts, 1))
    configs = forward_configs(backend.target(q), q.dtype, 16, 2, False)
    tiles = [schedule.tiles(config.tile_class) for config in configs]
    later = backward_tiles(q, k, v, schedule, rotate_, False, False, False)
    table = rotation_for(schedule, 16, device).cos_TK if rotate_ else None
    rotated_k = k.detach() if rotate_ else None
    numbers = (0.3, -1, -1, 0.0, 0, 0, 0)
    torch.library.opcheck(
        attention_op, (q, k, v, rotated_k, tiles, later, 22, table, table, None, 0.0, 0.0, None, None, *numbers)
    )
    out, lse = torch.randn_like(q), torch.randn(2, 27, device=device)
    torch.library.opcheck(
        attention_bwd,
        (out, *(x.detach() for x in (q, k, v)), out, lse, later, 22, table, table, None, *numbers, False),
    )


def test_refuses_a_gradient_it_would_get_wrong(device, small_tiles):
    merged, parts, schedule = merged_heads([2], 2, 1, 16, torch.float32, device)
    q, k, v = merged.split(parts, 1)
    table = torch.ones(7, 8, device=device)
    tiles = [schedule.tiles(c.tile_class) for c in forward_configs(backend.target(merged), merged.dtype, 16, 2, False)]
    numbers = (0.3, -1, -1, 0.0, 0, 0, 0)
    norm = torch.ones(16, device=device)
    with pytest.raises(RuntimeError, match="head norms"):
        attention_op(q, k, v, k.detach(), tiles, [], 2, table, table, norm, 0.0, 0.0, None, None, *numbers)
    with pytest.raises(RuntimeError, match="rotated keys"):
        attention_op(q, k, v, None, tiles, [], 2, table, table, None, 0.0, 0.0, None, None, *numbers)


def test_selected_queries(device, small_tiles):
    """The gradient of their rows alone, whichever token the filling rows repeat."""
    merged, parts, schedule = merged_heads([5, 40], 4, 2, 16, torch.float32, device)
    queries = select_queries(schedule, np.array([[0, 2], [37, 40]]), 8)
    rotation = rotation_for(schedule, 16, device)
    dout = torch.randn(8, 4, 16, device=device)
    q, k, v = merged.split(parts, 1)
    out = attention(q[queries.rows], k, v, schedule, scale=0.25, queries=queries, rotation=rotation)
    got = torch.autograd.grad(out, merged, dout)[0]
    dout[queries.num_tokens :] = 0
    whole = torch.zeros(len(merged), 4, 16, device=device).index_add(0, queries.rows, dout)
    torch.testing.assert_close(got, gradient(merged, parts, schedule, whole, rotation=rotation))
