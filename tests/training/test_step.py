"""One gradient, however it is made: in one piece, in micro-batches of any split and order, kept, recomputed, spread."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_runs import config_for, tiny_base, write_pairs

from flashvec.kernels import backend
from flashvec.kernels.schedule import filled_length
from flashvec.training.contrastive import Contrastive
from flashvec.training.distributed import World
from flashvec.training.encode import Rates, encode, micro_batches
from flashvec.training.memory import graph_bytes
from flashvec.training.model import load_model
from flashvec.training.run import OBJECTIVES, run_training
from flashvec.training.step import Retention, backward_through

TOLERANCE = 1e-6  # relative error of a gradient, fp32: sums in another order, nothing else


def objective_for(name, tmp_path, **values):
    config = config_for(name, tmp_path, **{"dtype": "float32", "batch_size": 6, **values})
    model = load_model(config, wants_head=name == "mntp")
    generator = torch.Generator().manual_seed(5)
    for _, _, b in model.trainable.lora.matrices():  # with B zero A had no gradient
        b.copy_(torch.randn(b.shape, generator=generator) * 0.05)
    return OBJECTIVES[type(config)](model, config, World())


def gradient_of(objective, step=3):
    for x in objective.model.trainable.parameters().values():
        x.grad = None
    found = objective.step(step)
    return found["loss"], torch.cat([x.grad.flatten() for x in objective.model.trainable.parameters().values()])


def assert_same(got, want):
    assert abs(got[0] - want[0]) <= 1e-6 * max(1.0, abs(want[0]))
    assert want[1].any() and relative(got[1], want[1]) <= TOLERANCE


def relative(got, want):
    """Length of the difference over length."""
    return float((got - want).norm() / want.norm())


WAYS = {
    "one piece": {"micro_batch_tokens": 10_000, "activation_gib": 1.0},
    "all kept": {"micro_batch_tokens": 50, "activation_gib": 1.0},
    "none kept": {"micro_batch_tokens": 50, "activation_gib": 0.0},
    "some kept": {"micro_batch_tokens": 50, "activation_gib": 0.0005},
    "other split": {"micro_batch_tokens": 33, "activation_gib": 0.0},
    "recomputed": {"micro_batch_tokens": 50, "activation_gib": 1.0, "recompute": True},
    "recomputed, none kept": {"micro_batch_tokens": 50, "activation_gib": 0.0, "recompute": True},
}


@pytest.mark.parametrize("name", ["views", "hard negatives", "mntp", "distill"])
def test_every_way_gives_the_same_gradient_with_dropout_on(name, tmp_path):
    kind = {"views": "contrastive", "hard negatives": "contrastive"}.get(name, name)
    # At the default temperature of 0.05 a vector's rounding counts twenty-fold: fp32 left 1.7e-6 in one step.
    values = {"temperature": 0.5} if kind == "contrastive" else {}
    if name == "hard negatives":
        values |= {"pairs": [str(write_pairs(tmp_path / "pairs.jsonl", negatives=3))], "attention_dropout": 0.2}
        values["words"] = 0.25
    want = None
    for way, loop in WAYS.items():
        objective = objective_for(kind, tmp_path, loop=loop, **values)
        got = gradient_of(objective)
        assert_same(got, want := want or got)
        if way == "some kept" and kind == "contrastive":
            rows = objective.batch(3).rows
            packs = micro_batches(rows.lengths, 50, torch.device("cpu"))
            kept = objective.retention.num_kept(objective.model, None, packs, rows.lengths)
            assert 0 < kept < len(packs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["contrastive", "distill"])
def test_memory_that_is_free_does_not_show_in_a_bit(name, dtype, tmp_path):
    """How many graphs are kept may differ between a run and its resumption."""
    kept, found = set(), []
    for gib in (1.0, 0.0002, 0.0):
        objective = objective_for(name, tmp_path, dtype=dtype, loop={"micro_batch_tokens": 30, "activation_gib": gib})
        num_kept = objective.retention.num_kept
        objective.retention.num_kept = lambda *args, num_kept=num_kept: kept.add(n := num_kept(*args)) or n
        found.append(gradient_of(objective)[1])
    assert len(kept) == 3 and found[0].any()
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_dropout_is_really_on_and_differs_between_steps_and_views(tmp_path):
    objective = objective_for("contrastive", tmp_path)
    columns = objective.batch(0)
    training = [objective.rates.training(objective.model.trainable.training(), step) for step in (0, 0, 1)]
    n = columns.num_queries
    with torch.no_grad():
        first, again, later = (encode(objective.model, columns.rows, range(2 * n), t) for t in training)
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert np.array_equal(columns.ids[:n], columns.ids[n:])  # two views of the same texts
    assert (first[:n] - first[n:]).abs().amax(1).gt(1e-4).all()


def test_other_masks_give_another_gradient(tmp_path):
    """The tests of equal gradients would hold, too, if nothing were dropped."""
    objective = objective_for("contrastive", tmp_path)
    _, want = gradient_of(objective)
    objective.rates = Rates(0.2, 0.1, seed=7)
    assert relative(gradient_of(objective)[1], want) > 0.1


def test_order_of_packs_and_rows_does_not_matter(tmp_path):
    objective = objective_for("contrastive", tmp_path, temperature=0.5)
    columns = objective.batch(1)
    model, count = objective.model, len(columns.rows.lengths)
    training = objective.rates.training(model.trainable.training(), 1)

    def run(packs, kept):
        for x in model.trainable.parameters().values():
            x.grad = None
        loss, _ = backward_through(
            lambda own: encode(model, columns.rows.take(own), own, training),
            packs,
            count,
            lambda vectors: objective.loss(vectors, columns),
            num_kept=kept,
        )
        return float(loss), torch.cat([x.grad.flatten() for x in model.trainable.parameters().values()])

    order = np.random.default_rng(0).permutation(count)
    want = run([np.arange(count)], 1)
    assert_same(run([order[:5], order[5:6], order[6:]], 2), want)
    assert_same(run([order[8:], order[:8]], 0), want)


def test_kernels_interpreted_give_the_references_gradient(tmp_path, interpreter):
    objective = objective_for("contrastive", tmp_path, batch_size=2, max_length=8, loop={"micro_batch_tokens": 10_000})
    want = gradient_of(objective)
    before = backend.launches.copy()
    with interpreter():
        got = gradient_of(objective)
    assert abs(got[0] - want[0]) <= 1e-5
    assert relative(got[1], want[1]) <= 1e-5
    assert {"_attention_bwd_dkv_kernel", "_low_rank_reduce_kernel", "_info_nce_bwd_kernel"} <= set(
        backend.launches - before
    )


def test_twenty_steps_with_kernels_and_with_references_agree(tmp_path, interpreter):
    tiny_base(tmp_path / "base", num_hidden_layers=1)  # a kernel takes its time in the interpreter
    values = {"batch_size": 2, "max_length": 6, "optimizer": {"learning_rate": 1e-3}, "loop": {"steps": 20}}
    values["lora"] = {"targets": ["q_proj", "v_proj", "down_proj"]}
    run_training(config_for("contrastive", tmp_path, **values))
    before = backend.launches.copy()
    with interpreter():
        run_training(config_for("contrastive", tmp_path, output=str(tmp_path / "kernels"), **values))
    assert (backend.launches - before)["_attention_bwd_dkv_kernel"] >= 20
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("out", "kernels")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert len(losses[0]) == 20 and losses[1] == pytest.approx(losses[0], rel=1e-4, abs=1e-5)
    kept = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "kernels")]
    ends = [torch.cat([x.flatten() for x in adapter.values()]) for adapter in kept]
    assert relative(ends[1], ends[0]) <= 1e-4


def test_recomputation_keeps_a_fraction(tmp_path):
    sizes = []
    for recompute in (False, True):
        objective = objective_for("contrastive", tmp_path)
        rows, model = objective.batch(0).rows, objective.model
        training = objective.rates.training(model.trainable.training(), 0, recompute)
        known = [*model.weights(), *model.trainable.parameters().values()]
        everyone = np.arange(len(rows.lengths))
        sizes.append(graph_bytes(partial(encode, model, rows, everyone, training), known))
    assert 0 < sizes[1] < 0.3 * sizes[0]


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_what_a_graph_holds_is_what_backward_reads(dropout, tmp_path):
    """Of a layer and token: the stream before each block, attention's output, gate and up, what updates read.

    That is both norms and the activation; with dropout all four inputs' copies, of which zeros say what was dropped.
    Attention holds q, k, v and probabilities of short texts, filled up.
    """
    tiny_base(tmp_path / "base", num_hidden_layers=6)  # so many that what pooling holds hardly counts
    objective = objective_for("contrastive", tmp_path, attention_dropout=0.1, lora={"dropout": dropout})
    rows, model = objective.batch(0).rows, objective.model
    training = objective.rates.training(model.trainable.training(), 0)
    known = [*model.weights(), *model.trainable.parameters().values()]
    everyone = np.arange(len(rows.lengths))
    held = graph_bytes(partial(encode, model, rows, everyone, training), known) / 4 / len(rows.ids)
    spec, rank = model.decoder.spec, objective.config.lora.r
    filled = np.array([filled_length(n) for n in rows.lengths])
    attention = filled.sum() * (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_size
    attention += (filled * filled).sum() * spec.num_heads
    layer = attention / len(rows.ids) + spec.num_heads * spec.head_size
    layer += 2 * spec.hidden_size + 2 * spec.mlp_size + 7 * rank  # 7 updates' x Aᵀ
    layer += 2 * spec.hidden_size + spec.mlp_size
    if dropout:
        layer += spec.hidden_size + 2 * 4  # a copy of attention's output, and masks' keys
    assert held == pytest.approx(spec.num_layers * layer, rel=0.15)


def test_a_gpu_makes_norms_and_activations_again(tmp_path, interpreter):
    tiny_base(tmp_path / "base", num_hidden_layers=2)
    objective = objective_for("contrastive", tmp_path, lora={"dropout": 0.0})
    model, rows = objective.model, objective.batch(0).rows.take(np.arange(2))
    known = [*model.weights(), *model.trainable.parameters().values()]
    encodes = partial(encode, model, rows, np.arange(2), objective.rates.training(model.trainable.training(), 0))
    kept = graph_bytes(encodes, known)
    with interpreter():
        found = graph_bytes(encodes, known)
    spec = model.decoder.spec
    spared = spec.num_layers * (2 * spec.hidden_size + spec.mlp_size) * 4 * len(rows.ids)
    assert found < kept - 0.8 * spared


def test_a_step_takes_four_operations_a_weight_and_token(tmp_path):
    """2 forward and 2 for the gradient of what comes in: frozen weights want none. Updates: 2 and 4."""
    sizes = {"hidden_size": 128, "intermediate_size": 384}  # so large that products are nearly all
    tiny_base(tmp_path / "base", num_hidden_layers=2, **sizes)
    none = {"attention_dropout": 0.0, "lora": {"dropout": 0.0, "r": 4}, "view": "crop"}
    objective = objective_for("contrastive", tmp_path, loop={"micro_batch_tokens": 10_000}, **none)
    rows, model = objective.batch(1).rows, objective.model
    objective.step(0)  # which also measures what a graph holds
    with torch.profiler.profile(record_shapes=True) as profile:
        objective.step(1)
    counted = 0
    for event in profile.key_averages(group_by_input_shape=True):
        if event.key in ("aten::mm", "aten::addmm_"):
            (m, k), (_, n) = event.input_shapes[:2] if event.key == "aten::mm" else event.input_shapes[1:3]
            counted += event.count * 2 * m * k * n
    layers = model.decoder.layers
    weights = sum(w.numel() for x in layers for w in (x.qkv, x.out, x.gate_up, x.down))
    updates = sum(x.numel() for x in model.trainable.parameters().values())
    assert counted == pytest.approx(len(rows.ids) * (4 * weights + 6 * updates), rel=0.15)


def test_retention_fills_its_budget():
    class Fake:
        decoder = type("D", (), {"device": torch.device("cpu")})()
        trainable = type("T", (), {"parameters": lambda self: {}})()

        def weights(self):
            return []

    leaf = torch.ones(1, 1 << 18, requires_grad=True)
    packs = [np.arange(4), np.arange(4, 6), np.array([6])]
    lengths = np.full(7, 8)
    retention = Retention(3.5 / 1024)
    assert retention.num_kept(Fake(), lambda own: (leaf * 2).exp() * len(own), packs, lengths) == 2  # 1 MiB a text
    assert Retention(1.0).num_kept(Fake(), lambda own: (leaf * 2).exp() * len(own), packs, lengths) == 3
    assert Retention(0.0).num_kept(Fake(), lambda own: (leaf * 2).exp() * len(own), packs, lengths) == 0


def test_columns_without_a_gradient_are_refused(tmp_path):
    objective = objective_for("contrastive", tmp_path)
    assert isinstance(objective, Contrastive)
    objective.loss = lambda vectors, columns: vectors[: columns.num_queries].square().sum()
    with pytest.raises(ValueError, match="positives got no gradient"):
        objective.step(0)


def test_masters_of_a_narrow_body_sum_micro_batches_in_fp32(tmp_path):
    config = config_for("contrastive", tmp_path, train="body", dtype="bfloat16", attention_dropout=0.0, view="crop")
    objective = Contrastive(model := load_model(config), config, World())
    weight, master = (own["layers.0.out"] for own in (model.trainable.live, model.trainable.masters))
    handed = []
    weight.register_post_accumulate_grad_hook(lambda x: handed.append(x.grad))
    seen = []
    weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    objective.step(0)
    assert len(seen) > 1 and handed == [None] * len(seen)  # nothing stays in bf16
    want = torch.zeros_like(master)
    for gradient in seen:
        want += gradient.float()
    assert master.grad.dtype == torch.float32 and torch.equal(master.grad, want)
