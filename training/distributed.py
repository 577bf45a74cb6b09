"""Several processes, started by torchrun or `launch.py`: gloo on CPUs, NCCL on GPUs.

Every process knows the whole batch and encodes its share of it. Two exchanges make a step: vectors, so that every
process has the loss of the whole batch (texts of all processes are each other's negatives), and gradients of the
trained parameters, one flat sum at the end. Nothing is averaged: each process's share is a term of the same gradient,
whatever its tokens. Encoding needs no exchange, so that micro-batches may differ in number; but over a base in parts
(`shards.py`) every layer does.
"""

import ctypes
import hashlib
import importlib
import os
import signal
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT_S = 1800
LAUNCHER = "FLASHVEC_LAUNCHER"  # in the environment: the number of the process that `launch` runs in
PR_SET_PDEATHSIG = 1  # prctl(2)


def own_device(name: str | None) -> torch.device:
    """The device that this process runs on.

    Args:
        name: as configured; None takes a GPU where there is one. Of several GPUs each process of a machine has its own.

    Raises:
        ValueError: no GPU where one is asked for, or more processes than GPUs.
    """
    there = torch.cuda.is_available()
    device = torch.device(name or ("cuda" if there else "cpu"))
    if device.type == "cuda" and not there:
        raise ValueError(f"device is {device}, but torch finds no GPU here: leave it out to train on the CPU")
    if device.type != "cuda" or device.index is not None:
        return device
    number, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= count:
        raise ValueError(f"process {number + 1} of this machine has no GPU, there are {count}: start as many processes")
    return torch.device("cuda", number)


def _import_what_keeps_a_group() -> None:
    """Import the modules of torch whose functions have the group of the time as a default argument.

    transformers imports them with the first model. Imported after the group was opened, they hold it for good:
    `destroy_process_group` then destroys nothing, and its threads run on into the end of the interpreter, where one
    that frees a tensor aborts the process.
    """
    for name in ("torch.distributed.nn.functional", "torch.distributed.fsdp"):
        importlib.import_module(name)


def _end_with_launcher() -> None:
    """Killed, `launch` cannot stop its processes: they would train on, into the same output. On Linux they end.

    Not under others' launchers: Linux tells of the thread that started a process, which with them may end long before.
    """
    if os.environ.get(LAUNCHER) != str(os.getppid()):
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class World:
    """This process among all of them; alone where torchrun did not start it."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self._owns = False
        if device is not None and device.type == "cuda":
            torch.cuda.set_device(device)  # what is launched or exchanged without a name goes there
        self._device = device or torch.device("cpu")
        if self.size > 1 and not dist.is_initialized():
            _import_what_keeps_a_group()
            _end_with_launcher()
            backend = "nccl" if device is not None and device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_S))
            self._owns = True

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, lengths: np.ndarray) -> np.ndarray:
        """int64: this process's rows, dealt by falling length so that all have like work.

        Raises:
            ValueError: fewer rows than processes; every process raises it.
        """
        if len(lengths) < self.size:
            raise ValueError(f"a batch has {len(lengths)} sequences for {self.size} processes: take larger batches")
        order = np.argsort(-np.asarray(lengths), kind="stable")
        turns = np.arange(len(order))
        back_and_forth = np.where(turns // self.size % 2 == 0, turns % self.size, self.size - 1 - turns % self.size)
        return np.sort(order[back_and_forth == self.rank])

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, part: Tensor) -> Tensor:
        """All processes' parts [n], one behind another: [size * n]."""
        if self.size == 1:
            return part
        whole = part.new_empty(self.size * len(part))
        dist.all_gather(list(whole.chunk(self.size)), part)
        return whole

    def least(self, value: int) -> int:
        """The smallest of all processes' values."""
        if self.size == 1:
            return value
        dist.all_reduce(least := torch.tensor(value, device=self._device), op=dist.ReduceOp.MIN)
        return int(least)

    def evened(self, packs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """As many packs as the process with the most has, where each has rows enough: its largest ones are halved.

        Args:
            packs: rows of this process, in micro-batches.
        """
        rows = sum(map(len, packs))
        wanted = min(-self.least(-len(packs)), self.least(rows))
        found = list(packs)
        while len(found) < wanted:
            largest = max(range(len(found)), key=lambda place: len(found[place]))
            found[largest : largest + 1] = np.array_split(found[largest], 2)
        while len(found) > wanted:
            smallest = min(range(len(found) - 1), key=lambda place: len(found[place]) + len(found[place + 1]))
            found[smallest : smallest + 2] = [np.concatenate(found[smallest : smallest + 2])]
        return found

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Every parameter's gradient summed over all processes, in one exchange; absent ones count as zero."""
        if self.size == 1:
            return
        leaves = list(parameters)
        grads = [x.new_zeros(x.shape) if x.grad is None else x.grad for x in leaves]
        flat = self.sum(torch.cat([g.flatten() for g in grads]))
        for x, part in zip(leaves, flat.split([x.numel() for x in leaves]), strict=True):
            x.grad = part.view(x.shape)

    def check_equal(self, parameters: Sequence[Tensor], step: int) -> None:
        """Refuse to go on with processes whose parameters have drifted apart.

        Raises:
            RuntimeError: they differ.
        """
        if self.size == 1:
            return
        sums = torch.stack([x.detach().double().sum() for x in parameters])
        own = torch.stack([sums, -sums])
        dist.all_reduce(most := own.clone(), op=dist.ReduceOp.MAX)
        if not torch.equal(most[0], -most[1]):
            raise RuntimeError(f"step {step}: processes hold different parameters; stop and resume from a checkpoint")

    def check_same(self, value: str, what: str) -> None:
        """Refuse to go on with processes that were given different things.

        Raises:
            RuntimeError: their values differ; says `what` they do.
        """
        if self.size == 1:
            return
        words = torch.tensor(list(hashlib.sha256(value.encode()).digest()), device=self._device)
        dist.all_reduce(most := torch.stack([words, -words]), op=dist.ReduceOp.MAX)
        if not torch.equal(most[0], -most[1]):
            raise RuntimeError(f"processes {what}")

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        if self._owns:
            dist.destroy_process_group()
