"""`attn_implementation="flashvec"`: Hugging Face models on the packed attention, forward and backward.

    register_with_transformers()
    model = AutoModel.from_pretrained(name, attn_implementation="flashvec")

transformers asks for a mask once a forward and for attention once a layer. Which tokens belong together, in which
direction and how far they see is worked out with the mask, by asking the model's own mask function: the result is that
of "eager" and "sdpa", where "flash_attention_2" has windows of its own. The layers find it by the mask they are given.

Padding is taken out before attention and put back (as zeros) after it; flattened batches, by `cu_seq_lens_q` or by
positions that start anew, have none. Whole sequences only: no generation with a cache.

Shape letters: B = rows of the batch, n = tokens of a row, T = packed tokens, H = query heads, G = kv heads,
K = head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from flashvec.kernels.attention import attention
from flashvec.kernels.dropout import Dropout
from flashvec.kernels.schedule import Schedule, build_schedule

NAME = "flashvec"
SPREAD = 2_654_435_761  # a multiplier that scatters the far keys that a mask is asked for

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # batch row, head, query, key -> may it see it


@dataclass(frozen=True)
class Layout:
    """Where sequences lie in a batch of [B, n] tokens. `tokens` int64 [T]: theirs among B * n, None: all of them."""

    schedule: Schedule
    tokens: Tensor | None


@dataclass(frozen=True)
class Plan:
    """What a mask says: where the sequences are, and how far a token sees in its own (`window` None: all of it)."""

    layout: Layout
    causal: bool
    window: int | None


# By the tensor that stands for it: a mask, cumulative lengths, positions. An entry goes when its tensor goes.
_plans: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_layouts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def register_with_transformers() -> None:
    """Make `attn_implementation="flashvec"` known to transformers (5.4 or later); calling it again changes nothing.

    Then `AutoModel.from_pretrained(..., attn_implementation="flashvec")`, `model.set_attn_implementation("flashvec")`
    and `SentenceTransformer(..., model_kwargs={"attn_implementation": "flashvec"})` run and train on it;
    sentence-transformers also flattens its batches, so that they hold no padding at all. Processes that it spawns need
    the call, too: make it where the script is imported, not under `if __name__ == "__main__"`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations import hub_kernels

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    load = hub_kernels.load_and_register_attn_kernel
    if getattr(load, "knows_flashvec", False):
        return

    def load_or_ours(attn_implementation: str, *args: Any, **keywords: Any) -> Any:
        if attn_implementation == NAME:
            return SimpleNamespace(
                flash_attn_func=_refuse, flash_attn_varlen_func=_refuse, flash_attn_with_kvcache=_refuse
            )
        return load(attn_implementation, *args, **keywords)

    # transformers takes every name with "flash" in it for one of its flash-attention kernels, and loads that with the
    # model: here it finds functions that are never called, since our own entry comes first.
    load_or_ours.knows_flashvec = True  # type: ignore[attr-defined]
    hub_kernels.load_and_register_attn_kernel = load_or_ours


def _refuse(*args: Any, **keywords: Any) -> NoReturn:
    raise ValueError(
        "this model calls flash attention's functions itself instead of transformers' AttentionInterface: "
        f"attn_implementation={NAME!r} cannot serve it"
    )


# --- once a forward: the mask -----------------------------------------------------------------------------


@torch.compiler.disable
@torch.no_grad()
def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **unused: Any,
) -> Tensor:
    """What transformers calls for a mask: bool [B, n], True for tokens, with its plan kept under it."""
    if q_length != kv_length or int(q_offset) or kv_offset:
        raise ValueError(
            f"attn_implementation={NAME!r} attends over whole sequences: {q_length} queries at {int(q_offset)} do not "
            f"go with {kv_length} keys at {kv_offset}; for generation with a cache use 'sdpa'"
        )
    if attention_mask is None:
        is_token = torch.ones(batch_size, q_length, dtype=torch.bool, device=device)
    else:
        is_token = attention_mask.to(device=device, dtype=torch.bool).view_as(attention_mask)  # ours, not the caller's
    _plans[is_token] = _read(is_token, mask_function)
    return is_token


def _read(is_token: Tensor, sees: MaskFunction | None) -> Plan:
    """Work out a plan from a mask function.

    Raises:
        ValueError: a mask that is no window (or all, or causal) within each sequence.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    B, n = is_token.shape
    if sees is None or sees is causal_mask_function or sees is bidirectional_mask_function or n <= 1:
        joined = torch.ones_like(is_token)
    else:  # neighbours that do not see each other belong to different sequences
        row, token = _indices(is_token)
        before = (token - 1).clamp(min=0)
        joined = (_ask(sees, row, token, before) | _ask(sees, row, before, token)).view(B, n)
    number = (~joined).int()
    number[:, 0] = 1
    number = number.flatten().cumsum(0).view(B, n)  # of each token's sequence
    own, lengths = torch.unique_consecutive(number[is_token], return_counts=True)
    layout = _layout(lengths.tolist(), is_token)
    if sees is causal_mask_function or sees is bidirectional_mask_function or sees is None or not len(own):
        return Plan(layout, sees is causal_mask_function, None)
    places = (is_token & (number == own[lengths.argmax()])).flatten().nonzero().flatten()
    left, right = _reach(sees, places, n)
    reach = len(places) - 1
    if _has_holes(is_token, number, lengths) and (left < reach or right not in (0, reach)):
        # Taking padding out of the middle of a sequence would bring tokens closer than a window counts them.
        raise ValueError(_unlike("a window over sequences with padding in their middle"))
    if right and left != right:
        raise ValueError(_unlike(f"one that reaches {left} tokens back and {right} ahead"))
    causal, window = not right and reach > 0, left if left < reach else None
    _verify(sees, is_token, number, causal, window)
    return Plan(layout, causal, window)


def _layout(lengths: list[int], is_token: Tensor) -> Layout:
    tokens = None if sum(lengths) == is_token.numel() else is_token.flatten().nonzero().flatten()
    return Layout(build_schedule(lengths, device=is_token.device, identities=range(len(lengths))), tokens)


def _indices(is_token: Tensor) -> tuple[Tensor, Tensor]:
    """Row and place of each of the B * n tokens."""
    B, n = is_token.shape
    number = torch.arange(B * n, device=is_token.device)
    return number // n, number % n


class _Head(Tensor):
    """The head that a mask function is asked for: one that looks at it has a mask for each."""

    @classmethod
    def __torch_function__(cls, *args: Any, **keywords: Any) -> NoReturn:
        raise ValueError(_unlike("another for each head"))


def _ask(sees: MaskFunction, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return sees(row, torch.zeros_like(row).as_subclass(_Head), query, key).expand(row.shape)


def _reach(sees: MaskFunction, places: Tensor, n: int) -> tuple[int, int]:
    """How many tokens the last one of a sequence sees before it, and the first one after it."""
    row, token = places // n, places % n
    back = _ask(sees, row, token[-1:].expand_as(token), token)
    ahead = _ask(sees, row, token[:1].expand_as(token), token)
    left, right = torch.stack([back.sum(), ahead.sum()]).tolist()
    return left - 1, right - 1


def _verify(sees: MaskFunction, is_token: Tensor, number: Tensor, causal: bool, window: int | None) -> None:
    """Compare what was made of a mask with the mask, for every token.

    At its neighbours, at both edges of the window, at the row's first and last token, and at one key anywhere: blocks
    that see each other, prefixes, tokens that all see or that see all, and gaps show there. All pairs would be n².
    """
    n = is_token.shape[1]
    row, query = _indices(is_token)
    edge = n if window is None else window
    steps = torch.tensor([-n, -edge - 1, -edge, -1, 0, 1, edge, edge + 1, n], device=is_token.device).unique()
    near = query[:, None] + steps
    far = ((row * n + query) * SPREAD // 7 % n)[:, None]
    key = torch.cat([near, far], 1).clamp(0, n - 1).flatten()
    row, query = (x.repeat_interleave(len(steps) + 1) for x in (row, query))
    distance = query - key
    expected = number[row, query] == number[row, key]
    if causal:
        expected &= distance >= 0
    if window is not None:
        expected &= distance.abs() <= window
    both = is_token[row, query] & is_token[row, key]
    if bool((both & (expected != _ask(sees, row, query, key))).any()):
        raise ValueError(_unlike("one of another shape"))


def _has_holes(is_token: Tensor, number: Tensor, lengths: Tensor) -> bool:
    """True if a sequence has padding between its tokens."""
    _, place = _indices(is_token)
    place, starts = place[is_token.flatten()], lengths.cumsum(0) - lengths
    return bool((place[starts + lengths - 1] - place[starts] + 1 != lengths).any())


def _unlike(found: str) -> str:
    return (
        f"attn_implementation={NAME!r} knows masks that are full, causal or a symmetric window within each sequence; "
        f"this model's is {found}: use 'sdpa'"
    )


# --- once a layer: attention ------------------------------------------------------------------------------


@torch.compiler.disable
def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for attention.

    Args:
        query: [B, H, n, K]; key, value: [B, G, n, K].
        attention_mask: what `_mask` gave, a caller's own [B, n], or None.
        kwargs: of them `cu_seq_lens_q` and `position_ids` are read; what would change the result is refused.

    Returns:
        [B, n, H, K], zeros on padding; and None for the weights.
    """
    for name in ("s_aux", "position_bias", "cache", "block_table"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attn_implementation={NAME!r} does not take {name}: use another for this model")
    B, H, n, K = query.shape
    if _reads_another_sequence(module):  # of equal length its mask, which is of keys alone, passes for one of queries
        raise ValueError(f"attn_implementation={NAME!r} knows no cross-attention ({type(module).__name__}): use 'sdpa'")
    if key.shape[2] != n:
        raise ValueError(f"attn_implementation={NAME!r} got {n} queries and {key.shape[2]} keys; it keeps no cache")
    if is_causal is None:  # modules of decoders say True whatever their configuration does
        own = getattr(module, "is_causal", True)
        is_causal = bool(own and getattr(getattr(module, "config", None), "is_causal", True) is not False)
    plan = _plan(attention_mask, (B, n), query.device, is_causal, sliding_window)
    layout = plan.layout
    if layout.tokens is None:
        layout = _packed_layout(layout, (B, n), kwargs, is_first=not getattr(module, "layer_idx", None))
    extra: dict[str, Any] = {}
    if dropout > 0:  # drawn from torch's generator, so that checkpointing draws it again in recomputation
        site = getattr(module, "layer_idx", None) or 0
        extra["dropout"] = Dropout(dropout, seed=int(torch.randint(1 << 62, ())), site=site)
    q_THK, k_TGK, v_TGK = (_pack(x.to(value.dtype), layout.tokens) for x in (query, key, value))
    out_THK = attention(
        q_THK,
        k_TGK,
        v_TGK,
        layout.schedule,
        scale=K**-0.5 if scaling is None else scaling,
        causal=plan.causal,
        window=plan.window,
        softcap=softcap,
        **extra,
    )
    if layout.tokens is not None:
        out_THK = out_THK.new_zeros(B * n, H, K).index_copy(0, layout.tokens, out_THK)
    return out_THK.view(B, n, H, K), None


def _reads_another_sequence(module: torch.nn.Module) -> bool:
    """Is this the attention of a decoder to an encoder, by the marks that transformers' models have for it."""
    if getattr(module, "is_cross_attention", False) or "Cross" in type(module).__name__:
        return True
    return bool(getattr(module, "is_decoder", False)) and getattr(module, "is_causal", None) is False


def _plan(
    mask: Tensor | None, shape: tuple[int, int], device: torch.device, causal: bool, sliding_window: int | None
) -> Plan:
    """The plan of a mask; of one that is not ours as far as it can be known."""
    if mask is not None and mask in _plans:
        return _plans[mask]
    if mask is not None and mask.shape != shape:
        raise ValueError(_unlike(f"given as a tensor {list(mask.shape)}"))
    if sliding_window is not None and not causal and shape[1] > sliding_window:
        raise ValueError(_unlike("a window whose mask was not made by this implementation"))
    is_token = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask.bool()
    layout = _layout(is_token.sum(1).tolist(), is_token)
    return Plan(layout, causal, None if sliding_window is None else sliding_window - 1)


def _packed_layout(layout: Layout, shape: tuple[int, int], kwargs: dict[str, Any], is_first: bool) -> Layout:
    """The layout of a batch without padding, as flattened batches say it: by lengths, or by positions."""
    cu_seq_lens, position_ids = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    if cu_seq_lens is not None:
        return _layout_by(cu_seq_lens, shape, lambda: cu_seq_lens.tolist(), is_first)
    if position_ids is None or shape[0] > 1 or position_ids.shape != shape or layout.schedule.num_sequences > 1:
        return layout
    return _layout_by(position_ids, shape, lambda: [0, *_restarts(position_ids[0]), shape[1]], is_first)


def _restarts(positions: Tensor) -> list[int]:
    """Where positions start anew; one that leaves some out, as in training for long contexts, goes on."""
    return ((positions.diff() < 1).nonzero().flatten() + 1).tolist()


def _layout_by(key: Tensor, shape: tuple[int, int], bounds: Callable[[], list[int]], is_first: bool) -> Layout:
    """A layout without padding, kept for the other layers of this forward.

    Args:
        is_first: of the layers; a buffer may be written anew for every forward.
    """
    known = _layouts.get(key)
    if known is None or (is_first and not _unchanged(key, known[0])):
        lengths = [stop - start for start, stop in pairwise(bounds())]
        if sum(lengths) != shape[0] * shape[1]:
            raise ValueError(f"cu_seq_lens_q ends at {sum(lengths)}, the batch has {shape[0]} x {shape[1]} tokens")
        schedule = build_schedule(lengths, device=key.device, identities=range(len(lengths)))
        known = (key.clone() if key.is_inference() else key._version, Layout(schedule, None))
        _layouts[key] = known
    return known[1]


def _unchanged(key: Tensor, before: Tensor | int) -> bool:
    """Tensors of inference mode count no versions."""
    if isinstance(before, Tensor):
        return torch.equal(key, before)
    return not key.is_inference() and key._version == before


def _pack(x_BHnK: Tensor, tokens: Tensor | None) -> Tensor:
    """[T, H, K] of [B, H, n, K]."""
    x = x_BHnK.transpose(1, 2).flatten(0, 1)
    return x.contiguous() if tokens is None else x.index_select(0, tokens)
