"""torch.compile traces the ops of a training step as one graph, which computes what they compute without it."""

import numpy as np
import pytest
import torch

from flashvec.kernels import backend
from flashvec.kernels.add_rms_norm import add_rms_norm
from flashvec.kernels.attention import attention
from flashvec.kernels.cross_entropy import cross_entropy
from flashvec.kernels.info_nce import info_nce
from flashvec.kernels.lora import lora
from flashvec.kernels.mean_pool import mean_pool
from flashvec.kernels.norm_rope import norm_rope
from flashvec.kernels.rms_norm import rms_norm
from flashvec.kernels.rope import Rope, rope, rope_table
from flashvec.kernels.schedule import build_schedule
from flashvec.kernels.swiglu import swiglu

LENGTHS = [5, 1, 9]
T, D, H, G, K, F, V = sum(LENGTHS), 24, 2, 1, 16, 20, 40


def problem(device):
    schedule = build_schedule(LENGTHS, device=device)
    stops = np.cumsum(LENGTHS)
    spans = torch.tensor(np.stack([stops - LENGTHS, stops], 1), device=device)
    cos, sin = (table[schedule.positions].to(device) for table in rope_table(Rope(), K, max(LENGTHS)))
    rows = torch.tensor([1, 4, 9], device=device)
    N = (H + 2 * G) * K
    sizes = {"x": (T, D), "a": (1, 4, D), "b": (N, 4), "weight": (D,), "head": (K,)}
    leaves = {name: torch.randn(*size, device=device) for name, size in sizes.items()}
    w_qkv, w_out, w_up, w_down, w_vocab = (
        torch.randn(*size, device=device) / size[1] ** 0.5 for size in ((N, D), (D, H * K), (2 * F, D), (D, F), (V, D))
    )

    def step(x, a, b, weight, head):
        qkv = lora(rms_norm(x, weight, 1e-6), w_qkv, a, b, scales=2.0).view(T, H + 2 * G, K)
        q, k, v = qkv.split([H, G, G], 1)
        out = attention(rope(q, cos, sin), norm_rope(k, cos, sin, head, 1e-6), v, schedule, scale=K**-0.5)
        h, normed = add_rms_norm(x, out.reshape(T, H * K) @ w_out.T, weight, 1e-6)
        h = h + swiglu(normed @ w_up.T, "silu") @ w_down.T
        pooled = mean_pool(h, spans, weight, 1e-6)
        contrast = info_nce(pooled, pooled.roll(1, 0), torch.arange(3, device=x.device), 0.1).sum()
        return contrast + cross_entropy(h, w_vocab, rows, rows + 3)

    return step, leaves


def gradients(step, leaves):
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    loss = step(**leaves)
    return loss.detach(), torch.autograd.grad(loss, list(leaves.values()))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_a_training_step_is_one_graph(device, interpreted):
    step, leaves = problem(device)
    loss, grads = gradients(step, leaves)  # and makes the tile lists
    backend.launches.clear()
    compiled_loss, compiled_grads = gradients(torch.compile(step, backend="aot_eager", fullgraph=True), leaves)
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(compiled_grads, grads)
    assert backend.launches["_attention_fwd_kernel"] and backend.launches["_attention_bwd_dkv_kernel"]


def test_tile_lists_are_made_before(device, interpreted):
    step, leaves = problem(device)
    with pytest.raises(Exception, match="run attention once with this schedule before"):
        torch.compile(step, backend="aot_eager", fullgraph=True)(**leaves)


CPU_FORMS = {
    "rope": lambda x, w, cos, sin: rope(x, cos, sin),
    "norm_rope": lambda x, w, cos, sin: norm_rope(x, cos, sin, w, 1e-6),
    "swiglu": lambda x, w, cos, sin: swiglu(x.flatten(1), "gelu_tanh"),
    "rms_norm": lambda x, w, cos, sin: rms_norm(x, w, 1e-6),
}


@pytest.mark.parametrize("has_gradient", [False, True])
@pytest.mark.parametrize("name", CPU_FORMS)
def test_forms_of_the_cpu_are_one_graph(name, has_gradient):
    tables = rope_table(Rope(), K, T)
    x, w = torch.randn(T, H, K, requires_grad=has_gradient), torch.rand(K, requires_grad=has_gradient)
    compiled = torch.compile(CPU_FORMS[name], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, w, *tables), CPU_FORMS[name](x, w, *tables))
