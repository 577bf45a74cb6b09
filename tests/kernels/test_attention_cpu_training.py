"""The CPU's attention with a gradient, and with dropout, against the reference."""

from functools import partial

import pytest
import torch
from gradients import assert_op_and_gradients

from flashvec.kernels import attention_cpu_training
from flashvec.kernels.attention import attention, attention_reference
from flashvec.kernels.dropout import Dropout, draws_cpu
from flashvec.kernels.schedule import build_schedule

LENGTHS = [70, 33, 33, 36, 24, 20, 18, 9, 5, 5, 4, 3, 1, 1, 0]  # filled up: 72, 40, 24 and 16
OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (4, 9)},
    "softcap causal window": {"softcap": 0.7, "causal": True, "window": 9},
    "dropout": {"dropout": Dropout(0.3, seed=5, step=1, site=2)},
    "dropout softcap window": {"dropout": Dropout(0.6, seed=5), "softcap": 0.7, "window": 30},
}


@pytest.fixture(autouse=True)
def _on_cpu(device):
    if device == "cuda":
        pytest.skip("the CPU's own form")


def problem(K, dtype, filling=4):
    schedule = build_schedule(LENGTHS, sum(LENGTHS) + filling, identities=range(7, 7 + len(LENGTHS)))
    return schedule, [torch.randn(len(schedule.positions), x, K).to(dtype) for x in (6, 2, 2)]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("block_scores", "run_rows"), [(1 << 22, 1 << 15), (1 << 22, 400), (6 * 40 * 40 * 2, 1 << 15), (6 * 40 * 10, 1)]
)
def test_output_and_gradients(name, dtype, block_scores, run_rows, monkeypatch):
    """Also in blocks: of two sequences of a group, and of a few queries of one; masks for few of them at a time."""
    monkeypatch.setattr(attention_cpu_training, "BLOCK_SCORES", block_scores)
    monkeypatch.setattr(attention_cpu_training, "RUN_ROWS", run_rows)
    schedule, leaves = problem(16, dtype)
    run = partial(attention, schedule=schedule, scale=0.3, **OPTIONS[name])
    reference = partial(attention_reference, schedule=schedule, scale=0.3, **OPTIONS[name])
    assert_op_and_gradients(run, lambda *x: reference(*x)[0], leaves)


def test_dropout_without_a_gradient_has_the_bits_of_the_pass_with_one():
    """A pass that only reads vectors and the one that is differentiated later must not differ."""
    schedule, leaves = problem(16, torch.float32)
    run = partial(attention, schedule=schedule, scale=0.3, dropout=Dropout(0.3, seed=1))
    with torch.no_grad():
        plain = run(*leaves)
    assert torch.equal(plain, run(*(x.requires_grad_() for x in leaves)).detach())


def test_short_blocks_draw_their_masks_together_for_a_bounded_number_of_rows(monkeypatch):
    rows = []
    monkeypatch.setattr(attention_cpu_training, "RUN_ROWS", 450)
    monkeypatch.setattr(
        attention_cpu_training, "draws_cpu", lambda key, *rest: rows.append(len(key[0])) or draws_cpu(key, *rest)
    )
    schedule = build_schedule([40, 24, 16, 16, 8], identities=range(5))
    q, k, v = (torch.randn(len(schedule.positions), x, 16) for x in (6, 2, 2))
    attention(q, k, v, schedule, scale=0.3, dropout=Dropout(0.3, seed=1))
    assert rows == [6 * (40 + 24), 6 * 3 * 16]  # a text of 8 tokens fills 16


def test_masks_go_by_identity_not_by_place():
    schedule, (q, k, v) = problem(16, torch.float32, filling=0)
    drop = Dropout(0.3, seed=1)
    whole = attention(q, k, v, schedule, scale=0.3, dropout=drop)
    rows = slice(70, 103)  # the second sequence
    alone = build_schedule([33], identities=[8])
    got = attention(q[rows], k[rows], v[rows], alone, scale=0.3, dropout=drop)
    torch.testing.assert_close(got, whole[rows], rtol=0, atol=1e-6)
    other = attention(q[rows], k[rows], v[rows], build_schedule([33], identities=[9]), scale=0.3, dropout=drop)
    assert float((got - other).abs().max()) > 0.01


@pytest.mark.parametrize("drop", [None, Dropout(0.3, seed=1)], ids=["plain", "dropout"])
def test_probabilities_that_are_kept_give_the_bits_of_those_that_are_made_again(drop, monkeypatch):
    schedule, leaves = problem(16, torch.float32)
    found = []
    for longest in (64, 24, 0):
        monkeypatch.setattr(attention_cpu_training, "KEPT_LENGTH", longest)
        own = [x.clone().requires_grad_() for x in leaves]
        out = attention(*own, schedule, scale=0.3, dropout=drop)
        out.square().sum().backward()
        found.append([out.detach(), *(x.grad for x in own)])
    for again in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], again, strict=True))


def test_scores_of_long_texts_are_not_kept():
    """Between forward and backward q, k and v live, and nothing of the size of scores."""
    schedule = build_schedule([256])
    leaves = [torch.randn(256, 4, 8).requires_grad_() for _ in range(3)]
    sizes: list[int] = []

    def note(x):
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        attention(*leaves, schedule, scale=0.3)
    assert sizes == [256 * 4 * 8] * 3


@pytest.mark.parametrize("drop", [None, Dropout(0.3, seed=1)], ids=["plain", "dropout"])
def test_of_texts_of_a_few_tokens_no_filling_is_kept(drop):
    """They fill up to 16 tokens: a graph of words would hold q, k and v many times over."""
    lengths = [1, 2, 3] * 40
    schedule = build_schedule(lengths, identities=range(len(lengths)))
    leaves = [torch.randn(sum(lengths), X, 16) for X in (6, 2, 2)]
    sizes: list[int] = []

    def note(x):
        sizes.append(x.numel())
        return x

    run = partial(attention, schedule=schedule, scale=0.3, dropout=drop)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        run(*(x.clone().requires_grad_() for x in leaves))
    assert sizes[:3] == [x.numel() for x in leaves]
    reference = partial(attention_reference, schedule=schedule, scale=0.3, dropout=drop)
    assert_op_and_gradients(run, lambda *x: reference(*x)[0], leaves)


@pytest.mark.parametrize("length", [3, 20, 100])
def test_second_derivatives_are_refused(length):
    schedule = build_schedule([length])
    leaves = [torch.randn(length, 2, 16, requires_grad=True) for _ in range(3)]
    with pytest.raises(RuntimeError, match=r"attention's backward has no gradient: .* no create_graph=True"):
        torch.autograd.grad(attention(*leaves, schedule, scale=0.3).sum(), leaves, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("drop", [None, Dropout(0.2, seed=1)], ids=["plain", "dropout"])
@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_of_nothing_the_gradient_is_nothing(lengths, drop, dtype):
    schedule = build_schedule(lengths, 3, identities=range(len(lengths)))
    leaves = [torch.randn(3, X, 16, dtype=dtype).requires_grad_() for X in (4, 2, 2)]
    out = attention(*leaves, schedule, scale=0.25, dropout=drop)
    assert out.shape == (3, 4, 16) and not out.any()
    assert not any(gradient.any() for gradient in torch.autograd.grad(out.sum(), leaves))
