import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_close_as_torch

from flashvec.kernels import backend, panel
from flashvec.kernels.cross_entropy import cross_entropy, cross_entropy_reference

HALVES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
SIZES = [(1, 8, 5), (7, 20, 33), (70, 72, 300)]  # rows that predict, hidden size, vocabulary
OPTIONS = {"plain": {}, "softcap": {"softcap": 2.0}, "scale": {"scale": 0.5}, "bias": {"bias": True}}


def batch(R, D, V, dtype, device, bias=False, **options):
    h = torch.randn(R + 9, D, device=device).to(dtype)
    weight = (torch.randn(V, D, device=device) / D**0.5).to(dtype)
    rows = torch.randperm(R + 9, device=device)[:R]
    targets = torch.randint(0, V, (R,), device=device)
    if bias:
        options["bias_V"] = torch.randn(V, device=device).to(dtype)
    return h, weight, rows, targets, options


def each(*arguments, **options):
    return cross_entropy(*arguments, reduction="none", **options)


def gradients(run, h, weight, rows, targets, options, trained, dloss):
    h, weight = h.detach().requires_grad_(), weight.detach().requires_grad_(trained)
    loss = run(h, weight, rows, targets, **options)
    loss.backward(dloss.to(loss.dtype))
    return (loss.detach(), h.grad, weight.grad) if trained else (loss.detach(), h.grad)


def torch_form(h, weight, rows, targets, bias_V=None, softcap=None, scale=1.0):
    """What torch computes in the dtype itself: logits rounded to it."""
    logits = F.linear(h[rows], weight, bias_V) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.float(), targets, reduction="none")


def assert_matches_reference(h, weight, rows, targets, options, trained=False, same_form=cross_entropy_reference):
    dloss = torch.rand(len(rows), device=h.device)
    arguments = h, weight, rows, targets, options, trained, dloss
    got, same = gradients(each, *arguments), gradients(same_form, *arguments)
    wide = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    truth = gradients(cross_entropy_reference, h.double(), weight.double(), rows, targets, wide, trained, dloss)
    for g, s, t in zip(got, same, truth, strict=True):
        assert torch.isfinite(g).all()
        assert_as_close_as_torch(g, s, t)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(SIZES[0], torch.float32)]  # of a single number in halves, torch's own error says nothing
    + [(size, dtype) for size in SIZES[1:] for dtype in (torch.float32, torch.float16, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("options", OPTIONS)
def test_cpu_form_matches_reference(size, options, dtype, device):
    """Its products are the library's, rounded to the dtype: judged beside torch in the same dtype."""
    assert_matches_reference(*batch(*size, dtype, device, **OPTIONS[options]), same_form=torch_form)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernel_matches_reference(size, options, dtype, device, interpreted):
    before = sum(backend.launches.values())
    assert_matches_reference(*batch(*size, dtype, device, **OPTIONS[options]))
    assert sum(backend.launches.values()) >= before + 2


@pytest.mark.parametrize("trained", [False, True])
def test_kernel_over_several_panels(trained, device, interpreted, monkeypatch):
    monkeypatch.setattr(panel, "PANEL_ELEMENTS", 4096)
    assert_matches_reference(*batch(40, 24, 500, torch.float32, device), trained=trained)


def test_definition(device):
    h, weight = torch.tensor([[1.0], [9.0]], device=device), torch.tensor([[0.0], [2.0]], device=device)
    loss = cross_entropy(h, weight, torch.tensor([0], device=device), torch.tensor([1], device=device))
    torch.testing.assert_close(loss, torch.log1p(torch.exp(torch.tensor(-2.0, device=device))))


def test_rows_that_predict_nothing_have_no_gradient(device, interpreted):
    h, weight, rows, targets, _ = batch(5, 16, 40, torch.float32, device)
    _, dh = gradients(each, h, weight, rows, targets, {}, False, torch.ones(5, device=device))
    others = torch.ones(len(h), dtype=torch.bool, device=device).index_fill(0, rows, False)
    assert not dh[others].any() and dh[rows].any(1).all()


def test_kernel_repeats_its_bits(device, interpreted):
    arguments = *batch(40, 24, 200, torch.float16, device), True, torch.rand(40, device=device)
    one, two = (gradients(each, *arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_reductions(device):
    h, weight, rows, targets, _ = batch(7, 20, 33, torch.float32, device)
    losses = each(h, weight, rows, targets)
    torch.testing.assert_close(cross_entropy(h, weight, rows, targets), losses.mean())
    torch.testing.assert_close(cross_entropy(h, weight, rows, targets, reduction="sum"), losses.sum())


def test_rejects(device):
    h, weight, rows, targets, _ = batch(7, 20, 33, torch.float32, device)
    for change in [
        {"weight_VD": weight[:, :4]},
        {"targets_R": targets[:3]},
        {"rows_R": rows.float()},
        {"softcap": -1.0},
        {"reduction": "median"},
        {"weight_VD": weight.half()},
    ]:
        arguments = {"h_TD": h, "weight_VD": weight, "rows_R": rows, "targets_R": targets, **change}
        with pytest.raises(ValueError, match=r".+"):
            cross_entropy(**arguments)
