"""What to do when a device's memory runs out: smaller packs, then slowly larger ones again.

A text's vector does not depend on its pack, so packs may be cut anywhere. Only `torch.OutOfMemoryError` counts: any
other failure would fail again in smaller pieces, and hiding it would hide a bug.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CLIMB_AFTER = 64  # packs that fit before a larger one is tried: a failed try costs a pack's time and the cached memory
LONGEST_PATIENCE = 4096
CLIMB = 1.25  # one bucket
MEMORY_FACTS = Path("/proc/meminfo")
# Where a container's limit and use stand, and among its facts the cached files that would make room: of either version.
CONTROL_GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class Ladder:
    """The token budget that fits: halved when a pack fails, raised by a quarter after many that fitted.

    A raised budget that fails falls back to the one before, and doubles the number of packs until the next try, so a
    budget at the edge of what fits is not tried for ever.
    """

    def __init__(self) -> None:
        self.limit: int | None = None  # tokens; None: nothing has failed
        self.patience = CLIMB_AFTER
        self._fitted: int | None = None  # the limit before it was raised
        self._successes = 0

    def budget(self, asked: int) -> int:
        """Tokens a pack may hold now, of those asked for."""
        return asked if self.limit is None else min(asked, self.limit)

    def failed(self, num_tokens: int) -> None:
        """A pack of several texts, this large, did not fit."""
        if self._fitted is not None and self._fitted < num_tokens:
            self.limit = self._fitted
            self.patience = min(2 * self.patience, LONGEST_PATIENCE)
        else:
            self.limit = max(1, num_tokens // 2)
        self._fitted, self._successes = None, 0

    def succeeded(self, asked: int, num_tokens: int) -> None:
        """A pack of so many tokens fitted; `asked` is the budget that its caller wanted."""
        if self.limit is None or 2 * num_tokens < self.limit:  # that small ones fit says nothing of larger ones
            return
        self._successes += 1
        if self._successes >= self.patience:
            self._fitted, self._successes = self.limit, 0
            raised = int(self.limit * CLIMB) + 1
            self.limit = raised if raised < asked else None


def fits(work: Callable[[], Any]) -> tuple[bool, Any]:
    """Run work; (False, None) if memory ran out.

    The error is dropped here: while it lives, its traceback holds the very tensors that did not fit.
    """
    try:
        return True, work()
    except torch.OutOfMemoryError:
        return False, None


def host_memory() -> tuple[int, int]:
    """Bytes that can be had without swapping, cached files' among them, and all; a container's where it has a limit."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    facts = _numbers(MEMORY_FACTS)
    free = facts["MemAvailable:"] * 1024 if "MemAvailable:" in facts else total // 2  # no Linux: a guess
    for folder, *names, cached_files in CONTROL_GROUPS:
        try:
            limit, used = (int((folder / name).read_text()) for name in names)
        except (OSError, ValueError):  # not there, or "max"
            continue
        cached = _numbers(folder / "memory.stat").get(cached_files, 0)
        free, total = min(free, max(0, limit - used + cached)), min(total, limit)
    return free, total


def _numbers(path: Path) -> dict[str, int]:
    """Of lines of a name and a number; nothing where there is no such file."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def does_not_fit(num_tokens: int, memory: tuple[int, int], device: torch.device, dtype: torch.dtype) -> str:
    """What to tell the user when a text does not fit on its own."""
    free, total = (num_bytes / 2**30 for num_bytes in memory)
    narrower = ", load the model with dtype='bfloat16'" if dtype == torch.float32 else ""
    return (
        f"a text of {num_tokens} tokens does not fit into the memory of {device} even alone ({free:.1f} of {total:.1f} "
        f"GiB are free): give a max_length below {num_tokens}{narrower}, or free memory on the device"
    )
