"""Self-distillation: what the model says in one word teaches what it says by the mean of its tokens.

    teacher   the frozen weights run causally under a prompt that asks for one word, the state of the last token some
              layers before the end (Jiang et al. 2023); partly whitened; cosines of several prompts averaged
    student   the same weights, bidirectional, with what is trained, pooled as they will be used, without a prompt

    loss = mean over texts of KL(softmax(T[i] / t), softmax(S[i] / t)) + w * mean of (T - S)²

T and S are cosines among the batch's texts, without each text's own. No other model, no label.

What a student learns from a batch is how alike its texts are; of texts drawn at random it is mostly that they are not.
So `neighbours` brings texts of one passage together, and `crops` texts with parts of themselves.

Whitening: a few axes hold most of the variance of such states and say little. With variances v along the principal axes
of some thousand texts' states, each axis is scaled by (v + SMOOTHING * mean v) ** -power (Su et al. 2021 take power
0.5). Mean and axes are those of a text's own file, and a batch holds texts of one file: what tells captions from
articles would else stand for what they say. On 300 pairs of STS-B dev a prompt scores 76.1 centred by these texts' own
mean and 77.5 whitened to the power 0.35, but 72.9 and 70.5 with Wikipedia's mean and axes.
"""

import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from flashvec.runtime.decoder import Decoder
from flashvec.runtime.encoder import Encoder, TruncationWarning
from flashvec.training.config import ConfigError, DistillConfig
from flashvec.training.data import SourceBatches, read_texts, text_hash
from flashvec.training.distributed import World
from flashvec.training.encode import Rates, encode, micro_batches, token_rows
from flashvec.training.model import Model
from flashvec.training.step import Retention, backward_through

FALLBACK_LAYERS = 2  # before the end, for a teacher that is told no layer
SMOOTHING = 0.05  # of the mean variance: axes without any are not blown up
CROP_WORDS = 6  # the shortest text that is cropped
CROP_SHARES = (0.4, 0.8)  # of a text's words
READ_TOGETHER = 128  # texts of the teacher's between two looks at the progress line
MAX_KNOWN_BYTES = 1 << 30  # of the teacher's states that are kept for later epochs


class Distill:
    """The objective: `step` leaves gradients of one step in the model's parameters."""

    def __init__(self, model: Model, config: DistillConfig, world: World) -> None:
        self.model, self.config, self.world = model, config, world
        if config.neighbours < 1:
            raise ConfigError(f"neighbours is {config.neighbours}, expected 1 or more")
        files = [read_texts([file]) for file in config.texts] or [read_texts(())]
        self.lines = self.texts = [text for texts in files for text in texts]
        self.origins = np.arange(len(self.lines))  # the line that each text is or was cut from
        if config.crops:
            self.texts, self.origins = with_crops(self.lines, config.loop.seed)
        self.sources = np.repeat(np.arange(len(files)), [len(texts) for texts in files])[self.origins]
        names = [frozenset([text_hash(text)]) for text in self.texts]
        self.batches = SourceBatches(
            self.sources, names, config.batch_size, config.loop.seed, files=config.texts, groups=self._groups()
        )
        self.rates = Rates(
            config.attention_dropout, config.lora.dropout if config.train == "lora" else 0.0, config.loop.seed
        )
        count = len(model.decoder.layers)
        if list(config.depths) != sorted(set(config.depths)) or not all(1 <= d <= count for d in config.depths):
            raise ConfigError(f"depths are {list(config.depths)}, expected rising numbers from 1 to {count}")
        if not 0 <= config.whitening <= 0.5 or config.whitening_texts < 2:
            raise ConfigError(
                f"whitening is {config.whitening} over {config.whitening_texts} texts, expected a power from 0 to 0.5 "
                "and at least two texts"
            )
        self.teacher = frozen_teacher(model, config)
        # The teacher is frozen: its states of a text, fp32 [prompts, D], are kept for later epochs where all would fit.
        self.known: dict[int, Tensor] = {}
        needed_bytes = 4 * len(self.texts) * len(config.prompts) * model.decoder.spec.hidden_size
        self.keeps_known = needed_bytes <= MAX_KNOWN_BYTES
        self.spaces = [self._spaces_of(source) for source in range(len(files))]
        self.retention = Retention(config.loop.activation_gib)

    def _groups(self) -> list[np.ndarray]:
        """Rows that meet in a batch: lines that follow each other in a file, and their crops."""
        first_rows = np.flatnonzero(np.diff(self.origins, prepend=-1))  # of each line
        _, first_lines = np.unique(self.sources[first_rows], return_index=True)
        ends = [*first_lines[1:].tolist(), len(first_rows)]
        starts = [range(start, end, self.config.neighbours) for start, end in zip(first_lines, ends, strict=True)]
        return np.split(np.arange(len(self.texts)), first_rows[np.concatenate(starts)][1:])

    def parameters(self) -> dict[str, Tensor]:
        """None beside the model's own."""
        return {}

    def step(self, step: int) -> dict[str, float]:
        """Gradients of one step, of this process's share; and the loss of all."""
        loop, device = self.config.loop, self.model.decoder.device
        drawn = self.batches.rows(step)
        texts = [self.texts[row] for row in drawn]
        rows = token_rows(self.model, texts)
        training = self.rates.training(self.model.trainable.training(), step, loop.recompute)
        target = self.teach(drawn)

        def vectors_of(own: np.ndarray) -> Tensor:
            return encode(self.model, rows.take(own), own, training, self.config.depths)

        share = self.world.share(rows.lengths)
        packs = [share[p] for p in micro_batches(rows.lengths[share], loop.micro_batch_tokens, device)]
        loss, _ = backward_through(
            vectors_of,
            packs,
            len(texts),
            lambda vectors: self.loss(vectors, target),
            num_kept=self.retention.num_kept(self.model, vectors_of, packs, rows.lengths),
            exchange=self.world.sum,
        )
        return {"loss": float(loss), "tokens": int(rows.lengths.sum())}

    def teach(self, rows: np.ndarray) -> Tensor:
        """Cosines of the teacher's vectors of some texts of one file, the mean over prompts: fp32 [n, n]."""
        total = torch.zeros(len(rows), len(rows), device=self.model.decoder.device)
        spaces = self.spaces[self.sources[rows[0]]]
        for states, (mean_D, axes_DD) in zip(self._states(rows), spaces, strict=True):
            unit = F.normalize((states - mean_D) @ axes_DD, dim=-1)
            total += unit @ unit.T
        return total / len(self.config.prompts)

    def _states(self, rows: np.ndarray) -> Tensor:
        """The teacher's answers to each prompt, fp32 [prompts, n, D].

        Kept as the teacher gives them, which does not hang on the batch: a resumed run has the bits of a whole one.
        """
        new = [row for row in rows.tolist() if row not in self.known]
        fresh = dict(zip(new, self._answers([self.texts[row] for row in new]), strict=True)) if new else {}
        if self.keeps_known:
            self.known |= fresh
        return torch.stack([fresh[row] if row in fresh else self.known[row] for row in rows.tolist()], 1)

    def _answers(self, texts: list[str]) -> Tensor:
        """fp32 [n, prompts, D]; every process asks for its part of the texts, and all have all answers."""
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        own = sorted(order[self.world.rank :: self.world.size])
        shape = (len(texts), len(self.config.prompts), self.model.decoder.spec.hidden_size)
        answers = torch.zeros(shape, device=self.model.decoder.device)
        for number, prompt in enumerate(self.config.prompts if own else ()):
            answers[own, number] = self._ask([texts[place] for place in own], prompt)
        return self.world.sum(answers)  # zeros and one process's answer: the bits of one process alone

    def _ask(self, texts: list[str], prompt: str) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncationWarning)  # the student's tokens are cut alike
            return self.teacher.embed(texts, instruction=prompt, normalize=False, output="torch").float()

    def _spaces_of(self, source: int) -> list[tuple[Tensor, Tensor]]:
        """For each prompt the mean [D] of its states over texts of one file, and the axes [D, D] to see them along."""
        rows = np.flatnonzero(self.sources == source)
        order = np.random.default_rng(self.config.loop.seed).permutation(len(rows))
        chosen = rows[order[: self.config.whitening_texts]]
        parts = np.array_split(chosen, -(-len(chosen) // READ_TOGETHER))
        hidden = not (self.world.is_first and sys.stderr.isatty())
        shown = track(parts, "the teacher reads", console=Console(stderr=True), transient=True, disable=hidden)
        return [self._space(states) for states in torch.cat([self._states(part) for part in shown], 1)]

    def _space(self, states: Tensor) -> tuple[Tensor, Tensor]:
        mean_D = states.mean(0)
        if not self.config.whitening:
            return mean_D, torch.eye(states.shape[1], device=states.device)
        spread = (states - mean_D).double().cpu()
        variances_D, axes_DD = torch.linalg.eigh(spread.T @ spread / len(spread))
        variances_D = variances_D.clamp(min=0) + SMOOTHING * variances_D.mean().clamp(
            min=torch.finfo(torch.float32).tiny
        )
        return mean_D, (axes_DD * variances_D**-self.config.whitening).float().to(states.device)

    def loss(self, vectors: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch's vectors [n, D] against cosines [n, n]; of several depths side by side their mean."""
        parts = vectors.chunk(max(1, len(self.config.depths)), 1)
        return torch.stack([self._loss(part, target) for part in parts]).mean()

    def _loss(self, vectors: Tensor, target: Tensor) -> Tensor:
        n = len(vectors)
        unit = F.normalize(vectors.float(), dim=-1)
        other = ~torch.eye(n, dtype=torch.bool, device=vectors.device)
        student = (unit @ unit.T)[other].view(n, n - 1)
        teacher = target.to(student)[other].view(n, n - 1)
        t = self.config.temperature
        divergence = F.kl_div(
            (student / t).log_softmax(1), (teacher / t).log_softmax(1), log_target=True, reduction="sum"
        )
        return divergence / n + self.config.squared_weight * (student - teacher).square().mean()

    def seen(self, step: int) -> Iterator[int]:
        """Hashes of the texts of a step."""
        for row in self.batches.rows(step):
            yield text_hash(self.texts[row])
            yield text_hash(self.lines[self.origins[row]])


def with_crops(texts: list[str], seed: int) -> tuple[list[str], np.ndarray]:
    """Each text, and behind it a run of its words: where a crop starts and ends is a function of seed and place.

    Returns:
        Texts and crops, and which of `texts` each of these is or was cut from.
    """
    found: list[str] = []
    origins: list[int] = []
    for number, text in enumerate(texts):
        found.append(text)
        origins.append(number)
        words = text.split()
        if len(words) >= CROP_WORDS:
            rng = np.random.default_rng([seed, number])
            count = max(2, round(len(words) * rng.uniform(*CROP_SHARES)))
            start = int(rng.integers(len(words) - count + 1))
            found.append(" ".join(words[start : start + count]))
            origins.append(number)
    return found, np.array(origins)


def frozen_teacher(model: Model, config: DistillConfig) -> Encoder:
    """The model's own weights as they are now, causal, read at the last token of some layer."""
    decoder, spec = model.decoder, model.spec
    count = len(decoder.layers)
    layers = max(1, count - FALLBACK_LAYERS) if config.teacher_layers is None else config.teacher_layers
    if not 1 <= layers <= count:
        raise ConfigError(f"teacher_layers is {layers}, the model has {count}")
    if not config.prompts or any("{text}" not in prompt for prompt in config.prompts):
        raise ConfigError("prompts: give at least one, each with {text} in it")
    prompt_tokens = int(model.tokenizer.count(list(config.prompts), special=True).max())
    own = decoder.layers[:layers]
    norm_D = decoder.norm_D
    if config.train == "body":  # they are about to change
        own = [replace(layer, **_copies(layer)) for layer in own]
        norm_D = norm_D.detach().clone()
    facts = decoder.spec
    teacher_spec = replace(
        facts,
        num_layers=layers,
        layer_ropes=facts.layer_ropes[:layers],
        layer_windows=facts.layer_windows[:layers],
    )
    causal = replace(
        spec, decoder=teacher_spec, attention="causal", pooling=("last",), span="offsets", layout="hf", template=None,
        text_suffix="", max_length=min(decoder.spec.max_positions, spec.max_length + prompt_tokens),
    )  # fmt: skip
    return Encoder(causal, Decoder(teacher_spec, decoder.embedding_VD, own, norm_D), model.tokenizer)


def _copies(layer: object) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in vars(layer).items() if x is not None}
