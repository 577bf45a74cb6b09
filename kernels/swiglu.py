"""Gated activation of a decoder's MLP: act(gate) * up, act being SiLU (SwiGLU) or a GELU (GeGLU).

Shape letters: T = packed tokens, F = MLP width. Memory-bound: reads 2*T*F, writes T*F elements.
Source: Shazeer 2020.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from flashvec.kernels.backend import implementation
from flashvec.kernels.precision import widen

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def swiglu_reference(gate_up_T2F: Tensor, activation: str = "silu") -> Tensor:
    gate_TF, up_TF = widen(gate_up_T2F).chunk(2, -1)
    return (ACTIVATIONS[activation](gate_TF) * up_TF).to(gate_up_T2F.dtype)


def _swiglu_cpu(gate_up_T2F: Tensor, activation: str) -> Tensor:
    """Two passes in the input's dtype: the exponential bounds the first, a fp32 round trip would double both."""
    gate_TF, up_TF = gate_up_T2F.chunk(2, -1)
    return ACTIVATIONS[activation](gate_TF).mul_(up_TF)


def swiglu(gate_up_T2F: Tensor, activation: str = "silu") -> Tensor:
    """Activate the gate half and multiply by the up half.

    Args:
        gate_up_T2F: [T, 2 F] fp32, bf16 or fp16: gate columns, then up columns, of one merged product.
        activation: silu, gelu or gelu_tanh.

    Returns:
        [T, F] in the same dtype.

    Raises:
        ValueError: an odd width or an unknown activation.

    Error: one rounding to the dtype in the reference; two (activation, product) in the CPU form.
    """
    if gate_up_T2F.shape[-1] % 2:
        raise ValueError(f"gate_up_T2F needs an even width, got {gate_up_T2F.shape[-1]}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, known are {', '.join(ACTIVATIONS)}")
    run = _swiglu_cpu if implementation(gate_up_T2F) == "cpu" else swiglu_reference
    return run(gate_up_T2F, activation)
