"""What a training run is: one tree of frozen settings for each objective, read from YAML or JSON, every key checked.

    model: smollm2-encoder
    output: out/mntp
    texts: [wiki.txt]
    lora: {r: 32}
    optimizer: {learning_rate: 3e-4}

A key on the command line overrides the file's: `lora.r=8`. Unknown keys, values of a wrong type and values out of range
are errors that name the key. The reference's own train_configs are recognised and translated (`reference_config.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from flashvec.training.settings import ConfigError, Places, build_tree, parse_for, read_values, set_value

RATES = "0, or a rate from 1/256 to 255/256: dropout is drawn in steps of 1/256"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

T = TypeVar("T")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank updates of the decoder's products; `alpha / r` scales them (`alpha / sqrt(r)` with `rslora`)."""

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    targets: tuple[str, ...] = PROJECTIONS
    rslora: bool = False
    start: str | None = None  # an adapter folder to go on from, instead of zero updates
    saved_as: Literal["float32", "bfloat16"] = "float32"  # the adapter's file; masters and checkpoints are fp32


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule and clipping."""

    learning_rate: float = 5e-5
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: int = 0
    decay_steps: int | None = None  # where the schedule reaches zero; default `loop.steps`
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 1.0


@dataclass(frozen=True)
class LoopConfig:
    """Steps, their micro-batches, and what is written when."""

    steps: int = 1000
    seed: int = 42
    micro_batch_tokens: int | None = None  # tokens run together; default 2,048 on a CPU, 16,384 on a GPU
    recompute: bool = False  # layers' activations are made again in the backward instead of being kept
    shard_base: bool = False  # each of several processes keeps a part of the frozen base, for one that does not fit
    activation_gib: float | None = None  # for kept graphs, by what the first one takes; default half of what is free
    log_every: int = 10
    tensorboard: bool = False  # lines of the log as events too, in the output's folder `tensorboard`
    save_every: int = 200
    keep_checkpoints: int = 2
    average_checkpoints: int = 1  # the result is the mean of the last so many
    evaluate_every: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What all objectives share."""

    model: str
    output: str
    adapters: tuple[str, ...] = ()  # merged into the base before training
    base_name: str | None = None  # the base's id or path as the adapter shall name it; default `model`
    train: Literal["lora", "body"] = "lora"
    dtype: Literal["float32", "bfloat16"] | None = None  # float16 holds no gradient of a mean over many tokens
    device: str | None = None
    pooling: str | None = None
    max_length: int = 512
    depths: tuple[int, ...] = ()  # layers after which is taught, for a model cut there; default the last alone
    sts: str | None = None  # a file of scored pairs, evaluated every `loop.evaluate_every` steps and after the last
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)


@dataclass(frozen=True, kw_only=True)
class MntpConfig(TrainConfig):
    """Masked next token prediction."""

    texts: tuple[str, ...] = ()  # .txt files of one text a line, .jsonl files with a key "text"
    batch_size: int = 32  # blocks of up to `max_length` tokens
    mask_probability: float = 0.2
    mask_token: str = "_"
    masking: Literal["bert", "all"] = "bert"  # 80 % mask, 10 % random, 10 % kept; or all mask
    llm2vec_compat: bool = False  # texts joined and cut into blocks across their boundaries, as the reference does
    train_head: bool = False


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig(TrainConfig):
    """Contrastive learning: of views of one text, or of pairs, triples and scored pairs."""

    texts: tuple[str, ...] = ()  # unsupervised: each text is its own positive
    pairs: tuple[str, ...] = ()  # supervised: .jsonl files, or tables of scored pairs, see `data.py`
    batch_size: int = 128
    temperature: float = 0.05
    attention_dropout: float = 0.0
    view: Literal["dropout", "crop"] = "dropout"
    loss: Literal["info_nce", "cosent"] = "info_nce"
    neighbours: int = 1  # pairs or texts that follow each other in a file and meet in a batch, as distill's do
    words: float = 0.0  # share of the loss that is taught by rare words that texts share (`overlap.py`)
    margin: float | None = None  # candidates closer than the positive by more than this are left out
    prefixes: tuple[int, ...] = ()  # Matryoshka sizes, ascending
    instruction: str | None = None  # written before queries, and before both texts of views and of scored pairs
    e5_instructions: bool = False  # before queries that have none: what LLM2Vec says for their file, by its name
    max_length: int = 128


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainConfig):
    """Self-distillation: the frozen weights, run causally under one-word prompts, teach mean pooling of all tokens."""

    texts: tuple[str, ...] = ()
    batch_size: int = 64
    prompts: tuple[str, ...] = ('This sentence : "{text}" can be summarized in one word:"',)  # or none, with teachers
    teacher_layers: int | None = None  # default all but two
    centred: bool = False  # the teacher's states, by their file's mean, and whitened along principal axes
    whitening: float = 0.5  # power of the inverse variances of the teacher's dimensions, or axes; 0 leaves them
    whitening_texts: int = 400  # of each file, that mean and variances are estimated from
    teachers: tuple[str, ...] = ()  # adapters of the same model whose unprompted vectors teach beside the prompts
    vector_weight: float = 1.0  # of the distance to the teacher's vectors, turned to where the student starts
    divergence_weight: float = 0.0  # of the divergence between softmaxed rows of cosines
    temperature: float = 0.05  # of that softmax, for both sides
    squared_weight: float = 0.0  # of the squared error of cosines
    neighbours: int = 4  # lines that follow each other in a file and meet in a batch, where they differ the least
    crops: bool = True  # every text of six words or more also comes as a part of itself
    attention_dropout: float = 0.0
    max_length: int = 128


# --- reading ------------------------------------------------------------------------------------------------


def read_config(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """A configuration file with overrides.

    Args:
        cls: `MntpConfig`, `ContrastiveConfig` or `DistillConfig`.
        path: .yaml, .yml or .json.
        overrides: `key=value`, a nested key with dots, the value in YAML (or JSON); a text as it stands.

    Raises:
        ConfigError: names file and key.
    """
    from flashvec.training.reference_config import is_reference, translate

    path = Path(path)
    values = read_values(path)
    if is_reference(values):
        values = translate(values, cls.__name__, path.name)
    given = {}
    for override in overrides:
        key, found, text = override.partition("=")
        key = key.strip()
        if not found or not key:
            raise ConfigError(f"{override!r} is no override: write key=value, such as lora.r=8")
        set_value(values, key, parse_for(cls, key, text, f"override {key}"), override)
        given[key] = f"override {override}"
    return build(cls, values, path.name, given)


def build(
    cls: type[T], values: Mapping[str, Any], where: str = "config", overrides: Mapping[str, str] | None = None
) -> T:
    """Settings from plain values, checked.

    Args:
        where: what errors name, such as a file.
        overrides: what they name instead for a key, and for all keys below it.

    Raises:
        ConfigError: an unknown or missing key, a wrong type, or a value out of range; all name the key.
    """
    places = Places(where, overrides or {})
    config: Any = build_tree(cls, values, places, "")
    if isinstance(config, TrainConfig):
        _check(config, places)
        sts = None if config.sts is None else str(Path(config.sts).expanduser())
        config = replace(config, output=str(Path(config.output).expanduser()), sts=sts)
    return config


# --- ranges ---------------------------------------------------------------------------------------------------


def _check(config: TrainConfig, places: Places) -> None:
    lora, optimizer, loop = config.lora, config.optimizer, config.loop
    rules: list[tuple[str, Any, bool, str]] = [
        ("model", config.model, bool(config.model), "a folder, a .gguf file or a hub id"),
        ("output", config.output, bool(config.output), "a folder"),
        ("lora.r", lora.r, 1 <= lora.r <= 128, "1 to 128"),
        ("lora.alpha", lora.alpha, lora.alpha > 0, "a positive number"),
        ("lora.dropout", lora.dropout, _can_be_drawn(lora.dropout), RATES),
        ("lora.targets", lora.targets, 0 < len(lora.targets) == len(set(lora.targets) & set(PROJECTIONS)), "of "
         + ", ".join(PROJECTIONS)),
        ("lora.start", lora.start, lora.start is None or config.train == "lora",
         "null with train: body, which has no updates to go on with; adapters: merges it first"),
        ("optimizer.learning_rate", optimizer.learning_rate, 0 < optimizer.learning_rate <= 1,
         "above 0, up to 1: AdamW moves every number by about so much a step"),
        ("optimizer.warmup_steps", optimizer.warmup_steps, optimizer.warmup_steps >= 0, "0 or more"),
        ("optimizer.decay_steps", optimizer.decay_steps, optimizer.decay_steps is None
         or optimizer.warmup_steps < optimizer.decay_steps, "more than optimizer.warmup_steps, or null"),
        ("optimizer.betas", optimizer.betas, len(optimizer.betas) == 2 and all(0 <= b < 1 for b in optimizer.betas),
         "two numbers from 0 to 1"),
        ("optimizer.eps", optimizer.eps, optimizer.eps > 0, "a positive number"),
        ("optimizer.weight_decay", optimizer.weight_decay, optimizer.weight_decay >= 0, "0 or more"),
        ("optimizer.clip", optimizer.clip, optimizer.clip is None or optimizer.clip > 0, "a positive number or null"),
        ("loop.steps", loop.steps, loop.steps > 0, "1 or more"),
        ("loop.seed", loop.seed, 0 <= loop.seed < 1 << 63, "0 or more"),
        ("loop.micro_batch_tokens", loop.micro_batch_tokens, loop.micro_batch_tokens is None
         or loop.micro_batch_tokens > 0, "1 or more, or null"),
        ("loop.activation_gib", loop.activation_gib, loop.activation_gib is None or loop.activation_gib >= 0,
         "0 or more, or null"),
        ("loop.evaluate_every", loop.evaluate_every, loop.evaluate_every >= 0, "0 or more"),
        ("loop.evaluate_every", loop.evaluate_every, not loop.evaluate_every or config.sts is not None,
         "0 where no file is named: sts=scored.tsv"),
        ("sts", config.sts, config.sts is None or loop.evaluate_every > 0,
         "null, or loop.evaluate_every above 0: it would never be looked at"),
        ("loop.log_every", loop.log_every, loop.log_every > 0, "1 or more"),
        ("loop.save_every", loop.save_every, loop.save_every > 0, "1 or more"),
        ("loop.keep_checkpoints", loop.keep_checkpoints, loop.keep_checkpoints > 0, "1 or more"),
        ("loop.average_checkpoints", loop.average_checkpoints, 1 <= loop.average_checkpoints <= loop.keep_checkpoints,
         "1 to loop.keep_checkpoints"),
        ("loop.shard_base", loop.shard_base, not loop.shard_base or (
            config.train == "lora" and not isinstance(config, DistillConfig)),
         "false: only MNTP and contrastive training of updates (train: lora) run over a base in parts"),
        ("max_length", config.max_length, config.max_length > 1, "2 or more"),
    ]  # fmt: skip
    if isinstance(config, ContrastiveConfig):
        is_cosent, prefixes = config.loss == "cosent", list(config.prefixes)
        rules += [
            ("margin", config.margin, config.margin is None or not is_cosent, "null with loss: cosent, which has none"),
            ("margin", config.margin, (config.margin or 0) >= 0, "0 or more, or null"),
            ("prefixes", prefixes, not prefixes or not is_cosent, "empty with loss: cosent"),
            (
                "prefixes",
                prefixes,
                prefixes == sorted({p for p in prefixes if p > 1}),
                "rising numbers from 2 on: of one dimension a unit vector keeps the sign alone, which has no gradient",
            ),
            ("words", config.words, 0 <= config.words <= (not is_cosent), "0 to 1, and 0 with loss: cosent"),
            (
                "view",
                config.view,
                not config.pairs or config.view == "dropout",
                "dropout with pairs, which have no view",
            ),
        ]
    own: dict[str, tuple[Callable[[Any], bool], str]] = {
        "mask_probability": (lambda value: 0 < value <= 1, "above 0, up to 1"),
        "attention_dropout": (_can_be_drawn, RATES),
        "temperature": (lambda value: value > 0, "a positive number"),
        "batch_size": (lambda value: value > 0, "1 or more"),
    }
    for name, (is_within, said) in own.items():
        if (value := getattr(config, name, None)) is not None:
            rules.append((name, value, is_within(value), said))
    depths = list(config.depths)
    rules.append(("depths", depths, depths == sorted({d for d in depths if d >= 1}), "rising numbers from 1 on"))
    if isinstance(config, ContrastiveConfig | DistillConfig):
        rules.append(("neighbours", config.neighbours, config.neighbours >= 1, "1 or more"))
    if isinstance(config, DistillConfig):
        rules += _distill_rules(config)
    for key, value, holds, expected in rules:
        if not holds:
            raise ConfigError(f"{places.of(key)}: {key} is {value!r}; expected {expected}")


def _can_be_drawn(rate: float) -> bool:
    """Masks take a byte an element (`kernels/dropout.py`): rates are multiples of 1/256."""
    return rate == 0 or 1 <= round(rate * 256) <= 255


def _distill_rules(config: DistillConfig) -> list[tuple[str, Any, bool, str]]:
    weights = (config.vector_weight, config.divergence_weight, config.squared_weight)
    return [
        ("prompts", list(config.prompts), all("{text}" in p for p in config.prompts)
         and bool(config.prompts or config.teachers), "one or more, each with {text} in it; none where teachers teach"),
        ("whitening", config.whitening, 0 <= config.whitening <= 0.5, "a power from 0 to 0.5"),
        ("whitening_texts", config.whitening_texts, config.whitening_texts >= 2, "2 or more"),
        ("vector_weight, divergence_weight, squared_weight", weights, min(weights) >= 0 < max(weights),
         "0 or more, and not all 0"),
        ("batch_size", config.batch_size, config.batch_size > 1 or not max(weights[1:]),
         "2 or more, where cosines are taught (divergence_weight, squared_weight)"),
    ]  # fmt: skip
