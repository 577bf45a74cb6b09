import pytest
import torch

from flashvec.kernels.mean_pool import MODES, mean_pool
from flashvec.kernels.rms_norm import rms_norm

SPANS = [[0, 4], [2, 3], [1, 7], [7, 9]]  # overlapping, nested, leaving rows out


def by_hand(y, mode, first):
    if mode == "mean":
        return y.mean(0)
    if mode == "mean_sqrt_len":
        return y.sum(0) / len(y) ** 0.5
    if mode == "max":
        return y.max(0).values
    if mode == "weighted_mean":
        weights = torch.arange(first, first + len(y), device=y.device)[:, None]
        return (y * weights).sum(0) / weights.sum()
    return y[-1] if mode == "last" else y[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("mode", MODES)
def test_matches_definition(mode, offset, dtype, device):
    x = torch.randn(10, 24, dtype=dtype, device=device)
    w = torch.randn(24, device=device)
    spans = torch.tensor(SPANS, device=device)
    first = torch.tensor([1, 3, 2, 5], device=device)
    got = mean_pool(x, spans, w, 1e-2, norm_offset=offset, mode=mode, first_weights_S=first)
    y = rms_norm(x.float(), w, 1e-2, offset)
    want = torch.stack([by_hand(y[a:b], mode, f) for (a, b), f in zip(SPANS, first.tolist(), strict=True)])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_same_bits_alone_and_with_others(mode, device):
    x, w = torch.randn(300, 64, device=device), torch.ones(64, device=device)
    spans = torch.tensor([[0, 100], [100, 101], [101, 300]], device=device)
    together = mean_pool(x, spans, w, 1e-6, mode=mode)
    for i in range(3):
        assert torch.equal(together[i], mean_pool(x, spans[i : i + 1], w, 1e-6, mode=mode)[0])


@pytest.mark.parametrize("mode", MODES)
def test_gradient(mode, device):
    x = torch.randn(6, 5, dtype=torch.float32, device=device, requires_grad=True)
    w = torch.randn(5, device=device)
    spans = torch.tensor([[0, 4], [3, 6]], device=device)
    (got,) = torch.autograd.grad(mean_pool(x, spans, w, 1e-2, mode=mode).square().sum(), x)
    y = rms_norm(x, w, 1e-2)
    want = torch.autograd.grad(sum(by_hand(y[a:b], mode, 1).square().sum() for a, b in spans.tolist()), x)[0]
    torch.testing.assert_close(got, want)


def test_rejects(device):
    x, w = torch.zeros(3, 2, device=device), torch.ones(2, device=device)
    with pytest.raises(ValueError, match="'median'"):
        mean_pool(x, torch.zeros(1, 2, dtype=torch.int64), w, 1e-6, mode="median")
    with pytest.raises(ValueError, match=r"\[S, 2\]"):
        mean_pool(x, torch.zeros(2, dtype=torch.int64), w, 1e-6)
