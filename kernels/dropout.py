"""Dropout whose mask is a function of what is dropped, not of where it lies in a batch.

    keep[r, j] = byte(draw(key(r), j)) >= round(p * 256)          kept values are multiplied by 1 / (1 - p)

The key of a row is folded from (seed, step, site) and from what names the row: its sequence's identity, its head, its
position. Packing, order, micro-batches, processes and recomputation therefore see the same mask, and a backward pass
can draw it again instead of storing it. Two views of one text differ by their identities.

One 32-bit draw serves four elements, a byte each, so rates are multiples of 1/256. Columns are taken in blocks of 64:
column j uses byte (j // 16) % 4 of draw 16 * (j // 64) + j % 16, so that the four elements of a draw lie where a tensor
core's output keeps them in one thread.

Sources: counter-based generators, Salmon et al. 2011; the mixing constants are those of `lowbias32`, found by search
(Wellons 2018). Statistics of the mask are tested; it is no cryptographic generator.
"""

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


def _int(word: int) -> Tensor:
    """Python's own integers are 64 bits wide: every call would convert them, in more time than few elements take."""
    return torch.tensor(_signed(word), dtype=torch.int32, device="cpu")


_SHIFTS = {bits: (_int(bits), _int((1 << 32 - bits) - 1)) for bits in (15, 16)}
_FACTORS = _int(_MIX_1), _int(_MIX_2)


def _shifted(x: Tensor, bits: int) -> Tensor:
    by, low = _SHIFTS[bits]
    return (x >> by).bitwise_and_(low)


def _mix_reference(x: Tensor, between: Tensor | None = None) -> Tensor:
    """In place."""
    x.bitwise_xor_(_shifted(x, 16)).mul_(_FACTORS[0])
    if between is not None:
        x.bitwise_xor_(between)
    x.bitwise_xor_(_shifted(x, 15)).mul_(_FACTORS[1])
    return x.bitwise_xor_(_shifted(x, 16))


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
    draw = torch.arange(num_blocks * 16, dtype=torch.int32, device=key[0].device) * _int(_GOLDEN)
    x = _mix_reference(key[0][..., None] + draw, key[1][..., None])
    bytes_ = x.view(torch.uint8).unflatten(-1, (num_blocks, 16, 4)).transpose(-1, -2)  # [..., block, byte, draw]
    return (bytes_ >= threshold).flatten(-3)[..., :num_columns]


# --- the processor: the same bits in passes that its vectors are fast at ---------------------------------------

_DRAWS = 1 << 20  # drawn at a time: few calls, which cost some microseconds each, and still within a cache
_WORD_OF_SIZE = {2: torch.int16, 4: torch.int32}
_TOP_BITS = _int(0x80808080)


def draws_cpu(key: tuple[Tensor, Tensor], num_columns: int, dtype: torch.dtype) -> Tensor:
    """The byte that decides over each element of rows; `drop_cpu` applies it.

    Comparing bytes and choosing by booleans is what takes the time in `keep_reference`. Here a byte stands at the top
    of a word of its element's size, where one vector instruction compares it, whatever stands below it.

    Args:
        key: int32 [R] two words of each row's key.
        num_columns: C, elements of a row.
        dtype: of what is dropped, a float of 16 or 32 bits.

    Returns:
        Signed integers [R, C] of that size, with space between rows: the byte less 128 at the top.
    """
    R, num_blocks, word = len(key[0]), -(-num_columns // 64), _WORD_OF_SIZE[dtype.itemsize]
    top = 8 * dtype.itemsize - 8
    golden = torch.arange(num_blocks * 16, dtype=torch.int32, device="cpu") * _int(_GOLDEN)
    found = torch.empty(R, num_blocks, 4, 16, dtype=word, device="cpu")
    rows = max(1, min(R, _DRAWS // max(1, len(golden))))
    draws, work = (torch.empty(rows, len(golden), dtype=torch.int32, device="cpu") for _ in range(2))
    for start in range(0, R, rows):
        here = slice(start, min(start + rows, R))
        x = draws[: here.stop - start]
        _draw_cpu(key[0][here, None], key[1][here, None], golden, x, work[: here.stop - start])
        x = x.bitwise_xor_(_TOP_BITS).view(-1, num_blocks, 16)  # as signed numbers the bytes keep their order
        for byte in range(4):
            whole = -(-(num_columns - 16 * byte) // 64)  # blocks that have a column under this byte
            if whole > 0:
                left = top - 8 * byte
                shift = torch.bitwise_left_shift if left >= 0 else torch.bitwise_right_shift
                shift(x[:, :whole], _int(abs(left)), out=found[here, :whole, byte])
    return found.flatten(1)[:, :num_columns]


def drop_cpu(x: Tensor, draws: Tensor, threshold: int, out: Tensor | None = None) -> Tensor:
    """`x` with zeros where `keep_reference` drops, unscaled.

    Args:
        x: a matrix, or any tensor of the shape of `draws`.
        draws: of `draws_cpu`.
        threshold: of `Dropout`.
        out: where to write, may be `x`.
    """
    words = x.view(draws.dtype)
    least = (threshold - 128 << 8 * draws.itemsize - 8) - 1  # a derivative of relu's kind: nothing up to this value
    if out is None:
        return torch.ops.aten.threshold_backward(words, draws, least).view(x.dtype)
    torch.ops.aten.threshold_backward.grad_input(words, draws, least, grad_input=out.view(draws.dtype))
    return out


def dropped_copy_cpu(x: Tensor, draws: Tensor, threshold: int) -> Tensor:
    """`drop_cpu` into a copy that says itself what was dropped: +0 is there alone, a zero that stays is -0."""
    words = x.view(draws.dtype)
    own = torch.eq(words, 0, out=torch.empty_like(words))
    torch.add(words, own, alpha=torch.iinfo(words.dtype).min, out=own)  # the sign alone, where there was nothing
    return drop_cpu(own, draws, threshold, out=own).view(x.dtype)


def drop_as_cpu(x: Tensor, copy: Tensor) -> Tensor:
    """`x`, in place, with zeros where those of a `dropped_copy_cpu` of the same shape and dtype are."""
    words = copy.view(_WORD_OF_SIZE[copy.dtype.itemsize])
    kept = torch.ne(words, 0, out=torch.empty_like(words))  # 1 and 0 as words, for another vector instruction
    torch.ops.aten.threshold_backward.grad_input(x.view(words.dtype), kept, 0, grad_input=x.view(words.dtype))
    return x


def _draw_cpu(a: Tensor, b: Tensor, golden: Tensor, x: Tensor, work: Tensor) -> None:
    """`_mix_reference` of every draw of a row, in place."""
    torch.add(a, golden, out=x)
    for bits, factor in ((16, _FACTORS[0]), (15, _FACTORS[1]), (16, None)):
        by, low = _SHIFTS[bits]
        torch.bitwise_right_shift(x, by, out=work).bitwise_and_(low)
        x.bitwise_xor_(work)
        if factor is not None:
            x.mul_(factor)
        if factor is _FACTORS[0]:
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
