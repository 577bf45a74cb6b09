import gc
import weakref
from itertools import pairwise

import pytest
import torch

from flashvec.runtime import memory
from flashvec.runtime.memory import CLIMB_AFTER, LONGEST_PATIENCE, Ladder, does_not_fit, fits, host_memory


def climb(ladder, asked):
    """How many packs must fit until the budget rises."""
    before, waited = ladder.limit, 0
    while ladder.limit == before:
        ladder.succeeded(asked, before - 1)
        waited += 1
    return waited


def test_halves_and_climbs_back_slowly():
    ladder = Ladder()
    assert ladder.budget(1000) == 1000
    ladder.failed(900)
    ladder.failed(450)
    assert ladder.budget(1000) == 225 and ladder.budget(100) == 100
    climbed = [225]
    while climbed[-1] < 1000:
        assert climb(ladder, 1000) == CLIMB_AFTER
        climbed.append(ladder.budget(1000))
    assert all(1 < b / a <= 1.26 for a, b in pairwise(climbed)) and ladder.limit is None


def test_a_raised_budget_that_fails_falls_back_and_is_tried_ever_less():
    ladder, waits = Ladder(), []
    ladder.failed(1000)
    for _ in range(9):
        waits.append(climb(ladder, 10**6))
        assert ladder.limit == 626
        ladder.failed(620)
        assert ladder.limit == 500
    assert waits[:3] == [CLIMB_AFTER, 2 * CLIMB_AFTER, 4 * CLIMB_AFTER] and waits[-1] == LONGEST_PATIENCE
    ladder.failed(480)  # what fitted once does not any more
    assert ladder.limit == 240


def test_small_packs_do_not_raise_a_budget():
    ladder = Ladder()
    ladder.failed(1000)
    for _ in range(10 * CLIMB_AFTER):
        ladder.succeeded(10**6, 100)
    assert ladder.limit == 500


def test_falls_back_from_the_budget_asked_for_too():
    ladder = Ladder()
    ladder.failed(1000)
    climb(ladder, 600)
    assert ladder.limit is None
    ladder.failed(600)
    assert ladder.limit == 500


def test_never_below_one_token():
    ladder = Ladder()
    for _ in range(5):
        ladder.failed(1)
    assert ladder.budget(10) == 1


def test_a_failure_keeps_nothing_alive():
    """The traceback of an error holds the tensors that filled the memory: it must be gone before the next try."""
    held = []

    def work():
        big = torch.zeros(10)
        held.append(weakref.ref(big))
        raise torch.OutOfMemoryError("full")

    gc.disable()
    try:
        assert fits(work) == (False, None) and held[0]() is None
    finally:
        gc.enable()
    assert fits(lambda: 3) == (True, 3)
    with pytest.raises(RuntimeError, match="other"):
        fits(lambda: (_ for _ in ()).throw(RuntimeError("other")))


def test_message_names_length_memory_and_cure():
    text = does_not_fit(9000, (2**30, 8 * 2**30), torch.device("cuda", 1), torch.float32)
    assert "9000 tokens does not fit into the memory of cuda:1" in text and "1.0 of 8.0 GiB are free" in text
    assert "max_length below 9000, load the model with dtype='bfloat16'" in text
    assert "bfloat16" not in does_not_fit(9, host_memory(), torch.device("cpu"), torch.bfloat16)


def test_free_memory_counts_cached_files_and_a_containers_limit(tmp_path, monkeypatch):
    free, total = host_memory()
    assert 0 < free <= total
    (tmp_path / "meminfo").write_text(
        "MemTotal: 8000 kB\nMemFree: 10 kB\nMemAvailable:    4000 kB\nHugePages_Free: 0\n"
    )
    monkeypatch.setattr(memory, "MEMORY_FACTS", tmp_path / "meminfo")
    groups = [(tmp_path / name, "limit", "used", "cached") for name in ("none", "free", "tight")]
    monkeypatch.setattr(memory, "CONTROL_GROUPS", groups)
    assert host_memory() == (4000 * 1024, total)
    for name, limit in (("free", "max"), ("tight", "1000000")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "limit").write_text(f"{limit}\n")
        (tmp_path / name / "used").write_text("900000\n")
    assert host_memory() == (100_000, 1_000_000)
    (tmp_path / "tight" / "memory.stat").write_text("anon 600000\ncached 300000\n")
    assert host_memory() == (400_000, 1_000_000)
    monkeypatch.setattr(memory, "MEMORY_FACTS", tmp_path / "none")
    monkeypatch.setattr(memory, "CONTROL_GROUPS", ())
    assert host_memory() == (total // 2, total)  # another system
