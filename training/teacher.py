"""The teacher of self-distillation: the frozen weights, run causally, answer in one word what a text says.

    state     of the prompt's last token, some layers before the end: where that word would be predicted
              (Jiang et al. 2023, "Scaling Sentence Embeddings with Large Language Models")
    vector    states seen in a space of their own, to unit length; those of several prompts side by side
    cosine    of two texts: the product of their vectors, a weighted mean of the prompts' cosines

Encoders made of the same weights before (`teachers`) may answer beside the prompts, unprompted, as they are used: two
that are wrong in different places are right together (Furlanello et al. 2018, "Born-Again Neural Networks"). Cosines
spread differently, so each prompt's and teacher's weigh as 1 / (1 - f), with f the mean cosine of two texts at random.

A few axes hold most of the variance of such states and say little. Two spaces deal with that; v are variances over some
thousand texts, smoothed by SMOOTHING times their mean, p the power `whitening`:

    centred       the mean taken off, each principal axis scaled by v^-p (Su et al. 2021 take p = 0.5). Mean and axes
                  are those of the text's own file: what tells captions from articles would else stand for what they say
    not centred   each dimension as it is, scaled by v^-p over all files: nothing hangs on whose mean was taken

On 300 pairs of STS-B dev one prompt scores 76.2 as it is, 78.5 centred (p = 0.2) with these texts' own mean and axes,
75.0 and 73.4 with those of WordNet's examples and of Wikipedia; not centred (p = 0.5) 76.8, 76.9 and 76.8. Statistics
of the judged texts are not to be had, so centring promises more than it keeps.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from flashvec.runtime.checkpoint.open import resolve
from flashvec.runtime.checkpoint.peft import read_adapter_config
from flashvec.runtime.decoder import Decoder
from flashvec.runtime.encoder import Encoder
from flashvec.runtime.progress import is_watched
from flashvec.runtime.texts import TruncationWarning
from flashvec.training.adapter import base_part
from flashvec.training.config import DistillConfig
from flashvec.training.data import DataError
from flashvec.training.distributed import World
from flashvec.training.model import Model
from flashvec.training.settings import ConfigError

FALLBACK_LAYERS = 2  # before the end, for a teacher that is told no layer
SMOOTHING = 0.05  # of the mean variance: axes without any are not blown up
READ_TOGETHER = 128  # texts between two looks at the progress line
MAX_KNOWN_BYTES = 1 << 30  # of states that are kept for later epochs


class Teacher:
    """What the frozen model says of the texts of a run.

    Args:
        model: whose weights, as they are now, answer.
        config: prompts, layers, whitening.
        world: the processes that share the work.
        texts: all of the run.
        sources: int [texts]: number of each text's file.

    Attributes:
        sample: the rows that spaces are made of, `whitening_texts` of each file at most.
        floor: the mean cosine of two texts of the sample: about 0 where centred, else what all have in common.
    """

    def __init__(
        self, model: Model, config: DistillConfig, world: World, texts: Sequence[str], sources: np.ndarray
    ) -> None:
        self.encoder = frozen_encoder(model, config)
        self.config, self.world, self.texts, self.sources = config, world, texts, sources
        self._device, self._width = model.decoder.device, model.decoder.spec.hidden_size
        self._readings: list[Callable[..., Any]] = [
            partial(self.encoder.embed, instruction=prompt) for prompt in config.prompts
        ]
        named = Counter(config.teachers)  # one that is named twice is read once, and counts twice
        self._readings += [_earlier(folder, model, config).embed for folder in named]
        # Frozen: the states of a text, fp32 [readings, D], are kept for later epochs where all would fit.
        self.known: dict[int, Tensor] = {}
        self.keeps_known = 4 * len(texts) * len(self._readings) * self._width <= MAX_KNOWN_BYTES
        samples = [self._sampled(source) for source in range(int(sources.max()) + 1)]
        self.sample = np.concatenate(samples)
        if len(self.sample) < 2:
            raise DataError("texts: there is one text: what it is told from is missing, give more")
        states = [self._read(rows)[: len(config.prompts)] for rows in samples]
        if config.centred:
            self._spaces = [[_principal(x, config.whitening) for x in own] for own in states]
        else:
            self._spaces = [[_dimensions(x, config.whitening) for x in torch.cat(states, 1)]] * len(samples)
        units = self._units(self.sample)
        n = len(self.sample)
        floors = (units.sum(0).square().sum(-1) - n) / (n * n - n)
        counts = torch.tensor([1] * len(config.prompts) + list(named.values()), device=floors.device)
        weights = counts / (1 - floors)
        self._weights = weights / weights.sum()
        self.floor = float((floors * self._weights).sum())

    def vectors(self, rows: np.ndarray) -> Tensor:
        """Unit vectors of some texts, fp32 [n, (prompts + teachers) * D]: their products are cosines."""
        return (self._units(rows) * self._weights.sqrt()[:, None]).flatten(1)

    def _units(self, rows: np.ndarray) -> Tensor:
        """Unit vectors of each prompt and teacher, fp32 [n, prompts + teachers, D]."""
        states = self._states(rows)
        for source in np.unique(self.sources[rows]).tolist():
            own = torch.from_numpy(np.flatnonzero(self.sources[rows] == source)).to(self._device)
            for number, (offset_D, axes_DD) in enumerate(self._spaces[source]):
                states[number, own] = (states[number, own] - offset_D) @ axes_DD
        return F.normalize(states, dim=-1).transpose(0, 1)

    def _sampled(self, source: int) -> np.ndarray:
        rows = np.flatnonzero(self.sources == source)
        order = np.random.default_rng(self.config.loop.seed).permutation(len(rows))
        return rows[order[: self.config.whitening_texts]]

    def _read(self, rows: np.ndarray) -> Tensor:
        """`_states` of many rows, with a progress line."""
        parts = np.array_split(rows, -(-len(rows) // READ_TOGETHER))
        hidden = not (self.world.is_first and is_watched())
        shown = track(parts, "the teacher reads", console=Console(stderr=True), transient=True, disable=hidden)
        return torch.cat([self._states(part) for part in shown], 1)

    def _states(self, rows: np.ndarray) -> Tensor:
        """The answers to each prompt and of each teacher, fp32 [prompts + teachers, n, D].

        Kept as the teacher gives them, which does not hang on the batch: a resumed run has the bits of a whole one.
        """
        new = [row for row in rows.tolist() if row not in self.known]
        fresh = dict(zip(new, self._answers([self.texts[row] for row in new]), strict=True)) if new else {}
        if self.keeps_known:
            self.known |= fresh
        return torch.stack([fresh[row] if row in fresh else self.known[row] for row in rows.tolist()], 1)

    def _answers(self, texts: list[str]) -> Tensor:
        """fp32 [n, prompts + teachers, D]; every process asks for its part of the texts, and all have all answers."""
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        own = sorted(order[self.world.rank :: self.world.size])
        answers = torch.zeros((len(texts), len(self._readings), self._width), device=self._device)
        for number in range(len(self._readings) if own else 0):
            answers[own, number] = self._ask([texts[place] for place in own], number)
        return self.world.sum(answers)  # zeros and one process's answer: the bits of one process alone

    def _ask(self, texts: list[str], number: int) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncationWarning)  # the student's tokens are cut alike
            return self._readings[number](texts, normalize=False, output="torch").float()


def _principal(states: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """Mean [D] of states [n, D], and principal axes [D, D] scaled by their variances to the power `-power`."""
    mean_D = states.mean(0)
    if not power:
        return mean_D, torch.eye(states.shape[1], device=states.device)
    spread = (states - mean_D).double().cpu()
    variances_D, axes_DD = torch.linalg.eigh(spread.T @ spread / len(spread))
    return mean_D, (axes_DD * _smooth(variances_D) ** -power).float().to(states.device)


def _dimensions(states: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """Zero [D], and the dimensions of states [n, D] as they are, scaled by their variances to the power `-power`."""
    variances_D = states.double().var(0, correction=0)
    return torch.zeros_like(states[0]), torch.diag(_smooth(variances_D) ** -power).float()


def _smooth(variances: Tensor) -> Tensor:
    least = torch.finfo(torch.float32).tiny
    return variances.clamp(min=0) + SMOOTHING * variances.mean().clamp(min=least)


def _earlier(folder: str, model: Model, config: DistillConfig) -> Encoder:
    """The encoder that an adapter made of the model's weights before."""
    stated = read_adapter_config(resolve(folder)).get("base_model_name_or_path")
    base = base_part(model.base_name, Path(config.output))
    if base_part(stated, resolve(folder)) not in ("", base):
        raise ConfigError(
            f"teachers: {folder} is of base {stated!r}, the run's base is {base!r}; if both are one model, set "
            "base_name to the former"
        )
    encoder = Encoder.load(
        config.model,
        adapters=(*config.adapters, folder),
        dtype=str(model.decoder.embedding_VD.dtype).removeprefix("torch."),
        device=model.decoder.device,
        max_length=model.spec.max_length,
    )
    given, width = encoder.spec.embedding_size, model.decoder.spec.hidden_size
    if given != width:
        raise ConfigError(f"teachers: {folder} gives vectors of {given} numbers, the model's states have {width}")
    return encoder


def frozen_encoder(model: Model, config: DistillConfig) -> Encoder:
    """The model's own weights as they are now, causal, read at the last token of some layer."""
    decoder, spec = model.decoder, model.spec
    count = len(decoder.layers)
    layers = max(1, count - FALLBACK_LAYERS) if config.teacher_layers is None else config.teacher_layers
    if not 1 <= layers <= count:
        raise ConfigError(f"teacher_layers is {layers}, the model has {count}")
    prompt_tokens = int(model.tokenizer.count(list(config.prompts), special=True).max(initial=0))
    own = decoder.layers[:layers]
    norm_D = decoder.norm_D
    if config.train == "body":  # they are about to change
        own = [replace(layer, **_copies(layer)) for layer in own]
        norm_D = norm_D.detach().clone()
    facts = decoder.spec
    cut = replace(
        facts,
        num_layers=layers,
        layer_ropes=facts.layer_ropes[:layers],
        layer_windows=facts.layer_windows[:layers],
    )
    causal = replace(
        spec, decoder=cut, attention="causal", pooling=("last",), span="offsets", layout="hf", template=None,
        text_suffix="", max_length=min(decoder.spec.max_positions, spec.max_length + prompt_tokens),
    )  # fmt: skip
    return Encoder(causal, Decoder(cut, decoder.embedding_VD, own, norm_D), model.tokenizer)


def _copies(layer: object) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in vars(layer).items() if x is not None}
