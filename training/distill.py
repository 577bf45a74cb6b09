"""Self-distillation: what the model says in one word teaches what it says by the mean of its tokens.

    teacher   the frozen weights run causally under a prompt that asks for one word, the state of the last token some
              layers before the end (Jiang et al. 2023); centred within the batch; several prompts averaged
    student   the same weights, bidirectional, with what is trained, pooled as they will be used, without a prompt

    loss = mean over texts of KL(softmax(T[i] / t), softmax(S[i] / t)) + w * mean of (T - S)²

T and S are cosines among the batch's texts, without each text's own. No other model, no label.
"""

import warnings
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
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


class Distill:
    """The objective: `step` leaves gradients of one step in the model's parameters."""

    def __init__(self, model: Model, config: DistillConfig, world: World) -> None:
        self.model, self.config, self.world = model, config, world
        self.texts = read_texts(config.texts)
        names = [frozenset([text_hash(text)]) for text in self.texts]
        self.batches = SourceBatches(np.zeros(len(self.texts), np.int64), names, config.batch_size, config.loop.seed)
        self.rates = Rates(
            config.attention_dropout, config.lora.dropout if config.train == "lora" else 0.0, config.loop.seed
        )
        count = len(model.decoder.layers)
        if list(config.depths) != sorted(set(config.depths)) or not all(1 <= d <= count for d in config.depths):
            raise ConfigError(f"depths are {list(config.depths)}, expected rising numbers from 1 to {count}")
        self.teacher = frozen_teacher(model, config)
        self.retention = Retention(config.loop.activation_gib)

    def parameters(self) -> dict[str, Tensor]:
        """None beside the model's own."""
        return {}

    def step(self, step: int) -> dict[str, float]:
        """Gradients of one step, of this process's share; and the loss of all."""
        loop, device = self.config.loop, self.model.decoder.device
        texts = [self.texts[row] for row in self.batches.rows(step)]
        rows = token_rows(self.model, texts)
        training = self.rates.training(self.model.trainable.training(), step, loop.recompute)
        target = self.teach(texts)

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

    def teach(self, texts: list[str]) -> Tensor:
        """Cosines of the teacher's vectors of a batch: fp32 [n, n]."""
        total = None
        for prompt in self.config.prompts:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", TruncationWarning)  # the student's tokens are cut alike
                vectors = self.teacher.embed(texts, instruction=prompt, normalize=False, output="torch").float()
            unit = F.normalize(vectors - vectors.mean(0), dim=-1)
            total = unit @ unit.T if total is None else total + unit @ unit.T
        assert total is not None
        return total / len(self.config.prompts)

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
        return (text_hash(self.texts[row]) for row in self.batches.rows(step))


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
