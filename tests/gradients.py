"""An op and its gradients against its reference: both judged by the criterion of `compare`, the truth in fp64."""

from collections.abc import Callable, Sequence

import pytest
import torch
from compare import assert_as_close_as_torch
from torch import Tensor

HALVES = [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float16]  # interpreted bf16 is wrong


def outputs_and_gradients(op: Callable[..., Tensor | tuple[Tensor, ...]], leaves: Sequence[Tensor]) -> list[Tensor]:
    """What `op` returns for the leaves, and the gradient of a fixed random combination of it in each of them."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]  # as they lie in memory
    returned = op(*leaves)
    outputs = [returned] if isinstance(returned, Tensor) else list(returned)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(out.shape, generator=generator).to(torch.float16) for out in outputs]  # exact in all
    gradients = torch.autograd.grad(outputs, leaves, [d.to(o) for d, o in zip(directions, outputs, strict=True)])
    return [tensor.detach() for tensor in (*outputs, *gradients)]


def assert_op_and_gradients(op: Callable, reference: Callable, leaves: Sequence[Tensor]) -> None:
    """`op` and `reference` take the leaves; the reference is also run on them in fp64, and must then return fp64."""
    truth = outputs_and_gradients(reference, [leaf.double() for leaf in leaves])
    same = outputs_and_gradients(reference, leaves)
    for got, own, true in zip(outputs_and_gradients(op, leaves), same, truth, strict=True):
        assert true.dtype == torch.float64
        assert_as_close_as_torch(got, own, true)


def surrounded(x: Tensor) -> Tensor:
    """The same values as a strided view, with NaN before and after every row and on the rows around them."""
    wide = torch.full((x.shape[0] + 2, *x.shape[1:-1], x.shape[-1] + 16), float("nan"), dtype=x.dtype, device=x.device)
    wide[1:-1, ..., 8:-8] = x
    return wide[1:-1, ..., 8:-8]


def far_apart(x: Tensor) -> Tensor:
    """The same rows, so far apart that the last lies past 2^31 elements; what is between them is never touched."""
    stride = 2**31 // (len(x) - 1) + 64
    memory = torch.empty((len(x) - 1) * stride + x[0].numel(), dtype=x.dtype, device=x.device)
    rows = memory.as_strided(x.shape, (stride, *x.stride()[1:]))
    assert rows[-1].storage_offset() > 2**31
    return rows.copy_(x)


def heads_far_apart(x: Tensor) -> Tensor:
    """`far_apart` of heads: the same [T, heads, K] with each head's tokens in a place of their own."""
    return far_apart(x.transpose(0, 1).contiguous()).transpose(0, 1)


def dense_past_2_31(elements: int = 2**31) -> pytest.MarkDecorator:
    """For tests that write past 2^31 elements: outputs are dense, so they need that memory (`far_apart` does not)."""
    fits = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > 8 * elements
    return pytest.mark.skipif(not fits, reason=f"writes {elements:,} elements: a GPU with {8 * elements >> 30} GB")
