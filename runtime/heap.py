"""Memory that a pass frees stays with the process, for the next layer to write into; what loading freed does not.

A layer's results are tens of megabytes, made and freed once a layer. The C library gives blocks of that size back to
the system at once, and the system hands out fresh ones page by page, each emptied first: 194,000 page faults in a call
of 2,018 tokens, a tenth of its time where it runs alone (`LOG.md`).
"""

import ctypes
import os
import platform
from functools import cache

KEPT_BYTES = 512 << 20  # of the heap's free end, and of the largest block that comes from the heap
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3), from glibc's malloc.h
_OWN_CHOICE = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@cache
def keep_freed_memory() -> bool:
    """Tell glibc to keep up to `KEPT_BYTES` of freed memory; once a process.

    Returns:
        Whether it was told: not with another C library, nor where the environment sets glibc's thresholds itself.
    """
    if not _is_glibc() or any(name in os.environ for name in _OWN_CHOICE):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_TRIM_THRESHOLD, KEPT_BYTES) and mallopt(_MMAP_THRESHOLD, KEPT_BYTES))


def return_freed_memory() -> None:
    """Give the system what lies free between blocks that stay, where glibc keeps it.

    A model that is read layer by layer, each in its file's form first, leaves tens of megabytes of that.
    """
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"
