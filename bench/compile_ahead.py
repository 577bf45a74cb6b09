"""Compiles kernels on all cores before they are needed, into Triton's cache on disk.

Compiling takes a second or three for each form of a kernel, and a run with a GPU at hand needs some hundreds of them.
Steps are first run on tensors without storage while launches are recorded (`backend.recording`); worker processes then
take the path that a launch takes, `warmup`, with a driver that only names the GPU. Nothing depends on its success: what
was not compiled ahead is compiled when it is launched.
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashvec.kernels.backend import Launch, Target, has_triton, recording, triton

PATIENCE_S = 90.0  # for one step's kernels; then it compiles what is missing itself

_launches: list[Launch] = []  # what workers, forked after it is filled, look their work up in


class Ahead:
    """Kernels of named steps, being compiled.

    Args:
        steps: name to a function that runs the step on meta tensors.
        target: of the GPU.
        jobs: worker processes; default one a core.
    """

    def __init__(self, steps: dict[str, Callable[[], Any]], target: Target, jobs: int | None = None) -> None:
        self.problems: dict[str, str] = {}
        self._pending: dict[str, list[Any]] = {}
        recorded = {name: self._record(name, run, target) for name, run in steps.items()}
        _launches[:] = [launch for launches in recorded.values() for launch in launches]
        self._pool = multiprocessing.get_context("fork").Pool(jobs or os.cpu_count(), _become, (target,))
        known: dict[str, Any] = {}
        index = 0
        for name, launches in recorded.items():
            self._pending[name] = []
            for launch in launches:
                key = _key(launch)
                if key not in known:
                    known[key] = self._pool.apply_async(_compile, (index,))
                self._pending[name].append(known[key])
                index += 1
        self.num_kernels = len(known)

    def _record(self, name: str, run: Callable[[], Any], target: Target) -> list[Launch]:
        try:
            with recording(target) as recorder, _Launchers():
                run()
        except Exception as error:  # recording is a courtesy: the step itself will say what is wrong with it
            self.problems[name] = f"not recorded: {type(error).__name__}: {error}"
            return []
        return recorder.launches

    def wait(self, name: str, patience_s: float = PATIENCE_S) -> list[str]:
        """Wait for a step's kernels; returns what the compiler said of those that it refused."""
        refused, stop = [], time.monotonic() + patience_s
        for result in self._pending.get(name, ()):
            try:
                message = result.get(max(0.0, stop - time.monotonic()))
            except multiprocessing.TimeoutError:
                break
            if message:
                refused.append(message)
        return refused

    def close(self) -> None:
        """End the workers."""
        self._pool.terminate()
        self._pool.join()


class _Launchers(TorchDispatchMode):
    """Runs the project's ops' own launchers on meta tensors, where torch would run their shape functions."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "flashvec":
            return func(*args, **(kwargs or {}))
        with self:
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))


def without_ahead() -> Any:
    """Stands for `Ahead` where nothing is compiled ahead."""
    return SimpleNamespace(problems={}, num_kernels=0, wait=lambda name, patience_s=0.0: [], close=lambda: None)


def _key(launch: Launch) -> str:
    """Equal for launches that need the same code."""
    parts = [launch.kernel.__name__, str(sorted(launch.options.items()))]
    for name, value in launch.arguments.items():
        if isinstance(value, Tensor):
            parts.append(f"{name}: {value.dtype} {value.storage_offset() * value.element_size() % 16}")
        elif hasattr(value, "block_shape"):
            parts.append(f"{name}: {value.base.dtype} {value.block_shape}")
        elif type(value) is int and not (param := _param(launch, name)).is_constexpr:
            special = () if param.do_not_specialize else (value == 1, value % 16 == 0)
            parts.append(f"{name}: {special} {-(2**31) <= value < 2**31}")
        elif isinstance(value, float):
            parts.append(f"{name}: float")
        else:
            parts.append(f"{name}: {value}")
    return "; ".join(parts)


def _param(launch: Launch, name: str) -> Any:
    return launch.kernel.params[launch.kernel.arg_names.index(name)]


# --- in the workers ---------------------------------------------------------------------------------------


class _NamedDriver:
    """All that compiling asks of a driver: which GPU it is for."""

    def __init__(self, target: Target) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(target.backend, target.arch, target.warp_size)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def _become(target: Target) -> None:
    if has_triton():
        triton.runtime.driver.set_active(_NamedDriver(target))


def _compile(index: int) -> str:
    """Compile one launch; returns what went wrong, or nothing."""
    launch = _launches[index]
    arguments = [launch.arguments[name] for name in launch.kernel.arg_names]
    try:
        launch.kernel.warmup(*arguments, grid=(1,), **launch.options)
    except Exception as error:  # a compiler's faults have no common type
        return f"{launch.kernel.__name__} does not compile: {str(error)[-300:]}"
    return ""
