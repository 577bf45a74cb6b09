"""Sizes that batches are rounded up to on a GPU, so that shapes repeat.

A matrix library picks its kernel by the number of rows, a CUDA graph holds one shape, and the allocator reuses blocks
of the same size: all three want few different sizes. Buckets are multiples of 64 up to 512 rows, then quarters of
powers of two, a factor of 1.14 to 1.25 apart; every usual token budget is one of them, so a full pack wastes nothing.
Zero rows fill up.
"""

STEP = 64  # rows: what a GPU's matrix products are tiled by, and so the least that costs anything


def token_bucket(num_tokens: int) -> int:
    """The smallest bucket of at least `num_tokens` rows: 64, 128, 192, 256, 320, ... 16,384, 20,480, ..."""
    step = max(STEP, 1 << max((num_tokens - 1).bit_length() - 3, 0))
    return max(-(-num_tokens // step), 1) * step


def sequence_bucket(num_sequences: int) -> int:
    """The next power of two: a missing sequence costs a few programs that return at once, so steps may be wide."""
    return 1 << max(num_sequences - 1, 0).bit_length()
