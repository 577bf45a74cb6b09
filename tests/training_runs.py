"""A tiny model, some texts, and short training runs over them."""

import json
import random
from pathlib import Path
from typing import Any

from flashvec.training.config import ContrastiveConfig, DistillConfig, MntpConfig, build

WORDS = ("stone", "river", "cloud", "ember", "willow", "harbour", "lantern", "meadow", "copper", "winter", "falcon")
CONFIGS = {"mntp": MntpConfig, "contrastive": ContrastiveConfig, "distill": DistillConfig}


def sentences(count: int, seed: int = 0) -> list[str]:
    """Different texts of different lengths."""
    rng = random.Random(seed)
    return [f"{i} " + " ".join(rng.choices(WORDS, k=rng.randint(2, 12))) for i in range(count)]


def write_texts(path: Path, count: int = 40) -> Path:
    path.write_text("\n".join(sentences(count)) + "\n")
    return path


def write_pairs(path: Path, count: int = 40, negatives: int = 1, scored: bool = False) -> Path:
    """Supervised rows; ragged numbers of negatives where there are several."""
    texts = sentences(count * (2 + negatives), seed=1)
    lines = []
    for i in range(count):
        own = texts[i * (2 + negatives) : (i + 1) * (2 + negatives)]
        row: dict[str, Any] = {"query": own[0], "positive": own[1]}
        if scored:
            row["score"] = i % 5
        else:
            row["negatives"] = own[2 : 2 + (negatives if negatives < 2 else i % (negatives + 1))]
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    return path


def tiny_base(folder: Path, **keys: Any) -> Path:
    from tiny_models import tiny_checkpoint  # and with it libraries that take seconds: not for every process of a run

    tiny_checkpoint(
        folder, "llama", **{"num_hidden_layers": 2, "tie_word_embeddings": True, "initializer_range": 0.1, **keys}
    )
    return folder


def config_for(objective: str, folder: Path, **values: Any) -> Any:
    """A configuration of a short run over files in `folder`, made where they are not there."""
    base = folder / "base"
    if not base.exists():
        tiny_base(base)
    if not (folder / "texts.txt").exists():
        write_texts(folder / "texts.txt")
    given: dict[str, Any] = {
        "model": str(base),
        "output": str(folder / "out"),
        "dtype": "float32",  # whatever the processor is fast at
        "max_length": 24,
        "batch_size": 8,
        "lora": {"r": 4, "dropout": 0.1},
        "optimizer": {"learning_rate": 1e-2, "schedule": "constant"},
        "loop": {"steps": 4, "log_every": 1, "save_every": 2, "micro_batch_tokens": 160},
    }
    if "pairs" not in values:
        given["texts"] = [str(folder / "texts.txt")]
    if objective == "contrastive":
        given["attention_dropout"] = 0.2
    if objective == "distill":
        given["prompts"] = ['"{text}" means']
        given["teacher_layers"] = 2
        given["crops"], given["neighbours"] = False, 1
    for key, value in values.items():
        given[key] = {**given[key], **value} if isinstance(value, dict) and key in given else value
    return build(CONFIGS[objective], given)
