"""Linear cross entropy over chosen rows: against the reference in a wider dtype, on CPU and in the kernels."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_close_as_torch, wider

from flashvec.kernels import backend, panel
from flashvec.kernels import cross_entropy as module
from flashvec.kernels.backend import launch, tl, triton
from flashvec.kernels.cross_entropy import (
    _cross_entropy,
    _cross_entropy_bwd,
    cross_entropy,
    cross_entropy_reference,
)
from flashvec.kernels.cross_entropy_tiles import _tanh

# rows in all, features, vocabulary, chosen rows: smaller than a tile, dividing none
SHAPES = [(9, 8, 40, 5), (70, 70, 700, 33), (140, 40, 129, 131)]
FORMS = {"plain": {}, "softcap": {"softcap": 3.0, "scale": 0.8}, "scale": {"scale": 1.7}}


def inputs(shape, dtype, device, biased=True):
    T, D, V, R = shape
    h = torch.randn(T, D, device=device).to(dtype)
    weight = (torch.randn(V, D, device=device) * 2 / D**0.5).to(dtype)
    bias = torch.randn(V, device=device).to(dtype) if biased else None
    rows, targets = torch.randperm(T, device=device)[:R], torch.randint(0, V, (R,), device=device)
    return h, weight, rows, targets, bias


def gradients(function, leaves, dout):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, dout.to(out.dtype))


def reduced(loss, reduction):
    return {"mean": loss.mean, "sum": loss.sum, "none": lambda: loss}[reduction]()


def plain_torch(h, weight, bias, rows, targets, softcap=None, scale=1.0):
    """What one writes without this op: logits in the dtype, softmax in fp32."""
    logits = F.linear(h[rows], weight, bias).float() * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="none")


def judge(shape, dtype, form, reduction, device, same_as_torch):
    h, weight, rows, targets, bias = inputs(shape, dtype, device, biased=form != "plain")
    options = FORMS[form]
    leaves = [h, weight] + ([] if bias is None else [bias])
    dout = torch.randn(len(rows), device=device) if reduction == "none" else torch.tensor(1.3, device=device)

    def own(h, weight, bias=None):
        return cross_entropy(h, weight, rows, targets, bias_V=bias, reduction=reduction, **options)

    def reference(h, weight, bias=None):
        return reduced(cross_entropy_reference(h, weight, rows, targets, bias, **options), reduction)

    def composed(h, weight, bias=None):
        return reduced(plain_torch(h, weight, bias, rows, targets, **options), reduction)

    got, got_grads = gradients(own, leaves, dout)
    same, same_grads = gradients(composed if same_as_torch else reference, leaves, dout)
    truth, _ = gradients(reference, [leaf.double() for leaf in leaves], dout)  # losses are fp32 for every dtype
    _, truth_grads = gradients(reference, [leaf.to(wider(dtype)) for leaf in leaves], dout)
    assert_as_close_as_torch(got, same, truth)
    for one, other, true in zip(got_grads, same_grads, truth_grads, strict=True):
        assert_as_close_as_torch(one, other, true)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_processor_matches_reference(shape, form, reduction, dtype, monkeypatch):
    monkeypatch.setattr(module, "PANEL_ELEMENTS_CPU", 33 * 256)  # several panels
    judge(shape, dtype, form, reduction, "cpu", same_as_torch=dtype != torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *[torch.bfloat16] * torch.cuda.is_available()])
@pytest.mark.parametrize("form, reduction", [("plain", "mean"), ("softcap", "none"), ("scale", "sum")])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_match_reference(shape, form, reduction, dtype, device, interpreted, monkeypatch):
    monkeypatch.setattr(module, "PANEL_ELEMENTS", 33 * 256)
    backend.launches.clear()
    judge(shape, dtype, form, reduction, device, same_as_torch=False)
    panels = -(-shape[2] // panel.panel_width(shape[3], shape[2], 256, 33 * 256))
    products = 2 if form == "plain" else 3  # of h's gradient, W's, and the bias's
    counted = {name: backend.launches[f"_{name}_kernel"] for name in ("cross_entropy_fwd", "cross_entropy_bwd")}
    assert counted == {"cross_entropy_fwd": 1, "cross_entropy_bwd": panels}
    assert backend.launches["_panel_product_kernel"] == products * panels


def test_small_probabilities_survive_fp16(device, interpreted):
    """A softmax over many columns, summed over rows, in a dtype whose smallest number is larger than its entries."""
    D, V, R = 16, 2000, 8
    h, weight, rows, targets, _ = inputs((R, D, V, R), torch.float16, device)
    weight, targets = weight / 100 + 1, torch.zeros_like(targets)
    weight[0] = 0  # the gradient is the sum of the other rows, each with a small weight
    dout = torch.full((R,), 1e-3, device=device)
    function = lambda h: cross_entropy(h, weight, rows, targets, reduction="none")  # noqa: E731
    _, (got,) = gradients(function, [h], dout)
    reference = lambda w: lambda h: cross_entropy_reference(h, w, rows, targets)  # noqa: E731
    _, (same,) = gradients(reference(weight), [h], dout)
    _, (truth,) = gradients(reference(weight.float()), [h.float()], dout)
    assert_as_close_as_torch(got, same, truth)


@triton.jit
def _tanh_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, _tanh(tl.load(x_ptr + at)))


def test_tanh(device, interpreted):
    x = torch.cat([torch.linspace(-12, 12, 900), torch.logspace(-20, 0, 124)]).to(device)
    out = torch.empty_like(x)
    launch(_tanh_kernel, (1,), x, out, BLOCK=1024)
    truth = x.double().tanh()
    assert ((out - truth).abs() <= 4 * torch.finfo(torch.float32).eps * truth.abs()).all()


def test_definition():
    h, weight = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.5]])
    loss = cross_entropy(h, weight, torch.tensor([1]), torch.tensor([2]), softcap=4.0, reduction="sum")
    logits = [4 * torch.tensor(z / 4).tanh() for z in (0.0, 2.0, 0.5)]
    torch.testing.assert_close(loss, torch.stack(logits).logsumexp(0) - logits[2])


@pytest.mark.parametrize("run", ["cpu", "kernels"])
def test_only_chosen_rows_are_read_and_get_a_gradient(run, device, request):
    if run == "kernels":
        request.getfixturevalue("interpreted")
    else:
        device = "cpu"
    h, weight, rows, targets, _ = inputs((90, 24, 100, 40), torch.float32, device)
    alone = gradients(
        lambda h: cross_entropy(h, weight, torch.arange(40, device=device), targets), [h[rows]], torch.tensor(1.0)
    )
    others = torch.ones(90, dtype=torch.bool, device=device)
    others[rows] = False
    h[others] = float("nan")
    loss, (dh,) = gradients(lambda h: cross_entropy(h, weight, rows.int(), targets.int()), [h], torch.tensor(1.0))
    assert torch.equal(loss, alone[0]) and torch.equal(dh[rows], alone[1][0])
    assert torch.equal(dh[others], torch.zeros_like(dh[others]))


@pytest.mark.parametrize("run", ["cpu", "kernels"])
def test_a_frozen_head_costs_nothing_and_strides_are_taken(run, device, request):
    if run == "kernels":
        request.getfixturevalue("interpreted")
    else:
        device = "cpu"
    h, weight, rows, targets, bias = inputs((40, 24, 70, 20), torch.float32, device)
    both = gradients(lambda h, w: cross_entropy(h, w, rows, targets, bias_V=bias), [h, weight], torch.tensor(1.0))
    wide = torch.full((40, 50), float("nan"), device=device)
    wide[:, 8:32] = h
    columns = torch.full((70, 30), float("nan"), device=device)
    columns[:, :24] = weight
    backend.launches.clear()
    strided = lambda wide: cross_entropy(wide[:, 8:32], columns[:, :24], rows, targets, bias_V=bias)  # noqa: E731
    one = gradients(strided, [wide], torch.tensor(1.0))
    torch.testing.assert_close(one[0], both[0])
    torch.testing.assert_close(one[1][0][:, 8:32], both[1][0])
    assert run == "cpu" or backend.launches["_panel_product_kernel"] == 1


def test_repetition_gives_equal_bits(device, interpreted):
    h, weight, rows, targets, bias = inputs((70, 40, 300, 50), torch.float32, device)
    run = lambda: gradients(  # noqa: E731
        lambda h, w, b: cross_entropy(h, w, rows, targets, bias_V=b), [h, weight, bias], torch.tensor(1.0)
    )
    (loss, grads), (again, grads_again) = run(), run()
    assert torch.equal(loss, again) and all(map(torch.equal, grads, grads_again))


@pytest.mark.parametrize("run", ["cpu", "kernels"])
def test_no_rows(run, device, request):
    if run == "kernels":
        request.getfixturevalue("interpreted")
    else:
        device = "cpu"
    h, weight, rows, targets, _ = inputs((5, 8, 9, 0), torch.float32, device)
    loss, grads = gradients(
        lambda h, w: cross_entropy(h, w, rows, targets, reduction="sum"), [h, weight], torch.tensor(1.0)
    )
    assert loss == 0 and all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)
    assert cross_entropy(h, weight, rows, targets, reduction="none").shape == (0,)


def test_what_a_gpu_cannot_refuse_is_no_number(device, interpreted):
    """The op itself: the public function looks first where looking does not wait."""
    h, weight, *_ = inputs((10, 8, 9, 1), torch.float32, device)
    rows = torch.tensor([0, 3, 3, 10, -1, 5, 6, 7], device=device)
    targets = torch.tensor([0, 1, 2, 3, 4, 9, -1, 8], device=device)
    loss, _ = _cross_entropy(h, weight, rows, targets, None, 0.0, 1.0)
    bad = loss.isnan().tolist()
    assert sum(bad[1:3]) >= 1  # one of the two that name row 3
    assert [bad[0], *bad[3:]] == [False, True, True, True, True, False]


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_what_a_gpu_cannot_refuse_has_no_gradient(softcap, device, interpreted):
    h, weight, rows, targets, bias = inputs((10, 8, 300, 8), torch.float32, device)
    leaves = [x.requires_grad_() for x in (h, weight, bias)]
    good, dloss = [0, 3, 6], torch.rand(8, device=device)
    bad_rows, bad_targets = rows.clone(), targets.clone()
    bad_rows[1], bad_rows[2], bad_rows[7] = 10, -1, 2**40
    bad_targets[4], bad_targets[5] = 300, -100
    found = []
    for facts in ((bad_rows, bad_targets, dloss), (rows[good], targets[good], dloss[good])):
        loss, _ = _cross_entropy(h, weight, *facts[:2], bias, softcap, 1.5)
        found.append(torch.autograd.grad(loss, leaves, facts[2]))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("run", ["cpu", "kernels"])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_is_a_well_behaved_torch_op(softcap, run, device, request):
    if run == "kernels":
        request.getfixturevalue("interpreted")
    else:
        device = "cpu"
    h, weight, rows, targets, bias = inputs((12, 8, 30, 6), torch.float32, device)
    h, weight, bias = (t.requires_grad_() for t in (h, weight, bias))
    torch.library.opcheck(_cross_entropy, (h, weight, rows, targets, bias, softcap, 1.5))
    saved = (*(t.detach() for t in (h, weight)), rows, targets, bias.detach(), torch.rand(6, device=device))
    for wants in ([True, True, True], [True, False, False]):
        torch.library.opcheck(_cross_entropy_bwd, (torch.rand(6, device=device), *saved, softcap, 1.5, wants))


def test_rejects():
    h, weight, rows, targets, bias = inputs((6, 8, 9, 3), torch.float32, "cpu")
    cases = [
        ({"h_TD": h.double()}, "float64"),
        ({"weight_VD": weight.half()}, "float16"),
        ({"weight_VD": weight[:, :7]}, r"\(9, 7\)"),
        ({"h_TD": h.T.contiguous().T}, "strides"),
        ({"bias_V": bias[:4]}, r"bias_V is \(4,\)"),
        ({"rows_R": rows[:2]}, r"rows_R is \(2,\)"),
        ({"rows_R": rows.float()}, "rows_R is torch.float32"),
        ({"targets_R": targets.short()}, "targets_R torch.int16"),
        ({"rows_R": torch.tensor([0, 6, 1])}, "rows_R holds 6, expected 0 to 5"),
        ({"rows_R": torch.tensor([0, -1, 1])}, "rows_R holds -1"),
        ({"rows_R": torch.tensor([0, 4, 4])}, "rows_R holds 4 more than once"),
        ({"targets_R": torch.tensor([0, 9, 1])}, "targets_R holds 9, expected 0 to 8"),
        ({"targets_R": torch.tensor([0, -100, 1])}, "targets_R holds -100"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"reduction": "max"}, "'max'"),
        ({"rows_R": rows[:0], "targets_R": targets[:0]}, "no mean over no rows"),
        ({"h_TD": h[:0]}, "rows_R names 3 rows, h_TD has none"),
    ]
    for changed, message in cases:
        with pytest.raises(ValueError, match=message):
            cross_entropy(**({"h_TD": h, "weight_VD": weight, "rows_R": rows, "targets_R": targets} | changed))
