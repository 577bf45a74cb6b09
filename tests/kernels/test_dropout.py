"""Masks are the same words in torch and Triton, depend on nothing but their keys, and look random."""

import pytest
import torch

from flashvec.kernels import dropout
from flashvec.kernels.attention import attention_reference
from flashvec.kernels.backend import launch, tl, triton
from flashvec.kernels.dropout import (
    Dropout,
    draws_cpu,
    drop_as_cpu,
    drop_cpu,
    dropped_copy_cpu,
    fold,
    fold_reference,
    keep,
    keep_reference,
)
from flashvec.kernels.schedule import build_schedule


@triton.jit
def _keep_kernel(word_ptr, out_ptr, key_a, key_b, columns, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    a, b = fold(key_a.to(tl.uint32), key_b.to(tl.uint32), tl.load(word_ptr + row))
    kept = keep(a[:, None], b[:, None], column[None, :], threshold)
    tl.store(out_ptr + row[:, None] * columns + column[None, :], kept.to(tl.int8), mask=column[None, :] < columns)


def mask(dropout: Dropout, words: torch.Tensor, columns: int) -> torch.Tensor:
    return keep_reference(fold_reference(dropout.key(), words), columns, dropout.threshold)


@pytest.mark.parametrize("columns", [1, 17, 64, 150, 256])
def test_triton_and_torch_draw_the_same_mask(columns, device, interpreted):
    words = torch.randint(-(2**31), 2**31 - 1, (32,), dtype=torch.int32, device=device)
    words[:3] = torch.tensor([0, -1, 1])
    dropout = Dropout(0.3, seed=2**40 + 17, step=5, site=-3)
    out = torch.full((32, columns), -1, dtype=torch.int8, device=device)
    launch(_keep_kernel, (1,), words, out, *dropout.key(), columns, dropout.threshold, ROWS=32, COLUMNS=256)
    assert torch.equal(out.bool(), mask(dropout, words, columns)) and (out >= 0).all()


@pytest.mark.parametrize("p", [0.05, 0.1, 0.3, 0.9])
def test_keep_rate_of_rows_columns_and_all(p):
    dropout = Dropout(p, seed=1)
    kept = mask(dropout, torch.arange(4000, dtype=torch.int32), 640).double()
    rate = 1 / dropout.scale
    deviation = (rate * (1 - rate)) ** 0.5
    assert abs(kept.mean() - rate) < 5 * deviation / kept.numel() ** 0.5
    for dim in (0, 1):  # each row and each column: no position is favoured; 5 sigma over 4,640 means
        means = kept.mean(dim)
        assert ((means - rate).abs() < 5 * deviation / kept.shape[dim] ** 0.5).all()
        spread = means.var() * kept.shape[dim] / deviation**2
        assert 0.8 < spread < 1.2, f"means over dim {dim} spread {spread:.2f} times as far as independent draws do"


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x.double().flatten(), y.double().flatten()]))[0, 1])


@pytest.mark.parametrize(
    "other",
    [{"seed": 2}, {"seed": 1 + 2**32}, {"step": 1}, {"site": 1}, {"site": -1}],
    ids=str,
)
def test_another_key_is_another_mask(other):
    words = torch.arange(1000, dtype=torch.int32)
    one, two = (mask(Dropout(0.5, **{"seed": 1, **key}), words, 640) for key in ({}, other))
    assert abs(correlation(one, two)) < 5 / one.numel() ** 0.5


def test_neighbours_are_independent():
    kept = mask(Dropout(0.5, seed=3), torch.arange(2000, dtype=torch.int32), 512)
    for rows, columns in [(1, 0), (0, 1), (0, 16), (0, 64), (1, 1), (2, 0), (64, 0)]:
        shifted, still = kept[rows:, columns:], kept[: len(kept) - rows, : kept.shape[1] - columns]
        assert abs(correlation(shifted, still)) < 5 / still.numel() ** 0.5, (rows, columns)


def attention_masks(identities, heads, positions, keys, dropout):
    """[identities, heads, positions, keys], folded as attention's rows are."""
    sizes = [torch.arange(size, dtype=torch.int32) for size in (heads, positions)]
    key = fold_reference(dropout.key(), torch.tensor(identities, dtype=torch.int32)[:, None, None])
    key = fold_reference(fold_reference(key, sizes[0][:, None]), sizes[1])
    return keep_reference(key, keys, dropout.threshold)


def test_heads_and_views_are_independent():
    """Of one text each head has a mask of its own, and of two views of it, which differ by their identities."""
    kept = attention_masks([6, 7, -1], 8, 128, 192, Dropout(0.5, seed=3, step=1, site=2)).flatten(2)
    kept = kept.flatten(0, 1).double()
    found = torch.corrcoef(kept) - torch.eye(24)
    assert (found.abs() < 5 / kept.shape[1] ** 0.5).all()
    spread = found.square().sum() / (24 * 23) * kept.shape[1]
    assert 0.8 < spread < 1.2, f"correlations spread {spread:.2f} times as far as those of independent masks"


def test_attention_keeps_its_mean():
    """Over many steps the output is the one without dropout, within what so many draws leave of chance."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 6, 2, 4, dtype=torch.float64)
    schedule = build_schedule([6], identities=[4])
    want, _ = attention_reference(q, k, v, schedule, scale=0.5)
    outs = torch.stack(
        [attention_reference(q, k, v, schedule, scale=0.5, dropout=Dropout(0.3, 5, step))[0] for step in range(400)]
    )
    error = (outs.mean(0) - want) / (outs.std(0) / len(outs) ** 0.5)
    assert error.abs().max() < 5 and 0.7 < error.square().mean() < 1.3


def test_a_row_does_not_depend_on_its_neighbours():
    words = torch.tensor([5, 9, -7], dtype=torch.int32)
    dropout = Dropout(0.2, seed=4)
    assert torch.equal(mask(dropout, words, 100)[1], mask(dropout, words[1:2], 70 + 30)[0])
    assert torch.equal(mask(dropout, words, 100)[:, :70], mask(dropout, words, 70))


def test_scale_keeps_the_mean():
    for p in (0.1, 0.25, 0.5):
        dropout = Dropout(p, seed=0)
        kept = mask(dropout, torch.arange(3000, dtype=torch.int32), 512)
        assert abs(kept.double().mean() * dropout.scale - 1) < 0.005
    assert Dropout(0.0, seed=0).scale == 1.0


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, 0.001, 0.9999, float("nan")])
def test_rejects_rates_it_cannot_keep(p):
    with pytest.raises(ValueError, match="dropout p is"):
        Dropout(p, seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (7, 100), (33, 576)], ids=str)
def test_processor_drops_what_the_reference_drops(shape, dtype, monkeypatch):
    monkeypatch.setattr(dropout, "_DRAWS", 2000)  # several rounds
    key = fold_reference(Dropout(0.5, seed=6).key(), torch.randint(-(2**31), 2**31 - 1, shape[:1], dtype=torch.int32))
    x = torch.randn(shape).to(dtype)
    for threshold in (1, 13, 127, 128, 129, 255):
        kept = keep_reference(key, shape[1], threshold)
        draws = draws_cpu(key, shape[1], dtype)
        assert torch.equal(drop_cpu(x, draws, threshold), torch.where(kept, x, 0))
        in_place = x.clone()
        drop_cpu(in_place, draws, threshold, out=in_place)
        assert torch.equal(in_place, torch.where(kept, x, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threshold", [1, 128, 255])
def test_a_dropped_copy_says_what_was_dropped(threshold, dtype):
    """Zeros that stay, of either sign, are none that were dropped; nor are the least and the largest numbers."""
    key = fold_reference(Dropout(0.5, seed=7).key(), torch.arange(40, dtype=torch.int32))
    limits = torch.finfo(dtype)
    values = torch.tensor([0.0, -0.0, limits.smallest_normal, -limits.smallest_normal, limits.max, limits.min, 1, -1])
    x = torch.cat([values.to(dtype).repeat(40, 10), torch.randn(40, 20).to(dtype)], 1)
    x[:, 5] = torch.tensor(1, dtype={2: torch.int16, 4: torch.int32}[dtype.itemsize]).view(dtype)  # the least of all
    kept = keep_reference(key, 100, threshold)
    copy = dropped_copy_cpu(x, draws_cpu(key, 100, dtype), threshold)
    assert torch.equal(copy, torch.where(kept, x, 0))
    gradient = torch.randn(40, 100).to(dtype)
    want = torch.where(kept, gradient, 0)
    assert torch.equal(drop_as_cpu(gradient, copy), want) and torch.equal(gradient, want)
