import pytest
import torch
from compare import assert_as_close_as_torch

from flashvec.kernels import backend, info_nce_tiles
from flashvec.kernels import info_nce as module
from flashvec.kernels.info_nce import _info_nce, info_nce, info_nce_reference

HALVES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
SIZES = [(1, 1, 8), (3, 5, 20), (70, 130, 72)]
OPTIONS = {
    "plain": {},
    "ids": {"ids": True},
    "margin": {"margin": 0.1},
    "prefixes": {"prefixes": [8]},
    "all": {"ids": True, "margin": 0.2, "prefixes": [3, 8, 20]},
}


def batch(B, M, D, dtype, device, ids=False, **options):
    q = torch.randn(B, D, device=device).to(dtype)
    c = torch.randn(M, D, device=device).to(dtype)
    positives = torch.randperm(M, device=device)[:B]
    c[positives] += 0.5 * q  # so that a margin hides some candidates, not all
    if ids:
        options["document_ids_M"] = torch.randint(0, 4, (M,), device=device)
    if "prefixes" in options:
        options["prefixes"] = [p for p in options["prefixes"] if p <= D]
    return q, c, positives, options


def gradients(run, q, c, positives, dloss, options):
    q, c = q.detach().requires_grad_(), c.detach().requires_grad_()
    loss = run(q, c, positives, 0.1, **options)
    loss.backward(dloss.to(loss.dtype))
    return loss.detach(), q.grad, c.grad


def assert_matches_reference(q, c, positives, options):
    loss_shape = info_nce_reference(q, c, positives, 0.1, **options).shape
    dloss = torch.rand(loss_shape, device=q.device) / q.shape[0]
    got = gradients(info_nce, q, c, positives, dloss, options)
    same = gradients(info_nce_reference, q, c, positives, dloss, options)
    truth = gradients(info_nce_reference, q.double(), c.double(), positives, dloss.double(), options)
    for name, g, s, t in zip(("loss", "dq", "dc"), got, same, truth, strict=True):
        assert torch.isfinite(g).all(), name
        assert_as_close_as_torch(g, s, t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tiled_torch_matches_reference(size, options, dtype, device, monkeypatch):
    monkeypatch.setattr(module, "ROWS_TORCH", 16)
    assert_matches_reference(*batch(*size, dtype, device, **OPTIONS[options]))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernel_matches_reference(size, options, dtype, device, interpreted):
    before = backend.launches.copy()
    assert_matches_reference(*batch(*size, dtype, device, **OPTIONS[options]))
    assert backend.launches["_info_nce_fwd_kernel"] == before["_info_nce_fwd_kernel"] + 1
    assert backend.launches["_info_nce_bwd_kernel"] == before["_info_nce_bwd_kernel"] + 2


@pytest.mark.parametrize("programs", [1, 2, 1000])
def test_kernel_shares_out_documents(programs, device, interpreted, monkeypatch):
    monkeypatch.setattr(info_nce_tiles, "WANTED_PROGRAMS", programs)
    assert_matches_reference(*batch(20, 300, 16, torch.float32, device, ids=True))


def test_kernel_repeats_its_bits(device, interpreted):
    q, c, positives, options = batch(70, 130, 72, torch.float16, device, prefixes=[16, 72])
    dloss = torch.rand(2, 70, device=device)
    one, two = (gradients(info_nce, q, c, positives, dloss, options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_zero_vectors_have_finite_gradients(device, interpreted):
    q, c, positives, _ = batch(3, 5, 20, torch.float32, device)
    q[0] = c[1] = 0
    _, dq, dc = gradients(info_nce, q, c, positives, torch.ones(3, device=device), {})
    assert torch.isfinite(dq).all() and torch.isfinite(dc).all() and not dq[0].any() and not dc[1].any()


RUNS = {"reference": info_nce_reference, "torch": info_nce, "kernel": info_nce}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("options", OPTIONS)
def test_what_is_no_number_is_not_left_out(options, run, device, request):
    if run == "kernel":
        request.getfixturevalue("interpreted")
    q, c, positives, options = batch(4, 9, 20, torch.float32, device, **OPTIONS[options])
    options.pop("document_ids_M", None)
    q[2] = float("nan")
    bad = RUNS[run](q, c, positives, 0.1, **options).isnan()
    assert bad[..., 2].all() and bad.sum() == bad[..., 2].numel()
    ids = torch.zeros(9, dtype=torch.int64, device=device)  # all but the positive are left out
    assert RUNS[run](q, c, positives, 0.1, document_ids_M=ids).isnan().tolist() == [False, False, True, False]
    q[2], other = 1.0, next(j for j in range(9) if j not in positives)
    c[other, 1] = float("nan")
    assert RUNS[run](q, c, positives, 0.1, **options).isnan().all()
    assert not RUNS[run](q, c, positives, 0.1, document_ids_M=ids).isnan().any()


@pytest.mark.parametrize("run", ["torch", "kernel"])
def test_documents_without_queries_have_gradients_of_zero(run, device, request):
    if run == "kernel":
        request.getfixturevalue("interpreted")
    q, c, positives, _ = batch(0, 70, 20, torch.float32, device)
    loss, dq, dc = gradients(info_nce, q, c, positives, torch.ones(0, device=device), {})
    assert loss.shape == (0,) and dq.shape == q.shape and torch.equal(dc, torch.zeros_like(c))


def test_definition(device):
    q = torch.tensor([[1.0, 0.0]], device=device)
    c = torch.tensor([[0.0, 2.0], [3.0, 0.0]], device=device)
    loss = info_nce(q, c, torch.tensor([1], device=device), 0.5)
    torch.testing.assert_close(loss, torch.log1p(torch.exp(torch.tensor([-2.0], device=device))))


def test_left_out_candidates_change_nothing(device):
    q, c, positives, _ = batch(4, 9, 16, torch.float32, device)
    ids = torch.arange(9, device=device)
    want = info_nce(q, c, positives, 0.1, document_ids_M=ids)
    doubled = torch.cat([c, c[positives]]), torch.cat([ids, ids[positives]])
    own = info_nce(q[:1], doubled[0], positives[:1], 0.1, document_ids_M=doubled[1])
    others = torch.cat([c, c[positives[1:]]])
    plain = info_nce(q[:1], others, positives[:1], 0.1)
    torch.testing.assert_close(own, plain)  # its own positive's copy is hidden, the others' copies are not
    assert own > want[:1]


def test_columns_past_the_last_prefix_have_no_gradient(device, interpreted):
    q, c, positives, _ = batch(4, 9, 32, torch.float32, device)
    _, dq, dc = gradients(info_nce, q, c, positives, torch.ones(1, 4, device=device), {"prefixes": [20]})
    assert dq[:, :20].any() and not dq[:, 20:].any() and not dc[:, 20:].any()


@pytest.mark.parametrize("wide", [torch.float64])
def test_gradients_by_finite_differences(wide, device):
    q, c, positives, options = batch(3, 5, 6, wide, device, prefixes=[2, 6])
    q, c = q.requires_grad_(), c.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, c: info_nce(q, c, positives, 0.5, **options), (q, c))


def test_is_a_well_behaved_torch_op(device, interpreted):
    q, c, positives, _ = batch(3, 5, 20, torch.float32, device)
    arguments = (q.requires_grad_(), c.requires_grad_(), positives, None, 0.1, 0.5, [8, 20])
    torch.library.opcheck(_info_nce, arguments)


def test_rejects(device):
    q, c, positives, _ = batch(3, 5, 20, torch.float32, device)
    for change, message in [
        ({"documents_MD": c[:, :4]}, "do not fit"),
        ({"documents_MD": c.half()}, "float16"),
        ({"queries_BD": torch.randn(20, 3, device=device).T}, "contiguous"),
        ({"positives_B": positives[:2]}, "expected 3 integers"),
        ({"positives_B": positives.float()}, "float32"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"margin": -0.1}, "margin is -0.1"),
        ({"prefixes": [8, 8]}, r"prefixes are \[8, 8\]"),
        ({"prefixes": [8, 21]}, "from 1 to 20"),
        ({"prefixes": []}, "rising"),
        ({"document_ids_M": positives}, "document_ids_M"),
    ]:
        arguments = {"queries_BD": q, "documents_MD": c, "positives_B": positives, "temperature": 0.1, **change}
        with pytest.raises(ValueError, match=message):
            info_nce(**arguments)
