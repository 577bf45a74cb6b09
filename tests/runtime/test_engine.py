from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from fake_accelerator import FakeAccelerator, attention_by_definition, full_above
from family_models import models, run_packs, texts_of

from flashvec.runtime import decoder as decoder_module
from flashvec.runtime import engine
from flashvec.runtime.batches import TokenRows
from flashvec.runtime.decoder import Decoder
from flashvec.runtime.program import embedding_program
from flashvec.runtime.spec import ModelSpec


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_text_comes_back_once(workers):
    _, decoder = models("llama", "bidirectional")
    texts = texts_of([3, 9, 9, 1, 20, 64, 2] * 5)
    lengths = np.array([len(t) for t in texts], dtype=np.int32)
    done = run_packs(decoder, texts, False, 70, workers)
    assert sorted(np.concatenate([d.indices for d in done]).tolist()) == list(range(len(texts)))
    for d in done:
        assert d.schedule.num_tokens == lengths[d.indices].sum() <= len(d.hidden_TD)
        assert d.hidden_TD.dtype == torch.float32


def test_a_worker_that_fails_says_so():
    _, decoder = models("llama", "bidirectional")
    texts = [np.array([i], dtype=np.int32) for i in (1, 2, 10**6)]
    threads = torch.get_num_threads()
    with pytest.raises(IndexError):
        run_packs(decoder, texts, False, 1, 2)
    assert torch.get_num_threads() == threads


def test_budgets():
    assert engine.default_budget(torch.device("cpu")) == 2048
    assert engine.default_budget(torch.device("cuda")) == 16_384


def test_rotary_tables_grow_while_another_worker_reads_them():
    """A worker keeps the tables it asked for, though another one replaces them by shorter ones meanwhile."""
    from flashvec.kernels.schedule import build_schedule
    from flashvec.runtime.decoder import Decoder

    class Meddled(Decoder):
        """Another worker, slower to start, puts its short tables in place right after ours."""

        def __setattr__(self, name, value):
            if name == "_tables" and value:
                value = [(cos[:8], sin[:8]) for cos, sin in value]
            super().__setattr__(name, value)

    _, plain = models("llama", "bidirectional")
    meddled = Meddled(plain.spec, plain.embedding_VD, plain.layers, plain.norm_D)
    schedule = build_schedule([2000])
    for ours, theirs in zip(meddled._rope_rows(schedule), plain._rope_rows(schedule), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# --- a device with a queue of its own --------------------------------------------------------------------


def prepared(lengths):
    texts = texts_of(lengths)
    lengths = np.array(lengths, dtype=np.int32)
    return TokenRows(np.concatenate(texts), lengths, np.stack([lengths * 0, lengths], 1).astype(np.int64))


def vectors_of(engine_, rows, budget=70, program=None, **how):
    """Vectors of all texts, and the packs' sizes in the order they came."""
    vectors, sizes = torch.full((len(rows.lengths), 48), float("nan")), []
    for ran in engine_.run(rows, budget, program or mean_vectors(engine_), **how):
        vectors[torch.from_numpy(ran.indices)] = ran.outputs[0]
        sizes.append(len(ran.indices))
    return vectors, sizes


def mean_vectors(engine_):
    return embedding_program(ModelSpec(engine_.decoder.spec, "bidirectional", ("mean",), "hf"), ())


LENGTHS = [3, 9, 9, 1, 20, 64, 2] * 5


@pytest.mark.parametrize("on_device", [False, True])
def test_a_queued_device_gives_the_same_vectors(on_device):
    _, decoder = models("llama", "bidirectional")
    rows = prepared(LENGTHS)
    want, sizes = vectors_of(engine.Engine(decoder), rows)
    queued = engine.Engine(decoder, FakeAccelerator(), graphs=False)
    got, queued_sizes = vectors_of(queued, rows, on_device=on_device)
    assert torch.equal(got, want) and queued_sizes == sizes
    assert queued.accelerator.count("fetch") == (0 if on_device else len(sizes))
    assert queued.accelerator.count("send") == len(sizes)  # all of a pack in one copy


def test_no_pack_is_waited_for_until_more_are_queued():
    _, decoder = models("llama", "bidirectional")
    queued = engine.Engine(decoder, FakeAccelerator(), graphs=False)
    _, sizes = vectors_of(queued, prepared(LENGTHS))
    marks = waits = 0
    for event in queued.accelerator.events:
        marks, waits = marks + (event == "mark"), waits + (event == "wait")
        if event == "wait":
            assert marks - waits >= min(engine.QUEUED_PACKS, len(sizes) - waits + 1) - 1
        assert marks - waits <= engine.QUEUED_PACKS
    assert marks == waits == len(sizes) > 4


def test_small_packs_of_a_device_run_as_recordings(monkeypatch):
    monkeypatch.setattr(decoder_module, "attention", attention_by_definition)
    _, decoder = models("llama", "bidirectional")
    rows = prepared(LENGTHS)
    want, _ = vectors_of(engine.Engine(decoder), rows)
    queued = engine.Engine(decoder, FakeAccelerator(), graphs=True)
    for _ in range(3):
        got, _ = vectors_of(queued, rows)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert queued.accelerator.count("replay") > queued.accelerator.count("record") > 0


@pytest.mark.parametrize("accelerator", [None, FakeAccelerator])
def test_packs_shrink_to_what_fits(monkeypatch, accelerator):
    _, decoder = models("llama", "bidirectional")
    rows = prepared(LENGTHS)
    want, _ = vectors_of(engine.Engine(decoder), rows, 200)
    full = engine.Engine(decoder, accelerator and accelerator(), graphs=False)
    monkeypatch.setattr(Decoder, "run", full_above(Decoder.run, lambda: 70))
    got, sizes = vectors_of(full, rows, 200)
    assert torch.equal(got, want) and sum(sizes) == len(LENGTHS)
    assert 32 <= full.ladder.limit <= 70
    if accelerator:
        assert 1 <= full.accelerator.count("release") <= 3
        events = full.accelerator.events[full.accelerator.events.index("mark") :]
        sends = [i for i, event in enumerate(events) if event == "send" and events[i - 1] not in ("send", "replay")]
        assert sends and all(events[i - 1] == "follow" for i in sends)  # then buffers may be written
    make_room, limit, failures = full.make_room, full.ladder.limit, []
    monkeypatch.setattr(full, "make_room", lambda: failures.append(1) or make_room())
    vectors_of(full, rows, 200)
    assert not failures and full.ladder.limit == limit  # the next call starts where this one ended


def test_a_recording_without_memory_makes_packs_smaller_and_leaves_recordings_possible(monkeypatch):
    monkeypatch.setattr(decoder_module, "attention", attention_by_definition)
    _, decoder = models("llama", "bidirectional")
    rows = prepared(LENGTHS)
    want, _ = vectors_of(engine.Engine(decoder), rows, 200)
    full = engine.Engine(decoder, FakeAccelerator(), graphs=True)
    vectors_of(full, rows, 200)
    assert full.ladder.limit is None
    full.accelerator.refuses = torch.OutOfMemoryError("CUDA out of memory (injected)")
    record = full.accelerator.record

    def refusing_once(work):
        try:
            return record(work)
        finally:
            full.accelerator.refuses = None

    monkeypatch.setattr(full.accelerator, "record", refusing_once)
    for _ in range(3):
        got, _ = vectors_of(full, rows, 200)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert full.ladder.limit is not None and full.graphs.take(64)
    assert full.accelerator.count("replay") > 0


def test_memory_that_comes_back_is_used_again(monkeypatch):
    _, decoder = models("llama", "bidirectional")
    limit = 20
    monkeypatch.setattr(Decoder, "run", full_above(Decoder.run, lambda: limit))
    full = engine.Engine(decoder)
    full.ladder.patience = 3
    _, sizes = vectors_of(full, prepared([4] * 40), 40)
    assert max(sizes) == 5
    full.ladder.patience, limit = 3, 10**6
    _, sizes = vectors_of(full, prepared([4] * 120), 40)
    assert sizes[0] == 5 and max(sizes) == 10 and sizes[:-1] == sorted(sizes[:-1]) and full.ladder.limit is None


@pytest.mark.parametrize("accelerator", [None, FakeAccelerator])
def test_a_text_that_does_not_fit_alone_is_named(monkeypatch, accelerator):
    _, decoder = models("llama", "bidirectional")
    full = engine.Engine(decoder, accelerator and accelerator())
    tries = []
    monkeypatch.setattr(Decoder, "run", full_above(Decoder.run, lambda: tries.append(1) or 50))
    rows, done = prepared([64, 5]), []
    with pytest.raises(
        torch.OutOfMemoryError, match=r"a text of 64 tokens .* GiB are free.*give a max_length below 64"
    ):
        done += full.run(rows, 200, mean_vectors(full))
    assert not done and 3 <= len(tries) <= 5  # together, smaller, alone, and once more after all room was made
    assert torch.isfinite(vectors_of(full, prepared([5, 9]))[0]).all()  # and the engine still runs


def test_a_text_alone_runs_once_room_was_made(monkeypatch):
    """What filled the memory was kept for speed: recordings, and blocks held by the allocator."""
    _, decoder = models("llama", "bidirectional")
    full = engine.Engine(decoder, FakeAccelerator(), graphs=False)
    room = full.accelerator.events
    monkeypatch.setattr(Decoder, "run", full_above(Decoder.run, lambda: 100 if "release" in room else 0))
    vectors, sizes = vectors_of(full, prepared([64]))
    assert sizes == [1] and vectors.isfinite().all() and full.ladder.limit is None


def test_recordings_give_way_when_memory_runs_out(monkeypatch):
    monkeypatch.setattr(decoder_module, "attention", attention_by_definition)
    _, decoder = models("llama", "bidirectional")
    full = engine.Engine(decoder, FakeAccelerator(), graphs=True)
    for _ in range(2):
        vectors_of(full, prepared([9, 5]))
    assert len(full.graphs) == 1
    monkeypatch.setattr(Decoder, "run", full_above(Decoder.run, lambda: 70))
    vectors_of(full, prepared([64, 64, 5]), 200)
    assert full.graphs.take(64) and all(key[1] != 64 or key[2] != 2 for key in full.graphs._entries)


def test_other_errors_are_not_retried(monkeypatch):
    _, decoder = models("llama", "bidirectional")
    calls = []

    def failing(*_, **__):
        calls.append(1)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Decoder, "run", failing)
    for accelerator in (None, FakeAccelerator()):
        with pytest.raises(RuntimeError, match="illegal memory access"):
            vectors_of(engine.Engine(decoder, accelerator), prepared(LENGTHS))
    assert len(calls) == 2


def test_threads_share_a_device(monkeypatch):
    """A graph's buffers are written just before it is replayed: another thread may not write in between."""
    monkeypatch.setattr(decoder_module, "attention", attention_by_definition)
    _, decoder = models("llama", "bidirectional")
    shared = engine.Engine(decoder, FakeAccelerator(), graphs=True)
    batches = [prepared([n, 9, n]) for n in range(1, 9)]
    want = [vectors_of(engine.Engine(decoder), rows)[0] for rows in batches]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: (i % 8, vectors_of(shared, batches[i % 8])[0]), range(40)))
    for i, got in results:
        torch.testing.assert_close(got, want[i], rtol=0, atol=1e-5)
