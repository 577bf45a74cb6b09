"""A PEFT adapter merged into a checkpoint while its tensors are read.

    LoRA     W + s B A                  s = alpha / r, or alpha / sqrt(r) with use_rslora
    DoRA     m (W + s B A) / |W + s B A|        norms over each row

The sum is fp32 and is rounded once, by whoever reads it, to the dtype it runs in. Adapters are merged one
over the other by wrapping a source twice. Source: peft's `lora/layer.py` and `lora/dora.py`, whose merge this
equals in fp32.
"""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashvec.runtime.checkpoint.json_files import read_object
from flashvec.runtime.checkpoint.safetensors_files import SafetensorsSource
from flashvec.runtime.checkpoint.source import CheckpointError, TensorSource

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_RANK = 4096
MAX_ALPHA = 1e12  # an update's scale beyond it leaves nothing of the weights
MAX_PATTERN_CHARS = 256
MAX_WAYS = 2**18  # in which all patterns of a key may match one name: every way is tried before a name is given up
IGNORED_MODULES = ("lm_head",)  # an encoder has no use for the language-model head, adapted or not

# Keys that change what an adapter computes, and the values under which they change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "fan_in_fan_out": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "use_bdlora": (False, []),
    "layer_replication": ([],),
    "layers_pattern": ([], "layers", ["layers"]),
    "trainable_token_indices": ([], {}),
    "target_parameters": ([],),
    "alora_invocation_tokens": ([],),
    "arrow_config": (),
    "kasa_config": (),
    "monteclora_config": (),
    # The others (pissa, olora, corda, loftq, lora_ga) subtract something from the base weights first.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}

LORA_KEY = re.compile(
    r"^(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.default)?(\.weight)?$"
)
WHOLE_KEY = re.compile(r"^(?P<module>.+?)(\.modules_to_save)?(\.default)?(\.base_layer)?\.(?P<kind>weight|bias)$")

# What a pattern of names is made of; of regular expressions no more is read.
PATTERN_PART = re.compile(
    r"(?P<atom>[\w.^$-]|\\[dw.-]|\[\^?(?:[\w.-]|\\[dw.-])+\])|(?P<open>\((?:\?:|(?!\?)))|(?P<close>\))|(?P<bar>\|)"
    r"|(?P<optional>\?)|(?P<repeat>[*+]|\{\d{0,3}(?:,\d{0,3})?\})"
)


@dataclass(frozen=True)
class _Update:
    """What the adapter does to one tensor: key of each part in the adapter's file."""

    scale: float
    a: str = ""  # [r, in]
    b: str = ""  # [out, r]
    magnitude: str = ""  # [out], DoRA
    transposed: bool = False  # embeddings: A is [r, V], B is [D, r], the tensor [V, D]
    whole: str = ""  # replaces the tensor (modules_to_save); beside A and B it is what they are added to


class AdapterSource:
    """`TensorSource`: another source with one adapter merged in."""

    def __init__(self, base: TensorSource, folder: Path) -> None:
        """Args:
            base: what the adapter was trained on.
            folder: holds adapter_config.json and adapter_model.safetensors.

        Raises:
            CheckpointError: an adapter of another kind or for another model, or a damaged one; names file and
                key.
        """
        self.base = base
        self.folder = Path(folder)
        self.where = f"{self.folder.name}/{WEIGHTS_FILE}"
        self.config = read_adapter_config(self.folder)
        self.weights = SafetensorsSource.from_file(_weights_file(self.folder))
        self._patterns: dict[str, list[tuple[re.Pattern[str], Any]]] = {}
        self._updates = self._plan()

    def names(self) -> frozenset[str]:
        """Those of the base: an adapter adds none."""
        return self.base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape without reading the data."""
        return self.base.shape(name)

    def place(self, name: str) -> str:
        """The file of the base, and the adapter's where it has a part in the tensor, for messages."""
        return self.base.place(name) + (f" with {self.where}" if name in self._updates else "")

    def read(self, name: str) -> Tensor:
        """The merged tensor, fp32; one that the adapter leaves alone as the base gives it."""
        update = self._updates.get(name)
        if update is None:
            return self.base.read(name)
        if update.whole and not update.a:
            return self.weights.read(update.whole)
        a, b = self.weights.read(update.a).float(), self.weights.read(update.b).float()
        if update.transposed:
            a, b = b.T, a.T
        merged = self._own(name).addmm_(b, a, alpha=update.scale)
        if update.magnitude:
            magnitude = self.weights.read(update.magnitude).float()
            merged *= (magnitude / torch.linalg.norm(merged, dim=1))[:, None]
        return merged

    def _own(self, name: str) -> Tensor:
        """What A and B are added to, fp32, in memory that may be written into; a second copy only of what is mapped."""
        whole = self._updates[name].whole
        source: TensorSource = self.weights if whole else self.base
        read = source.read(whole or name)
        is_new = read.dtype != torch.float32 or (isinstance(source, AdapterSource) and source.makes(name))
        return read.float() if is_new else read.clone()

    def makes(self, name: str) -> bool:
        """Whether `read` makes a tensor of its own, which nothing else holds."""
        update = self._updates.get(name)
        return update is not None and bool(update.a)

    def close(self) -> None:
        """Release every mapped file, the base's too."""
        self.weights.close()
        self.base.close()

    def _plan(self) -> dict[str, _Update]:
        """Match every tensor of the adapter to one of the base; nothing may be left over."""
        parts: dict[str, dict[str, str]] = {}
        updates: dict[str, _Update] = {}
        for key in sorted(self.weights.names()):
            if found := LORA_KEY.match(key):
                parts.setdefault(found["module"], {})[found["part"]] = key
            else:
                self._plan_whole(key, updates)
        longest = max((len(_strip_prefix(module)) for module in parts), default=0)
        for key in ("rank_pattern", "alpha_pattern"):
            self._patterns[key] = _compiled(self.config.get(key) or {}, longest, f"{self._config_name}: {key}")
        for module, keys in parts.items():
            module = _strip_prefix(module)
            if module.removeprefix("model.") in IGNORED_MODULES:
                continue
            name = f"{module.removeprefix('model.')}.weight"
            if name not in self.base.names():
                raise CheckpointError(
                    f"{self.where}: {next(iter(keys.values()))} fits nowhere: the base has no tensor {name}; "
                    "the adapter is for another model"
                )
            stored = updates.get(name)  # an embedding that peft saves beside its update
            if stored is not None and stored.a:
                raise CheckpointError(f"{self.where}: holds {module} twice, under two prefixes")
            self._check_followed(module)
            update = self._plan_module(module, name, keys)
            updates[name] = update if stored is None else replace(update, whole=stored.whole)
        if not updates:
            raise CheckpointError(f"{self.where}: holds no adapter tensor; fetch it again")
        return updates

    def _check_followed(self, module: str) -> None:
        """peft passes over tensors that these keys leave out: a file of its own making holds none of them."""
        layers, excluded = self.config.get("layers_to_transform"), self.config.get("exclude_modules") or []
        layers = [layers] if isinstance(layers, int) else layers or []
        for key, value in (("layers_to_transform", layers), ("exclude_modules", excluded)):
            if not isinstance(value, list):
                raise CheckpointError(f"{self._config_name}: {key} is {repr(value)[:80]}; expected a list")
        found = re.search(r"\.layers\.(\d+)\.", f".{module}.")
        if layers and (found is None or int(found[1]) not in layers):
            raise CheckpointError(f"{self._config_name}: layers_to_transform leaves out {module}, which is adapted")
        if any(f".{module}".endswith(f".{name}") for name in excluded):
            raise CheckpointError(f"{self._config_name}: exclude_modules leaves out {module}, which is adapted")

    def _plan_module(self, module: str, name: str, keys: dict[str, str]) -> _Update:
        transposed = "lora_embedding_A" in keys or "lora_embedding_B" in keys
        a, b = (keys.get(f"lora_embedding_{x}" if transposed else f"lora_{x}", "") for x in "AB")
        if not a or not b:
            raise CheckpointError(
                f"{self.where}: {a or b or next(iter(keys.values()))} has no partner lora_A or lora_B"
            )
        rank = self._number("r", "rank_pattern", module)
        if rank != int(rank) or not 1 <= rank <= MAX_RANK:
            raise CheckpointError(f"{self._config_name}: rank of {module} is {rank:g}; expected 1 to {MAX_RANK}")
        rows, columns = self._matrix_shape(name)
        if transposed:
            rows, columns = columns, rows
        for key, expected in ((a, (int(rank), columns)), (b, (rows, int(rank)))):
            self._check_shape(key, expected, name)
        magnitude = keys.get("lora_magnitude_vector", "")
        if magnitude and transposed:
            raise CheckpointError(
                f"{self.where}: {magnitude}: DoRA of embeddings is not merged; merge it with peft first"
            )
        if bool(magnitude) != bool(self.config.get("use_dora")):
            raise CheckpointError(f"{self._config_name}: use_dora does not agree with the tensors of {module}")
        if magnitude:
            self._check_shape(magnitude, (rows,), name)
        root = math.sqrt(rank) if self.config.get("use_rslora") else rank
        return _Update(self._number("lora_alpha", "alpha_pattern", module) / root, a, b, magnitude, transposed)

    def _plan_whole(self, key: str, updates: dict[str, _Update]) -> None:
        """A tensor stored whole: of `modules_to_save`, or an embedding that peft saves beside its adapter."""
        found = WHOLE_KEY.match(key)
        module = _strip_prefix(found["module"]).removeprefix("model.") if found else key
        if module in IGNORED_MODULES:
            return
        name = f"{module}.{found['kind']}" if found else key
        if name not in self.base.names():
            raise CheckpointError(
                f"{self.where}: {key} fits nowhere in the base; an encoder takes LoRA, DoRA and whole "
                "tensors of the "
                "base (modules_to_save)"
            )
        self._check_shape(key, self.base.shape(name), name)
        updates[name] = _Update(1.0, whole=key)

    @property
    def _config_name(self) -> str:
        return f"{self.folder.name}/{CONFIG_FILE}"

    def _matrix_shape(self, name: str) -> tuple[int, int]:
        shape = self.base.shape(name)
        if len(shape) != 2:
            raise CheckpointError(f"{self.where}: adapts {name}, which is no matrix")
        return shape[0], shape[1]

    def _check_shape(self, key: str, expected: tuple[int, ...], name: str) -> None:
        shape = self.weights.shape(key)
        if shape != expected:
            raise CheckpointError(
                f"{self.where}: {key} has shape {shape}, the base's {name} {self.base.shape(name)} asks for "
                f"{expected}; "
                "the adapter is for another model or another vocabulary"
            )

    def _number(self, key: str, pattern_key: str, module: str) -> float:
        """r or lora_alpha of a module: of the first pattern that matches its name, else the common one."""
        value = self.config.get(key, 8)
        for pattern, own in self._patterns[pattern_key]:
            if pattern.match(module):
                value = own
                break
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_ALPHA:
            raise CheckpointError(f"{self._config_name}: {key} of {module} is {repr(value)[:80]}; expected a number")
        return float(value)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, refused by name where it asks for something that merging cannot give.

    Raises:
        CheckpointError: missing, damaged, or an adapter of another kind.
    """
    config = read_object(folder / CONFIG_FILE)
    where = f"{folder.name}/{CONFIG_FILE}"
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: peft_type is {config.get('peft_type')!r}; only LORA is merged")
    for key, neutral in NEUTRAL.items():
        value = config.get(key)
        if value is not None and value not in neutral:
            raise CheckpointError(
                f"{where}: {key} is {str(value)[:80]!r}, which cannot be merged; merge it with peft first"
            )
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise CheckpointError(f"{where}: {key} is {str(config[key])[:80]!r}; expected an object")
    return config


def _strip_prefix(module: str) -> str:
    """A module's name inside the model that peft wrapped."""
    return module.removeprefix("base_model.model.")


def _compiled(patterns: dict[str, Any], longest: int, where: str) -> list[tuple[re.Pattern[str], Any]]:
    """peft's rule: a pattern, a regular expression, covers a module's name or its end after a dot.

    One from a file is untrusted: some take longer than anybody waits, so the ways in which it can match are counted.

    Args:
        longest: characters of the longest name.

    Raises:
        CheckpointError: a pattern that is too costly, or none; names it.
    """
    found: list[tuple[re.Pattern[str], Any]] = []
    ways = 0
    for pattern, value in patterns.items():
        if len(pattern) > MAX_PATTERN_CHARS or re.search(r"\)[*+{]", pattern):
            raise CheckpointError(f"{where}: {pattern[:80]!r} is too long or repeats a group; name the modules plainly")
        ways += _ways(pattern, longest, where)
        if ways > MAX_WAYS:
            raise CheckpointError(f"{where}: {pattern!r} can match in too many ways; name the modules plainly")
        try:
            re.compile(pattern)  # by itself: its parentheses must not close ours
            found.append((re.compile(rf"(.*\.)?({pattern})$"), value))
        except re.error as error:
            raise CheckpointError(f"{where}: {pattern!r} is no regular expression ({error})") from None
    return found


def _ways(pattern: str, longest: int, where: str) -> int:
    """In how many ways a pattern can match a name of `longest` characters, at most.

    Each repetition multiplies them by the name's length, each choice by its alternatives; a repeated group would be
    no end of them.

    Raises:
        CheckpointError: another part of a regular expression than these; names it.
    """
    ways, at = 1, 0
    alternatives = [1]  # of the whole pattern and of each group that is open
    while at < len(pattern):
        part = PATTERN_PART.match(pattern, at)
        if part is None:
            raise CheckpointError(
                f"{where}: {pattern!r}: {pattern[at]!r} is not read in a pattern; name the modules plainly, or with "
                "\\d, \\w, [...], (a|b), *, + and ?"
            )
        if part.lastgroup == "open":
            alternatives.append(1)
        elif part.lastgroup == "close" and len(alternatives) > 1:
            ways *= alternatives.pop()
        elif part.lastgroup == "bar":
            alternatives[-1] += 1
        elif part.lastgroup == "optional":
            ways *= 2
        elif part.lastgroup == "repeat":
            ways *= longest + 1
        at = part.end()
    return ways * math.prod(alternatives)


def _weights_file(folder: Path) -> Path:
    if not (folder / WEIGHTS_FILE).is_file():
        cure = "fetch it"
        if (folder / "adapter_model.bin").is_file():
            cure = "adapter_model.bin is a pickle, never read: save it again with safe_serialization=True"
        raise CheckpointError(f"{folder.name}/{WEIGHTS_FILE} is missing; {cure}")
    return folder / WEIGHTS_FILE
