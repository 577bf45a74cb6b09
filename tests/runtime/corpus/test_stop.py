"""Stopped by a person, the system or the disk: a clear message, finished shards kept, and the job goes on."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import stand_in_job
from stand_in import embed_with_stand_in, tree
from stand_in_job import InProcess

from flashvec.runtime.corpus.job import Interrupted, embed_corpus
from flashvec.runtime.corpus.local import WorkerError

NOBODY = 65534
PROGRAM = str(Path(stand_in_job.__file__).resolve())


@pytest.fixture
def texts_file(tmp_path):
    (tmp_path / "in.txt").write_text("".join(f"row {i}\n" for i in range(300)))
    return tmp_path / "in.txt"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal(texts_file, tmp_path, number):
    options = {"shard_size": 30, "load": {"delay_s": 0.006}}
    command = [sys.executable, PROGRAM, str(texts_file), str(tmp_path / "out"), json.dumps(options)]
    unignored = partial(signal.signal, number, signal.SIG_DFL)  # tests in a shell's background inherit a deaf Ctrl-C
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=unignored)
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["event"] == "done":
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and re.search("[1-9] of 10 shards finished", errors.splitlines()[-1]), errors
    until = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{child}") for child in children) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(os.path.exists(f"/proc/{child}") for child in children)
    kept = {name: content for name, content in tree(tmp_path / "out").items() if name.startswith("part")}
    assert kept
    embed_with_stand_in(texts_file, tmp_path / "out", **options)
    assert kept.items() <= tree(tmp_path / "out").items() and (tmp_path / "out" / "_SUCCESS").exists()


def test_a_signal_while_the_model_loads(texts_file, tmp_path):
    class Loading(InProcess):
        def facts(self):
            signal.raise_signal(signal.SIGTERM)
            return super().facts()

    with pytest.raises(Interrupted, match="stopped: 0 of 1 shard finished; the same command goes on from there"):
        embed_corpus(texts_file, tmp_path / "out", model="stand-in", fleet=Loading)
    assert not (tmp_path / "out").exists()
    assert embed_corpus(texts_file, tmp_path / "out", model="stand-in", fleet=InProcess).rows == 300


def test_a_full_disk(texts_file, tmp_path):
    """A limit on the size of a file stands for it: the same kind of error from the same call."""
    script = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)); sys.argv = sys.argv[1:];"
        "sys.path.insert(0, sys.argv.pop(0)); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    folder = str(Path(PROGRAM).parent)
    options = json.dumps({"shard_size": 100})
    command = [sys.executable, "-c", script, folder, PROGRAM, str(texts_file), str(tmp_path / "out"), options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and f"shard 0: File too large: {tmp_path / 'out'}\n" in done.stderr
    assert not [name for name in tree(tmp_path / "out") if name.endswith(".tmp")]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert embed_with_stand_in(texts_file, tmp_path / "out", shard_size=100).rows == 300


@contextmanager
def without_privileges():
    """Root may write anywhere: within it, it is nobody."""
    own = os.geteuid()
    if own == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(own)


def test_a_read_only_folder(texts_file, tmp_path):
    embed_with_stand_in(texts_file, tmp_path / "before")  # imports all that is needed, from where nobody may read
    with tempfile.TemporaryDirectory() as place:  # not below root's own folders
        os.chmod(place, 0o755)
        inputs, out = Path(place, "in.txt"), Path(place, "out")
        inputs.write_text("a\n")
        out.mkdir(mode=0o555)
        with without_privileges(), pytest.raises(PermissionError, match=f"{out}"):
            embed_with_stand_in(inputs, out)
        assert not list(out.iterdir())


def test_an_input_that_vanishes_midway(texts_file, tmp_path):
    other = tmp_path / "second.txt"
    other.write_text("".join(f"other {i}\n" for i in range(100)))
    status = other.stat()

    def vanish(event):
        if event["event"] == "done" and other.exists():
            other.rename(tmp_path / "elsewhere")

    inputs = [texts_file, other]
    with pytest.raises(WorkerError, match=r"second\.txt is gone: finished shards are kept"):
        embed_with_stand_in(inputs, tmp_path / "out", shard_size=100, load={"delay_s": 0.001}, on_event=vanish)
    done = {name for name in tree(tmp_path / "out") if name.startswith("part")}
    assert len(done) >= 2
    (tmp_path / "elsewhere").rename(other)
    assert other.stat().st_mtime_ns == status.st_mtime_ns
    assert embed_with_stand_in(inputs, tmp_path / "out", shard_size=100, load={"delay_s": 0.001}).rows == 400
