"""A tiny model of every family through every kernel: losses and the gradients of low-rank updates are the references'.

The same pass runs twice on the same weights, by the Triton kernels and by the references: layers with dropout and
low-rank updates, pooling, a contrastive and a masked-token loss.
"""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from family_models import CONFIGS, models, texts_of

from flashvec.kernels import backend
from flashvec.kernels.cross_entropy import cross_entropy
from flashvec.kernels.dropout import Dropout
from flashvec.kernels.info_nce import info_nce
from flashvec.kernels.mean_pool import mean_pool
from flashvec.kernels.rms_norm import rms_norm
from flashvec.kernels.schedule import build_schedule, select_queries
from flashvec.runtime.decoder import Decoder, LayerLora, LoraPair, Training

LENGTHS = [1, 3, 9, 10, 19, 30]  # around a window of 9
LONGER = {"llama", "gemma3_text"}  # families whose last text takes two tiles of keys in fp32, and two chunks in pooling
RANK = 3
EVERY_KERNEL = {
    "_add_rms_norm_fwd_kernel",
    "_add_rms_norm_bwd_kernel",
    "_attention_fwd_kernel",
    "_attention_bwd_dkv_kernel",
    "_cross_entropy_fwd_kernel",
    "_cross_entropy_bwd_kernel",
    "_info_nce_fwd_kernel",
    "_info_nce_bwd_kernel",
    "_low_rank_keys_kernel",
    "_low_rank_shrink_kernel",
    "_low_rank_expand_kernel",
    "_low_rank_reduce_kernel",
    "_mean_pool_fwd_kernel",
    "_mean_pool_bwd_kernel",
    "_panel_product_kernel",
    "_rms_norm_fwd_kernel",
    "_rms_norm_bwd_kernel",
    "_swiglu_fwd_kernel",
    "_swiglu_bwd_kernel",
}
OF_LONGER = {"_attention_bwd_dq_kernel", "_mean_pool_finish_kernel"}


def shallow(decoder):
    """Its first layers, two or more, in which every kind of layer occurs: the interpreter takes its time."""
    spec = decoder.spec
    kinds = list(zip(spec.layer_ropes, spec.layer_windows, strict=True))
    count = max(2, *(kinds.index(kind) + 1 for kind in kinds))
    own = {name: getattr(spec, name)[:count] for name in ("layer_ropes", "layer_windows")}
    return Decoder(replace(spec, num_layers=count, **own), decoder.embedding_VD, decoder.layers[:count], decoder.norm_D)


def updates(decoder):
    """Small random updates of every product of every layer."""
    spec, generator = decoder.spec, torch.Generator().manual_seed(2)
    H, G, K, D, F = spec.num_heads, spec.num_kv_heads, spec.head_size, spec.hidden_size, spec.mlp_size
    sizes = {"qkv": (3, D, (H + 2 * G) * K), "out": (1, H * K, D), "gate_up": (2, D, 2 * F), "down": (1, F, D)}

    def pair(P, inputs, outputs):
        shapes = (P, RANK, inputs), (outputs, RANK)
        a, b = ((torch.randn(*shape, generator=generator) * 0.05).requires_grad_() for shape in shapes)
        return LoraPair(a, b, (2.0,) * P)

    return [LayerLora(**{name: pair(*size) for name, size in sizes.items()}) for _ in decoder.layers]


def parameters(lora):
    return [x for layer in lora for pair in vars(layer).values() for x in (pair.a_PRC, pair.b_NR)]


def one_pass(decoder, texts, lora):
    """Both losses and the gradient of every update."""
    spec, lengths = decoder.spec, torch.tensor([len(text) for text in texts])
    schedule = build_schedule(lengths.tolist(), identities=range(5, 5 + len(texts)))
    ids = torch.from_numpy(np.concatenate(texts))
    training = Training(lora, Dropout(0.2, seed=1, step=2), Dropout(0.1, seed=3, step=2))
    h, delta, post_norm = decoder.run(ids, schedule, (len(ids),), False, training=training)
    spans = torch.stack([lengths.cumsum(0) - lengths, lengths.cumsum(0)], 1)
    norm = {"norm_offset": spec.norm_offset, "delta_TD": delta, "post_norm_weight_D": post_norm}
    vectors = mean_pool(h, spans, decoder.norm_D, spec.norm_eps, **norm)
    half = len(texts) // 2
    contrastive = info_nce(vectors[:half], vectors[half:], torch.arange(half), 0.5).mean()
    added = delta if post_norm is None else rms_norm(delta, post_norm, spec.norm_eps, spec.norm_offset)
    states = rms_norm(h + added, decoder.norm_D, spec.norm_eps, spec.norm_offset)
    rows = torch.tensor([4, 7, 30, 60])
    masked = cross_entropy(states, decoder.embedding_VD, rows, ids[rows + 1].long(), scale=0.05)
    (contrastive + masked).backward()
    return contrastive.detach(), masked.detach(), [x.grad for x in parameters(lora)]


@pytest.mark.parametrize("name", [name for name in CONFIGS if " " not in name])  # each family once
def test_kernels_train_as_the_references_do(name, interpreter, monkeypatch):
    decoder = shallow(models(name, "bidirectional")[1])
    is_longer = name in LONGER
    if is_longer:
        monkeypatch.setattr("flashvec.kernels.mean_pool_fwd.CHUNK", 32)
    texts, before = texts_of([*LENGTHS[:-1], 40] if is_longer else LENGTHS), backend.launches.copy()
    want = one_pass(decoder, texts, updates(decoder))
    assert backend.launches == before
    with interpreter():
        got = one_pass(decoder, texts, updates(decoder))
    for ours, theirs in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    largest = max(float(x.abs().max()) for x in want[2])
    for ours, theirs in zip(got[2], want[2], strict=True):
        own = max(float(theirs.abs().max()), 0.01 * largest)  # what is small in itself is a sum of what is not
        assert theirs.any() and float((ours - theirs).abs().max()) <= 1e-5 * own
    ran = backend.launches - before
    rotation = {"_norm_rope_fwd_kernel", "_norm_rope_bwd_kernel"} if decoder.spec.qk_norm else {"_rope_fwd_kernel"}
    wanted = EVERY_KERNEL | rotation | (OF_LONGER if is_longer else set())
    assert set(ran) >= wanted, wanted - set(ran)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "ministral3"])
@pytest.mark.parametrize("kernels", [False, True])
def test_selected_rows_are_those_of_the_whole_pass(name, kernels, interpreter):
    _, decoder = models(name, "bidirectional")
    texts = texts_of([*LENGTHS, 70])
    ids = torch.from_numpy(np.concatenate(texts))
    schedule = build_schedule([len(text) for text in texts])
    spans = np.array([(n // 2, n) for n in schedule.lengths])
    with torch.inference_mode(), interpreter() if kernels else nullcontext():
        h, delta, post = decoder.run(ids, schedule, (len(ids),), False)
        whole = h + (delta if post is None else decoder._norm(delta, post, torch.float32))
        count = int((spans[:, 1] - spans[:, 0]).sum())
        queries = select_queries(schedule, spans, sum(decoder.row_plan(count)))
        h, delta, post = decoder.run(ids, schedule, (len(ids),), False, queries=queries)
        selected = h + (delta if post is None else decoder._norm(delta, post, torch.float32))
    want = whole[queries.rows[:count]]
    scale = want.abs().max()
    torch.testing.assert_close(selected[:count] / scale, want / scale, rtol=0, atol=1e-5)
