"""Products with panels."""

import pytest
import torch
from compare import assert_as_close_as_torch, wider

from flashvec.kernels import backend
from flashvec.kernels.panel import panel_product, panel_width


def product(panel, x, before, rows, factor, scale):
    x = x if rows is None else x[rows]
    x = x if factor is None else x * factor.to(x.dtype)[:, None]
    result = panel @ x if scale is None else panel @ x * scale.to(x.dtype)
    return result if before is None else before + result


@pytest.mark.parametrize("run", ["cpu", "kernels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("form", ["plain", "add", "rows, factor, scale"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (130, 70, 33), (70, 129, 65)], ids=str)
def test_matches_torch(shape, form, transposed, dtype, run, device, request):
    if run == "kernels":
        request.getfixturevalue("interpreted")
    else:
        device = "cpu"
    M, N, K = shape
    panel = torch.randn(K, M, device=device).to(dtype).T if transposed else torch.randn(M, K, device=device).to(dtype)
    wide = torch.full((K + 5, N + 3), float("nan"), device=device).to(dtype)
    wide[:, 2 : N + 2] = torch.randn(K + 5, N, device=device)
    chosen = form == "rows, factor, scale"
    x = wide[:, 2 : N + 2] if chosen else wide[:K, 2 : N + 2]
    rows = torch.randperm(K + 5, device=device)[:K] if chosen else None
    factor, scale = (torch.rand(n, device=device) if chosen else None for n in (K, 1))
    before = torch.randn(M, N, device=device) if form == "add" else None
    out = torch.full((M, N + 4), float("nan"), device=device).to(torch.float32 if form == "add" else dtype)
    if before is not None:
        out[:, 1 : N + 1] = before
    backend.launches.clear()
    panel_product(panel, x, out[:, 1 : N + 1], add=form == "add", rows_K=rows, factor_K=factor, scale=scale)
    truth = product(panel.to(wider(dtype)), x.to(wider(dtype)), before, rows, factor, scale)
    same = product(panel, x, before, rows, factor, scale).to(out.dtype)
    assert_as_close_as_torch(out[:, 1 : N + 1], same, truth)
    assert out[:, 0].isnan().all() and out[:, N + 1 :].isnan().all()
    assert backend.launches["_panel_product_kernel"] == (run == "kernels")


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9, 13])
def test_no_row_is_summed_term_by_term(rows):
    """50,000 terms of one sign would lose two digits."""
    panel, x = torch.rand(rows, 49152), 1 + torch.rand(49152, 40)
    out = torch.empty(rows, 40)
    panel_product(panel, x, out)
    truth = panel.double() @ x.double()
    assert float(((out - truth) / truth).abs().max()) < 2e-6


def test_width():
    assert panel_width(100, 5000, 256, 100 * 1024) == 1024
    assert panel_width(100, 300, 256, 1 << 25) == 512  # all columns, rounded up
    assert panel_width(10**9, 300, 256, 1 << 25) == 256
    assert panel_width(0, 300, 256, 1 << 25) == 512
