"""The parent's side of the pipes, with threads in place of processes."""

import os
import threading
from multiprocessing import Pipe

import numpy as np
import pytest
import torch

from flashvec.runtime.spec import DecoderSpec, ModelSpec
from flashvec.runtime.worker_pool import IN_HAND, Chunk, Notes, WorkerPool, _Worker

SPEC = ModelSpec(DecoderSpec("llama", 9, 4, 4, 1, 1, 1, 4, 9, 1e-6), "bidirectional", ("mean",), "hf")


class Process:
    """Ends when told to."""

    def __init__(self):
        self.pid, self.exitcode = 1, None
        self.sentinel, self.end = os.pipe()

    def join(self, timeout):
        self.exitcode = 3

    def is_alive(self):
        return False


@pytest.fixture
def pool():
    """A pool of two, and the far ends of its pipes."""
    pool = WorkerPool([], {})
    pool.far = []
    for name in ("a", "b"):
        ours, theirs = Pipe()
        pool.workers.append(_Worker(name, Process(), ours))
        pool.far.append(theirs)
    return pool


def answering(pipe, answer):
    """A thread that answers every message."""

    def work():
        try:
            while True:
                answer(pipe, *pipe.recv())
        except (EOFError, OSError):
            pass

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def doubled(pipe, method, arguments, spec):
    array = np.full((arguments["n"], 2), arguments["first"] * 2, np.float32)
    pipe.send(("array", (array.shape, array.dtype.name), {"num_truncated": 1, "non_finite": (0,)}))
    if array.nbytes:
        pipe.send_bytes(array.data.cast("B"))


def chunks_of(*sizes):
    stops = np.cumsum(sizes).tolist()
    return [Chunk(stop - n, stop, {"n": n, "first": stop - n}) for n, stop in zip(sizes, stops, strict=True)]


def test_arrays_land_in_their_place(pool):
    for pipe in pool.far:
        answering(pipe, doubled)
    chunks, got = chunks_of(3, 0, 1, 70_000, 2, 5), []
    into = np.full((70_011, 2), np.nan, np.float32)
    pool.run("m", chunks, SPEC, lambda chunk, value, notes: got.append((chunk, value, notes)), into)
    for chunk in chunks:
        assert (into[chunk.start : chunk.stop] == 2 * chunk.start).all()
    assert np.isfinite(into).all() and {id(c) for c, _, _ in got} == {id(c) for c in chunks}
    assert all(value is None and notes == Notes(1, (0,)) for _, value, notes in got)


def test_work_is_dealt_one_each_and_nobody_holds_more_than_two(pool):
    order, most = [], []
    send = pool._send

    def sending(worker, *rest):
        send(worker, *rest)
        order.append(worker.device)
        most.append(max(len(w.in_hand) for w in pool.workers))

    pool._send = sending
    for pipe in pool.far:
        answering(pipe, doubled)
    pool.run("m", chunks_of(*[1] * 20), SPEC, lambda *_: None, np.empty((20, 2), np.float32))
    assert order[:4] == ["a", "b", "a", "b"] and max(most) == IN_HAND


def test_a_spec_is_sent_when_it_changes(pool):
    specs = []

    def noting(pipe, method, arguments, spec):
        specs.append(spec)
        pipe.send(("value", None, {}))

    for pipe in pool.far:
        answering(pipe, noting)
    for spec in (SPEC, SPEC, ModelSpec(SPEC.decoder, "causal", ("last",), "hf")):
        pool.run("m", chunks_of(1, 1), spec, lambda *_: None)
    assert sum(s is not None for s in specs) == 4 and len(specs) == 6


@pytest.mark.parametrize(("name", "error"), [("ValueError", ValueError), ("OutOfMemoryError", torch.OutOfMemoryError)])
def test_late_answers_to_a_call_that_failed_are_dropped(pool, name, error):
    """The other process still answers it when the next call is under way."""
    go = threading.Event()

    def failing(pipe, method, arguments, spec):
        if method == "bad":
            pipe.send(("error", (name, "no"), {}))
        else:
            doubled(pipe, method, arguments, spec)

    def slow(pipe, method, arguments, spec):
        go.wait(10)
        doubled(pipe, method, {**arguments, "first": -1 if method == "bad" else arguments["first"]}, spec)

    answering(pool.far[0], failing)
    answering(pool.far[1], slow)
    into = np.zeros((4, 2), np.float32)
    with pytest.raises(error, match=r"no \(on a\)"):
        pool.run("bad", chunks_of(1, 1, 1, 1), SPEC, lambda *_: None, into)
    go.set()
    pool.run("good", chunks_of(1, 1, 1, 1), SPEC, lambda *_: None, into)
    assert into[:, 0].tolist() == [0, 2, 4, 6]


def test_an_unknown_error_keeps_its_name(pool):
    for pipe in pool.far:
        answering(pipe, lambda pipe, *_: pipe.send(("error", ("StrangeError", "what"), {})))
    with pytest.raises(RuntimeError, match="StrangeError on a: what"):
        pool.run("m", chunks_of(1), SPEC, lambda *_: None)


def test_a_process_that_ends_between_calls_is_found(pool):
    answering(pool.far[0], doubled)
    pool.far[1].close()
    with pytest.raises(RuntimeError, match=r"the worker on b \(process 1\) ended with exit code 3 while embedding"):
        pool.run("m", chunks_of(1, 1, 1), SPEC, lambda *_: None, np.empty((3, 2), np.float32))
    with pytest.raises(RuntimeError, match="closed: the worker on b"):
        pool.run("m", chunks_of(1), SPEC, lambda *_: None)


def test_interrupted_between_messages_it_goes_on(pool):
    for pipe in pool.far:
        answering(pipe, doubled)

    def interrupted(*_):
        raise KeyboardInterrupt

    into = np.zeros((6, 2), np.float32)
    with pytest.raises(KeyboardInterrupt):
        pool.run("m", chunks_of(*[1] * 6), SPEC, interrupted, into)
    pool.run("m", chunks_of(*[1] * 6), SPEC, lambda *_: None, into)
    assert into[:, 0].tolist() == [0, 2, 4, 6, 8, 10]
    pool.close()
    with pytest.raises(RuntimeError, match=r"close\(\) was called"):
        pool.run("m", chunks_of(1), SPEC, lambda *_: None)
