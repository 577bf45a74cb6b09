"""Gated activation of a decoder's MLP: act(gate) * up, act being SiLU (SwiGLU) or a GELU (GeGLU).

    silu(x) = x / (1 + exp(-x))        gelu(x) = x (1 + erf(x / sqrt(2))) / 2
    gelu_tanh(x) = x (1 + tanh(z)) / 2 = x / (1 + exp(-2 z)),    z = sqrt(2 / pi) (x + 0.044715 x³)

Shape letters: T = packed tokens, F = MLP width. Memory-bound: reads 2*T*F, writes T*F elements; the backward reads
3*T*F and writes 2*T*F, and computes the activation again rather than storing it. All but gelu take one exponential and
one division an element, which is why gelu_tanh is written as a sigmoid.
Source: Shazeer 2020; Hendrycks and Gimpel 2016.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashvec.kernels.backend import define_op, implementation, launch, needs_gradient, tl, triton
from flashvec.kernels.checks import check_rows
from flashvec.kernels.precision import widen

MAX_BLOCK = 1024  # columns of a program: 8 elements a thread in 4 warps, one load of 16 bytes in halves

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


_DERIVED: dict[str, Callable[..., Tensor]] = {  # each writes into `grad_input`
    "silu": torch.ops.aten.silu_backward.grad_input,
    "gelu": torch.ops.aten.gelu_backward.grad_input,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward.grad_input, approximate="tanh"),
}


class _SwigluCpu(torch.autograd.Function):
    """`_swiglu_cpu` with a gradient of one merged tensor: between the passes only its input lives."""

    @staticmethod
    def forward(ctx: Any, gate_up_T2F: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate_up_T2F)
        ctx.activation = activation
        return _swiglu_cpu(gate_up_T2F, activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (dout_TF,), (gate_up_T2F,) = grads, ctx.saved_tensors
        gate_TF, up_TF = gate_up_T2F.chunk(2, -1)
        dgate_up_T2F = gate_up_T2F.new_empty(gate_up_T2F.shape)
        dgate_TF, dup_TF = dgate_up_T2F.chunk(2, -1)
        torch.mul(ACTIVATIONS[ctx.activation](gate_TF), dout_TF, out=dup_TF)
        _DERIVED[ctx.activation](dout_TF * up_TF, gate_TF, grad_input=dgate_TF)
        return dgate_up_T2F, None


# --- kernels: one program per row and block of columns ------------------------------------------------------


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """An activation of fp32 values and its derivative; what is not used is not computed.

    Both sigmoid forms are x share(x) with share = 1 / (1 + exp(-inner)), whose derivative is inner' share (1 - share).
    """
    if ACTIVATION == "gelu":
        share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        return x * share, share + x * 0.3989422804014327 * tl.exp2(x * x * -0.7213475204444817)
    if ACTIVATION == "gelu_tanh":
        z = x * (0.7978845608028654 + 0.035677408136300125 * x * x)  # sqrt(2 / pi) (x + 0.044715 x³)
        slope = 2 * (0.7978845608028654 + 0.10703222440890037 * x * x)
        slope = tl.where(tl.abs(x) < 1e12, slope, 0.0)  # it meets a 0 there, and x times it may be infinite
        exponent = z * -2.885390081777927  # 2 log2(e)
    else:
        slope = 1.0
        exponent = x * -1.4426950408889634
    power = tl.exp2(exponent)
    share = 1 / (1 + power)
    rest = tl.where(exponent < 126, power * share, 1.0)  # 1 - share without its cancellation, nor inf * 0
    return x * share, share + x * slope * share * rest


@triton.jit
def _swiglu_fwd_kernel(gate_up_ptr, out_ptr, row_stride, F, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # times 2 F it may pass 2^31
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(gate_up_ptr + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * row_stride + F + column, mask=inside, other=0.0).to(tl.float32)
    activated, _ = activate(gate, ACTIVATION)
    tl.store(out_ptr + row * F + column, (activated * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_bwd_kernel(
    dout_ptr, gate_up_ptr, dgate_up_ptr, row_stride, F, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(gate_up_ptr + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * row_stride + F + column, mask=inside, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + row * F + column, mask=inside, other=0.0).to(tl.float32)
    activated, slope = activate(gate, ACTIVATION)
    own = dgate_up_ptr + row * (2 * F) + column
    tl.store(own, (dout * up * slope).to(dgate_up_ptr.dtype.element_ty), mask=inside)
    tl.store(own + F, (dout * activated).to(dgate_up_ptr.dtype.element_ty), mask=inside)


# --- ops ------------------------------------------------------------------------------------------------


def _columns(F: int) -> int:
    """Columns of a program: as many as leave the fewest lanes idle in the last block."""
    return min((MAX_BLOCK, MAX_BLOCK // 2), key=lambda block: -(-F // block) * block)


def launch_swiglu(gate_up_T2F: Tensor, activation: str) -> Tensor:
    T, F = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    out_TF = gate_up_T2F.new_empty(T, F)
    block = _columns(F)
    grid = (T, -(-F // block))
    launch(
        _swiglu_fwd_kernel,
        grid,
        gate_up_T2F,
        out_TF,
        gate_up_T2F.stride(0),
        F,
        ACTIVATION=activation,
        BLOCK=block,
        num_warps=block // 256,
    )
    return out_TF


def launch_swiglu_bwd(dout_TF: Tensor, gate_up_T2F: Tensor, activation: str) -> Tensor:
    T, F = dout_TF.shape
    dgate_up_T2F = gate_up_T2F.new_empty(T, 2 * F)
    block = _columns(F)
    launch(
        _swiglu_bwd_kernel,
        (T, -(-F // block)),
        dout_TF,
        gate_up_T2F,
        dgate_up_T2F,
        gate_up_T2F.stride(0),
        F,
        ACTIVATION=activation,
        BLOCK=block,
        num_warps=block // 256,
    )
    return dgate_up_T2F


def _setup_context(ctx, inputs, output):
    gate_up_T2F, ctx.activation = inputs
    ctx.save_for_backward(gate_up_T2F)


def _backward(ctx, dout_TF):
    return _swiglu_bwd(dout_TF.contiguous(), *ctx.saved_tensors, ctx.activation), None


_swiglu_bwd = define_op(
    "swiglu_bwd(Tensor dout, Tensor gate_up, str activation) -> Tensor",
    launch_swiglu_bwd,
    lambda dout_TF, gate_up_T2F, activation: gate_up_T2F.new_empty(gate_up_T2F.shape),
)
_swiglu = define_op(
    "swiglu(Tensor gate_up, str activation) -> Tensor",
    launch_swiglu,
    lambda gate_up_T2F, activation: gate_up_T2F.new_empty(gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2),
    setup_context=_setup_context,
    backward=_backward,
)


# --- public ---------------------------------------------------------------------------------------------


def swiglu(gate_up_T2F: Tensor, activation: str = "silu") -> Tensor:
    """Activate the gate half and multiply by the up half.

    Args:
        gate_up_T2F: [T, 2 F] fp32, bf16 or fp16 (fp64 runs the reference): gate columns, then up columns, of one merged
            product; any row stride.
        activation: silu, gelu or gelu_tanh.

    Returns:
        [T, F] in the same dtype. Differentiable; the gradient is one merged [T, 2 F] tensor.

    Raises:
        ValueError: not two dimensions, an odd width, an unknown activation, another dtype than these, rows that are not
            contiguous.

    Error: one rounding to the dtype; two (activation, product) in the CPU form. Bitwise deterministic.
    """
    if gate_up_T2F.ndim != 2:
        raise ValueError(f"gate_up_T2F must be [T, 2 F], got {tuple(gate_up_T2F.shape)}")
    if gate_up_T2F.shape[1] % 2:
        raise ValueError(f"gate_up_T2F needs an even width, got {gate_up_T2F.shape[1]}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, known are {', '.join(ACTIVATIONS)}")
    check_rows("gate_up_T2F", gate_up_T2F)
    form = implementation(gate_up_T2F)
    if form == "triton" and gate_up_T2F.dtype != torch.float64:
        return _swiglu(gate_up_T2F, activation)
    if form == "cpu" and needs_gradient(gate_up_T2F) and gate_up_T2F.dtype != torch.float64:
        if torch.compiler.is_compiling():  # the CPU's gradient writes into parts of a tensor, which no graph can say
            return swiglu_reference(gate_up_T2F, activation)
        return _SwigluCpu.apply(gate_up_T2F, activation)
    return (_swiglu_cpu if form == "cpu" else swiglu_reference)(gate_up_T2F, activation)
