"""Attention of packed sequences as other libraries have it, each at its best: one small function per peer.

A peer is given the batch's lengths and heads, and makes of them a `Call` in its own layout, outside the time that is
taken: padding, masks, expanded heads and views are free to it. One that is missing, or cannot do a case, raises; the
row then says so. `PEERS` is the table.
"""

import importlib.util
import inspect
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flashvec.bench.problems import AttentionShape, Tensors


class Missing(Exception):
    """A peer that is not installed, or has no such case."""


@dataclass(frozen=True)
class Call:
    """One prepared forward.

    `run()` gives the output in the peer's layout, `leaves` are q, k and v in it (who wants gradients asks for them
    there), `packed` maps a tensor of q's layout to rows [T, H, K]. Its backward, too, runs within `around()`.
    """

    run: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    packed: Callable[[Tensor], Tensor]
    around: Callable[[], AbstractContextManager[None]] = nullcontext


Peer = Callable[[AttentionShape, Tensors], Call]


def _as_is(x: Tensor) -> Tensor:
    return x


def _leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.detach().contiguous() for x in tensors)


def _expanded(shape: AttentionShape, t: Tensors) -> tuple[Tensor, Tensor]:
    """Keys and values with a head for each query head."""
    group = shape.H // shape.G
    return t["k"].repeat_interleave(group, 1), t["v"].repeat_interleave(group, 1)


def _offsets(shape: AttentionShape, device: torch.device) -> Tensor:
    return torch.as_tensor(np.concatenate([[0], np.cumsum(shape.lengths)]), dtype=torch.int32).to(device)


# --- torch ------------------------------------------------------------------------------------------------


def sdpa_padded(shape: AttentionShape, t: Tensors) -> Call:
    """Padded to the longest; equal lengths run without a mask, by the flash kernels."""
    if len(set(shape.lengths)) == 1:
        return _sdpa_equal(shape, t, "FLASH_ATTENTION")
    longest, device = max(shape.lengths), t["q"].device
    lengths = torch.as_tensor(shape.lengths).to(device)
    is_token_Bn = torch.arange(longest, device=device) < lengths[:, None]

    def padded(x: Tensor) -> Tensor:
        out = x.new_zeros(len(shape.lengths), longest, *x.shape[1:])
        out[is_token_Bn] = x
        return out.transpose(1, 2)

    q, k, v = _leaves(padded(t["q"]), *(padded(x) for x in _expanded(shape, t)))
    mask = is_token_Bn[:, None, None, :]
    run = lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=shape.K**-0.5)  # noqa: E731
    return Call(run, (q, k, v), lambda x: x.transpose(1, 2)[is_token_Bn])


def sdpa_cudnn(shape: AttentionShape, t: Tensors) -> Call:
    if len(set(shape.lengths)) != 1:
        raise Missing("cuDNN is timed on equal lengths alone")
    return _sdpa_equal(shape, t, "CUDNN_ATTENTION")


def _sdpa_equal(shape: AttentionShape, t: Tensors, backend: str) -> Call:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if t["q"].device.type == "cpu":
        backend = "MATH"
    n = shape.lengths[0]
    q, k, v = _leaves(*(t[name].unflatten(0, (-1, n)).transpose(1, 2) for name in "qkv"))

    def run() -> Tensor:
        with sdpa_kernel([getattr(SDPBackend, backend)]):
            return F.scaled_dot_product_attention(q, k, v, scale=shape.K**-0.5, enable_gqa=shape.H != shape.G)

    return Call(run, (q, k, v), lambda x: x.transpose(1, 2).flatten(0, 1))


def sdpa_jagged(shape: AttentionShape, t: Tensors) -> Call:
    """Nested tensors; they have no grouped heads, so keys and values are expanded."""
    q, k, v = _leaves(t["q"], *_expanded(shape, t))
    offsets = _offsets(shape, q.device).long()
    limits: dict[str, Any] = {"min_seqlen": min(shape.lengths), "max_seqlen": max(shape.lengths)}

    def nested(x: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(x, offsets, **limits).transpose(1, 2)

    def run() -> Tensor:
        out = F.scaled_dot_product_attention(nested(q), nested(k), nested(v), scale=shape.K**-0.5)
        return out.transpose(1, 2).values()

    return Call(run, (q, k, v), _as_is)


def torch_varlen(shape: AttentionShape, t: Tensors) -> Call:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = _leaves(t["q"], t["k"], t["v"])
    offsets, longest = _offsets(shape, q.device), max(shape.lengths)
    grouped: dict[str, Any] = {}
    if shape.H != shape.G and "enable_gqa" in inspect.signature(varlen_attn).parameters:  # before, it needed no asking
        grouped = {"enable_gqa": True}

    def run() -> Any:
        return varlen_attn(q, k, v, offsets, offsets, longest, longest, scale=shape.K**-0.5, **grouped)

    return Call(run, (q, k, v), _as_is)


@cache
def _document_of(num_tokens: int, device: torch.device) -> Tensor:
    """One buffer for all batches of a size: what is compiled for one of them serves the next."""
    return torch.zeros(num_tokens, dtype=torch.int32, device=device)


@cache
def _same_document(num_tokens: int, device: torch.device) -> Callable[..., Tensor]:
    document = _document_of(num_tokens, device)
    return lambda batch, head, query, key: document[query] == document[key]


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import flex_attention

    config.recompile_limit = 64  # heads, head sizes and directions each compile once
    return torch.compile(flex_attention, dynamic=False)


def flex(shape: AttentionShape, t: Tensors) -> Call:
    """FlexAttention with a document mask; its block mask, built once a batch, is not in the time."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T, device = sum(shape.lengths), t["q"].device
    index = np.repeat(np.arange(len(shape.lengths)), shape.lengths)
    _document_of(T, device).copy_(torch.as_tensor(index, dtype=torch.int32))
    block_mask = create_block_mask(_same_document(T, device), None, None, T, T, device=str(device))
    attend: Any = flex_attention if device.type == "cpu" else _compiled_flex()
    q, k, v = _leaves(*(t[name].transpose(0, 1)[None] for name in "qkv"))

    def run() -> Tensor:
        grouped = shape.H != shape.G
        return attend(q, k, v, block_mask=block_mask, scale=shape.K**-0.5, enable_gqa=grouped)

    return Call(run, (q, k, v), lambda x: x[0].transpose(0, 1))


# --- flash-attention, where it is installed -----------------------------------------------------------------


def _flash_call(varlen: Callable[..., Any], shape: AttentionShape, t: Tensors) -> Call:
    q, k, v = _leaves(t["q"], t["k"], t["v"])
    offsets, longest = _offsets(shape, q.device), max(shape.lengths)

    def run() -> Tensor:
        out = varlen(q, k, v, offsets, offsets, longest, longest, softmax_scale=shape.K**-0.5)
        return out[0] if isinstance(out, tuple) else out

    return Call(run, (q, k, v), _as_is)


def flash_2(shape: AttentionShape, t: Tensors) -> Call:
    if importlib.util.find_spec("flash_attn_2_cuda") is None:
        raise Missing("flash_attn 2 with CUDA kernels is not installed")
    from flash_attn import flash_attn_varlen_func

    return _flash_call(flash_attn_varlen_func, shape, t)


def flash_3(shape: AttentionShape, t: Tensors) -> Call:
    if importlib.util.find_spec("flash_attn_interface") is None:
        raise Missing("flash_attn_interface (FlashAttention 3) is not installed")
    from flash_attn_interface import flash_attn_varlen_func

    return _flash_call(flash_attn_varlen_func, shape, t)


def flash_triton(shape: AttentionShape, t: Tensors) -> Call:
    """flash_attn's Triton back end, which it uses where it was told to before its first import."""
    if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn_2_cuda") is not None:
        raise Missing("flash_attn without its CUDA kernels is not installed")
    os.environ.setdefault("FLASH_ATTENTION_TRITON_AMD_ENABLE", "TRUE")
    from flash_attn import flash_attn_varlen_func

    return _flash_call(flash_attn_varlen_func, shape, t)


PEERS: dict[str, Peer] = {
    "torch varlen_attn": torch_varlen,
    "torch sdpa, padded": sdpa_padded,
    "torch sdpa, cuDNN": sdpa_cudnn,
    "torch flex, document mask": flex,
    "flash_attn 2": flash_2,
    "flash_attn 3": flash_3,
    "flash_attn, Triton": flash_triton,
    "torch sdpa, jagged": sdpa_jagged,
}
