"""Where a kernel may run: decided here and nowhere else.

An op has a reference, sometimes a form for the CPU, and a Triton kernel; `implementation` picks one by the device of
its input. Kernels reach Triton through this module (`triton`, `tl`, `launch`), so that everything imports where it is
not installed, and so that one place can count launches, run them interpreted, or record them for compilation elsewhere.
Nothing is read from the environment and nothing is decided at import.
"""

import importlib
import importlib.util
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial, wraps
from typing import Any, Literal

import torch
from torch import Tensor

Implementation = Literal["triton", "cpu", "torch"]

logger = logging.getLogger("flashvec")


class _Absent:
    """Stands for triton where it is not installed: decorates and annotates, and is never launched."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> "_Absent":
        return self


def _module(name: str) -> Any:
    """A module of Triton's, or what stands for it where it is not installed or has no such module."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return _Absent()


if importlib.util.find_spec("triton") is None:
    triton: Any = _Absent()
    tl: Any = triton
else:
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
gluon: Any = _module("triton.experimental.gluon")  # Triton's lower layer, from 3.6 on: kernels for one architecture
gl: Any = _module("triton.experimental.gluon.language")
hopper: Any = _module("triton.experimental.gluon.language.nvidia.hopper")

launches: Counter[str] = Counter()  # kernel name -> launches in this process
_interpreted = False
_recorder: "Recorder | None" = None


@cache
def has_triton() -> bool:
    """True if the triton package can be imported; says so once where it cannot."""
    found = not isinstance(triton, _Absent)
    if not found:
        logger.warning("triton is not installed: kernels run as torch operations (pip install triton on Linux)")
    return found


@cache
def runs_triton(device: torch.device) -> bool:
    """True for a GPU that the kernels are made for: CUDA from compute capability 8.0 on, or ROCm."""
    if device.type != "cuda" or not has_triton():
        return False
    if torch.version.hip is None and torch.cuda.get_device_capability(device)[0] < 8:
        name = torch.cuda.get_device_name(device)
        logger.warning("%s is older than the kernels support (compute capability 8.0): torch operations run", name)
        return False
    return True


def implementation(x: Tensor) -> Implementation:
    """The form of an op that runs for `x`: its Triton kernel, its form for the `cpu`, or the `torch` reference."""
    if _recorder is not None or (_interpreted and x.device.type == "cpu"):
        return "triton"
    if x.device.type == "cpu":
        has_triton()
        return "cpu"
    return "triton" if runs_triton(x.device) else "torch"


def needs_gradient(*tensors: Tensor | None) -> bool:
    """True if autograd will ask for the gradient of any of these: forms that overwrite buffers must not run."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


@contextmanager
def interpreted() -> Iterator[None]:
    """Run kernels on CPU tensors in Triton's interpreter, for tests; slow.

    Raises:
        RuntimeError: TRITON_INTERPRET=1 was not set when the kernels were imported.
    """
    global _interpreted
    if has_triton() and not triton.knobs.runtime.interpret:
        raise RuntimeError("set TRITON_INTERPRET=1 before flashvec is imported to run kernels interpreted")
    before, _interpreted = _interpreted, True
    try:
        yield
    finally:
        _interpreted = before


# --- launching and recording -----------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A GPU architecture that kernels are tuned and compiled for.

    `arch` is NVIDIA's compute capability times ten, or AMD's name. A block may use `shared_bytes`; a multiprocessor
    holds `threads` threads and `registers` registers of 32 bits.
    """

    name: str
    backend: Literal["cuda", "hip"]
    arch: int | str
    warp_size: int
    shared_bytes: int
    threads: int = 2048
    registers: int = 65_536


TARGETS = {
    t.name: t
    for t in (
        Target("sm_80", "cuda", 80, 32, 163 * 1024),
        Target("sm_89", "cuda", 89, 32, 99 * 1024, 1536),
        Target("sm_90", "cuda", 90, 32, 227 * 1024),
        Target("sm_100", "cuda", 100, 32, 227 * 1024),
        Target("sm_120", "cuda", 120, 32, 99 * 1024, 1536),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024, 2048, 131_072),
    )
}
WARPGROUPS = ("sm_90", "sm_100")  # matrix units that read shared memory and keep no operand in registers


@cache
def _device_target(index: int | None) -> Target:
    device = torch.device("cuda", index) if index is not None else torch.device("cuda")
    if torch.version.hip is not None:
        return TARGETS["gfx942"]
    major, minor = torch.cuda.get_device_capability(device)
    capability = major * 10 + minor
    if capability == 86:  # made later than sm_80 and with as little shared memory as sm_89
        return TARGETS["sm_89"]
    known = [t for t in TARGETS.values() if isinstance(t.arch, int) and t.arch <= capability]
    return max(known, key=lambda t: int(t.arch))


def target(x: Tensor) -> Target:
    """What the kernel for `x` is tuned for: the recorder's target, else the device's (interpreted: sm_90)."""
    if _recorder is not None:
        return _recorder.target
    return _device_target(x.device.index) if x.device.type == "cuda" else TARGETS["sm_90"]


@cache
def _multiprocessors(index: int | None) -> int:
    return int(torch.cuda.get_device_properties(index or 0).multi_processor_count)


def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU, for kernels whose blocks stay; of an H100 where launches are recorded."""
    return _multiprocessors(device.index) if device.type == "cuda" else 132


@cache
def _has_gluon() -> bool:
    version = tuple(int(part) for part in str(getattr(triton, "__version__", "0.0")).split(".")[:2])
    return not isinstance(hopper, _Absent) and version >= (3, 6)


def runs_gluon() -> bool:
    """True if kernels written in Gluon can run, or be recorded: Triton 3.6 or later, and not interpreted."""
    return not _interpreted and _has_gluon()


@cache
def _descriptor_type() -> Any:
    return importlib.import_module("triton.experimental.gluon.nvidia.hopper").TensorDescriptor


def tensor_descriptor(x: Tensor, box: list[int]) -> Any:
    """What the bulk copy engine needs to know of a matrix of 16-bit elements, to copy boxes of it.

    Args:
        x: [rows, columns]; rows 16-byte aligned.
        box: rows and columns of a box, which lies in shared memory swizzled over 128 bytes.
    """
    return _descriptor_type()(x, list(x.shape), list(x.stride()), box, gl.NVMMASharedLayout(128, 16, 2))


@dataclass(frozen=True)
class Launch:
    """One kernel launch as recorded: enough to compile the same code for its target."""

    kernel: Any
    arguments: dict[str, Any]  # tensors, numbers, and constexpr values by parameter name
    options: dict[str, Any]  # num_warps, num_stages, maxnreg, enable_fp_fusion


class Recorder:
    """Launches noted instead of run, see `recording`."""

    def __init__(self, recorded_target: Target) -> None:
        self.target = recorded_target
        self.launches: list[Launch] = []


@contextmanager
def recording(recorded_target: Target) -> Iterator[Recorder]:
    """Note launches for a target instead of running them; inputs may be meta tensors."""
    global _recorder
    before, _recorder = _recorder, Recorder(recorded_target)
    try:
        yield _recorder
    finally:
        _recorder = before


OPTIONS = ("num_warps", "num_stages", "maxnreg")


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **keywords: Any) -> None:
    """Run a kernel over a grid; an empty grid runs nothing.

    Args:
        kernel: a `@triton.jit` function.
        grid: number of programs along each axis.
        args, keywords: the kernel's parameters; `num_warps`, `num_stages`, `maxnreg` are compilation options.
    """
    if 0 in grid:
        return
    # Fused multiply-add is asked for by name: from Triton 3.10 on it is no longer the default.
    options = {key: keywords.pop(key, None) for key in OPTIONS}
    options = {key: value for key, value in options.items() if value is not None} | {"enable_fp_fusion": True}
    if _recorder is not None:
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | keywords
        _recorder.launches.append(Launch(kernel, arguments, options))
        return
    launches[kernel.__name__] += 1
    tensor = next(a for a in args if isinstance(a, Tensor))
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        with torch.cuda.device(tensor.device):
            kernel[grid](*args, **keywords, **options)
    else:
        kernel[grid](*args, **keywords, **options)


# --- registering ops -------------------------------------------------------------------------------

_library = torch.library.Library("flashvec", "FRAGMENT")
AUTOCAST = ("cpu", "cuda")  # device types whose autocast is kept out; meta tensors have none


def _call_as_given(device_type: str, op: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    with torch.autocast(device_type, enabled=False):
        return op(*args, **keywords)


def as_given(op: Callable[..., Any]) -> Callable[..., Any]:
    """`op`, which is no registered one, in the dtype of its first tensor whatever autocast says, as kernels run."""

    @wraps(op)
    def run(*args: Any, **keywords: Any) -> Any:
        device_type = next(x for x in (*args, *keywords.values()) if isinstance(x, Tensor)).device.type
        if device_type in AUTOCAST and torch.is_autocast_enabled(device_type):
            return _call_as_given(device_type, op, *args, **keywords)
        return op(*args, **keywords)

    return run


def _without_gradient(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of an op that has no gradient: where one is wanted torch would warn, and take zeros for it."""

    @wraps(forward)
    def run(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            raise RuntimeError(f"flashvec::{name} has no gradient: first derivatives alone, no create_graph=True")
        return forward(*args)

    return run


def define_op(
    schema: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register `flashvec::<name>`, visible to torch.compile and autograd; returns the callable op.

    `Library.define` and `impl` cost half of what `torch.library.custom_op` adds to every call. Under autocast an op
    runs as it is given, its products too; where there is none, nothing asks for it.

    Args:
        schema: as in `torch.library.Library.define`, e.g. "swiglu(Tensor gate_up, str activation) -> Tensor".
        forward: launches the kernel; may not mutate or return its inputs.
        fake: the same shapes, strides and dtypes, without computing.
        setup_context, backward: as in `torch.library.register_autograd`; `backward` calls ops. An op without them, as
            those are, refuses tensors whose gradient is wanted.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema)
    run = _without_gradient(name, forward) if backward is None else forward
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flashvec::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"flashvec::{name}", backward, setup_context=setup_context, lib=_library)
    op = getattr(torch.ops.flashvec, name).default
    for device_type in AUTOCAST:
        _library.impl(name, partial(_call_as_given, device_type, op), f"Autocast{device_type.upper()}")
    return op


# --- the processor ---------------------------------------------------------------------------------


def has_hardware_bf16(device: torch.device) -> bool:
    """True where bf16 products run on hardware made for them; elsewhere fp32 is both faster and closer.

    On a CPU that means AVX512-BF16 or AMX; on CUDA compute capability 8.0 and later.
    """
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return False


def instruction_set() -> str:
    """The matrix instructions this CPU's products use: amx_bf16, avx512_bf16, avx512, avx2 or none."""
    if torch.cpu._is_amx_tile_supported():
        return "amx_bf16"
    if torch.cpu._is_avx512_bf16_supported():
        return "avx512_bf16"
    return torch.backends.cpu.get_cpu_capability().lower()
