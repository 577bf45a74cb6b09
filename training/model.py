"""What is trained: a decoder with its tokenizer and rules, and the parameters that change.

Rules (pooling, what is written around a text) are those under which `Encoder.load` opens the trained folder later, so
that a text is trained on as it will be embedded.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from flashvec.kernels.backend import has_hardware_bf16
from flashvec.runtime.checkpoint.chain import adapter_below
from flashvec.runtime.checkpoint.hf import read_config
from flashvec.runtime.checkpoint.json_files import read_object
from flashvec.runtime.checkpoint.llm2vec import SETTINGS_FILE, first_base, llm2vec_spec, mntp_name
from flashvec.runtime.checkpoint.open import Checkpoint, Overrides, open_checkpoint, parts_of, resolve
from flashvec.runtime.checkpoint.peft import read_adapter_config
from flashvec.runtime.checkpoint.placing import naming
from flashvec.runtime.checkpoint.saved import SPEC_FILE
from flashvec.runtime.checkpoint.sentence_transformers import MODULES_FILE
from flashvec.runtime.decoder import Decoder, Training
from flashvec.runtime.decoder_loader import DecoderLoader
from flashvec.runtime.placement import choose_dtype
from flashvec.runtime.spec import ModelSpec
from flashvec.runtime.tokenize import Tokenizer
from flashvec.training.adapter import POOLING_NAMES, base_part, read_adapter, write_adapter, write_surroundings
from flashvec.training.config import TrainConfig
from flashvec.training.distributed import World, own_device
from flashvec.training.lora import Lora
from flashvec.training.settings import ConfigError
from flashvec.training.shards import Shards

logger = logging.getLogger("flashvec")

HEAD = "lm_head.weight"
ENCODER_FOLDER = "encoder"  # below a run's output, where the body was trained


class Trainable(Protocol):
    """Parameters that the optimiser changes."""

    def parameters(self) -> dict[str, Tensor]:
        """fp32 masters by name."""

    def freeze_after(self, num_layers: int) -> None:
        """Of the layers, train the first ones alone."""

    def training(self) -> Training:
        """What a forward pass adds: updates, or nothing where the decoder's own weights are trained."""

    def give_values(self) -> None:
        """Bring the masters' values to what runs."""

    def untouched(self) -> list[str]:
        """Names of what a step should have changed and has not."""


@dataclass
class Model:
    """A loaded decoder and everything around it."""

    spec: ModelSpec
    decoder: Decoder
    tokenizer: Tokenizer
    trainable: Trainable
    base_name: str
    config_json: dict[str, Any] | None  # the base's config.json
    head_VD: Tensor | None = None  # language-model head, where asked for
    head_softcap: float | None = None

    def weights(self) -> list[Tensor]:
        """The decoder's own tensors."""
        layers = [x for layer in self.decoder.layers for x in vars(layer).values() if x is not None]
        return [self.decoder.embedding_VD, self.decoder.norm_D, *layers]

    def end_at(self, depths: Sequence[int]) -> None:
        """Train no layer after the last of `depths`, which would run for no loss; without any, all layers.

        Raises:
            ConfigError: the model has fewer layers.
        """
        count = len(self.decoder.layers)
        if any(depth > count for depth in depths):
            raise ConfigError(f"depths are {list(depths)}, the model has {count} layers")
        if depths:
            self.trainable.freeze_after(depths[-1])

    def save(self, folder: Path) -> None:
        """Write what was trained so that `Encoder.load` opens it: an adapter, or the whole encoder in `encoder/`.

        Args:
            folder: made if it is not there.

        Raises:
            OSError: the disk is full or not writable; names the file.
        """
        if isinstance(self.trainable, LoraTrainable):
            write_adapter(folder, self.trainable.lora, self.base_name)
            with naming(folder):
                write_surroundings(folder, self.spec, self.config_json, self.tokenizer)
            return
        from flashvec.runtime.encoder import Encoder

        with torch.no_grad(), naming(folder / ENCODER_FOLDER):
            Encoder(self.spec, self.decoder, self.tokenizer).save(folder / ENCODER_FOLDER, overwrite=True)


class LoraTrainable:
    """Low-rank updates over a frozen decoder."""

    def __init__(self, lora: Lora) -> None:
        self.lora = lora

    def parameters(self) -> dict[str, Tensor]:
        return self.lora.parameters()

    def freeze_after(self, num_layers: int) -> None:
        self.lora.freeze_after(num_layers)

    def training(self) -> Training:
        return Training(self.lora.layers())

    def give_values(self) -> None:
        """The masters are what runs."""

    def untouched(self) -> list[str]:
        return self.lora.untouched()


class BodyTrainable:
    """The decoder's own layers and final norm; embeddings stay frozen.

    Masters are fp32 copies of narrower weights, and sum the gradients of all micro-batches.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.live: dict[str, Tensor] = {"norm": decoder.norm_D}
        for index, layer in enumerate(decoder.layers):
            self.live |= {f"layers.{index}.{name}": x for name, x in vars(layer).items() if x is not None}
        self.masters: dict[str, Tensor] = {}
        for name, x in self.live.items():
            x.requires_grad_()
            self.masters[name] = x if x.dtype == torch.float32 else x.detach().float().requires_grad_()
            if self.masters[name] is not x:
                x.register_post_accumulate_grad_hook(partial(_hand_on, self.masters[name]))

    def parameters(self) -> dict[str, Tensor]:
        return self.masters

    def freeze_after(self, num_layers: int) -> None:
        first = tuple(f"layers.{index}." for index in range(num_layers))
        for name in [name for name in self.live if name != "norm" and not name.startswith(first)]:
            self.live.pop(name).requires_grad_(False)
            self.masters.pop(name)

    def training(self) -> Training:
        return Training()

    def give_values(self) -> None:
        with torch.no_grad():
            for name, x in self.live.items():
                if self.masters[name] is not x:
                    x.copy_(self.masters[name])

    def untouched(self) -> list[str]:
        """By their gradients: a first step of a long warm-up is below the last bit of a weight."""
        return [name for name, x in self.masters.items() if x.grad is None or not bool(x.grad.any())]


def _hand_on(master: Tensor, x: Tensor) -> None:
    """A narrow weight's gradient of one micro-batch, added to its master's in fp32."""
    assert x.grad is not None
    master.grad = x.grad.float() if master.grad is None else master.grad.add_(x.grad)
    x.grad = None


def load_model(config: TrainConfig, *, wants_head: bool = False, world: World | None = None) -> Model:
    """Load what a configuration names, ready to be trained.

    Args:
        wants_head: read the language-model head too (the token embeddings, where they are tied).
        world: the processes that share a base with `loop.shard_base`.

    Raises:
        CheckpointError, ConfigError: files or settings; the message names them and the cure.
    """
    path = resolve(config.model)
    folder, chain = parts_of(path)
    has_rules = folder.is_file() or states_rules(folder)
    # Rules that a folder states hold again when it is opened with what was trained: they are not overridden here.
    own = Overrides(None if has_rules else "bidirectional", None if has_rules else config.pooling, config.max_length)
    checkpoint = open_checkpoint(path, own, config.adapters)
    values = read_config(folder) if (folder / "config.json").is_file() else None
    below = config.adapters[-1] if config.adapters else config.model  # an adapter names what it was trained on
    base_name = config.base_name or _name_from(below, config.output)
    if config.train == "lora":
        _check_named(config, folder != path)
    if not has_rules and values is not None and config.train == "lora":
        # The adapter's folder will be an LLM2Vec one: its rules hold while training, too.
        settings: dict[str, Any] = {}
        for place in (folder, *chain, *map(resolve, config.adapters)):  # the last one's, as where they are opened
            if (place / SETTINGS_FILE).is_file():
                settings = read_object(place / SETTINGS_FILE)
        checkpoint.spec = llm2vec_spec(values, settings, own, first_base([checkpoint.spec.base_model, base_name]))
    _check_rules(config, checkpoint.spec, has_rules)
    device, dtype = own_device(config.device), training_dtype(config)
    read_head = _head_reader(checkpoint, config.model, dtype, device) if wants_head else None
    loader = DecoderLoader(checkpoint.spec.decoder, checkpoint.source, dtype, device)
    if config.loop.shard_base and world is not None and world.size > 1:
        shards = Shards(world)
        decoder = loader.load(each=shards.take)
        decoder.parts = shards
    else:
        decoder = loader.load()
    trainable = _trainable(config, decoder, base_name)
    return Model(
        replace(checkpoint.spec, decoder=decoder.spec, int8_ranges=None, int8_length=None),  # of what it was before
        decoder,
        checkpoint.tokenizer,
        trainable,
        base_name,
        values,
        None if read_head is None else read_head(decoder),
        checkpoint.spec.decoder.head_softcap,
    )


def training_dtype(config: TrainConfig) -> torch.dtype:
    """As it is set; else bf16 where the device computes in it, fp32 elsewhere."""
    if config.dtype is not None:
        return choose_dtype(config.dtype)
    return torch.bfloat16 if has_hardware_bf16(own_device(config.device)) else torch.float32


def states_rules(folder: Path) -> bool:
    """Does a folder say itself how it is to be pooled and in which direction it is read."""
    return any((folder / name).is_file() for name in (SPEC_FILE, MODULES_FILE))


def _check_named(config: TrainConfig, is_adapter: bool) -> None:
    """The new adapter names the last of `adapters` alone: each of them must name what it lies on here."""
    for below, above in pairwise((config.model, *config.adapters)):
        folder = resolve(above)
        stated = read_adapter_config(folder).get("base_model_name_or_path")
        # LLM2Vec's second adapters name the raw base, and the one below them by their own name.
        named = {base_part(stated, folder), mntp_name(base_part(above, Path()))}
        if base_part(below, Path()) in named or (below == config.model and "" in named):
            continue
        if below == config.model and not is_adapter and (missing := adapter_below(folder)) is not None:
            raise ConfigError(
                f"adapters: {above} was trained on top of the adapter {stated}, which would be left out: "
                f"adapters=[{missing}, {above}], or model={above} alone"
            )
        if below == config.model and not is_adapter:  # a base may have been stored under another name
            logger.warning("adapters: %s was trained on %r: is %s that model?", above, stated, below)
        else:
            raise ConfigError(
                f"adapters: {above} is of base {stated!r}, not of {below}, which would be lost: an adapter names one "
                "folder below it; merge them first (Encoder.load(model, adapters=[...]).save(folder))"
            )


def _check_rules(config: TrainConfig, spec: ModelSpec, has_rules: bool) -> None:
    if spec.dense or spec.default_prompt_name:
        what = "dense heads" if spec.dense else f"a default prompt ({spec.default_prompt_name})"
        raise ConfigError(f"model: {config.model} has {what}, which training leaves out: name the decoder below it")
    if config.train == "lora" and not has_rules and not set(spec.pooling) <= POOLING_NAMES.keys():
        raise ConfigError(
            f"pooling is {'+'.join(spec.pooling)}, which an adapter's folder cannot state; one of "
            f"{', '.join(POOLING_NAMES)}, or convert {config.model} with that pooling first"
        )
    if spec.attention != "bidirectional":
        raise ConfigError(
            f"model: {config.model} states causal attention, which an adapter cannot change: convert it with "
            "attention=bidirectional first"
        )
    if config.pooling is not None and spec.pooling != (config.pooling,):
        raise ConfigError(
            f"pooling is {config.pooling}, but {config.model} states {'+'.join(spec.pooling)}, which an adapter cannot "
            "change: convert it with that pooling first"
        )


def _trainable(config: TrainConfig, decoder: Decoder, base_name: str) -> Trainable:
    if config.train == "body":
        return BodyTrainable(decoder)
    lora = Lora(decoder, config.lora, config.loop.seed)
    if config.lora.start is not None:
        base = base_part(base_name, Path(config.output))
        read_adapter(Path(config.lora.start).expanduser(), lora, base)
    return LoraTrainable(lora)


def _head_reader(
    checkpoint: Checkpoint, model: str, dtype: torch.dtype, device: torch.device
) -> Callable[[Decoder], Tensor]:
    """The head must be read before the loader closes the files, the tied one after it has read the embeddings.

    Raises:
        ConfigError: a model whose head is one of its own, and not there.
    """
    if checkpoint.spec.decoder.tied_head:
        return lambda decoder: decoder.embedding_VD
    if HEAD not in checkpoint.source.names():
        raise ConfigError(
            f"model: {model} has no {HEAD}, and its token embeddings are not its head: an encoder is stored without "
            "one; name the original model"
        )
    head = checkpoint.source.read(HEAD).to(device, dtype)
    return lambda decoder: head


def _name_from(model: str, output: str) -> str:
    """A base's name as an adapter in `output` should state it: a local folder's relative path, or the hub id."""
    path = Path(model).expanduser()
    if not path.exists():
        return model
    try:
        return os.path.relpath(path.resolve(), Path(output).resolve())
    except ValueError:  # another drive
        return str(path.resolve())
