"""A LoRA training step on the CPU: ours against transformers with PEFT on the same batches, and the bare products.

Both views of each text, rank 16 on every product, a contrastive loss, forward and backward, no optimiser. PEFT runs as
training scripts do: padded to the longest text, torch's own attention, adapters in the model's dtype; and in
sentence-transformers' cached loss, called as its trainer calls it (which itself needs package datasets), forward twice
and backward once.
Losses are compared before time is taken. A step's memory is what it takes at most beyond what stood before it: the
weights of all sides. The ceiling is the products alone at four FLOPs a weight and token: forward, and each input's
gradient.

    OMP_NUM_THREADS=1 python -m flashvec.bench.bench_train --model smollm2-encoder --keep

With one thread the clock is that thread's processor time, which a busy machine disturbs less. Several processes, one
thread each, share every batch and sum their gradients, all sides alike:

    torchrun --nproc-per-node 2 -m flashvec.bench.bench_train --model smollm2-encoder
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from flashvec.bench.embed_worker import forget_peak, peak_mib
from flashvec.bench.gpu_train import ALPHA, RANK, TEMPERATURE, Peft
from flashvec.bench.lengths import PROFILES, Texts
from flashvec.bench.timing import append_rows, at_least_one, interleave, spread
from flashvec.kernels.info_nce import info_nce
from flashvec.runtime.batches import TokenRows
from flashvec.runtime.heap import return_freed_memory
from flashvec.training.config import ContrastiveConfig, build
from flashvec.training.distributed import World
from flashvec.training.encode import Rates, encode, micro_batches
from flashvec.training.model import LoraTrainable, Model, load_model

TEXTS_PER_STEP = 32  # two views of each
SAME_LOSS = {"float32": 1e-3, "bfloat16": 6e-2}  # relative difference above which two sides compute another thing,
LEAST_LOSS = {"float32": 0.0, "bfloat16": 0.1}  # of a loss of so much at least: of less, roundings are all of it
CACHED = "sentence-transformers cached loss + PEFT"
RATES = {"flashvec": (0.0, 0.0), "flashvec, dropout 0.1 and 0.05": (0.1, 0.05)}


class Ours:
    """Our packed step, with or without dropout."""

    def __init__(self, model: Model, attention: float, lora: float) -> None:
        self.model, self.rates = model, Rates(attention, lora, seed=1)

    def leaves(self) -> list[torch.Tensor]:
        return list(self.model.trainable.parameters().values())

    def step(self, texts: Sequence[np.ndarray]) -> float:
        lengths = np.array([len(t) for t in texts], np.int32)
        spans = np.stack([np.zeros_like(lengths), lengths], 1).astype(np.int64)
        rows = TokenRows(np.concatenate(texts).astype(np.int32), lengths, spans)
        for x in self.leaves():
            x.grad = None
        training = self.rates.training(self.model.trainable.training(), step=1)
        packs = micro_batches(lengths, None, self.model.decoder.device)
        parts = [encode(self.model, rows.take(pack), pack, training) for pack in packs]
        vectors = torch.cat(parts)[torch.from_numpy(np.argsort(np.concatenate(packs)))]
        queries, documents = (x.contiguous() for x in vectors.chunk(2))
        loss = info_nce(queries, documents, torch.arange(len(queries)), TEMPERATURE).mean()
        loss.backward()
        return loss.item()


class Cached:
    """sentence-transformers' `CachedMultipleNegativesRankingLoss` over the same adapters, in its mini-batches of 32."""

    def __init__(self, folder: Path, peft: Peft) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

        model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        model[0].model = peft.model  # type: ignore[union-attr]
        self.loss = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)
        self.updates = list(peft.updates.values())

    def leaves(self) -> Sequence[torch.Tensor]:
        return self.updates

    def step(self, texts: Sequence[np.ndarray]) -> float:
        half = len(texts) // 2
        features = []
        for views in (texts[:half], texts[half:]):
            ids = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(text) for text in views], batch_first=True)
            mask = torch.arange(ids.shape[1]) < torch.tensor([[len(text)] for text in views])
            features.append({"input_ids": ids, "attention_mask": mask.long()})
        for x in self.leaves():
            x.grad = None
        loss = self.loss(features, torch.empty(0))
        loss.backward()
        return loss.item()


class Products:
    """The bare matrix products of a step."""

    def __init__(self, model: Model) -> None:
        layer = model.decoder.layers[0]
        self.weights = [layer.qkv, layer.out, layer.gate_up, layer.down]
        self.num_layers = len(model.decoder.layers)

    def leaves(self) -> list[torch.Tensor]:
        return []

    def step(self, texts: Sequence[np.ndarray]) -> float:
        num_rows = -(-sum(map(len, texts)) // 8) * 8  # as many as our step runs: the library's fast counts
        for weight in self.weights:
            x, dy = (torch.zeros(num_rows, size, dtype=weight.dtype) for size in reversed(weight.shape))
            for _ in range(self.num_layers):
                F.linear(x, weight)
                dy @ weight
        return 0.0


def load(folder: Path, peft: Peft, dtype: str = "float32") -> Model:
    """Our model with PEFT's updates."""
    values = {"model": str(folder), "output": "unused", "dtype": dtype, "lora": {"r": RANK, "alpha": ALPHA}}
    model = load_model(build(ContrastiveConfig, values))
    assert isinstance(model.trainable, LoraTrainable)
    for name, a, b in model.trainable.lora.matrices():
        a.copy_(peft.updates[f"{name}.lora_A"].detach())
        b.copy_(peft.updates[f"{name}.lora_B"].detach())
    return model


def bench(
    folder: Path, profile: str, repetitions: int, dtype: str = "float32", world: World | None = None
) -> list[dict[str, Any]]:
    """Rows of one length profile; all sides in one dtype. Every process of `world` runs its share of each batch."""
    world = world or World()
    config = transformers.AutoConfig.from_pretrained(folder)
    config.is_causal = False
    module = transformers.AutoModel.from_pretrained(
        folder, config=config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    module.config.use_cache = False
    peft = Peft(module)
    model = load(folder, peft, dtype)
    sides: dict[str, Any] = {"transformers + PEFT, sdpa padded": peft, CACHED: Cached(folder, peft)}
    sides |= {name: Ours(model, *rates) for name, rates in RATES.items()}
    texts = Texts(None, 1.4)
    batches, counts = [], []
    for seed in range(repetitions + 1):
        drawn = texts.draw(profile, TEXTS_PER_STEP * 200, seed)[:TEXTS_PER_STEP]
        tokens = model.tokenizer.encode(drawn, model.spec.max_length)
        ids = np.split(tokens.ids.astype(np.int64), np.cumsum(tokens.lengths)[:-1])
        batches.append([ids[row] for row in world.share(tokens.lengths)] * 2)
        counts.append(2 * int(tokens.lengths.sum()))
    losses = {name: torch.as_tensor(side.step(batches[-1])).item() for name, side in sides.items()}
    first = next(iter(losses.values()))
    most = SAME_LOSS[dtype] * max(abs(first), LEAST_LOSS[dtype])
    if any(abs(losses[name] - first) > most for name in ("flashvec", CACHED)):
        raise SystemExit(f"losses differ: {losses}")
    sides["bare products"] = Products(model)
    sides["bare products"].step(batches[-1])
    memory = {name: memory_of(partial(side.step, batches[-1])) for name, side in sides.items()}
    memory = {name: int(world.sum(torch.tensor(mib))) for name, mib in memory.items()}
    runs: dict[str, Callable[[int], Any]] = {name: partial(_step, side, batches, world) for name, side in sides.items()}
    clock = time.thread_time if torch.get_num_threads() == world.size == 1 else time.perf_counter
    seconds = interleave(runs, repetitions, clock)
    rates = {name: median(n / s for n, s in zip(counts, found, strict=False)) for name, found in seconds.items()}
    same = {"benchmark": "train", "model": folder.name, "profile": profile, "dtype": dtype}
    return [
        {
            **same,
            "variant": name,
            "tokens_per_s": round(rates[name], 1),
            "of_ceiling": round(rates[name] / rates["bare products"], 3),
            "over_peft": round(median(b / a for a, b in zip(found, next(iter(seconds.values())), strict=True)), 3),
            "step_mib": memory[name],
            "tokens": counts[0],
            "spread": spread(found),
            "clock": clock.__name__,
            "processes": world.size,
            "repetitions": repetitions,
        }
        for name, found in seconds.items()
    ]


def memory_of(step: Callable[[], Any]) -> int:
    """MiB of resident memory that a step takes at most, beyond what is resident before it."""
    gc.collect()
    return_freed_memory()  # else what was freed before would not count
    forget_peak()
    before = peak_mib()
    step()
    return round(peak_mib() - before)


def _step(side: Any, batches: Sequence[Any], world: World, repetition: int) -> None:
    world.barrier()
    side.step(batches[repetition])
    if leaves := side.leaves():
        world.sum_gradients(leaves)
    world.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("demo-cache/smollm2-135m"))
    parser.add_argument("--profiles", nargs="+", choices=PROFILES, default=["sentences"])
    parser.add_argument("--dtype", choices=sorted(SAME_LOSS), default="float32")
    parser.add_argument("--repetitions", type=at_least_one, default=3)
    parser.add_argument("--keep", action="store_true", help="append the rows to bench/results")
    options = parser.parse_args()
    if not (options.model / "config.json").is_file():  # all sides read it, transformers too
        sys.exit(f"bench_train: {options.model}: no folder of a model in Hugging Face's form")
    world = World()
    for profile in options.profiles:
        rows = bench(options.model, profile, options.repetitions, options.dtype, world)
        if not world.is_first:
            continue
        for row in rows:
            print(
                f"{row['profile']:10} {row['variant']:40} {row['tokens_per_s']:8,.0f} tokens/s {row['spread']:>5} "
                f"{row['of_ceiling']:6.0%} of the products  {row['over_peft']:.2f} x PEFT  {row['step_mib']:6,} MiB",
                flush=True,
            )
        if options.keep:
            append_rows(rows)
    world.close()


if __name__ == "__main__":
    main()
