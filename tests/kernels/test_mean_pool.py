from contextlib import nullcontext

import pytest
import torch
from compare import assert_as_close_as_torch
from gradients import HALVES, assert_op_and_gradients, dense_past_2_31, far_apart, outputs_and_gradients, surrounded
from hypothesis import given, settings
from hypothesis import strategies as st

from flashvec.kernels import backend, mean_pool_bwd, mean_pool_fwd
from flashvec.kernels.mean_pool import mean_pool, mean_pool_reference
from flashvec.kernels.pool_spans import MODES
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


@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_adds_cuts_and_normalises(mode, post, device):
    x, delta = torch.randn(10, 24, device=device), torch.randn(10, 24, device=device, dtype=torch.bfloat16)
    w, post_weight = torch.randn(2, 24, device=device)
    spans = torch.tensor(SPANS, device=device)
    added = rms_norm(delta, post_weight, 1e-2, 1.0, torch.float32) if post else delta
    y = rms_norm(x + added, w, 1e-2, 1.0)
    want = torch.stack([by_hand(y[a:b], mode, 1) for a, b in SPANS])[:, :10]
    options = {"delta_TD": delta, "post_norm_weight_D": post_weight if post else None, "norm_offset": 1.0}
    got = mean_pool(x, spans, w, 1e-2, mode=mode, truncate_dim=10, **options)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    got = mean_pool(x, spans, w, 1e-2, mode=mode, truncate_dim=10, normalize=True, **options)
    torch.testing.assert_close(got, want / want.norm(dim=1, keepdim=True), rtol=1e-6, atol=1e-6)


def test_a_zero_vector_stays_zero(device):
    x, w = torch.zeros(3, 8, device=device), torch.ones(8, device=device)
    assert not mean_pool(x, torch.tensor([[0, 3]], device=device), w, 1e-6, normalize=True).any()


def test_rejects(device):
    x, w = torch.zeros(3, 2, device=device), torch.ones(2, device=device)
    with pytest.raises(ValueError, match="'median'"):
        mean_pool(x, torch.zeros(1, 2, dtype=torch.int64), w, 1e-6, mode="median")
    with pytest.raises(ValueError, match=r"\[S, 2\]"):
        mean_pool(x, torch.zeros(2, dtype=torch.int64), w, 1e-6)
    spans = torch.zeros(1, 2, dtype=torch.int64, device=device)
    for match, options in [
        (r"delta_TD is \(2, 2\)", {"delta_TD": x[:2]}),
        ("norms delta_TD, which is None", {"post_norm_weight_D": w}),
        (r"post_norm_weight_D is \(1,\)", {"delta_TD": x, "post_norm_weight_D": w[:1]}),
        ("truncate_dim is 3, vectors have 2", {"truncate_dim": 3}),
        (r"first_weights_S is \(2,\), there are 1", {"first_weights_S": torch.ones(2, device=device)}),
    ]:
        with pytest.raises(ValueError, match=match):
            mean_pool(x, spans, w, 1e-6, **options)
    with pytest.raises(ValueError, match=r"strides \(1, 2\)"):
        mean_pool(x, torch.zeros(2, 2, dtype=torch.int64, device=device).T, w, 1e-6)
    with pytest.raises(ValueError, match="x_TD's rows must be contiguous"):
        mean_pool(x.T.contiguous().T, spans, w, 1e-6)


# --- the kernel -------------------------------------------------------------------------------------------

ROWS = 40
LONG_SPANS = [[0, 4], [2, 3], [5, 38], [38, 39], [9, 21]]  # of one chunk, two, and three that had to grow


@pytest.fixture
def short_chunks(monkeypatch):
    """Spans of 40 rows are long ones: chunks of 8 rows or more, four rows a step, at most three chunks."""
    for name, value in {"CHUNK": 8, "MAX_CHUNKS": 3, "TILE": 256}.items():
        monkeypatch.setattr(mean_pool_fwd, name, value)


def pooled(form, spans, delta, **options):
    """`form` as a function of x, the norm's weight, and, as far as there are any, delta and the post-norm's weight."""

    def op(x, w, *more):
        names = ("delta_TD", "post_norm_weight_D")[: len(more)]
        return form(x, spans, w, 1e-2, **options, **dict(zip(names, more, strict=True)))

    return op


def leaves(dtype, delta, device, D=48):
    tensors = [torch.randn(ROWS, D, device=device).to(dtype), torch.randn(D, device=device)]
    if delta != "none":
        tensors.append(torch.randn(ROWS, D, device=device).to(HALVES[0] if dtype == torch.float32 else dtype))
    return tensors + ([torch.randn(D, device=device)] if delta == "post" else [])


@pytest.mark.parametrize(
    ("delta", "cut", "normalize", "dtype"),
    [
        ("none", 33, True, torch.float32),
        ("post", None, False, torch.float32),
        *(("plain", 33, False, half) for half in HALVES),
        *(("post", 33, True, half) for half in HALVES),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_kernel_and_its_gradients(mode, delta, cut, normalize, dtype, device, interpreted, short_chunks):
    spans = torch.tensor(LONG_SPANS, device=device)
    options = {"mode": mode, "truncate_dim": cut, "normalize": normalize, "norm_offset": 1.0}
    options["first_weights_S"] = torch.tensor([1, 3, 5, 1, 7], device=device)
    op, reference = (pooled(form, spans, delta, **options) for form in (mean_pool, mean_pool_reference))
    tensors = leaves(dtype, delta, device)
    before = backend.launches.copy()
    if mode == "max":
        truth = reference(*(t.double() for t in tensors))
        assert_as_close_as_torch(op(*tensors), reference(*tensors), truth)
    else:
        assert_op_and_gradients(op, reference, tensors)
    ran = backend.launches - before
    assert ran["_mean_pool_fwd_kernel"] == 1
    assert ran["_mean_pool_finish_kernel"] == (mode not in ("last", "cls"))
    assert ran["_mean_pool_bwd_kernel"] == (mode != "max")


@pytest.mark.parametrize("mode", MODES)
def test_kernel_gives_the_same_bits_in_any_batch(mode, device, interpreted, short_chunks, monkeypatch):
    x, w, delta, post = leaves(torch.float32, "post", device)
    options = {"mode": mode, "delta_TD": delta, "post_norm_weight_D": post, "normalize": True}
    spans = torch.tensor(LONG_SPANS, device=device)
    together = mean_pool(x, spans, w, 1e-6, **options)
    for i, longest in enumerate((4, 10 * ROWS, None, 1, 12)):
        alone = mean_pool(x, spans[i : i + 1], w, 1e-6, longest=longest, **options)
        assert torch.equal(together[i], alone[0])
    monkeypatch.setattr(mean_pool_fwd, "PARTIAL_BYTES", 2 * 3 * 48 * 4)  # room for two spans' chunks
    order = torch.tensor([4, 2, 0, 3, 1], device=device)
    assert torch.equal(together[order], mean_pool(x, spans[order].to(torch.int32), w, 1e-6, **options))


@pytest.mark.parametrize("mode", ["weighted_mean", "max"])
@pytest.mark.parametrize("longest", [1, 9])
def test_kernel_is_right_where_a_span_is_longer_than_said(longest, mode, device, interpreted, short_chunks):
    x, w = leaves(torch.float32, "none", device)
    spans = torch.tensor(LONG_SPANS, device=device)
    got = mean_pool(x, spans, w, 1e-2, mode=mode, longest=longest)
    torch.testing.assert_close(got, mean_pool_reference(x, spans, w, 1e-2, mode=mode), rtol=1e-6, atol=1e-6)


def test_kernel_with_its_own_chunks(device, interpreted):
    x, w = torch.randn(300, 16, device=device), torch.randn(16, device=device)
    spans = torch.tensor([[0, 127], [1, 129], [3, 132], [0, 300]], device=device)  # either side of a chunk
    truth = mean_pool_reference(x.double(), spans, w.double(), 1e-2)
    assert_as_close_as_torch(mean_pool(x, spans, w, 1e-2), mean_pool_reference(x, spans, w, 1e-2), truth)


def context(device):
    return backend.interpreted() if device == "cpu" else nullcontext()


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, ROWS - 1), st.integers(1, 20)), min_size=0, max_size=5),
    st.sampled_from([m for m in MODES if m != "max"]),
)
def test_kernel_with_any_spans(starts_and_counts, mode):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [(start, min(ROWS, start + count)) for start, count in starts_and_counts]
    spans = torch.tensor(rows, dtype=torch.int64, device=device).view(-1, 2)
    tensors = leaves(torch.float32, "none", device, D=8)
    got, want = (
        outputs_and_gradients(pooled(form, spans, "none", mode=mode), tensors)
        for form in (lambda *a, **k: _within(device, mean_pool, a, k), mean_pool_reference)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def _within(device, form, args, kwargs):
    with context(device):
        return form(*args, **kwargs)


def test_backward_finds_its_spans_among_many(device, interpreted, monkeypatch):
    monkeypatch.setattr(mean_pool_bwd, "SPANS", 4)
    spans = torch.tensor([[i, i + 1 + i % 3] for i in range(0, ROWS - 3, 4)] + [[0, ROWS]], device=device)
    op, reference = (pooled(form, spans, "none") for form in (mean_pool, mean_pool_reference))
    assert_op_and_gradients(op, reference, leaves(torch.float32, "none", device))


def test_backward_sums_the_weights_gradients_over_many_tiles(device, interpreted, monkeypatch):
    monkeypatch.setattr("flashvec.kernels.rms_norm.PARTIALS", 2)
    monkeypatch.setattr(mean_pool_bwd, "TILE", 256)  # eight rows: five tiles, two programs
    spans = torch.tensor(LONG_SPANS, device=device)
    op, reference = (pooled(form, spans, "post") for form in (mean_pool, mean_pool_reference))
    assert_op_and_gradients(op, reference, leaves(torch.float32, "post", device))


def test_a_rows_gradient_has_the_same_bits_in_any_batch(device, interpreted):
    x, w = leaves(torch.float32, "none", device)
    spans = torch.tensor([[0, 9], [9, 21], [21, 40]], device=device)
    _, together, _ = outputs_and_gradients(pooled(mean_pool, spans, "none"), [x, w])
    _, backwards, _ = outputs_and_gradients(lambda x, w: pooled(mean_pool, spans.flip(0), "none")(x, w).flip(0), [x, w])
    assert torch.equal(together, backwards)
    _, again, _ = outputs_and_gradients(pooled(mean_pool, spans, "none"), [x, w])
    assert torch.equal(together, again)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # eps 0 divides by zero in the rows of a tile past the last
@pytest.mark.parametrize("mode", MODES)
def test_kernel_reads_its_own_rows_alone(mode, device, interpreted, short_chunks):
    x, w, delta, post = leaves(torch.float32, "post", device)
    spans = torch.tensor([[1, 18], [20, 23]], device=device)
    held = torch.zeros(ROWS, 1, dtype=torch.bool, device=device)
    held[1:18] = held[20:23] = True

    def op(x, w, delta, post):
        return mean_pool(x, spans, w, 0.0, mode=mode, delta_TD=delta, post_norm_weight_D=post, normalize=True)

    def among_nan(x, w, delta, post):
        x, delta = (surrounded(torch.where(held, t, float("nan"))) for t in (x, delta))
        return op(x, w, delta, post)

    if mode == "max":
        assert torch.equal(op(x, w, delta, post), among_nan(x, w, delta, post))
        return
    got, want = (outputs_and_gradients(form, [x, w, delta, post]) for form in (among_nan, op))
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(got, want, strict=True))
    assert not got[1][~held.squeeze(1)].any() and got[1][held.squeeze(1)].any()


def test_kernel_shows_a_row_that_is_not_finite(device, interpreted, short_chunks):
    x, w = leaves(torch.float32, "none", device)
    x[20, 5] = float("nan")
    spans = torch.tensor([[0, 40], [0, 19]], device=device)
    for mode in ("mean", "max"):
        got = mean_pool(x, spans, w, 1e-6, mode=mode, normalize=True)
        assert got[0].isnan().all() and got[1].isfinite().all()


def test_max_is_differentiable_through_the_reference(device, interpreted):
    x, w = leaves(torch.float32, "none", device)
    spans = torch.tensor(LONG_SPANS, device=device)
    got, want = (
        outputs_and_gradients(pooled(form, spans, "none", mode="max"), [x, w])
        for form in (mean_pool, mean_pool_reference)
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_op_is_well_formed(device, interpreted):
    x, w, delta, post = (t.requires_grad_() for t in leaves(torch.float32, "post", device, D=8))
    spans, first = torch.tensor(LONG_SPANS[:3], device=device), torch.tensor([1, 2, 3], device=device)
    op = torch.ops.flashvec.mean_pool.default
    torch.library.opcheck(op, (x, delta, post, w, spans, first, 1e-6, 0.0, "weighted_mean", 4, True, ROWS))
    torch.library.opcheck(op, (x, None, None, w, spans[:0], None, 1e-6, 0.0, "mean", 8, False, 7))


@pytest.mark.parametrize("mode", ["mean", "last", "max"])
def test_reads_rows_past_2_31_elements(mode, device, interpreted):
    x, w = torch.randn(3, 48, device=device), torch.randn(48, device=device)
    spans = torch.tensor([[0, 1], [1, 3]], device=device)
    op, reference = (lambda x, w, of=of: of(x, spans, w, 1e-6, mode=mode) for of in (mean_pool, mean_pool_reference))
    assert_op_and_gradients(op, reference, [far_apart(x), w])


@dense_past_2_31()
def test_rows_past_2_31_elements():
    T, D = 2**31 // 4096 + 2, 4096
    x, w = torch.ones(T, D, dtype=torch.bfloat16, device="cuda"), torch.ones(D, device="cuda")
    x[-2:] = torch.randn(2, D)
    want = mean_pool_reference(x[-2:], torch.tensor([[0, 2]], device="cuda"), w, 1e-6)
    got = mean_pool(x, torch.tensor([[T - 2, T]], device="cuda"), w, 1e-6)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
