"""Self-distillation: what the model says in one word teaches what it says by the mean of its tokens.

    teacher   the frozen weights run causally under a prompt that asks for one word (`teacher.py`): unit vectors u
    student   the same weights, bidirectional, with what is trained, pooled as they will be used, without a prompt:
              unit vectors s

    loss = v * mean over texts of (1 - u R s')
         + k * mean over texts of KL(softmax(T[i] / t), softmax(S[i] / t)) + w * mean of (T - S)²

    T, S   cosines among the batch's texts, without each text's own, those of the teacher and those of the student;
           both (cosine - f) / (1 - f) with the teacher's floor f, so that texts at random are near 0

R turns the teacher's vectors, along their first D principal axes, to lie nearest to those of the student as it was at
the start (orthogonal Procrustes, Schönemann 1966). A rotation changes no cosine, so the student need not learn where
the teacher's axes lie. No other model, no label.

The vectors teach a text by itself, with as many numbers as they have; cosines only how alike a batch's texts are, and
of texts drawn at random it is mostly that they are not. After 40 steps of 64 texts STS-B dev (300 pairs) was 76.6 with
vectors alone, 71.7 with both, and 59.0 with cosines alone at half the learning rate. Where cosines teach, `neighbours`
brings texts of one passage together, and `crops` texts with parts of themselves.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flashvec.training.config import DistillConfig
from flashvec.training.data import SourceBatches, existing_files, read_texts, run_starts, text_files, text_hash
from flashvec.training.distributed import World
from flashvec.training.encode import Rates, encode, own_packs, token_rows
from flashvec.training.model import Model
from flashvec.training.settings import ConfigError
from flashvec.training.step import Retention, backward_through
from flashvec.training.teacher import READ_TOGETHER, Teacher

CROP_WORDS = 6  # the shortest text that is cropped
CROP_SHARES = (0.4, 0.8)  # of a text's words


class Distill:
    """The objective: `step` leaves gradients of one step in the model's parameters."""

    def __init__(self, model: Model, config: DistillConfig, world: World) -> None:
        self.model, self.config, self.world = model, config, world
        model.end_at(config.depths)
        files = [read_texts([str(file)]) for file in existing_files(config.texts, "texts")]
        self.lines = self.texts = [text for texts in files for text in texts]
        self.origins = np.arange(len(self.lines))  # the line that each text is or was cut from
        if config.crops:
            self.texts, self.origins = with_crops(self.lines, config.loop.seed)
        self.sources = np.repeat(np.arange(len(files)), [len(texts) for texts in files])[self.origins]
        names = [frozenset([text_hash(text)]) for text in self.texts]
        self.batches = SourceBatches(
            self.sources,
            names,
            config.batch_size,
            config.loop.seed,
            files=list(map(str, text_files(config.texts))),
            groups=self._groups(),
        )
        self.rates = Rates(
            config.attention_dropout, config.lora.dropout if config.train == "lora" else 0.0, config.loop.seed
        )
        self.teacher = Teacher(model, config, world, self.texts, self.sources)
        self.rotations = self._rotations() if config.vector_weight else ()
        self.retention = Retention(config.loop.activation_gib)

    def _groups(self) -> list[np.ndarray]:
        """Rows that meet in a batch: lines that follow each other in a file, and their crops."""
        first_rows = np.flatnonzero(np.diff(self.origins, prepend=-1))  # of each line
        starts = run_starts(self.sources[first_rows], self.config.neighbours)
        return np.split(np.arange(len(self.texts)), first_rows[starts][1:])

    def _rotations(self) -> tuple[Tensor, ...]:
        """For each depth R, fp32 [width of the teacher's vectors, of the student's].

        Of the student as it is now, before its first step, which a resumed run finds as well. The first process reads
        for all, so that any number of them has the same bits.
        """
        sample = self.teacher.sample
        taught = self.teacher.vectors(sample).double().cpu()
        width = len(self.model.spec.pooling) * self.model.decoder.spec.hidden_size
        if len(sample) < width < taught.shape[1]:
            raise ConfigError(
                f"vectors of several prompts or teachers need {width} texts or more to be seen along {width} axes, "
                f"here are {len(sample)}: give more texts or whitening_texts, or a single prompt"
            )
        found = torch.zeros(len(sample), self._num_depths * width, device=self.model.decoder.device)
        order = np.argsort([len(self.texts[row]) for row in sample], kind="stable")
        training = self.model.trainable.training()  # without dropout
        with torch.no_grad():
            for places in np.array_split(order, -(-len(order) // READ_TOGETHER)) if self.world.is_first else ():
                rows = token_rows(self.model, [self.texts[row] for row in sample[places]])
                found[places] = encode(self.model, rows, range(len(places)), training, self.config.depths)
        students = self.world.sum(found).chunk(self._num_depths, 1)
        return tuple(_rotation(taught, F.normalize(x).double().cpu()).to(found) for x in students)

    @property
    def _num_depths(self) -> int:
        return max(1, len(self.config.depths))

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
        taught = self.teacher.vectors(drawn)

        def vectors_of(own: np.ndarray) -> Tensor:
            return encode(self.model, rows.take(own), own, training, self.config.depths)

        packs = own_packs(self.world, rows.lengths, loop, device)
        loss, _ = backward_through(
            vectors_of,
            packs,
            len(texts),
            lambda vectors: self.loss(vectors, taught),
            num_kept=self.retention.num_kept(self.model, vectors_of, packs, rows.lengths),
            exchange=self.world.sum,
        )
        return {"loss": float(loss), "tokens": int(rows.lengths.sum())}

    def loss(self, vectors: Tensor, taught: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            vectors: [n, D], those of several depths side by side, of which the mean is taken.
            taught: the teacher's unit vectors, [n, a multiple of D].
        """
        units = [F.normalize(part.float(), dim=-1) for part in vectors.chunk(self._num_depths, 1)]
        return torch.stack([self._at(depth, unit, taught.to(unit)) for depth, unit in enumerate(units)]).mean()

    def _at(self, depth: int, unit: Tensor, taught: Tensor) -> Tensor:
        loss = unit.new_zeros(())
        if self.rotations:
            loss = loss + self.config.vector_weight * (1 - (unit * (taught @ self.rotations[depth])).sum(1).mean())
        if self.config.divergence_weight or self.config.squared_weight:
            loss = loss + self._of_cosines(unit, taught)
        return loss

    def _of_cosines(self, unit: Tensor, taught: Tensor) -> Tensor:
        n, floor = len(unit), self.teacher.floor
        other = ~torch.eye(n, dtype=torch.bool, device=unit.device)
        student, teacher = ((((x @ x.T)[other] - floor) / (1 - floor)).view(n, n - 1) for x in (unit, taught))
        t = self.config.temperature
        divergence = F.kl_div(
            (student / t).log_softmax(1), (teacher / t).log_softmax(1), log_target=True, reduction="sum"
        )
        squares = (student - teacher).square().mean()
        return self.config.divergence_weight * divergence / n + self.config.squared_weight * squares

    def seen(self, step: int) -> Iterator[str]:
        """Texts of a step; of the first one also those that the teacher's spaces and the rotations were made of."""
        for row in (*self.batches.rows(step), *(self.teacher.sample if step == 0 else ())):
            yield self.texts[row]
            yield self.lines[self.origins[row]]


def _rotation(taught: Tensor, students: Tensor) -> Tensor:
    """R [P, D] that maximises the sum of products of the rows of `taught` @ R, [n, P] @ R, with those of `students`.

    Its columns are orthonormal, within the first D principal axes of `taught`; where P < D, its rows.
    """
    _, axes_PP = torch.linalg.eigh(taught.T @ taught)
    axes_PK = axes_PP[:, -students.shape[1] :]
    left, _, right = torch.linalg.svd((taught @ axes_PK).T @ students, full_matrices=False)
    return axes_PK @ left @ right


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
