"""Row counts whose products agree bit for bit: the committed table, the measurement, the plan.

`make soak` measures this machine's whole table again (bf16 only where it is fast), else a part of it is.
"""

import json
import os
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from flashvec.kernels.backend import has_hardware_bf16
from flashvec.kernels.linear import can_pack, linear, pack
from flashvec.runtime import row_counts
from flashvec.runtime.row_counts import LADDER, LARGEST, TABLED_THREADS, RowCounts, machine_key, measure

SOAK = int(os.environ.get("FLASHVEC_SOAK_BATCHES", "0")) > 50


@contextmanager
def torch_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def weights(dtype):
    return [torch.randn(n, c).to(dtype) for n, c in ((960, 576), (576, 576), (3072, 576), (576, 1536))]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_table_holds_on_this_machine(dtype, packed):
    """Entries for this instruction set are measured again; another machine's cannot be."""
    tabled = row_counts._table().get(machine_key(packed), {}).get(str(dtype).removeprefix("torch."), {})
    fast = dtype != torch.bfloat16 or has_hardware_bf16(torch.device("cpu"))
    counts, size = (LADDER, 1 << 30) if SOAK and fast else (LADDER[::4], 600_000)
    for shape, differing in tabled.items():
        rows, columns = map(int, shape.split("x"))
        if rows * columns <= size:
            found: set[int] = set()
            for threads in TABLED_THREADS:
                with torch_threads(threads):
                    weight = torch.randn(rows, columns).to(dtype)
                    found |= set(measure(pack(weight) if packed else weight, counts))
            assert found == set(differing) & set(counts), shape


def test_the_table_is_well_formed():
    table = json.loads(row_counts.TABLE.read_text())
    assert set(table) == {"about", "disagree"}
    for machine in table["disagree"].values():
        for shapes in machine.values():
            for differing in shapes.values():
                assert set(differing) <= set(LADDER)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_every_plan(dtype):
    given = weights(dtype)
    counts = RowCounts(given)
    is_fast = dtype != torch.bfloat16 or has_hardware_bf16(torch.device("cpu"))  # else emulated, for tens of seconds
    for weight in given:
        x = torch.randn(700, weight.shape[1]).to(dtype)
        alone = torch.cat([F.linear(F.pad(r, (0, 0, 0, sum(counts.plan(1)) - 1)), weight)[:1] for r in x[:40].split(1)])
        for rows in (40, 41, 130, 257, 700) if is_fast else (40, 41, 130):
            plan = counts.plan(rows)
            padded = F.pad(x[:rows], (0, 0, 0, sum(plan) - rows))
            out = torch.cat([F.linear(part, weight) for part in padded.split(plan)])
            assert torch.equal(out[:40], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_every_plan_of_packed_weights(dtype):
    given = weights(dtype)
    if not can_pack(given[0]):
        pytest.skip(f"this torch packs no {dtype} weight on this processor")
    given = [pack(weight) for weight in given]
    counts = RowCounts(given)
    for weight in given:
        x = torch.randn(300, weight.shape[1]).to(dtype)
        alone = torch.cat([linear(F.pad(r, (0, 0, 0, sum(counts.plan(1)) - 1)), weight)[:1] for r in x[:9].split(1)])
        for rows in (40, 41, 130, 300):
            plan = counts.plan(rows)
            padded = F.pad(x[:rows], (0, 0, 0, sum(plan) - rows))
            assert torch.equal(linear(padded, weight, None, plan)[:9], alone)


def test_weights_are_packed_where_that_was_measured(monkeypatch):
    """And nowhere else: another library may give other bits at other row counts, or be slower."""
    weight = weights(torch.float32)[0]
    monkeypatch.setattr(row_counts, "_table", lambda: {machine_key(): {"float32": {}, "bfloat16": {}}})
    assert not row_counts.pays_to_pack(weight)
    monkeypatch.setattr(row_counts, "_table", lambda: {machine_key(packed=True): {"float32": {}}})
    assert row_counts.pays_to_pack(weight) == can_pack(weight)
    assert not row_counts.pays_to_pack(weight.bfloat16()) and not row_counts.pays_to_pack(weight.half())


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 700, 2048, 2049, 5000])
def test_a_plan_covers_its_rows_without_much_filling(rows):
    plan = RowCounts(weights(torch.float32)).plan(rows)
    assert rows <= sum(plan) <= rows * row_counts.PADDING_WORTH + LADDER[0]


def test_counts_that_differ_are_not_used():
    class AmxLike(RowCounts):
        """As measured on an AMX machine in bf16: at most 32 rows, or a thousand and more."""

        def agrees(self, rows):
            return rows <= 32 or rows >= 1000

    counts = AmxLike([])
    assert counts.plan(30) == (32,)
    assert counts.plan(100) == (32, 32, 32, 16)
    assert counts.plan(900) == (1024,)
    assert counts.plan(3000) == (LARGEST, 1024)


def test_a_machine_where_nothing_agrees_still_gets_one_count():
    class Nothing(RowCounts):
        def agrees(self, rows):
            return rows == LARGEST

    assert Nothing([]).plan(3) == (LARGEST,)
    assert Nothing([]).plan(LARGEST + 3) == (LARGEST, LARGEST)


def test_the_table_says_nothing_of_other_thread_counts(monkeypatch):
    """More threads may share out rows another way: there, counts are measured."""
    asked = []
    monkeypatch.setattr(row_counts, "_table", lambda: {"here": {"float32": {"576x576": [64]}}})
    monkeypatch.setattr(row_counts, "machine_key", lambda packed: "here")
    monkeypatch.setattr(row_counts, "measure", lambda weight, counts: asked.extend(counts) or [])
    counts = RowCounts([torch.zeros(576, 576)])
    for threads, agrees, measured in ((2, False, []), (1, False, []), (3, True, [64])):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert counts.agrees(64) == agrees and asked == measured


def test_measurement_finds_a_difference(monkeypatch):
    """A library that sums in another order below 100 rows is caught at just those counts."""

    def odd(x, weight):
        order = torch.arange(x.shape[1]) if len(x) >= 100 else torch.arange(x.shape[1]).flip(0)
        chunks = [x[:, c] @ weight[:, c].T for c in order.split(7)]
        return torch.stack(chunks).sum(0)

    monkeypatch.setattr(row_counts, "linear", odd)
    assert measure(torch.randn(33, 64), (16, 96, 128)) == [16, 96]
