"""Runs kernels written in Gluon on the CPU: their own source, with Gluon's names standing for torch operations.

Triton interprets its own kernels, not those. What is emulated is what can go wrong in such a kernel apart from speed:

- Each partition of warps is a thread; one runs at a time, until it waits, and a seed chooses who is next. When all wait
  and nothing is being copied, they are stuck, and the test fails.
- Copies land late: masked ones when their group is waited for, bulk ones at some later moment. What they write to is
  NaN from the moment they are begun, so a slot that is overwritten too early, or read too early, shows.
- Products read their operands in shared memory when they are waited for, not when they are begun.
- Shared memory that was written by stores or masked copies must be fenced before a matrix instruction reads it or a
  bulk copy overwrites it.
- Pointers may touch what their tensor's storage holds and nothing else.

Numbers are not rounded: a kernel that runs on fp32 tensors here is compared with its definition to fp32's precision.
"""

import importlib
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from flashvec.kernels import backend

MODULES = (
    "attention_hopper_parts",
    "attention_hopper",
    "attention_hopper_dq",
    "attention_hopper_dkv",
    "attention_hopper_bwd",
)


class Block(torch.Tensor):
    """A tensor in registers: one whose `type` has a layout, as Gluon's have, and that `x -= y` does not change."""

    type = property(lambda self: SimpleNamespace(layout=None))  # type: ignore[assignment]
    __iadd__ = torch.Tensor.__add__  # type: ignore[assignment]
    __isub__ = torch.Tensor.__sub__


def block(x: Tensor) -> Any:
    return x.as_subclass(Block)


class Pointer:
    """A tensor's storage and an offset, or a tensor of offsets, into it."""

    def __init__(self, flat: Tensor, offset: Any) -> None:
        self.flat, self.offset = flat, offset
        self.dtype = SimpleNamespace(element_ty=flat.dtype)

    def __add__(self, other: Any) -> "Pointer":
        return Pointer(self.flat, self.offset + other)

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Offsets, and which of them are touched; of those each must lie in the storage."""
        offset = torch.as_tensor(self.offset).as_subclass(torch.Tensor)
        touched = torch.ones_like(offset, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
        touched = touched.as_subclass(torch.Tensor).expand_as(offset)
        own = offset[touched]
        if own.numel() and not (own.min() >= 0 and own.max() < len(self.flat)):
            raise AssertionError(f"offsets {own.min()} to {own.max()} of a tensor of {len(self.flat)} elements")
        return offset, touched

    def read(self, mask: Any = None, other: float = 0.0) -> Any:
        offset, touched = self.places(mask)
        found = torch.full(offset.shape, other, dtype=self.flat.dtype)
        found[touched] = self.flat[offset[touched]]
        return block(found)

    def write(self, value: Any, mask: Any = None) -> None:
        offset, touched = self.places(mask)
        value = torch.as_tensor(value).as_subclass(torch.Tensor).to(self.flat.dtype).expand_as(offset)
        self.flat[offset[touched]] = value[touched]


class Shared:
    """A view of shared memory; `written`, of the same shape, says what was written without a fence since."""

    def __init__(self, x: Tensor, written: Tensor) -> None:
        self.x, self.written, self.dtype = x, written, x.dtype

    def _view(self, of: Callable[[Tensor], Tensor]) -> "Shared":
        return Shared(of(self.x), of(self.written))

    def index(self, i: Any) -> "Shared":
        return self._view(lambda x: x[int(i)])

    def slice(self, start: int, length: int, dim: int) -> "Shared":
        return self._view(lambda x: x.narrow(dim, start, length))

    def permute(self, order: Sequence[int]) -> "Shared":
        return self._view(lambda x: x.permute(*order))

    def load(self, layout: Any) -> Any:
        return block(self.x.clone())

    def store(self, value: Any) -> None:
        self.x.copy_(value)
        self.written.fill_(True)


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all expected bytes are there."""

    def __init__(self) -> None:
        self.phase, self.count, self.waited, self.bytes = 0, 0, 0, 0

    def settle(self) -> None:
        assert self.waited >= 0 and self.bytes >= 0, "more arrivals or bytes than expected"
        if not self.waited and not self.bytes:
            self.phase ^= 1
            self.waited = self.count


class Barriers:
    def __init__(self, number: int) -> None:
        self.all = [Barrier() for _ in range(number)]

    def index(self, i: Any) -> Barrier:
        return self.all[int(i)]


class Product:
    """A matrix instruction that was begun: it reads shared memory when it is finished."""

    def __init__(self, a: Any, b: Shared, acc: Any) -> None:
        self.a, self.b, self.acc = a, b, acc
        self.result: Any = None

    def finish(self) -> None:
        for operand in (self.a, self.b):
            if isinstance(operand, Shared):
                assert not operand.written.any(), "a product reads what no fence has shown it"
        a = self.a.x if isinstance(self.a, Shared) else self.a
        acc = self.acc.result if isinstance(self.acc, Product) else self.acc
        self.result = block(acc + a.float() @ self.b.x.float())


class Launched:
    """One block of a grid: its partitions, and what they wait for."""

    def __init__(self, program: int, programs: int, chance: random.Random) -> None:
        self.program, self.programs, self.chance = program, programs, chance
        self.turn = threading.Condition()
        self.running: int | None = None
        self.waiting: dict[int, Callable[[], bool]] = {}  # partitions that are not running, by when they may
        self.flying: list[Callable[[], None]] = []  # bulk copies
        self.shared: list[Tensor] = []
        self.failure: BaseException | None = None

    def run(self, partitions: Sequence[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        self.waiting = {i: (lambda: True) for i in range(len(partitions))}
        threads = [threading.Thread(target=self._one, args=(i, *p), daemon=True) for i, p in enumerate(partitions)]
        for thread in threads:
            thread.start()
        with self.turn:
            self._next()
        for thread in threads:
            thread.join(120)
        if self.failure is not None:
            raise self.failure
        assert not self.flying, "copies that nobody waited for"

    def _one(self, number: int, run: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        local.block, local.number, local.groups, local.products = self, number, [], []
        try:
            self._await_turn(number)
            run(*arguments)
            assert not local.products and not local.groups, "work that nobody waited for"
        except BaseException as error:
            self.failure = self.failure or error
        with self.turn:
            self._next()

    def _await_turn(self, number: int) -> None:
        with self.turn:
            self.turn.wait_for(lambda: self.running == number or self.failure is not None, 60)
            if self.failure is not None:
                raise RuntimeError("another partition failed")

    def _next(self) -> None:
        """Give the turn to a partition that may run; copies land when chance says so, or when nobody may."""
        while self.flying and self.chance.random() < 0.3:
            self.flying.pop(self.chance.randrange(len(self.flying)))()
        ready = [i for i, may in self.waiting.items() if may()]
        while not ready and self.flying:
            self.flying.pop(self.chance.randrange(len(self.flying)))()
            ready = [i for i, may in self.waiting.items() if may()]
        if not ready and self.waiting:
            self.failure = self.failure or AssertionError(f"partitions {sorted(self.waiting)} wait for each other")
        self.running = None
        if ready:
            self.running = self.chance.choice(ready)
            del self.waiting[self.running]
        self.turn.notify_all()

    def wait(self, may: Callable[[], bool]) -> None:
        with self.turn:
            self.waiting[local.number] = may
            self._next()
        self._await_turn(local.number)


local: Any = threading.local()


# --- Gluon's names ----------------------------------------------------------------------------------------


def _wait(barrier: Barrier, phase: Any) -> None:
    local.block.wait(lambda: barrier.phase != int(phase))


def _arrive(barrier: Barrier, count: int) -> None:
    barrier.waited -= count
    barrier.settle()


def _expect(barrier: Barrier, num_bytes: int) -> None:
    barrier.bytes += num_bytes
    barrier.waited -= 1


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.waited = count


def _copy_async(slot: Shared, pointer: Pointer, mask: Any) -> None:
    value = pointer.read(mask)
    slot.x.fill_(float("nan"))
    local.groups.append(("copy", slot, value))


def _commit() -> None:
    local.groups.append(("end", None, None))


def _wait_group(left: int) -> None:
    while sum(kind == "end" for kind, _, _ in local.groups) > left:
        kind, slot, value = local.groups.pop(0)
        if kind == "copy":
            slot.store(value)


def _copy_bulk(boxes: Any, place: Sequence[Any], barrier: Barrier, slot: Shared) -> None:
    row, column = (int(i) for i in place)
    rows, columns = boxes.box
    assert not slot.written.any(), "a bulk copy overwrites what no fence has shown it"
    slot.x.fill_(float("nan"))

    def lands() -> None:
        found = boxes.x[row : row + rows, column : column + columns]
        slot.x.zero_()
        slot.x[: len(found)].copy_(found)
        slot.written.fill_(False)  # by the engine that matrix instructions agree with
        barrier.bytes -= rows * columns * 2
        barrier.settle()

    local.block.flying.append(lands)


def _fence() -> None:
    for written in local.block.shared:
        written.fill_(False)


def _multiply(a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Product:
    assert is_async
    begun = Product(a, b, acc if use_acc else torch.zeros_like(torch.as_tensor(acc)))
    local.products.append(begun)
    return begun


def _multiply_wait(left: int, deps: Sequence[Any]) -> Any:
    while len(local.products) > left:
        local.products.pop(0).finish()
    found = tuple(d.result if isinstance(d, Product) else d for d in deps)
    assert all(x is not None for x in found), "a product is used that was not waited for"
    return found[0] if len(found) == 1 else found


def _allocate(dtype: Any, shape: Sequence[int], layout: Any) -> Any:
    if dtype == torch.int64:
        return Barriers(shape[0])
    x = torch.full(tuple(shape), float("nan"), dtype=dtype)
    written = torch.zeros_like(x, dtype=torch.bool)
    local.block.shared.append(written)
    return Shared(x, written)


gl = SimpleNamespace(
    constexpr=lambda x: x,
    static_range=range,
    **{name: getattr(torch, name) for name in ("int32", "int64", "float32", "exp2", "log2", "sqrt", "where")},
    **{name: lambda *_: None for name in ("BlockedLayout", "SliceLayout", "NVMMADistributedLayout")},
    **{name: lambda *_: None for name in ("DotOperandLayout", "NVMMASharedLayout", "SwizzledSharedLayout")},
    program_id=lambda axis: local.block.program,
    num_programs=lambda axis: local.block.programs,
    arange=lambda start, stop, layout: block(torch.arange(start, stop)),
    zeros=lambda shape, dtype, layout: block(torch.zeros(shape, dtype=dtype)),
    full=lambda shape, value, dtype, layout: block(torch.full(shape, value, dtype=dtype)),
    load=lambda pointer, mask=None, other=0.0: pointer.read(mask, other),
    store=lambda pointer, value, mask=None: pointer.write(value, mask),
    maximum=torch.maximum,
    max=lambda x, axis: x.amax(axis),
    sum=lambda x, axis: x.sum(axis),
    expand_dims=lambda x, axis: x.unsqueeze(axis),
    convert_layout=lambda x, layout: x,
    reshape=lambda x, shape: x.reshape(shape),
    permute=lambda x, order: x.permute(*order),
    split=lambda x: (x[..., 0], x[..., 1]),
    join=lambda a, b: block(torch.stack([a, b], -1)),
    broadcast=lambda a, b: torch.broadcast_tensors(a, b),
    allocate_shared_memory=_allocate,
    barrier=lambda: None,
    warp_specialize=lambda partitions, num_warps, registers: local.block.run(partitions),
)
hopper = SimpleNamespace(
    async_copy=SimpleNamespace(async_load=_copy_async, commit_group=_commit, wait_group=_wait_group),
    tma=SimpleNamespace(async_load=_copy_bulk),
    mbarrier=SimpleNamespace(wait=_wait, arrive=_arrive, expect=_expect, init=_init, MBarrierLayout=lambda: None),
    fence_async_shared=_fence,
    warpgroup_mma=_multiply,
    warpgroup_mma_wait=_multiply_wait,
)


def launch(kernel: Callable[..., None], grid: tuple[int, ...], *arguments: Any, **keywords: Any) -> None:
    """Run a kernel's blocks, one after the other."""
    backend.launches[kernel.__name__] += 1
    keywords.pop("num_warps")
    for program in range(grid[0]):
        made = []
        for x in arguments:
            if isinstance(x, Tensor):
                flat = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
                x = Pointer(flat, torch.tensor(x.storage_offset()))
            made.append(torch.as_tensor(x) if isinstance(x, int) else x)
        local.block = Launched(program, grid[0], random.Random(order.seed + program))
        kernel(*made, **keywords)


order = SimpleNamespace(seed=0)  # of partitions and copies, in `launch`


@contextmanager
def emulated(num_multiprocessors: int = 3, seed: int = 0) -> Iterator[SimpleNamespace]:
    """The modules of such kernels, as new copies whose kernels run here."""
    fake = ModuleType(backend.__name__)
    fake.__dict__.update(
        backend.__dict__,
        gl=gl,
        hopper=hopper,
        gluon=SimpleNamespace(jit=lambda kernel=None, **options: kernel or (lambda later: later)),
        launch=launch,
        num_multiprocessors=lambda device: num_multiprocessors,
        tensor_descriptor=lambda x, box: SimpleNamespace(x=x, box=box),
    )
    names = [f"flashvec.kernels.{name}" for name in MODULES]
    parent = importlib.import_module("flashvec.kernels")
    before = {name: sys.modules.pop(name, None) for name in names}
    real, sys.modules[backend.__name__] = sys.modules[backend.__name__], fake
    order.seed = seed
    try:
        yield SimpleNamespace(**{name: importlib.import_module(f"flashvec.kernels.{name}") for name in MODULES})
    finally:
        sys.modules[backend.__name__] = real
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
                setattr(parent, name.rpartition(".")[2], module)
