"""Embedding on a GPU, from token ids on the host to vectors on the host: ours, transformers and what else is installed.

Random weights at the shapes of real models, texts with log-normal lengths, all variants in turn on the same texts, new
ones in every repetition. Vectors are compared before time is taken: with transformers' model in fp32 where it fits
beside the others, else in the same dtype. The share of 989 TFLOP/s counts useful FLOPs; beside it stands what the
model's bare products reach on this device at the same number of rows.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from flashvec.bench.gpu_models import (
    CONFIGS,
    RandomModel,
    draw_texts,
    flops_of,
    meta_decoder,
    model_spec,
    random_model,
    weight_bytes,
)
from flashvec.bench.gpu_session import Row, Session, describe, named
from flashvec.bench.peers_embed import HuggingFacePadded, Ours, SentenceTransformers, Vllm, packs_of
from flashvec.bench.timing import interleave, spread
from flashvec.kernels.schedule import build_schedule
from flashvec.runtime.batches import Batch
from flashvec.runtime.program import embedding_program
from flashvec.runtime.verify import DTYPE_MARGIN

DATASHEET_TFLOPS = 989.0  # bf16 products of an H100
SAME_MODEL = 0.9  # median cosine below which a variant runs another model
VOCABULARY = 30_000  # ids that texts are drawn from
BUDGETS = (16_384, 65_536)
REPETITIONS = 5
COMPARED_TEXTS = 48


@dataclass(frozen=True)
class Profile:
    """Texts of one length distribution for one model."""

    model: str
    mean_length: int
    num_tokens: int

    @property
    def name(self) -> str:
        return f"embed {self.model}, lengths log-normal {self.mean_length}"


def profiles() -> list[Profile]:
    """What is timed, most valuable first."""
    tokens = {"qwen3-0.6b": 131_072, "llama-3-8b": 32_768, "llama-3.2-1b": 131_072, "gemma-3-270m": 131_072}
    return [Profile(model, mean, count) for model, count in tokens.items() for mean in (256, 64)]


def contenders(model: RandomModel, num_tokens: int, vocabulary: int = VOCABULARY) -> dict[str, Callable[[], Any]]:
    """Who runs on so many tokens, and how each is made."""
    found: dict[str, Callable[[], Any]] = {}
    budgets = [budget for budget in BUDGETS if budget <= num_tokens] or list(BUDGETS[:1])
    for budget in budgets:
        found[f"flashvec, {budget:,} tokens a pack"] = partial(Ours, model, budget)
    for budget in budgets:
        found[f"transformers sdpa, sorted, {budget:,} padded"] = partial(HuggingFacePadded, model.module, budget)
    found["transformers sdpa, batches of 32"] = partial(HuggingFacePadded, model.module, None)
    flattened = partial(SentenceTransformers, model.module, vocabulary, "flash_attention_2")
    return found | {"sentence-transformers, flattened": flattened, "vllm, pooling runner": partial(Vllm, model.module)}


def product_rate(session: Session, model: RandomModel, rows: int) -> float:
    """Tokens per second that the model's bare products would run at."""
    layer = model.decoder.layers[0]
    weights = [layer.qkv, layer.out, layer.gate_up, layer.down]
    inputs = [torch.randn(rows, w.shape[1], device=w.device, dtype=w.dtype) for w in weights]

    def run(_: int) -> None:
        for x, weight in zip(inputs, weights, strict=True):
            F.linear(x, weight)

    timed = session.watch.prepare(run, 2)
    return rows / median(timed.seconds() for _ in range(5)) / len(model.decoder.layers)


def cosines(vectors: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Quantiles of the cosine of unit vectors."""
    found = (vectors.astype(np.float64) * truth).sum(1)
    return {"minimum_cosine": round(float(found.min()), 6), "median_cosine": round(float(np.median(found)), 6)}


def truth_of(session: Session, model: RandomModel, texts: Sequence[np.ndarray]) -> tuple[np.ndarray, str]:
    """transformers' vectors in fp32, or in the model's dtype where fp32 weights do not fit."""
    needed = 2 * weight_bytes(CONFIGS[model.name], 4) if model.name in CONFIGS else 0.0
    if session.device.type == "cuda" and torch.cuda.mem_get_info(session.device)[0] < needed:
        return HuggingFacePadded(model.module, BUDGETS[0]).embed(texts), str(model.decoder.dtype)
    module = copy.deepcopy(model.module).float()
    vectors = HuggingFacePadded(module, BUDGETS[0]).embed(texts)
    del module
    session.settle()
    return vectors, "float32"


def compared(session: Session, model: RandomModel, made: dict[str, Any], texts: Sequence[np.ndarray]) -> dict[str, Row]:
    """Each contender's cosines to the truth, and `wrong` for one that runs another model, or ours if less exact."""
    truth, dtype = truth_of(session, model, texts)
    found: dict[str, Row] = {
        name: {**cosines(contender.embed(texts), truth), "truth": dtype.removeprefix("torch.")}
        for name, contender in made.items()
    }
    theirs = [c["median_cosine"] for name, c in found.items() if name.startswith("transformers")]
    for name, cosine in found.items():
        floor = SAME_MODEL
        if name.startswith("flashvec") and dtype == "float32" and theirs:
            floor = min(theirs) - DTYPE_MARGIN  # at least as close as the same model in the same dtype
        if not cosine["median_cosine"] >= floor:
            cosine["wrong"] = f"median cosine {cosine['median_cosine']}, expected {floor:.6f} to {dtype}"
            if name.startswith("flashvec"):
                session.fail(f"{model.name}: {name}: {cosine['wrong']}")
    return found


def time_profile(session: Session, profile: Profile, model: RandomModel, vocabulary: int = VOCABULARY) -> None:
    """Rows of one length distribution."""
    spec = model.spec.decoder
    texts = [draw_texts(profile.num_tokens, profile.mean_length, seed, vocabulary) for seed in range(REPETITIONS)]
    made: dict[str, Any] = {}
    rows: list[Row] = []
    for name, make in contenders(model, profile.num_tokens, vocabulary).items():
        if not session.takes(name):
            continue
        try:
            contender = make()
            contender.embed(texts[-1])  # warm: graphs, tile lists, the allocator's blocks
            made[name] = contender
        except Exception as error:  # a peer that is missing or crashes is a row that says so
            rows.append({"variant": name, "missing": describe(error)})
            if name.startswith("flashvec"):
                session.fail(f"{profile.name}: {name}: {describe(error)}")
        session.settle()  # past the handler: until then the error holds what its frames held
    found = compared(session, model, made, texts[0][:COMPARED_TEXTS])
    rows += [{"variant": name, **cosine} for name, cosine in found.items() if "wrong" in cosine]
    made = {name: contender for name, contender in made.items() if "wrong" not in found[name]}
    variants: dict[str, Callable[[int], Any]] = {n: partial(_embed, made[n], texts) for n in made}
    seconds = interleave(variants, REPETITIONS) if variants else {}
    ceiling = product_rate(session, model, min(BUDGETS[0], profile.num_tokens))
    tokens = [sum(map(len, drawn)) for drawn in texts]
    flops = [flops_of(spec, [len(t) for t in drawn]) for drawn in texts]
    for name, times in seconds.items():
        rate = median(n / s for n, s in zip(tokens, times, strict=True))
        tflops = median(f / s for f, s in zip(flops, times, strict=True)) / 1e12
        rows.append(
            {
                "variant": name,
                "tokens_per_s": round(rate),
                "texts_per_s": round(rate / profile.mean_length, 1),
                "spread": spread(times),
                "tflops": float(f"{tflops:.4g}"),
                "share_of_989": round(tflops / DATASHEET_TFLOPS, 3),
                "share_of_products": round(rate / ceiling, 3),
                "repetitions": len(times),
                **found[name],
            }
        )
    same = {"benchmark": "gpu embed", "model": profile.model, "lengths": f"log-normal {profile.mean_length}"}
    session.keep([{**same, **row, "ceiling_tokens_per_s": round(ceiling)} for row in rows])
    session.settle()


def _embed(contender: Any, texts: Sequence[Sequence[np.ndarray]], repetition: int) -> None:
    contender.embed(texts[repetition])


def run(session: Session, only: str = "") -> None:
    """All profiles, of those whose name `only` finds, that there is time and memory for."""
    model: RandomModel | None = None
    for profile in profiles():
        if not named(only, profile.name):
            continue
        config = CONFIGS[profile.model]
        if not session.begin(profile.name, 45 if profile.model == "llama-3-8b" else 30):
            continue
        if model is None or model.name != profile.model:
            model = None
            session.settle()
            if torch.cuda.mem_get_info(session.device)[0] < 2.5 * weight_bytes(config):
                session.skipped.append(f"{profile.name}: not enough memory")
                continue
            model = random_model(profile.model, config, session.device, torch.bfloat16)
        time_profile(session, profile, model)


def record(profile: Profile, config: dict[str, Any] | None = None) -> None:
    """Run our decoder's program on meta tensors, for the kernels' recording."""
    config = config or CONFIGS[profile.model]
    decoder, spec, meta = meta_decoder(config, torch.bfloat16), model_spec(config), torch.device("meta")
    texts = draw_texts(profile.num_tokens, profile.mean_length, 0, VOCABULARY)
    for rows in packs_of(texts, BUDGETS[0])[:1]:
        lengths = [len(texts[i]) for i in rows]
        plan = decoder.row_plan(sum(lengths))
        schedule = build_schedule(lengths, sum(plan), meta)
        ids = torch.empty(sum(lengths), dtype=torch.int32, device=meta)
        spans = torch.empty(len(lengths), 2, dtype=torch.int32, device=meta)
        embedding_program(spec, []).run(decoder, Batch(ids, schedule, plan, spans))


def summary(rows: Sequence[Row]) -> list[str]:
    """One line per variant."""
    lines = []
    for row in rows:
        if row["benchmark"] != "gpu embed":
            continue
        head = f"{row['model']:13} {row['lengths']:15} {row['variant']:44}"
        if "tokens_per_s" in row:
            lines.append(
                f"{head} {row['tokens_per_s']:9,} tokens/s {row['spread']:>5} {row['share_of_989']:6.1%} of 989 TF/s "
                f"{row['share_of_products']:4.0%} of products, cosine {row['median_cosine']:.5f}"
            )
        else:
            lines.append(f"{head} {(row.get('missing') or row.get('wrong', ''))[:60]}")
    return ["embedding: token ids to vectors, host to host", *lines] if lines else []
