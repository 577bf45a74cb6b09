"""The loop that all objectives share: optimiser, schedule, log, checkpoints, and what it refuses to pass over.

What a step does is a function of its number: rows, masks and dropout are drawn from seed and step. A run that was
killed goes on from its last checkpoint and, on a CPU, ends with the bits of one that was not.
"""

import json
import logging
import math
import time
from collections.abc import Iterable
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from flashvec.runtime.batches import TokenRows
from flashvec.runtime.checkpoint.peft import WEIGHTS_FILE
from flashvec.runtime.checkpoint.placing import naming
from flashvec.runtime.checkpoint.safetensors_files import SafetensorsSource
from flashvec.training.checkpoint import (
    average_parameters,
    checkpoints,
    held,
    load_checkpoint,
    read_state,
    save_checkpoint,
)
from flashvec.training.config import ContrastiveConfig, OptimizerConfig, TrainConfig, read_config
from flashvec.training.distributed import World
from flashvec.training.encode import run_rows
from flashvec.training.evaluate import embed_with, sts_score
from flashvec.training.events import Events
from flashvec.training.files import whole
from flashvec.training.memory import used_bytes
from flashvec.training.model import ENCODER_FOLDER, Model
from flashvec.training.origin import CONFIG_FILE, SEEN_FILE, difference, earlier_seen, fingerprint, write_seen
from flashvec.training.progress import TrainingBar
from flashvec.training.scored_pairs import read_scored_pairs
from flashvec.training.sentences import text_hashes
from flashvec.training.settings import to_yaml

logger = logging.getLogger("flashvec")

LEARNT = 1e-3  # a loss below it may well have no gradient left in fp32
CHECK_EVERY = 100  # steps between two looks at whether all processes hold the same parameters
LOG_FILE = "log.jsonl"
MASTERS_KEY = "model/"


class TrainingStopped(RuntimeError):
    """Training cannot go on; says why, and at which step, before which the state is saved where it had been good."""


class Objective(Protocol):
    """What is minimised."""

    model: Model

    def parameters(self) -> dict[str, Tensor]:
        """Parameters beside the model's own."""

    def step(self, step: int) -> dict[str, float]:
        """Leave this process's share of a step's gradient; returns at least `loss` and `tokens`."""

    def seen(self, step: int) -> Iterable[str]:
        """Texts of a step; of the first one also those that were read before it."""


def learning_rate(config: OptimizerConfig, steps: int, step: int) -> float:
    """Of one step, counted from 0: a linear rise, then the schedule's fall to zero."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    end = steps if config.decay_steps is None else config.decay_steps
    share = min(1.0, (step - config.warmup_steps) / max(1, end - config.warmup_steps))
    fall = 1 - share if config.schedule == "linear" else (1 + math.cos(math.pi * share)) / 2
    return config.learning_rate * fall


def finished(config: TrainConfig) -> dict[str, Any] | None:
    """The last line of the log, where a run with these very settings and files has ended; else None."""
    output = Path(config.output)
    try:
        if not (output / SEEN_FILE).is_file() or not _is_whole(output, config.train):  # the first is written last
            return None
        if replace(read_config(type(config), output / CONFIG_FILE), device=None) != replace(config, device=None):
            return None
        state = read_state(checkpoints(output)[-1])
        if (state["step"], state["fingerprint"]) != (config.loop.steps, fingerprint(config)):
            return None
        last: dict[str, Any] = json.loads((output / LOG_FILE).read_text(encoding="utf-8").splitlines()[-1])
        return last
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None  # not whole: training finds out what is missing


def _is_whole(output: Path, kind: str) -> bool:
    """Is there what a run leaves, its weights as long as they say they are.

    Raises:
        CheckpointError: damaged weights.
    """
    names = ("adapter_config.json", "tokenizer.json") if kind == "lora" else ("config.json", "tokenizer.json")
    folder = output if kind == "lora" else output / ENCODER_FOLDER
    weights = [folder / WEIGHTS_FILE] if kind == "lora" else list(folder.glob("*.safetensors"))
    for path in weights:
        SafetensorsSource.from_file(path).close()
    return bool(weights) and all((folder / name).is_file() for name in names)


def train(
    config: TrainConfig, objective: Objective, world: World, *, show: bool | None = None, until: int | None = None
) -> dict[str, Any]:
    """Run the loop, from the last checkpoint in `config.output` where there is one.

    Args:
        show: a progress line on stderr; default on a terminal.
        until: stop after this many steps, with a checkpoint, as if killed then.

    Returns:
        The last line of the log.

    Raises:
        TrainingStopped: a loss or gradient that is not finite, a gradient that is zero while the loss is not,
            attention that is causal, a parameter that a step leaves as it was.
    """
    _check_schedule(config, world)
    return _Run(config, objective, world).run(show, until)


def _check_schedule(config: TrainConfig, world: World) -> None:
    """Say where the schedule's end and the run's have nothing to do with each other."""
    optimizer, steps = config.optimizer, config.loop.steps
    if world.is_first and optimizer.warmup_steps >= steps:
        logger.warning("optimizer.warmup_steps is %d of %d steps: the rate only rises", optimizer.warmup_steps, steps)
    if world.is_first and optimizer.schedule != "constant" and (optimizer.decay_steps or steps) < steps:
        logger.warning("optimizer.decay_steps is %d: the steps after it run at rate 0", optimizer.decay_steps)


class _Run:
    def __init__(self, config: TrainConfig, objective: Objective, world: World) -> None:
        self.config, self.objective, self.world = config, objective, world
        self.model, self.output = objective.model, Path(config.output)
        own = objective.parameters()
        self.parameters = {f"{MASTERS_KEY}{k}": x for k, x in self.model.trainable.parameters().items()} | own
        adam = config.optimizer
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=adam.learning_rate,
            betas=(adam.betas[0], adam.betas[1]),
            eps=adam.eps,
            weight_decay=adam.weight_decay,
        )
        self.fingerprint = fingerprint(config)
        self.was_checked = False  # that a step changes what it should
        self.steps_lost = 0  # the last ones, which had a loss and no gradient
        self.events: Events | None = None
        self.scored = None if config.sts is None else read_scored_pairs(Path(config.sts))

    def run(self, show: bool | None, until: int | None) -> dict[str, Any]:
        check_bidirectional(self.model)
        self.output.mkdir(parents=True, exist_ok=True)
        with held(self.output) if self.world.is_first else nullcontext():
            return self._run(show, until)

    def _run(self, show: bool | None, until: int | None) -> dict[str, Any]:
        loop = self.config.loop
        differs = partial(difference, self.config)
        start = load_checkpoint(self.output, self.parameters, self.optimizer, self.fingerprint, differs)
        self.world.check_same(str(start), "go on from different checkpoints: their output must be one folder")
        self.model.trainable.give_values()
        if self.world.is_first:
            (self.output / SEEN_FILE).unlink(missing_ok=True)
            with whole(self.output / CONFIG_FILE) as settings:
                settings.write_text(to_yaml(self.config), encoding="utf-8")
            with naming(self.output):
                _cut_log(self.output / LOG_FILE, start)
        if loop.tensorboard and self.world.is_first:
            self.events = Events(self.output, start)
        last: dict[str, Any] = {}
        stop = loop.steps if until is None else min(until, loop.steps)
        began, tokens = time.perf_counter(), 0
        watched = nullcontext() if self.events is None else closing(self.events)
        with TrainingBar(loop.steps, start, show if self.world.is_first else False) as bar, watched:
            for step in range(start, stop):
                last = self._step(step)
                if step == start or (step + 1) % CHECK_EVERY == 0 or step + 1 == stop:
                    self.world.check_equal(list(self.parameters.values()), step + 1)
                tokens += int(last["tokens"])
                seconds = time.perf_counter() - began
                last |= {"tokens_per_s": round(tokens / seconds, 1), "seconds": round(seconds, 3)}
                last["memory_gib"] = round(used_bytes(self.model.decoder.device) / 2**30, 2)
                if self.scored is not None and ((step + 1) % loop.evaluate_every == 0 or step + 1 == loop.steps):
                    embed = embed_with(self.model, self._deepest, self._instruction)
                    last["sts"] = sts_score(embed, self.scored)["spearman"]
                if (step + 1) % loop.log_every == 0 or step + 1 == stop or "sts" in last:
                    self._log(last)
                if self._is_due(step + 1) or step + 1 == stop:
                    self._save(step + 1)
                bar.advance(last)
        if stop == loop.steps and loop.average_checkpoints > 1:
            self.world.barrier()  # the last one is written
            average_parameters(self.output, self.parameters, loop.average_checkpoints)
            self.model.trainable.give_values()
        if stop == loop.steps and self.world.is_first:
            self.model.save(self.output)
            self._write_seen()
        self.world.barrier()
        return last or self._last_line()

    def _last_line(self) -> dict[str, Any]:
        """Of the log, where all steps had been done before."""
        log = self.output / LOG_FILE
        lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
        return json.loads(lines[-1]) if lines else {}

    def _step(self, step: int) -> dict[str, Any]:
        for x in self.parameters.values():
            x.grad = None
        found = self.objective.step(step)
        self.world.sum_gradients(self.parameters.values())
        grads = [x.grad for x in self.parameters.values() if x.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        if not math.isfinite(found["loss"]) or not math.isfinite(norm):
            what = "loss" if not math.isfinite(found["loss"]) else "gradient"
            self._save(step)
            raise TrainingStopped(
                f"step {step + 1}: the {what} is not finite (loss {found['loss']}, gradient {norm}); the state before "
                "it is saved; begin anew, in another output, with a lower optimizer.learning_rate, or look for the "
                "rows of this step"
            )
        self.steps_lost = self.steps_lost + 1 if norm == 0 and found["loss"] > LEARNT else 0
        if self.steps_lost > 1:  # one may be of texts that are all alike where they are cut
            raise TrainingStopped(
                f"steps {step} and {step + 1}: the loss is {found['loss']:.4g} and its gradient zero: all states are "
                "alike, and nothing is learnt any more; begin anew, in another output, with a lower "
                "optimizer.learning_rate"
            )
        adam = self.config.optimizer
        if adam.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), adam.clip, torch.tensor(norm))
        rate = learning_rate(adam, self.config.loop.steps, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.model.trainable.give_values()
        has_taught = norm > 0 or found["loss"] != 0  # else the batch had nothing to teach, such as scores all alike
        if has_taught and not self.was_checked:
            self.was_checked = True
            if untouched := self.model.trainable.untouched():
                raise TrainingStopped(
                    f"step {step + 1} left {len(untouched)} parameters as they were, {untouched[0]} among them: "
                    "nothing would be learnt there"
                )
        return {"step": step + 1, **found, "gradient_norm": norm, "learning_rate": rate}

    @property
    def _deepest(self) -> tuple[int, ...]:
        """Where vectors are read: after the last layer that is taught; empty for the model's last."""
        return self.config.depths[-1:]

    @property
    def _instruction(self) -> str | None:
        """What stands before texts of which none is a query."""
        config = self.config
        if isinstance(config, ContrastiveConfig) and (config.texts or config.loss == "cosent"):
            return config.instruction
        return None

    def _log(self, line: dict[str, Any]) -> None:
        if self.world.is_first:
            with naming(self.output / LOG_FILE), (self.output / LOG_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            if self.events is not None:
                self.events.add(line)

    def _save(self, step: int) -> None:
        if self.world.is_first:
            keep = self.config.loop.keep_checkpoints
            save_checkpoint(self.output, step, self.parameters, self.optimizer, self.fingerprint, keep, self._is_due)
        self.world.barrier()

    def _is_due(self, step: int) -> bool:
        return step % self.config.loop.save_every == 0 or step == self.config.loop.steps

    def _write_seen(self) -> None:
        """Hashes of every text of the run and of the sentences in it, and of what was seen before it.

        So that overlap with an evaluation set can be looked for.
        """
        texts = {text for step in range(self.config.loop.steps) for text in self.objective.seen(step)}
        found = {name for text in texts for name in text_hashes(text)}
        write_seen(self.output / SEEN_FILE, found | earlier_seen(self.config))


def check_bidirectional(model: Model) -> None:
    """The last token must reach the first one's state.

    Raises:
        TrainingStopped: it does not: attention is causal.
    """
    ids = np.array([1, 2, 3, 1, 2, 4], np.int32) % model.decoder.spec.vocab_size
    rows = TokenRows(ids, np.array([3, 3], np.int32), np.array([[0, 3]] * 2, np.int64))
    with torch.no_grad():
        (stream,), _ = run_rows(model, rows, [0, 1], model.trainable.training())
        states = stream.hidden_TD + stream.delta_TD
    if torch.equal(states[0], states[3]):
        raise TrainingStopped("attention is still causal: a text's last token does not reach its first one's state")


def _cut_log(path: Path, step: int) -> None:
    """Leave out the lines of steps that will be done again."""
    if path.is_file():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        with whole(path) as partial:
            partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # half a line, written as the process died
