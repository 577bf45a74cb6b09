"""One encoder over several devices: here over processes on the CPU."""

import dataclasses
import gc
import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import TEXTS, tiny_checkpoint

from flashvec import Encoder
from flashvec.runtime.checkpoint.source import CheckpointError
from flashvec.runtime.devices import SpreadEncoder, share_out
from flashvec.runtime.texts import TruncationWarning

MANY = [" ".join(TEXTS[(i * 7 + j) % 8] for j in range(i % 9 + 1)) for i in range(150)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_checkpoint(folder, "llama")
    return folder


@pytest.fixture(scope="module")
def enc(folder):
    return Encoder.load(folder, dtype="float32", attention="bidirectional", pooling="mean")


@pytest.fixture(scope="module")
def spread(folder):
    spread = Encoder.load(folder, dtype="float32", attention="bidirectional", pooling="mean", device=["cpu", "cpu"])
    with spread:
        yield spread


def test_same_bits_in_the_same_order(enc, spread):
    assert isinstance(spread, SpreadEncoder)
    np.testing.assert_array_equal(spread.embed(MANY), enc.embed(MANY))
    assert spread.embed("cat").shape == (32,) and spread.embed([]).shape == (0, 32)
    np.testing.assert_array_equal(spread.embed(MANY[:9], precision="ubinary"), enc.embed(MANY[:9], precision="ubinary"))
    tensor = spread.embed(MANY[:9], output="torch", truncate_dim=8, normalize=False)
    assert tensor.device.type == "cpu"
    assert torch.equal(tensor, enc.embed(MANY[:9], output="torch", truncate_dim=8, normalize=False))


def test_both_processes_work(spread, monkeypatch):
    taken, send = [], type(spread._pool)._send
    monkeypatch.setattr(
        type(spread._pool), "_send", lambda pool, worker, *rest: taken.append(worker) or send(pool, worker, *rest)
    )
    spread.embed(MANY)
    assert len(taken) > 2 and set(taken[:2]) == set(spread._pool.workers)


def test_instructions_prompts_and_settings(enc, spread):
    instructions = [f"Query {i}: " for i in range(len(MANY))]
    np.testing.assert_array_equal(
        spread.embed(MANY, instruction=instructions), enc.embed(MANY, instruction=instructions)
    )
    specs = enc.spec, spread.spec
    try:
        for one in (enc, spread):
            one.spec = dataclasses.replace(one.spec, prompts={"query": "Query: "}, normalize=False)
        np.testing.assert_array_equal(spread.encode_query(MANY[:50]), enc.encode_query(MANY[:50]))
        for one in (enc, spread):
            one.calibrate(MANY[:20])
        np.testing.assert_array_equal(spread.embed(MANY, precision="int8"), enc.embed(MANY, precision="int8"))
    finally:
        enc.spec, spread.spec = specs


def test_parts_of_texts(enc, spread):
    for got, want in zip(spread.embed_tokens(MANY[:90]), enc.embed_tokens(MANY[:90]), strict=True):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
    spans = [[(0, 1)] * (i % 3) for i in range(90)]
    got, want = spread.embed(MANY[:90], spans=spans), enc.embed(MANY[:90], spans=spans)
    np.testing.assert_array_equal(got.documents, want.documents)
    assert [len(s) for s in got.spans] == [i % 3 for i in range(90)]
    np.testing.assert_array_equal(np.concatenate(got.spans), np.concatenate(want.spans))
    assert spread.embed_tokens([]) == [] and spread.embed_spans([], []).documents.shape == (0, 32)
    words = [text.split() for text in MANY[:9]]
    for a, b in zip(spread.embed_words(words, shift=1), enc.embed_words(words, shift=1), strict=True):
        np.testing.assert_array_equal(a, b)


def test_streams_and_counts(enc, spread):
    np.testing.assert_array_equal(np.stack(list(spread.embed_iter(iter(MANY)))), enc.embed(MANY))
    assert spread.count_tokens(MANY[:5]).tolist() == enc.count_tokens(MANY[:5]).tolist()


def test_one_warning_for_all_processes(spread, enc):
    with pytest.warns(TruncationWarning) as caught:
        spread.embed(MANY, max_length=20)
    with pytest.warns(TruncationWarning) as alone:
        enc.embed(MANY, max_length=20)
    assert [str(w.message) for w in caught] == [str(w.message) for w in alone] and caught[0].filename == __file__


def test_an_error_there_is_raised_here_and_the_next_call_runs(spread, enc):
    with pytest.raises(ValueError, match=r"the instruction alone has .*\(on cpu\)"):
        spread.embed([*MANY, "prices rose " * 50], instruction='The long text "{text}" in one word:', max_length=9)
    np.testing.assert_array_equal(spread.embed(MANY[:40]), enc.embed(MANY[:40]))
    with pytest.raises(TypeError, match=r"texts\[1\] is int"):
        spread.embed(["a", 3])
    with pytest.raises(ValueError, match="max_length is 513, the model has 512 positions"):
        spread.embed(MANY, max_length=513)
    np.testing.assert_array_equal(spread.embed(MANY[:40]), enc.embed(MANY[:40]))


def test_says_what_it_is_and_what_it_cannot(spread, tmp_path):
    assert repr(spread) == "Encoder(llama, bidirectional, mean, dim=32, max_length=512, float32 on cpu, cpu)"
    with pytest.raises(ValueError, match="load it on one device to save it"):
        spread.save(tmp_path / "x")
    with pytest.raises(AttributeError, match="its weights are in its processes"):
        spread.decoder  # noqa: B018


def on_one(enc, folder):
    """One process, which is enough to see how it ends."""
    return SpreadEncoder(enc.spec, enc.tokenizer, [torch.device("cpu")], {"model": str(folder), "dtype": "float32"})


def test_a_process_that_dies_is_named_and_the_rest_closed(enc, folder):
    alone = on_one(enc, folder)
    process = psutil.Process(alone._pool.workers[0].process.pid)
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=rf"worker on cpu \(process {process.pid}\) ended with .* -9, killed by"):
        alone.embed(MANY)
    assert not process.is_running()
    with pytest.raises(RuntimeError, match="processes are closed: the worker on cpu"):
        alone.embed(MANY)


def test_forgotten_it_leaves_no_process(enc, folder):
    alone = on_one(enc, folder)
    process = psutil.Process(alone._pool.workers[0].process.pid)
    assert alone.embed("cat").shape == (32,) and process.is_running()
    del alone
    gc.collect()
    assert not process.is_running()


def test_a_model_that_cannot_be_loaded_there(enc, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"].fill_(float("nan"))
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"norm.weight holds NaN .*\(on cpu\)"):
        on_one(enc, tmp_path / "model")
    with pytest.raises(ValueError, match="layers is 9, the model has 3"):  # no process is started for that
        Encoder.load(folder, device=["cpu", "cpu"], layers=9)


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=200), st.integers(1, 8), st.sampled_from([2048, 16_384]))
def test_runs_hold_every_text_once_and_get_no_larger_than_they_may(sizes, num_devices, budget):
    rows = ["x" * n for n in sizes]
    runs = share_out(rows, None, 512, num_devices, budget)
    assert runs[0][0] == 0 and runs[-1][1] == len(rows)
    assert all(a[1] == b[0] for a, b in pairwise(runs))
    tokens = [sum(min(n // 4 + 1, 512) for n in sizes[a:b]) for a, b in runs]
    assert max(tokens) <= 16 * budget


def test_runs_shrink_towards_the_end():
    runs = share_out(["x" * 400] * 10_000, None, 512, 4, 2048)
    sizes = [stop - start for start, stop in runs]
    assert sizes[0] == sizes[1] == 16 * 2048 // 101 and sizes[-2] <= 2048 // 101 + 1 and len(runs) > 40
    long = share_out(["x" * 400] * 3, ["y" * 40_000] * 3, 4096, 2, 2048)
    assert long == [(0, 1), (1, 2), (2, 3)]  # a text is never cut


def test_where_there_is_one_device_alone_it_is_closed_the_same_way(enc, folder):
    with Encoder.load(folder, dtype="float32", attention="bidirectional", pooling="mean", device=["cpu"]) as one:
        assert type(one) is Encoder and np.array_equal(one.embed(["a river"]), enc.embed(["a river"]))
    one.close()


def test_a_script_without_a_guard_is_told(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from flashvec.runtime.worker_pool import WorkerPool\nWorkerPool(['cpu'], {'model': 'none'})\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 1
    assert "must do so under `if __name__ == '__main__':`" in done.stderr
