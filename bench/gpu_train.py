"""A LoRA training step on a GPU: forward, contrastive loss and backward, ours against transformers with PEFT.

Random weights at the shapes of real models, rank 16 on every product of a layer, the base frozen in bf16; half of the
texts are queries, the other half their documents, with log-normal lengths. Both sides have the same updates, texts and
loss. Gradients of all updates are compared before time is taken. The step has no
optimiser: it costs both sides the same. `tflops` counts 4 FLOPs a weight and token (forward, and the gradient of each
product's input; the base has none of its own) and 3.5 times attention's forward.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flashvec.bench.gpu_models import (
    CONFIGS,
    RandomModel,
    draw_texts,
    flops_of,
    meta_decoder,
    product_weights,
    random_model,
    weight_bytes,
)
from flashvec.bench.gpu_session import Row, Session, describe, named
from flashvec.bench.timing import interleave, spread
from flashvec.kernels.dropout import Dropout
from flashvec.kernels.info_nce import info_nce
from flashvec.kernels.mean_pool import mean_pool
from flashvec.kernels.schedule import build_schedule
from flashvec.runtime.decoder import Decoder, LayerLora, LoraPair, Training
from flashvec.runtime.spec import DecoderSpec

RANK, ALPHA = 16, 32
TEMPERATURE = 0.05
REPETITIONS = 7
SAME_GRADIENTS = 0.9  # cosine below which two sides do not compute the same thing
DATASHEET_TFLOPS = 989.0
VOCABULARY = 30_000
PRODUCTS = {"qkv": ("q", "k", "v"), "out": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
Texts = Sequence[np.ndarray]


@dataclass(frozen=True)
class Batches:
    """Texts of one length distribution for one model: tokens of a step."""

    model: str
    mean_length: int
    num_tokens: int

    @property
    def name(self) -> str:
        return f"train {self.model}, lengths log-normal {self.mean_length}"


def batches() -> list[Batches]:
    """What is timed, most valuable first; the 8B model's activations allow 4,096 tokens without recomputation."""
    tokens = {"qwen3-0.6b": 8192, "llama-3.2-1b": 8192, "llama-3-8b": 4096}
    return [Batches(model, mean, count) for model, count in tokens.items() for mean in (128, 64)]


def pairs(wanted: Batches, seed: int, vocabulary: int) -> Texts:
    """An even number of texts: the first half are queries, the second their documents."""
    texts = draw_texts(wanted.num_tokens, wanted.mean_length, seed, vocabulary, longest=512)
    return texts[: len(texts) // 2 * 2]


# --- PEFT ---------------------------------------------------------------------------------------------------


class Peft:
    """transformers' padded model with PEFT's adapters, as most training scripts run it."""

    def __init__(self, module: torch.nn.Module) -> None:
        from peft import LoraConfig, get_peft_model

        targets = [f"{name}_proj" for names in PRODUCTS.values() for name in names]
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, lora_dropout=0.0, bias="none")
        self.model = get_peft_model(module, config, autocast_adapter_dtype=False).train()
        self.device = next(module.parameters()).device
        generator = torch.Generator(self.device).manual_seed(1)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:  # zero at the start of a training: then A would have no gradient to compare
                    parameter.normal_(0.0, 0.02, generator=generator)

        self.updates = {
            name.split("model.", 1)[1].removeprefix("model.").replace(".default.weight", ""): parameter
            for name, parameter in self.model.named_parameters()
            if "lora_" in name
        }

    def leaves(self) -> list[Tensor]:
        return list(self.updates.values())

    def gradients(self) -> dict[str, Tensor]:
        """Of the adapters' matrices by name: layers.0.self_attn.q_proj.lora_A and so on."""
        return {name: x.grad for name, x in self.updates.items() if x.grad is not None}

    def step(self, texts: Texts) -> Tensor:
        lengths = np.array([len(t) for t in texts])
        ids = np.zeros((len(texts), lengths.max()), np.int64)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = text
        mask = torch.from_numpy(np.arange(ids.shape[1]) < lengths[:, None]).to(self.device)
        output = self.model(
            input_ids=torch.from_numpy(ids).to(self.device), attention_mask=mask.long(), use_cache=False
        )
        states = output.last_hidden_state
        vectors = F.normalize((states.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)
        queries, documents = vectors.chunk(2)
        scores = queries @ documents.T / TEMPERATURE
        loss = F.cross_entropy(scores, torch.arange(len(queries), device=self.device))
        _clear(self.updates.values())
        loss.backward()
        return loss.detach()


# --- ours ---------------------------------------------------------------------------------------------------


class Ours:
    """The packed decoder with low-rank updates in fp32: one pass, the loss and its gradients."""

    def __init__(self, decoder: Decoder, updates: Mapping[str, Tensor], dropout: float = 0.0) -> None:
        self.decoder, self.dropout, self.steps = decoder, dropout, 0
        self.pairs: dict[tuple[int, str], LoraPair] = {}
        for layer in range(len(decoder.layers)):
            for product, names in PRODUCTS.items():
                stems = [stem_of(layer, name) for name in names]
                a_PRC = torch.stack([updates[f"{stem}A"].detach() for stem in stems]).float().requires_grad_()
                b_NR = torch.cat([updates[f"{stem}B"].detach() for stem in stems]).float().requires_grad_()
                self.pairs[layer, product] = LoraPair(a_PRC, b_NR, (ALPHA / RANK,) * len(names))

    def _training(self) -> Training:
        drop = Dropout(self.dropout, seed=1, step=self.steps) if self.dropout else None
        layers = [
            LayerLora(**{product: self.pairs[layer, product] for product in PRODUCTS})
            for layer in range(len(self.decoder.layers))
        ]
        return Training(layers, attention_dropout=drop, lora_dropout=drop)

    def gradients(self) -> dict[str, Tensor]:
        """By the names that PEFT gives its matrices."""
        spec = self.decoder.spec
        found: dict[str, Tensor] = {}
        H, G, K = spec.num_heads, spec.num_kv_heads, spec.head_size
        splits = {"qkv": [H * K, G * K, G * K], "gate_up": [spec.mlp_size] * 2}
        for (layer, product), pair in self.pairs.items():
            assert pair.a_PRC.grad is not None and pair.b_NR.grad is not None
            parts = pair.b_NR.grad.split(splits.get(product, [spec.hidden_size]))
            for name, a_RC, b_nR in zip(PRODUCTS[product], pair.a_PRC.grad, parts, strict=True):
                found |= {f"{stem_of(layer, name)}A": a_RC, f"{stem_of(layer, name)}B": b_nR}
        return found

    def step(self, texts: Texts) -> Tensor:
        decoder, spec = self.decoder, self.decoder.spec
        self.steps += 1
        lengths = [len(t) for t in texts]
        stops = np.cumsum(lengths)
        plan = decoder.row_plan(int(stops[-1])) if decoder.device.type != "cpu" else (int(stops[-1]),)
        schedule = build_schedule(lengths, sum(plan), decoder.device, identities=range(len(texts)))
        ids_T = torch.from_numpy(np.concatenate(texts)).to(decoder.device)
        spans_S2 = torch.from_numpy(np.stack([stops - lengths, stops], 1)).to(decoder.device)
        stream = decoder.run(ids_T, schedule, plan, False, training=self._training())
        vectors = mean_pool(
            stream.hidden_TD,
            spans_S2,
            decoder.norm_D,
            spec.norm_eps,
            norm_offset=spec.norm_offset,
            delta_TD=stream.delta_TD,
            post_norm_weight_D=stream.post_norm_D,
            normalize=True,
            longest=max(lengths),
        )
        queries, documents = (x.contiguous() for x in vectors.chunk(2))
        loss = info_nce(queries, documents, torch.arange(len(queries), device=decoder.device), TEMPERATURE).mean()
        _clear(x for pair in self.pairs.values() for x in (pair.a_PRC, pair.b_NR))
        loss.backward()
        return loss.detach()


def stem_of(layer: int, name: str) -> str:
    """The start of a matrix's name, to be followed by A or B."""
    block = "self_attn" if name in "qkvo" else "mlp"
    return f"layers.{layer}.{block}.{name}_proj.lora_"


def _clear(parameters: Iterable[Tensor]) -> None:
    for x in parameters:
        x.grad = None


# --- comparing and timing -------------------------------------------------------------------------------------


def sides(model: RandomModel) -> dict[str, Callable[[], Any]]:
    """Who trains; PEFT is first: it wraps the module whose updates ours copies."""
    peft = Peft(model.module)
    return {
        "transformers + PEFT, sdpa padded": lambda: peft,
        "flashvec": lambda: Ours(model.decoder, peft.updates),
        "flashvec, dropout 0.1": lambda: Ours(model.decoder, peft.updates, 0.1),
    }


def time_batches(session: Session, wanted: Batches, model: RandomModel, vocabulary: int = VOCABULARY) -> None:
    """Rows of one length distribution."""
    texts = [pairs(wanted, seed, vocabulary) for seed in range(REPETITIONS)]
    made: dict[str, Any] = {}
    rows: list[Row] = []
    found: dict[str, Row] = {}
    for name, make in sides(model).items():
        if not session.takes(name):
            continue
        try:
            side = make()
            peak = _peak(session, partial(side.step, texts[-1]))
            made[name], found[name] = side, {"peak_gib": peak}
        except Exception as error:  # one side without memory must not take the other's figures along
            rows.append({"variant": name, "missing": describe(error)})
            if name == "flashvec":
                session.fail(f"{wanted.name}: {describe(error)}")
        session.settle()  # past the handler: until then the error holds what its frames held
    for name, wrong in compared(made, texts[0]).items():
        found[name] |= wrong
        if "wrong" in wrong:
            rows.append({"variant": name, **wrong})
            session.fail(f"{wanted.name}: {name}: {wrong['wrong']}")
            del made[name]
    variants: dict[str, Callable[[int], Any]] = {n: partial(_step, session, side, texts) for n, side in made.items()}
    seconds = interleave(variants, REPETITIONS) if variants else {}
    spec = model.spec.decoder
    for name, times in seconds.items():
        tokens = [sum(map(len, t)) for t in texts]
        tflops = [step_flops(spec, [len(x) for x in t]) / s / 1e12 for t, s in zip(texts, times, strict=True)]
        rows.append(
            {
                "variant": name,
                "tokens_per_s": round(median(n / s for n, s in zip(tokens, times, strict=True))),
                "spread": spread(times),
                "tflops": float(f"{median(tflops):.4g}"),
                "share_of_989": round(median(tflops) / DATASHEET_TFLOPS, 3),
                "repetitions": len(times),
                **found[name],
            }
        )
    same = {"benchmark": "gpu train", "model": wanted.model, "lengths": f"log-normal {wanted.mean_length}"}
    session.keep([{**same, "tokens": wanted.num_tokens, **row} for row in rows])
    session.settle()


def compared(made: dict[str, Any], texts: Texts) -> dict[str, Row]:
    """Cosine of our gradients to PEFT's; the side with dropout has masks of its own and is not compared."""
    theirs = next((side for name, side in made.items() if "PEFT" in name), None)
    ours = made.get("flashvec")
    if theirs is None or ours is None:
        return {}
    found = []
    for side in (ours, theirs):
        side.step(texts)
        found.append(side.gradients())
    assert found[0].keys() == found[1].keys()
    ours_flat, theirs_flat = (torch.cat([one[name].flatten().float() for name in sorted(one)]) for one in found)
    row: Row = {"gradient_cosine": round(float(F.cosine_similarity(ours_flat, theirs_flat, dim=0)), 6)}
    if not row["gradient_cosine"] >= SAME_GRADIENTS:
        row["wrong"] = f"gradients have cosine {row['gradient_cosine']} to PEFT's"
    return {"flashvec": row}


def step_flops(spec: DecoderSpec, lengths: Sequence[int]) -> float:
    """4 a weight and token, and attention's forward 3.5 times."""
    products = 2.0 * sum(lengths) * product_weights(spec) * spec.num_layers
    return 2 * products + 3.5 * (flops_of(spec, lengths) - products)


def _step(session: Session, side: Any, texts: Sequence[Texts], repetition: int) -> None:
    side.step(texts[repetition])
    if session.device.type == "cuda":
        torch.cuda.synchronize(session.device)


def _peak(session: Session, step: Callable[[], Any]) -> float:
    """GiB that a step needs beyond what lay there before; the first of two also compiles."""
    step()
    if session.device.type != "cuda":
        return 0.0
    session.settle()
    torch.cuda.reset_peak_memory_stats(session.device)
    before = torch.cuda.memory_allocated(session.device)
    step()
    session.settle()
    return round((torch.cuda.max_memory_allocated(session.device) - before) / 2**30, 2)


def run(session: Session, only: str = "") -> None:
    """All batches, of those whose name `only` finds, that there is time and memory for."""
    model: RandomModel | None = None
    for wanted in batches():
        if not named(only, wanted.name) or not session.begin(wanted.name, 40):
            continue
        model = None  # PEFT has wrapped the last one's module
        session.settle()
        config = CONFIGS[wanted.model]
        if torch.cuda.mem_get_info(session.device)[0] < 3 * weight_bytes(config):
            session.skipped.append(f"{wanted.name}: not enough memory")
            continue
        model = random_model(wanted.model, config, session.device, torch.bfloat16)
        time_batches(session, wanted, model)


def record(wanted: Batches) -> None:
    """Run our step on meta tensors, for the kernels' recording."""
    decoder = meta_decoder(CONFIGS[wanted.model], torch.bfloat16)
    for dropout in (0.0, 0.1):
        Ours(decoder, meta_updates(decoder.spec), dropout).step(pairs(wanted, 0, VOCABULARY))


def meta_updates(spec: DecoderSpec) -> dict[str, Tensor]:
    """The updates' shapes."""
    D, F_, K, H, G = spec.hidden_size, spec.mlp_size, spec.head_size, spec.num_heads, spec.num_kv_heads
    rows = {"q": H * K, "k": G * K, "v": G * K, "o": D, "gate": F_, "up": F_, "down": D}
    columns = {"o": H * K, "down": F_}
    shapes = {name: {"A": (RANK, columns.get(name, D)), "B": (rows[name], RANK)} for name in rows}
    return {
        f"{stem_of(layer, name)}{letter}": torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for layer in range(spec.num_layers)
        for name, both in shapes.items()
        for letter, shape in both.items()
    }


def summary(rows: Sequence[Row]) -> list[str]:
    """One line per variant."""
    lines = []
    for row in rows:
        if row["benchmark"] != "gpu train":
            continue
        head = f"{row['model']:13} {row['lengths']:15} {row['variant']:34}"
        if "tokens_per_s" in row:
            cosine = f", gradients' cosine {row['gradient_cosine']:.5f}" if "gradient_cosine" in row else ""
            lines.append(
                f"{head} {row['tokens_per_s']:9,} tokens/s {row['spread']:>5} {row['share_of_989']:6.1%} of 989 TF/s "
                f"{row['peak_gib']:5.1f} GiB{cosine}"
            )
        else:
            lines.append(f"{head} {(row.get('missing') or row.get('wrong', ''))[:60]}")
    return ["training: forward and backward of a LoRA step", *lines] if lines else []
