"""Freed memory stays with the process, in processes of their own: the setting holds for all of one."""

import os
import platform
import subprocess
import sys

import pytest

from flashvec.runtime.heap import KEPT_BYTES

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own setting")

PROGRAM = """
import resource
import torch
from flashvec.runtime.heap import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        made = [torch.full((10 << 20,), 1.0) for _ in range(2)]  # blocks that glibc never keeps by itself
        del made
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
told, again = keep_freed_memory(), keep_freed_memory()
assert told == again
faults()
print(told, faults())
"""

LOADING = """
import torch
from flashvec.runtime.heap import return_freed_memory

def resident_mib():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("RssAnon"))

made = [torch.ones(16_000) for _ in range(4000)]  # 64 KB each: blocks of the heap
kept = made[::50]
del made
before = resident_mib()
return_freed_memory()
print(before - resident_mib())
"""


def run(program: str = PROGRAM, **environment: str) -> list[str]:
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=True)
    return done.stdout.split()


@glibc
def test_freed_memory_is_written_again_without_page_faults():
    assert KEPT_BYTES > 80 << 20  # of the program's two blocks
    told, faults = run()
    assert told == "True" and int(faults) < 41_000  # 164,000 where each page comes from the system every time


@glibc
def test_what_loading_freed_between_blocks_that_stay_is_given_back():
    (mib,) = run(LOADING)
    assert int(mib) > 150  # of the 245 that were freed


def test_who_has_chosen_is_left_alone():
    told, _ = run(MALLOC_TRIM_THRESHOLD_="131072")
    assert told == "False"
