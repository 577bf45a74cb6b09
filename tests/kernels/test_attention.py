import pytest
import torch
from compare import assert_as_close_as_torch, wider

from flashvec.kernels import attention as module
from flashvec.kernels.attention import attention, attention_reference
from flashvec.kernels.schedule import build_schedule

LENGTHS = [[1], [5, 5, 5, 2], [40, 33, 33, 1]]
MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": 3},
    "window 0": {"window": 0},
    "causal window": {"causal": True, "window": 3},
    "softcap": {"softcap": 0.7},
    "softcap causal window": {"softcap": 0.7, "causal": True, "window": 3},
}


def heads(lengths, H, G, K, dtype, device, rows=None):
    schedule = build_schedule(lengths, rows, device)
    merged = torch.randn(len(schedule.positions), H + 2 * G, K, dtype=dtype, device=device)
    return *merged.split([H, G, G], 1), schedule


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [(4, 4, 8), (6, 2, 20), (3, 1, 64)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_matches_reference(lengths, shape, mask, dtype, device):
    q, k, v, schedule = heads(lengths, *shape, dtype, device)
    got = attention(q, k, v, schedule, scale=0.3, **MASKS[mask])
    truth = attention_reference(*(x.to(wider(dtype)) for x in (q, k, v)), schedule, scale=0.3, **MASKS[mask])
    same = attention_reference(q, k, v, schedule, scale=0.3, **MASKS[mask])
    assert_as_close_as_torch(got, same, truth)


@pytest.mark.parametrize("mask", ["window", "causal window", "softcap causal window"])
def test_long_sequences_run_in_blocks_of_queries(mask, monkeypatch, device):
    monkeypatch.setattr(module, "QUERY_BLOCK", 16)
    q, k, v, schedule = heads([50, 50, 17, 16], 4, 2, 8, torch.float32, device)
    got = attention(q, k, v, schedule, scale=0.3, **MASKS[mask])
    want = attention_reference(q, k, v, schedule, scale=0.3, **MASKS[mask])
    torch.testing.assert_close(got, want)


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
    alone = attention(q[own], k[own], v[own], build_schedule([length]), scale=0.125, **MASKS[mask])
    assert torch.equal(together[own], alone)


def test_filling_rows_come_back_zero(device):
    q, k, v, schedule = heads([3, 2], 2, 2, 8, torch.float32, device, rows=16)
    assert not attention(q, k, v, schedule, scale=1.0)[5:].any()


def test_rejects(device):
    q, k, v, schedule = heads([3], 3, 2, 8, torch.float32, device)
    with pytest.raises(ValueError, match="do not fit"):
        attention(q, k, v, schedule, scale=1.0)
    with pytest.raises(ValueError, match="got -1"):
        attention(k, k, v, schedule, scale=1.0, window=-1)
