"""Checkpoints of a run: whole or not there, checked before they are believed, exact enough to go on bit for bit.

    <output>/checkpoint-00000200/    parameters.safetensors, optimizer.safetensors, state.json

state.json comes last and holds the digests of the other two. A folder is written under another name and renamed; one
that is damaged is passed over for the one before it, with a notice.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flashvec.runtime.checkpoint.safetensors_files import write_tensors
from flashvec.runtime.durable import sync
from flashvec.training.files import whole

PREFIX = "checkpoint-"
STATE_FILE = "state.json"
# What reading a damaged checkpoint raises.
DAMAGE = (OSError, ValueError, ArithmeticError, KeyError, TypeError, RecursionError, SafetensorError)
TENSOR_FILES = ("parameters.safetensors", "optimizer.safetensors")

logger = logging.getLogger("flashvec")


class ResumeError(ValueError):
    """A run that cannot be resumed; says why and what to do."""


@contextmanager
def held(output: Path) -> Iterator[None]:
    """Keep a run's folder from other runs of this machine until this process ends, however it does.

    Raises:
        ResumeError: another process has it.
    """
    handle = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResumeError(
                f"{output}: another process trains there now; wait until it has ended, or give the run another output"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def save_checkpoint(
    output: Path,
    step: int,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    fingerprint: str,
    keep: int,
    is_due: Callable[[int], bool] = lambda step: True,
) -> Path:
    """Write one checkpoint and remove all but the last `keep`.

    Args:
        is_due: of a step, whether an uninterrupted run saves it. One of another step, where a run was stopped, takes
            no due one's place and goes with the next, so that the run ends with the checkpoints of one that was not.

    Raises:
        OSError: the disk is full or not writable; names the checkpoint, earlier checkpoints are as they were.
    """
    target = output / f"{PREFIX}{step:08d}"
    with whole(target) as partial:
        partial.mkdir(parents=True)
        contents = {
            TENSOR_FILES[0]: {name: x.detach().cpu().contiguous().clone() for name, x in parameters.items()},
            TENSOR_FILES[1]: optimizer_tensors(parameters, optimizer),
        }
        for name, tensors in contents.items():
            write_tensors(tensors, partial / name)
        digests = {name: _digest(partial / name) for name in TENSOR_FILES}
        state = {"step": step, "is_due": is_due(step), "fingerprint": fingerprint, "digests": digests}
        state["torch"] = torch.__version__
        (partial / STATE_FILE).write_text(json.dumps(state) + "\n", encoding="utf-8")
        for path in partial.iterdir():
            sync(path)
    sync(output)
    others = [folder for folder in checkpoints(output) if folder != target]
    due = [folder for folder in others if _was_due(folder, is_due)]
    room = keep - is_due(step)
    for folder in others:
        if folder not in due[max(len(due) - room, 0) :]:
            shutil.rmtree(folder, ignore_errors=True)
    return target


def _was_due(folder: Path, is_due: Callable[[int], bool]) -> bool:
    """As its state says: `loop.save_every` may be another since. Older ones, and damaged ones, do not say."""
    try:
        return bool(read_state(folder)["is_due"])
    except DAMAGE:
        return is_due(int(folder.name.removeprefix(PREFIX)))


def checkpoints(output: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(p for p in output.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdigit())


def load_checkpoint(
    output: Path,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    fingerprint: str,
    difference: Callable[[], str] = lambda: "settings",
) -> int:
    """Go on from the newest whole checkpoint: fills parameters and optimiser.

    Args:
        difference: says what is another where the fingerprint is.

    Returns:
        Steps already done; 0 where there is no checkpoint.

    Raises:
        ResumeError: it belongs to a run with other settings, or all are damaged.
    """
    found = checkpoints(output)
    for place, folder in reversed(list(enumerate(found))):
        try:
            state, tensors, moments = _read(folder)
            step, written = int(state["step"]), state["fingerprint"]
        except DAMAGE as error:
            if not place:
                which = f"all {len(found)} checkpoints are" if len(found) > 1 else "the only checkpoint is"
                raise ResumeError(
                    f"{which} damaged ({folder.name}: {error}): remove the folders {output}/{PREFIX}* to start again"
                ) from None
            logger.warning("%s is damaged (%s); going back to the one before it", folder.name, error)
            continue
        if written != fingerprint:
            raise ResumeError(
                f"{folder.name} was written with other {difference()}: give the run another output, or what it had"
            )
        if tensors.keys() != parameters.keys():
            raise ResumeError(f"{folder.name} holds other parameters: give the run another output")
        with torch.no_grad():
            for name, x in parameters.items():
                x.copy_(tensors[name])
        _give_optimizer(parameters, optimizer, moments)
        return step
    return 0


def average_parameters(output: Path, parameters: Mapping[str, Tensor], count: int) -> int:
    """Fill parameters with the mean of the last `count` checkpoints that are whole; returns how many there were."""
    found: list[dict[str, Tensor]] = []
    for folder in reversed(checkpoints(output)):
        if len(found) == count:
            break
        try:
            found.append(_read(folder)[1])
        except DAMAGE as error:
            logger.warning("%s is damaged (%s) and is left out of the mean", folder.name, error)
    with torch.no_grad():
        for name, x in parameters.items():
            if found:
                x.copy_(torch.stack([tensors[name] for tensors in found]).mean(0))
    if len(found) < count:
        logger.warning("the mean is of %d checkpoints, not %d: no more were left", len(found), count)
    return len(found)


def optimizer_tensors(parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state by parameter name: its moments and its count of steps."""
    return {
        f"{name}/{key}": value.detach().cpu().clone().reshape(value.shape)
        for name, x in parameters.items()
        for key, value in optimizer.state.get(x, {}).items()
    }


def _give_optimizer(
    parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]
) -> None:
    for key, value in moments.items():
        name, _, part = key.rpartition("/")
        x = parameters[name]
        optimizer.state[x][part] = value.clone() if part == "step" else value.to(x.device)


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's step, fingerprint and digests.

    Raises:
        OSError, ValueError: missing or damaged.
    """
    state: dict[str, Any] = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    return state


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    state = read_state(folder)
    if folder.name != f"{PREFIX}{int(state['step']):08d}":
        raise ValueError(f"{STATE_FILE}: step is {state['step']}, which is not that of its folder")
    for name in TENSOR_FILES:
        if _digest(folder / name) != state["digests"][name]:
            raise ValueError(f"{name} is not what was written")
    return state, load_file(folder / TENSOR_FILES[0]), load_file(folder / TENSOR_FILES[1])


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
