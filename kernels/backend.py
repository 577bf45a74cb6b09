"""Where a kernel may run: decided here and nowhere else.

Today every op has its reference and its CPU form; a Triton kernel joins them in the op's own file and is picked by
`implementation`. Nothing is read from the environment and nothing is decided at import.
"""

import importlib.util
import logging
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Implementation = Literal["cpu", "torch"]

logger = logging.getLogger("flashvec")


@cache
def has_triton() -> bool:
    """True if the triton package can be imported; says so once where it cannot."""
    found = importlib.util.find_spec("triton") is not None
    if not found:
        logger.warning("triton is not installed: kernels run as torch operations (pip install triton on Linux)")
    return found


def implementation(x: Tensor) -> Implementation:
    """The form of an op that runs for `x`: `cpu` (chosen by measurement) or `torch` (the reference)."""
    has_triton()
    return "cpu" if x.device.type == "cpu" else "torch"


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
