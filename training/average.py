"""The mean of several adapters of one base, as one adapter.

An update is a product, s B A. The mean of k updates is the product of their factors laid side by side, each B with its
s / k; cut to a rank by its largest singular values it is the nearest product of that rank (Eckart and Young 1936). Runs
that differ in their seed or in what taught them are wrong in different places, and the mean of their weights is better
than each (Wortsman et al. 2022, "Model soups").
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashvec.runtime.checkpoint.llm2vec import SETTINGS_FILE
from flashvec.runtime.checkpoint.peft import CONFIG_FILE, LORA_KEY, WEIGHTS_FILE, read_adapter_config
from flashvec.runtime.checkpoint.safetensors_files import SafetensorsSource, write_tensors
from flashvec.runtime.checkpoint.source import CheckpointError
from flashvec.training.adapter import PREFIXES, base_part
from flashvec.training.files import whole
from flashvec.training.origin import SEEN_FILE

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SURROUNDINGS = ("config.json", SETTINGS_FILE, *TOKENIZER_FILES)  # what lets a folder be opened by itself


def average_adapters(folders: Sequence[Path], output: Path, rank: int | None = None) -> float:
    """Write the mean of adapters: adapter files in bf16, pooling and tokenizer as the first has them.

    Hashes of what was seen are those of all, where every folder has its seen.npy; else there is none.

    Args:
        folders: two or more adapters of one base, LoRA of any rank and scale.
        output: a new folder.
        rank: of the mean; default the first adapter's.

    Returns:
        The share of the mean's squared norm that its rank leaves out, the worst product's.

    Raises:
        CheckpointError: adapters that do not fit together, one that is no plain LoRA, an output that is there.
        OSError: the disk is full or not writable; names the output, which is then not there.
    """
    if len(folders) < 2:
        raise CheckpointError(f"a mean is of two adapters or more; named: {len(folders)}")
    if output.exists():
        raise CheckpointError(f"{output}: is there already; name a new folder")
    config = _plain_config(folders[0])
    rank = rank or int(config.get("r", 8))
    stated = {folder: _plain_config(folder).get("base_model_name_or_path") for folder in folders}
    if len({base_part(base, folder) for folder, base in stated.items()} - {""}) > 1:
        named = ", ".join(f"{folder.name} of {base}" for folder, base in stated.items())
        raise CheckpointError(f"the adapters are of different bases ({named}), and only updates of one have a mean")
    updates = [dict(_updates(folder)) for folder in folders]
    for folder, found in zip(folders, updates, strict=True):
        if odd := sorted(found.keys() ^ updates[0].keys()):
            raise CheckpointError(f"{folder.name}/{WEIGHTS_FILE}: {odd[0]} is in one adapter and not in the other")
    tensors: dict[str, Tensor] = {}
    left_out = 0.0
    for name, (a_RC, b_NR) in updates[0].items():
        others = [found[name] for found in updates[1:]]
        if any(a.shape[1] != a_RC.shape[1] or b.shape[0] != b_NR.shape[0] for a, b in others):
            raise CheckpointError(f"{name}: the adapters are for models of different sizes")
        side_by_side = torch.cat([a_RC, *(a for a, _ in others)]), torch.cat([b_NR, *(b for _, b in others)], 1)
        a, b, lost = _cut(*side_by_side, rank)
        left_out = max(left_out, lost)
        for letter, x in (("A", a), ("B", b / len(folders))):
            tensors[f"{PREFIXES['headless']}{name}.lora_{letter}.weight"] = x.to(torch.bfloat16).contiguous()
    # Keys are those of a model without a head, so the class that PEFT takes the adapter for must be one, too.
    config |= {"task_type": None, "r": rank, "lora_alpha": rank, "use_rslora": False}
    if str(base := stated[folders[0]] or "").startswith("."):  # a path as seen from that folder
        config["base_model_name_or_path"] = os.path.relpath((folders[0] / base).resolve(), output.resolve())
    with whole(output) as partial:
        _write(folders, partial, tensors, config)
    return left_out


def _plain_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter that is LoRA and nothing more."""
    config = read_adapter_config(folder)
    for key in ("rank_pattern", "alpha_pattern", "use_dora", "modules_to_save"):
        if config.get(key):
            raise CheckpointError(f"{folder.name}/{CONFIG_FILE}: {key} is set; only plain LoRA has a mean")
    return config


def _updates(folder: Path) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Each product's A and B, fp32, B with its scale, under the module's name in the base."""
    config = _plain_config(folder)
    source = SafetensorsSource.from_file(folder / WEIGHTS_FILE)
    try:
        keys = {name: LORA_KEY.match(name) for name in source.names()}
        for key, found in sorted(keys.items()):
            if found is None or found["part"] not in ("lora_A", "lora_B"):
                raise CheckpointError(f"{folder.name}/{WEIGHTS_FILE}: {key} is no lora_A or lora_B of a product")
            if found["part"] == "lora_A":
                partner = key.replace("lora_A", "lora_B")
                if partner not in keys:
                    raise CheckpointError(f"{folder.name}/{WEIGHTS_FILE}: {key} has no partner {partner}")
                a, b = source.read(key).float(), source.read(partner).float()
                for own, x in ((key, a), (partner, b)):
                    if not bool(x.isfinite().all()):
                        raise CheckpointError(f"{folder.name}/{WEIGHTS_FILE}: {own} holds a number that is not finite")
                root = math.sqrt(len(a)) if config.get("use_rslora") else len(a)
                module = found["module"].removeprefix("base_model.model.").removeprefix("model.")
                yield module, (a, b * (float(config.get("lora_alpha", 8)) / root))
    finally:
        source.close()


def _cut(a_RC: Tensor, b_NR: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The nearest product of a rank, its singular values shared by both factors, and what is left out of its square."""
    q_b, r_b = torch.linalg.qr(b_NR)
    q_a, r_a = torch.linalg.qr(a_RC.T)
    u, values, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = values[:rank].sqrt()
    a, b = root[:, None] * (v[:rank] @ q_a.T), (q_b @ u[:, :rank]) * root
    if missing := rank - len(root):  # fewer directions than the rank asks for
        a, b = torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))
    squares = values.square()
    return a, b, float(squares[rank:].sum() / squares.sum().clamp(min=1e-30))


def _write(folders: Sequence[Path], output: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    output.mkdir(parents=True)
    for file in SURROUNDINGS:
        if (folders[0] / file).is_file():
            shutil.copyfile(folders[0] / file, output / file)
    if all((folder / SEEN_FILE).is_file() for folder in folders):
        seen = [np.load(folder / SEEN_FILE, allow_pickle=False) for folder in folders]
        np.save(output / SEEN_FILE, np.unique(np.concatenate(seen)), allow_pickle=False)
    (output / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_tensors(tensors, output / WEIGHTS_FILE)
