"""Low-rank updates: against the reference in a wider dtype, on the processor and through the kernels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compare import assert_as_close_as_torch, wider

from flashvec.kernels import backend, low_rank
from flashvec.kernels import lora as lora_module
from flashvec.kernels.dropout import Dropout, keep_reference
from flashvec.kernels.lora import _lora, _lora_bwd, _lora_keys, lora, lora_reference, mask_keys_of_sites

DROPOUT = Dropout(0.3, seed=5, step=2, site=7)
SCALES = [0.5, 2.0, 1.25]
# rows, input features, output features of each projection, rank: no size divides a tile but the last case's
SHAPES = [(1, 5, [3], 1), (70, 130, [40, 129, 9], 5), (70, 257, [140, 17], 17), (64, 256, [128], 16)]
HALVES = [torch.float16]  # bf16 only where hardware runs it: the interpreter's bf16 arithmetic is wrong


def inputs(shape, dtype, device, masters=None):
    T, C, splits, R = shape
    P, N = len(splits), sum(splits)
    x = torch.randn(T, C, device=device).to(dtype)
    weight = (torch.randn(N, C, device=device) / C**0.5).to(dtype)
    bias = torch.randn(N, device=device).to(dtype)
    a = (torch.randn(P, R, C, device=device) / C**0.5).to(masters or dtype)
    b = (torch.randn(N, R, device=device) / R**0.5).to(masters or dtype)
    identities = torch.randint(-9, 9, (T,), dtype=torch.int32, device=device)
    positions = torch.arange(T, device=device) % 11
    return x, weight, bias, a, b, identities, positions


def keys_of(identities, positions):
    return _lora_keys(identities, positions, list(DROPOUT.key()))


def gradients(function, leaves, dout):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))


def judge(shape, dtype, dropped, device):
    splits = shape[2]
    x, weight, bias, a, b, identities, positions = inputs(shape, dtype, device)
    dout = torch.randn(x.shape[0], weight.shape[0], device=device).to(dtype)
    scales = SCALES[: len(splits)]
    options = {"dropout": DROPOUT, "identities_T": identities, "positions_T": positions} if dropped else {}
    got = gradients(
        lambda x, a, b: lora(x, weight, a, b, scales=scales, splits=splits, bias_N=bias, **options), (x, a, b), dout
    )
    keys = keys_of(identities, positions) if dropped else None

    def reference(to):
        w, c = weight.to(to), bias.to(to)
        return gradients(
            lambda x, a, b: lora_reference(x, w, c, a, b, splits, scales, keys, DROPOUT.threshold),
            [t.to(to) for t in (x, a, b)],
            dout,
        )

    for one, same, truth in zip(got, reference(dtype), reference(wider(dtype)), strict=True):
        assert_as_close_as_torch(one, same, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropped", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_processor_matches_reference(shape, dropped, dtype):
    judge(shape, dtype, dropped, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, *([torch.bfloat16] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("dropped", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_match_reference(shape, dropped, dtype, device, interpreted):
    backend.launches.clear()
    judge(shape, dtype, dropped, device)
    counted = {name: count for name, count in backend.launches.items() if name.startswith("_low_rank")}
    keys = {"_low_rank_keys_kernel": 2} if dropped else {}  # the test's own are the second
    expected = {"_low_rank_shrink_kernel": 2, "_low_rank_expand_kernel": 2, "_low_rank_reduce_kernel": 2} | keys
    assert counted == expected


def test_gradients_are_summed_over_blocks_of_rows(device, interpreted, monkeypatch):
    monkeypatch.setattr(low_rank, "SPLIT_ROWS", 64)
    judge((150, 70, [33, 20], 4), torch.float32, True, device)


def test_a_gpu_without_triton_takes_the_processors_path(monkeypatch):
    """On the meta device: whatever is made there must lie on the inputs' device."""
    x, keys = torch.randn(9, 200), torch.randint(-(2**31), 2**31, (2, 9)).int()
    on_processor = lora_module._dropped(x, keys, 64)
    assert torch.equal(on_processor, x * keep_reference((keys[0], keys[1]), 200, 64)) and (on_processor == 0).any()
    gradient = torch.randn(9, 200)
    assert torch.equal(lora_module._drop_as(gradient.clone(), on_processor, keys, 64), gradient * (on_processor != 0))
    for name in ("draws_cpu", "dropped_copy_cpu", "drop_as_cpu"):  # another device's mask must not be the processor's
        monkeypatch.setattr(lora_module, name, None)
    meta, keys = x.to("meta"), keys.to("meta")
    assert lora_module._drop_as(meta, lora_module._dropped(meta, keys, 64), keys, 64).shape == x.shape
    a, b, weight = (torch.empty(*shape, device="meta") for shape in ((1, 4, 200), (30, 4), (30, 200)))
    _, h, dropped = lora_module._forward(meta, weight, None, a, b, [30], [1.0], keys, 64)
    grads = lora_module._backward(meta[:, :30], dropped, weight, a, b, h, [30], [1.0], keys, 64, [True] * 3)
    assert h.shape == (9, 1, 4) and [grad.shape for grad in grads] == [x.shape, a.shape, b.shape]


def test_masters_in_fp32_get_their_gradients_in_fp32():
    x, weight, bias, a, b, *_ = inputs((70, 96, [40, 24], 8), torch.bfloat16, "cpu", masters=torch.float32)
    dout = torch.randn(70, 64).bfloat16()
    function = lambda x, a, b: lora(x, weight, a, b, scales=2.0, splits=[40, 24], bias_N=bias)  # noqa: E731
    same = gradients(function, (x, a.bfloat16(), b.bfloat16()), dout)
    got = gradients(function, (x, a, b), dout)
    assert got[2].dtype == got[3].dtype == torch.float32
    for one, other in zip(got, same, strict=True):
        assert torch.equal(one.bfloat16(), other)


def test_definition():
    """Without dropout, one projection: a plain linear layer whose weight is W + scale B A."""
    x, weight, bias, a, b, *_ = inputs((6, 8, [5], 2), torch.float32, "cpu")
    want = F.linear(x, weight + 3.0 * b @ a[0], bias)
    torch.testing.assert_close(lora(x, weight, a, b, scales=3.0, bias_N=bias), want)


@pytest.mark.parametrize("run", ["cpu", "kernels"])
def test_a_mask_depends_on_the_sequence_the_position_and_the_site_alone(run, device, request):
    """Rows keep their masks under another packing, and projections share them, merged or not."""
    if run == "kernels":
        request.getfixturevalue("interpreted")
    else:
        device = "cpu"
    x, weight, _, a, b, identities, positions = inputs((40, 100, [24, 30], 4), torch.float32, device)
    call = lambda rows, **keywords: lora(  # noqa: E731
        x[rows],
        **({"weight_NC": weight, "a_PRC": a, "b_NR": b, "splits": [24, 30]} | keywords),
        scales=1.0,
        identities_T=identities[rows],
        positions_T=positions[rows],
    )
    whole = call(torch.arange(40), dropout=DROPOUT)
    order = torch.randperm(40)
    torch.testing.assert_close(call(order, dropout=DROPOUT), whole[order])  # one flipped element would show
    second = {"weight_NC": weight[24:], "a_PRC": a[1:], "b_NR": b[24:], "splits": [30]}
    torch.testing.assert_close(call(torch.arange(40), dropout=DROPOUT, **second), whole[:, 24:])
    other = call(torch.arange(40), dropout=DROPOUT.at(DROPOUT.site + 1), **second)
    assert not torch.allclose(other, whole[:, 24:])


def test_dropout_drops_the_update_and_not_the_product():
    """With A picking features and W zero, dropped features are zeros and kept ones are scaled."""
    x = torch.rand(300, 64) + 0.5
    identities, positions = torch.arange(300), torch.zeros(300, dtype=torch.int64)
    eye = torch.eye(64)
    options = {"scales": 1.0, "dropout": DROPOUT, "identities_T": identities, "positions_T": positions}
    out = lora(x, torch.zeros(64, 64), eye[None], eye, **options)
    keys = keys_of(identities, positions)
    kept = keep_reference((keys[0], keys[1]), 64, DROPOUT.threshold)
    torch.testing.assert_close(out, torch.where(kept, x * DROPOUT.scale, 0.0))
    torch.testing.assert_close(lora(x, eye, eye[None], 0 * eye, **options), x)


@pytest.mark.parametrize("run", ["cpu", "kernels"])
def test_repetition_gives_equal_bits(run, device, request):
    if run == "kernels":
        request.getfixturevalue("interpreted")
    else:
        device = "cpu"
    x, weight, bias, a, b, identities, positions = inputs((70, 64, [20, 30], 4), torch.float32, device)
    dout = torch.randn(70, 50, device=device)
    options = {"dropout": DROPOUT, "identities_T": identities, "positions_T": positions, "bias_N": bias}
    run_once = lambda: gradients(  # noqa: E731
        lambda x, a, b: lora(x, weight, a, b, scales=1.0, splits=[20, 30], **options), (x, a, b), dout
    )
    assert all(torch.equal(one, two) for one, two in zip(run_once(), run_once(), strict=True))


@pytest.mark.parametrize("run", ["cpu", "kernels"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2)], ids=str)
def test_only_what_is_wanted_is_computed(run, wanted, device, request):
    if run == "kernels":
        request.getfixturevalue("interpreted")
    else:
        device = "cpu"
    x, weight, _, a, b, identities, positions = inputs((20, 64, [16], 4), torch.float32, device)
    leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate((x, a, b))]
    options = {"dropout": DROPOUT, "identities_T": identities, "positions_T": positions}
    lora(leaves[0], weight, *leaves[1:], scales=1.0, **options).sum().backward()
    full = gradients(lambda x, a, b: lora(x, weight, a, b, scales=1.0, **options), (x, a, b), torch.ones(20, 16))[1:]
    for i, leaf in enumerate(leaves):
        assert torch.equal(leaf.grad, full[i]) if i in wanted else leaf.grad is None


@pytest.mark.parametrize("run", ["cpu", "kernels"])
def test_strides_and_no_rows(run, device, request):
    if run == "kernels":
        request.getfixturevalue("interpreted")
    else:
        device = "cpu"
    x, weight, _, a, b, identities, positions = inputs((20, 64, [16], 4), torch.float32, device)
    wide = torch.full((20, 80), float("nan"), device=device)
    wide[:, 8:72] = x
    options = {"scales": 1.0, "dropout": DROPOUT}
    keys = {"identities_T": identities, "positions_T": positions}
    want = lora(x, weight, a, b, **options, **keys)
    transposed = b.T.contiguous().T
    got = lora(wide[:, 8:72], weight, a.transpose(1, 2).contiguous().transpose(1, 2), transposed, **options, **keys)
    torch.testing.assert_close(got, want)
    none = {name: key[:0] for name, key in keys.items()}
    a.requires_grad_()
    empty = lora(x[:0], weight, a, b, **options, **none)
    empty.sum().backward()
    assert empty.shape == (0, 16) and torch.equal(a.grad, torch.zeros_like(a))


def test_keys_of_several_sites_are_those_of_each():
    x, weight, _, a, b, identities, positions = inputs(SHAPES[1], torch.float32, "cpu")
    sites = [7, 0, 131]
    for site, keys in zip(sites, mask_keys_of_sites(DROPOUT, sites, identities, positions), strict=True):
        dropout = DROPOUT.at(site)
        assert torch.equal(keys, lora_module.mask_keys(dropout, identities, positions))
        options = {"scales": 1.0, "splits": SHAPES[1][2], "dropout": dropout}
        named = lora(x, weight, a, b, **options, identities_T=identities, positions_T=positions)
        assert torch.equal(lora(x, weight, a, b, **options, keys_2T=keys), named)


@pytest.mark.parametrize("run", ["cpu", "kernels"])
@pytest.mark.parametrize("dropped", [False, True], ids=["", "dropout"])
def test_is_a_well_behaved_torch_op(dropped, run, device, request):
    if run == "kernels":
        request.getfixturevalue("interpreted")
    else:
        device = "cpu"
    x, weight, bias, a, b, identities, positions = inputs((9, 64, [8, 8], 2), torch.float32, device)
    keys = keys_of(identities, positions) if dropped else None
    x, a, b = (t.requires_grad_() for t in (x, a, b))
    shared = ([8, 8], [1.0, 2.0], keys, 77 if dropped else 0)
    torch.library.opcheck(_lora, (x, weight, bias, a, b, *shared))
    torch.library.opcheck(_lora_keys, (identities, positions, [1, 2]))
    saved = (torch.randn(9, 16, device=device), *(t.detach() for t in (x, weight, a, b)), torch.randn(9, 2, 2))
    for wants in ([True, True, True], [False, True, False]):
        torch.library.opcheck(_lora_bwd, (*(t.to(device) for t in saved), *shared, wants))


def test_rejects():
    x, weight, bias, a, b, identities, positions = inputs((6, 8, [5, 3], 2), torch.float32, "cpu")
    good = {"scales": 1.0, "splits": [5, 3]}
    cases = [
        ({"x_TC": x.double()}, "float64"),
        ({"weight_NC": weight.half()}, "float16"),
        ({"b_NR": b.bfloat16()}, "bfloat16"),
        ({"x_TC": x[:, :7]}, r"\(6, 7\)"),
        ({"x_TC": x.T.contiguous().T}, "strides"),
        ({"a_PRC": a[0]}, r"a_PRC \(2, 8\)"),
        ({"b_NR": b[:7]}, r"b_NR \(7, 2\)"),
        ({"a_PRC": torch.zeros(2, 200, 8), "b_NR": torch.zeros(8, 200)}, "rank 1 to 128"),
        ({"a_PRC": a.repeat(2, 1, 1), "splits": [2, 2, 2, 2]}, "at most 3 projections"),
        ({"splits": [5, 4]}, r"\[5, 4\]"),
        ({"splits": None}, r"splits \[8\]"),
        ({"splits": [8, 0]}, r"\[8, 0\]"),
        ({"scales": [1.0]}, r"scales \[1.0\]"),
        ({"scales": "12"}, "scales are '12', expected a number"),
        ({"bias_N": bias[:3]}, r"bias_N is \(3,\)"),
        ({"weight_NC": weight.clone().requires_grad_()}, "frozen"),
        ({"dropout": DROPOUT}, "needs identities_T"),
        ({"dropout": DROPOUT, "identities_T": identities[:3], "positions_T": positions}, r"\(3,\)"),
        (
            {"dropout": DROPOUT, "identities_T": identities.float(), "positions_T": positions},
            "identities_T is torch.float",
        ),
        ({"dropout": DROPOUT, "keys_2T": keys_of(identities, positions)[:, 1:]}, r"keys_2T is torch.int32 \(2, "),
        (
            {"dropout": DROPOUT, "identities_T": identities, "positions_T": positions.to("meta")},
            "positions_T .* on meta",
        ),
    ]
    for changed, message in cases:
        with pytest.raises(ValueError, match=message):
            lora(**({"x_TC": x, "weight_NC": weight, "a_PRC": a, "b_NR": b} | good | changed))


@pytest.mark.parametrize("scales", [np.float32(2.0), torch.tensor(2.0), (2.0, 2), torch.tensor([2.0, 2.0])], ids=repr)
def test_scales_are_numbers_of_any_kind(scales):
    x, weight, _, a, b, *_ = inputs((6, 8, [5, 3], 2), torch.float32, "cpu")
    want = lora(x, weight, a, b, scales=2.0, splits=[5, 3])
    assert torch.equal(lora(x, weight, a, b, scales=scales, splits=[5, 3]), want)
