import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from compare import assert_as_close_as_torch, enough, wider
from gradients import heads_far_apart
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashvec.kernels import attention_cpu as cpu
from flashvec.kernels import backend
from flashvec.kernels.attention import Rotation, attention, attention_reference, rotate
from flashvec.kernels.attention_fwd import attention_op
from flashvec.kernels.attention_tiles import forward_configs, head_chunks, packed_heads
from flashvec.kernels.dropout import Dropout
from flashvec.kernels.schedule import build_schedule, select_queries

LENGTHS = [[1], [5, 5, 5, 2], [40, 33, 33, 1]]
MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": 3},
    "window 0": {"window": 0},
    "window of two sizes": {"window": (2, 5)},
    "causal window": {"causal": True, "window": 3},
    "softcap": {"softcap": 0.7},
    "softcap causal window": {"softcap": 0.7, "causal": True, "window": 3},
}


def heads(lengths, H, G, K, dtype, device, rows=None):
    schedule = build_schedule(lengths, rows, device, identities=range(7, 7 + len(lengths)))
    merged = torch.randn(len(schedule.positions), H + 2 * G, K, dtype=dtype, device=device)
    return *merged.split([H, G, G], 1), schedule


def assert_matches_reference(q, k, v, schedule, **options):
    got = attention(q, k, v, schedule, scale=0.3, **options)
    if rotation := options.pop("rotation", None):
        q, k = rotate(q, k, rotation)
    same, _ = attention_reference(q, k, v, schedule, scale=0.3, **options)
    truth, _ = attention_reference(*(x.to(wider(q.dtype)) for x in (q, k, v)), schedule, scale=0.3, **options)
    assert_as_close_as_torch(got, same, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [(4, 4, 8), (6, 2, 20), (3, 1, 64)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_matches_reference(lengths, shape, mask, dtype, device):
    assert_matches_reference(*heads(lengths, *shape, dtype, device), **MASKS[mask])


@pytest.mark.parametrize("mask", ["window", "window of two sizes", "causal window", "softcap causal window"])
def test_long_sequences_run_in_blocks_of_queries(mask, monkeypatch, device):
    monkeypatch.setattr(cpu, "QUERY_BLOCK", 16)
    assert_matches_reference(*heads([50, 50, 17, 16], 4, 2, 8, torch.float32, device), **MASKS[mask])


# --- the Triton kernel ----------------------------------------------------------------------------------

EDGES = [1, 0, 2, 63, 64, 65, 127, 128, 129]  # around the classes of lengths and the tiles of 64 and 128 keys
HALVES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])


@pytest.fixture
def kernel_ran(interpreted):
    """Fails a test in which the kernel was not launched."""
    names = ("_attention_fwd_kernel", "_attention_fwd_hopper_kernel")
    before = sum(backend.launches[name] for name in names)
    yield
    assert sum(backend.launches[name] for name in names) > before


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mask", MASKS)
def test_kernel_masks(mask, dtype, device, kernel_ran):
    assert_matches_reference(*heads([5, 150, 70], 4, 2, 16, dtype, device), **MASKS[mask])


@pytest.mark.parametrize("window", [40, 64, (100, 10), (0, 90), 2**31 - 1], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_kernel_windows_wider_than_a_tile(window, causal, device, kernel_ran):
    if causal and isinstance(window, tuple):
        window = (window[0], 0)
    q, k, v, schedule = heads([300], 2, 1, 16, torch.float32, device)
    assert_matches_reference(q, k, v, schedule, causal=causal, window=window)


@pytest.mark.parametrize("shape", [(2, 2, 64), (8, 2, 80), (7, 1, 96), (3, 3, 8), (40, 2, 16), (2, 1, 128)], ids=str)
def test_kernel_head_counts_and_sizes(shape, device, kernel_ran):
    assert_matches_reference(*heads([1, 70, 17], *shape, torch.float32, device))


def test_kernel_lengths_at_tile_edges(device, kernel_ran):
    assert_matches_reference(*heads(EDGES, 4, 1, 16, torch.float16, device))
    assert_matches_reference(*heads(EDGES, 2, 1, 256, torch.float16, device))


def test_kernel_one_long_among_many_short(device, kernel_ran):
    assert_matches_reference(*heads([700] + [3] * 60, 2, 1, 16, torch.float32, device))


def rotation_for(schedule, K, norm, device):
    angle = torch.randn(len(schedule.positions), K // 2, device=device) * 3
    query_norm, key_norm = (torch.randn(2, K, device=device)) if norm else (None, None)
    return Rotation(angle.cos(), angle.sin(), query_norm, key_norm, norm_eps=1e-2, norm_offset=1.0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("K", [16, 24, 80, 128])
def test_kernel_rotates_and_normalises(K, norm, dtype, device, kernel_ran):
    q, k, v, schedule = heads([1, 20, 70], 4, 2, K, dtype, device)
    assert_matches_reference(q, k, v, schedule, rotation=rotation_for(schedule, K, norm, device))


@pytest.mark.parametrize("lengths", [[1, 40, 70], [200]], ids=str)
def test_kernel_drops_what_the_reference_drops(lengths, device, kernel_ran):
    q, k, v, schedule = heads(lengths, 4, 2, 16, torch.float32, device)
    assert_matches_reference(q, k, v, schedule, dropout=Dropout(0.3, seed=5, step=1, site=2))


def test_kernel_gives_a_sequence_the_same_bits_in_any_batch(device, kernel_ran):
    lengths, dropout = [3, 150, 64, 65, 1], Dropout(0.2, seed=1)
    q, k, v, schedule = heads(lengths, 4, 2, 16, torch.float16, device)
    together = attention(q, k, v, schedule, scale=0.3, window=50, dropout=dropout).split(lengths)
    order = [4, 1, 0, 3, 2]
    q, k, v = (torch.cat([x.split(lengths)[i] for i in order]) for x in (q, k, v))
    shuffled = build_schedule([lengths[i] for i in order], device=device, identities=[7 + i for i in order])
    apart = attention(q, k, v, shuffled, scale=0.3, window=50, dropout=dropout)
    for i, part in zip(order, apart.split([lengths[i] for i in order]), strict=True):
        assert torch.equal(part, together[i])


def test_kernel_does_not_read_neighbours_or_filling_rows(device, kernel_ran):
    q, k, v, schedule = heads([5, 70, 3], 2, 1, 16, torch.float32, device, rows=96)
    want = attention(q, k, v, schedule, scale=0.3)
    for x in (q, k, v):
        x[:5] = x[75:] = math.nan
    got = attention(q, k, v, schedule, scale=0.3)
    assert torch.equal(got[5:75], want[5:75]) and not got[78:].any()


@pytest.mark.parametrize("rotate_", [False, True])
def test_kernel_reads_query_heads_past_2_31_elements(rotate_, device, kernel_ran):
    q, k, v, schedule = heads([3, 20], 3, 1, 16, torch.float32, device)
    rotation = rotation_for(schedule, 16, False, device) if rotate_ else None
    want = attention(q, k, v, schedule, scale=0.3, rotation=rotation)
    assert torch.equal(attention(heads_far_apart(q), k, v, schedule, scale=0.3, rotation=rotation), want)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=4),
    heads_=st.sampled_from([(1, 1), (4, 1), (6, 2), (5, 5)]),
    K=st.integers(1, 40),
    left=st.none() | st.integers(0, 150),
    right=st.none() | st.integers(0, 150),
)
def test_kernel_shapes(lengths, heads_, K, left, right, device, interpreted):
    q, k, v, schedule = heads(enough(lengths, heads_[1] * K), *heads_, K, torch.float32, device)
    if len(q):
        assert_matches_reference(q, k, v, schedule, window=(left, right))


def test_kernel_is_a_well_behaved_torch_op(device, interpreted):
    q, k, v, schedule = heads([2, 20], 2, 1, 16, torch.float32, device)
    configs = forward_configs(backend.target(q), q.dtype, 16, 2, False)
    tiles = [schedule.tiles(config.tile_class) for config in configs]
    arguments = (q, k, v, None, tiles, [], 22, None, None, None, 0.0, 0.0, None, None, 0.3, -1, -1, 0.0, 0, 0, 0)
    torch.library.opcheck(attention_op, arguments)


SPANS = [(2, 3), (0, 150), (0, 0), (69, 70), (0, 1)]  # of lengths 5, 150, 4, 70, 64


def selected(device, dtype=torch.float32, rotate_=False, **options):
    """Attention of selected rows, and of the same rows among all, by the reference in `dtype` and wider."""
    q, k, v, schedule = heads([5, 150, 4, 70, 64], 4, 2, 16, dtype, device, rows=300)
    queries = select_queries(schedule, np.array(SPANS), num_rows=160)
    rows = [start + i for start, (a, b) in zip([0, 5, 155, 159, 229], SPANS, strict=True) for i in range(a, b)]
    assert queries.rows.tolist() == rows + [0] * (160 - len(rows))
    rotation = rotation_for(schedule, 16, True, device) if rotate_ else None
    got = attention(q[queries.rows], k, v, schedule, scale=0.3, queries=queries, rotation=rotation, **options)
    assert got.shape == (160, 4, 16) and not got[len(rows) :].any()
    if rotation:
        q, k = rotate(q, k, rotation)
    same, truth = (
        attention_reference(*(x.to(d) for x in (q, k, v)), schedule, scale=0.3, **options)[0]
        for d in (dtype, wider(dtype))
    )
    return got[: len(rows)], same[rows], truth[rows]


@pytest.mark.parametrize("options", [{}, {"window": 20}, {"causal": True}, {"rotate_": True}], ids=str)
def test_selected_queries_are_rows_of_the_whole(options, device):
    assert_as_close_as_torch(*selected(device, **options))


@pytest.mark.parametrize("options", [{}, {"window": 20}, {"dropout": Dropout(0.3, seed=1)}, {"rotate_": True}], ids=str)
def test_kernel_runs_selected_queries_alone(options, device, kernel_ran):
    assert_as_close_as_torch(*selected(device, **options))


def test_heads_are_packed_by_divisors():
    assert [packed_heads(*counts) for counts in [(32, 8), (9, 3), (14, 2), (4, 4), (64, 1), (40, 2)]] == [
        *[4, 3, 7, 1, 16, 10]
    ]


def test_head_chunks_are_powers_of_two():
    sizes = [1, 8, 16, 20, 64, 72, 80, 96, 104, 128, 256]
    assert [head_chunks(K) for K in sizes] == [
        *[(16, 0), (16, 0), (16, 0), (16, 16), (64, 0), (64, 16), (64, 16), (64, 32), (64, 64), (128, 0), (256, 0)]
    ]


@pytest.mark.parametrize("name", ["sm_90", "sm_100"])
def test_heads_of_two_chunks_are_walked_in_a_loop_where_tiles_of_all_keys_read_out_of_bounds(name):
    for K in (72, 80, 96, 160, 192):
        (config,) = forward_configs(backend.TARGETS[name], torch.bfloat16, K, 1, False)
        assert not config.one_tile and config.tile_class.shorter == 0 and config.tile_class.longest is None


# --- both -------------------------------------------------------------------------------------------------


def test_definition(device):
    """One head of size 1: weights are exp(q k scale), so the result is their weighted mean of v."""
    schedule = build_schedule([2], device=device)
    q, k, v = (torch.tensor(x, device=device).view(2, 1, 1) for x in ([1.0, 2.0], [0.5, -1.0], [3.0, 7.0]))
    weight = torch.exp(torch.tensor([2 * 0.5 * 0.1, 2 * -1.0 * 0.1], device=device))
    want = (weight * torch.tensor([3.0, 7.0], device=device)).sum() / weight.sum()
    torch.testing.assert_close(attention(q, k, v, schedule, scale=0.1)[1, 0, 0], want)


def test_neighbours_are_invisible(device):
    q, k, v, schedule = heads([6, 6, 3], 2, 1, 8, torch.float32, device)
    before = attention(q, k, v, schedule, scale=1.0)
    k[6:12], v[6:12] = 100.0, -100.0
    after = attention(q, k, v, schedule, scale=1.0)
    assert torch.equal(before[:6], after[:6]) and torch.equal(before[12:], after[12:])
    assert not torch.equal(before[6:12], after[6:12])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("K", [8, 64])
@pytest.mark.parametrize("length", [1, 19, 33, 130, 257])
def test_same_bits_alone_and_in_a_group(length, K, mask, dtype, device):
    q, k, v, schedule = heads([length] * 5, 6, 2, K, dtype, device)
    together = attention(q, k, v, schedule, scale=0.125, **MASKS[mask])
    own = slice(2 * length, 3 * length)
    alone = attention(q[own], k[own], v[own], build_schedule([length], device=device), scale=0.125, **MASKS[mask])
    assert torch.equal(together[own], alone)


def test_filling_rows_come_back_zero(device):
    q, k, v, schedule = heads([3, 2], 2, 2, 8, torch.float32, device, rows=16)
    assert not attention(q, k, v, schedule, scale=1.0)[5:].any()


@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_kernel_differentiates_past_head_norms_whichever_gradient_is_wanted(wanted, device, interpreted):
    q, k, v, schedule = heads([3, 20], 2, 1, 16, torch.float32, device)
    rotation = rotation_for(schedule, 16, True, device)
    leaf = {"q": q, "k": k, "v": v}[wanted].clone().requires_grad_()
    tensors = {"q": q, "k": k, "v": v, wanted: leaf}
    out = attention(*tensors.values(), schedule, scale=0.3, rotation=rotation)
    want, _ = attention_reference(*rotate(tensors["q"], tensors["k"], rotation), tensors["v"], schedule, scale=0.3)
    dout = torch.randn_like(out)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaf, dout)[0] for x in (out, want)))


def test_rejects_head_norms_that_do_not_fit(device, interpreted):
    q, k, v, schedule = heads([3], 2, 1, 16, torch.float32, device)
    good = rotation_for(schedule, 16, True, device)
    short, other = good.query_norm_K[:8], good.query_norm_K.to("meta")
    for change, message in [
        ({"query_norm_K": short}, r"query_norm_K is \(8,\), .* 16 elements"),
        ({"key_norm_K": short}, r"key_norm_K is \(8,\)"),
        ({"query_norm_K": other}, "query_norm_K is on meta"),
        ({"query_norm_K": None}, "both or neither"),
        ({"key_norm_K": None}, "both or neither"),
    ]:
        with pytest.raises(ValueError, match=message):
            attention(q, k, v, schedule, scale=0.3, rotation=replace(good, **change))


def test_rejects(device):
    q, k, v, schedule = heads([3], 3, 2, 8, torch.float32, device)
    with pytest.raises(ValueError, match="do not fit"):
        attention(q, k, v, schedule, scale=1.0)
    for options, message in [
        ({"window": -1}, "got -1"),
        ({"window": (2, -3)}, r"got \(2, -3\)"),
        ({"window": [3, 0]}, r"a whole number or a tuple of two, got \[3, 0\]"),
        ({"window": (3,)}, r"got \(3,\)"),
        ({"window": True}, "got True"),
        ({"window": 2.5}, "got 2.5"),
        ({"queries": select_queries(build_schedule([1, 2]), np.array([[0, 1], [0, 2]]))}, r"texts of \(1, 2\) tokens"),
        ({"window": (2, 3), "causal": True}, r"window is \(2, 3\); use \(2, 0\)"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"softcap": -1.0}, "softcap is -1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            attention(k, k, v, schedule, **{"scale": 1.0, **options})
    for bounds in (schedule.cu_seqlens, [0, 3]):
        with pytest.raises(TypeError, match=r"schedule is \w+: build_schedule\(lengths, device=\.\.\.\) makes one"):
            attention(k, k, v, bounds, scale=1.0)
    with pytest.raises(ValueError, match="int32"):
        attention(*(x.int() for x in (k, k, v)), schedule, scale=1.0)
    with pytest.raises(ValueError, match="float16"):
        attention(k, k.half(), v, schedule, scale=1.0)
    for rank in (k[0], k[None]):
        with pytest.raises(ValueError, match=r"batch of 3 rows: q_THK \((1, 3, )?2, 8\)"):
            attention(rank, k, v, schedule, scale=1.0)
        with pytest.raises(ValueError, match="v_TGK does not fit"):
            attention(k, k, rank, schedule, scale=1.0)
    for place in range(3):
        tensors = [x.to("meta") if i == place else x for i, x in enumerate((k, k, v))]
        with pytest.raises(ValueError, match=f"is on meta, the schedule on {device}"):
            attention(*tensors, schedule, scale=1.0)
    with pytest.raises(ValueError, match="batch of 3 rows"):
        attention(k[:2], k[:2], v[:2], schedule, scale=1.0)
    with pytest.raises(ValueError, match="contiguous"):
        attention(*(x.transpose(1, 2) for x in (k[:, :, :2], k[:, :, :2], v[:, :, :2])), schedule, scale=1.0)
    big = torch.zeros(3, 1, 257, device=device)
    with pytest.raises(ValueError, match="head size is 257"):
        attention(big, big, big, schedule, scale=1.0)
    with pytest.raises(ValueError, match="identities"):
        attention(k, k, v, build_schedule([3], device=device), scale=1.0, dropout=Dropout(0.5, seed=0))
    with pytest.raises(ValueError, match="do not fit"):
        attention(q[:, :0], k, v, schedule, scale=1.0)  # no heads


def test_the_reference_of_nothing_keeps_its_precision():
    nothing = torch.zeros(3, 2, 8, dtype=torch.bfloat16)
    out, lse = attention_reference(nothing, nothing, nothing, build_schedule([], 3), scale=1.0)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


def test_a_single_element_has_no_stride(device, interpreted):
    q, k, v, schedule = heads([5], 2, 1, 8, torch.float32, device)
    plain = [x[..., 3:4].contiguous() for x in (q, k, v)]
    strided = [x.as_strided(x.shape, (*x.stride()[:2], 7)) for x in plain]
    torch.testing.assert_close(attention(*strided, schedule, scale=1.0), attention(*plain, schedule, scale=1.0))
