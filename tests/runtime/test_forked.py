"""An encoder in a forked process, by a program of its own: a fork of pytest would take its threads' locks along."""

import os
import subprocess
import sys

import pytest
import torch

from flashvec.runtime import forked

PROGRAM = """
import multiprocessing, sys, warnings
import numpy as np
import torch
from flashvec import Encoder

def child(answers):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        Encoder.load(sys.argv[1], dtype="float32")
        torch.set_num_threads(2)
        vectors = enc.embed(["A cat sleeps.", "Rain fell."])
    large @ large  # on all threads that torch is allowed
    answers.put((vectors, [str(warning.message) for warning in seen if warning.category is RuntimeWarning]))

torch.set_num_threads(2)
large = torch.randn(1024, 1024)
enc = Encoder.load(sys.argv[1], dtype="float32")
want = enc.embed(["A cat sleeps.", "Rain fell."])
large @ large
context = multiprocessing.get_context("fork")
answers = context.Queue()
process = context.Process(target=child, args=(answers,), daemon=True)
process.start()
vectors, seen = answers.get(timeout=120)
process.join()
np.testing.assert_allclose(vectors, want, rtol=0, atol=1e-6)
assert len(seen) == 2 and all("forked from one with an encoder" in warning for warning in seen), seen
assert torch.get_num_threads() == 2
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux")
def test_a_forked_process_embeds_on_one_thread_instead_of_waiting_for_threads_that_it_has_not(folder):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_WAIT_POLICY": "passive"},  # where cores are few, threads that spin take them from others
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("is_known", [False, True])
def test_the_process_that_loaded_keeps_its_threads(monkeypatch, recwarn, is_known):
    threads = torch.get_num_threads()
    monkeypatch.setattr(forked, "_first_used_in", os.getpid() if is_known else None)
    forked.use_threads_that_exist()
    assert torch.get_num_threads() == threads and not recwarn
