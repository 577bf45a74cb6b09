"""Dropout whose mask is a function of what is dropped, not of where it lies in a batch.

    keep[r, j] = byte(draw(key(r), j)) >= round(p * 256)          kept values are multiplied by 1 / (1 - p)

The key of a row is folded from (seed, step, site) and from what names the row: its sequence's identity, its head, its
position. Packing, order, micro-batches, processes and recomputation therefore see the same mask, and a backward pass
draws it again instead of storing it. Two views of one text differ by their identities.

One 32-bit draw serves four elements, a byte each, so rates are multiples of 1/256. Columns are taken in blocks of 64:
column j uses byte (j // 16) % 4 of draw 16 * (j // 64) + j % 16, so that the four elements of a draw lie where a tensor
core's output keeps them in one thread.

Sources: counter-based generators, Salmon et al. 2011; the mixing constants are those of `lowbias32`, found by search
(Wellons 2018). Statistics of the mask are tested; it is no cryptographic generator.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashvec.kernels.backend import tl, triton

_GOLDEN = 0x9E3779B9
_MIX_1 = 0x7FEB352D
_MIX_2 = 0x846CA68B


@dataclass(frozen=True)
class Dropout:
    """What is dropped: a rate and the part of the key that all rows share.

    Args:
        p: share of elements set to zero, in [0, 1); rounded to a multiple of 1/256.
        seed, step: of the run and of the optimiser's step.
        site: which of a model's dropouts this is (a layer's attention, one of its LoRA inputs, ...).

    Raises:
        ValueError: `p` outside [0, 1), or so small that it rounds to no dropout at all.
    """

    p: float
    seed: int
    step: int = 0
    site: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise ValueError(f"dropout p is {self.p}, expected 0 <= p < 1")
        if self.p > 0 and not 0 < self.threshold < 256:
            raise ValueError(f"dropout p is {self.p}, which rounds to {self.threshold}/256; use 1/256 to 255/256")

    @property
    def threshold(self) -> int:
        """Bytes below it are dropped."""
        return round(self.p * 256)

    @property
    def scale(self) -> float:
        """What kept elements are multiplied by: the inverse of the share that is really kept."""
        return 256 / (256 - self.threshold)

    def at(self, site: int) -> "Dropout":
        """The same dropout at another site."""
        return replace(self, site=site)

    def key(self) -> tuple[int, int]:
        """The two 32-bit words, as signed integers, that every row's key is folded from."""
        a, b = _mix(self.seed & 0xFFFFFFFF), _mix(self.seed >> 32 & 0xFFFFFFFF ^ _GOLDEN)
        for word in (self.step, self.site):
            a = _mix(a ^ word & 0xFFFFFFFF)
            b = _mix(b + a & 0xFFFFFFFF)
        return _signed(a), _signed(b)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def _mix(x: int) -> int:
    x ^= x >> 16
    x = x * _MIX_1 & 0xFFFFFFFF
    x ^= x >> 15
    x = x * _MIX_2 & 0xFFFFFFFF
    return x ^ x >> 16


# --- torch: int32 products wrap, shifts are arithmetic and masked --------------------------------------


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << 32 - bits) - 1)


def _mix_reference(x: Tensor, between: Tensor | None = None) -> Tensor:
    x = (x ^ _shifted(x, 16)) * _MIX_1
    if between is not None:
        x = x ^ between
    x = (x ^ _shifted(x, 15)) * _signed(_MIX_2)
    return x ^ _shifted(x, 16)


def fold_reference(key: tuple[Tensor | int, Tensor | int], word: Tensor) -> tuple[Tensor, Tensor]:
    """Fold another word (int32, broadcasting) into a key."""
    a = _mix_reference(key[0] ^ word)
    return a, _mix_reference(key[1] + a)


def keep_reference(key: tuple[Tensor, Tensor], num_columns: int, threshold: int) -> Tensor:
    """Which elements of rows stay.

    Args:
        key: int32 [...] two words of each row's key.
        num_columns: elements of a row.
        threshold: of `Dropout`.

    Returns:
        bool [..., num_columns].
    """
    num_blocks = -(-num_columns // 64)
    draw = torch.arange(num_blocks * 16, dtype=torch.int32, device=key[0].device) * _signed(_GOLDEN)
    x = _mix_reference(key[0][..., None] + draw, key[1][..., None])
    bytes_ = x.view(torch.uint8).unflatten(-1, (num_blocks, 16, 4)).transpose(-1, -2)  # [..., block, byte, draw]
    return (bytes_ >= threshold).flatten(-3)[..., :num_columns]


# --- the processor: the same bits in passes that its vectors are fast at ---------------------------------------

_DRAWS = 1 << 18  # drawn at a time: few enough to stay in cache, enough that calls cost less than the work
_WORD_OF_SIZE = {2: torch.int16, 4: torch.int32}


def drop_cpu(
    key: tuple[Tensor, Tensor], threshold: int, sources: Sequence[Tensor], outs: Sequence[Tensor] | None = None
) -> Sequence[Tensor]:
    """Copies of matrices without what `keep_reference` says is dropped; nothing is scaled.

    Comparing bytes and choosing by booleans is what takes the time in `keep_reference`. Here the four bytes of a draw
    are compared at once inside the word, by a carry into each byte's top bit, which is then spread over the element's
    bits: less than half the time, masked copy included.

    Args:
        key: int32 [R] two words of each row's key.
        threshold: of `Dropout`.
        sources: [R, C] matrices of 16 or 32-bit floats, all under one mask.
        outs: where to write, may be `sources`; default new tensors.
    """
    outs = [torch.empty_like(x) for x in sources] if outs is None else outs
    R, C = sources[0].shape
    if R == 0:
        return outs
    num_blocks, tail = C // 64, C % 64
    golden = torch.arange((num_blocks + (tail > 0)) * 16, dtype=torch.int32, device=key[0].device) * _signed(_GOLDEN)
    words = [_WORD_OF_SIZE[x.element_size()] for x in sources]
    parts, written = (
        [_columns_of_bytes(x.view(word), num_blocks) for x, word in zip(group, words, strict=True)]
        for group in (sources, outs)
    )
    rows = max(1, min(R, _DRAWS // len(golden)))
    draws, work = (torch.empty_like(golden.expand(rows, -1)) for _ in range(2))
    for start in range(0, R, rows):
        here = slice(start, min(start + rows, R))
        x, y = draws[: here.stop - start], work[: here.stop - start]
        _draw_cpu(key[0][here, None], key[1][here, None], golden, x, y)
        # The low seven bits carry into the top bit from the threshold on; the byte's own top bit then decides with it.
        torch.bitwise_and(x, 0x7F7F7F7F, out=y)
        y.add_(((128 - threshold) % 128) * 0x01010101)
        keep = y.bitwise_and_(x) if threshold > 128 else y.bitwise_or_(x)
        own = _columns_of_draws(x, num_blocks)
        for byte in range(4 if num_blocks else -(-tail // 16)):
            torch.bitwise_left_shift(keep, 24 - 8 * byte, out=x).bitwise_right_shift_(31)
            for part, out, word in zip(parts, written, words, strict=True):
                for source, place, mask in zip(part[byte], out[byte], own, strict=True):
                    if place.shape[-1]:
                        torch.bitwise_and(source[here], mask[..., : place.shape[-1]].to(word), out=place[here])
    return outs


def _columns_of_bytes(x: Tensor, num_blocks: int) -> list[tuple[Tensor, Tensor]]:
    """For each byte of a draw the columns that it decides: those of whole blocks [R, blocks, 16], and of the rest."""
    blocks = x[:, : num_blocks * 64].view(len(x), num_blocks, 4, 16)
    rest = x[:, num_blocks * 64 :]
    return [(blocks[:, :, byte], rest[:, byte * 16 : byte * 16 + 16]) for byte in range(4)]


def _columns_of_draws(x: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    return x[:, : num_blocks * 16].view(len(x), num_blocks, 16), x[:, num_blocks * 16 :]


def _draw_cpu(a: Tensor, b: Tensor, golden: Tensor, x: Tensor, work: Tensor) -> None:
    """`_mix_reference` of every draw of a row, in place."""
    torch.add(a, golden, out=x)
    for bits, factor in ((16, _MIX_1), (15, _signed(_MIX_2)), (16, None)):
        torch.bitwise_right_shift(x, bits, out=work).bitwise_and_((1 << 32 - bits) - 1)
        x.bitwise_xor_(work)
        if factor is not None:
            x.mul_(factor)
        if bits == 16 and factor is not None:
            x.bitwise_xor_(b)


# --- triton: the same words, bit for bit -------------------------------------------------------------------


@triton.jit
def mix(x, between):
    """One draw; `between` is a second key word, 0 for none."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x ^ between
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def fold(a, b, word):
    """Fold an integer (any shape that broadcasts) into a key of two uint32 words."""
    a = mix(a ^ word.to(tl.uint32), 0)
    return a, mix(b + a, 0)


@triton.jit
def keep(a, b, column, threshold):
    """Which elements stay: `a`, `b` uint32 keys of rows, `column` int32, broadcast against each other."""
    draw = ((column // 64) * 16 + column % 16).to(tl.uint32)
    x = mix(a + draw * 0x9E3779B9, b)
    byte = (x >> ((column // 16) % 4 * 8).to(tl.uint32)) & 0xFF
    return byte >= threshold
