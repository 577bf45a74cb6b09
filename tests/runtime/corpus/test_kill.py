"""Nothing lost, nothing doubled, wherever a job is killed: what is resumed ends as an undisturbed run, byte for byte.

`FLASHVEC_SOAK_KILLS=50` (make soak) kills that often and prints what each kill hit.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stand_in_job
from stand_in import tree

from flashvec.runtime.corpus import storage
from flashvec.runtime.corpus.manifest import check_job

KILLS = int(os.environ.get("FLASHVEC_SOAK_KILLS", "6"))
PROGRAM = str(Path(stand_in_job.__file__).resolve())
ROWS = 50 * max(30, KILLS)
SIZE = -(-ROWS // 3)  # of a job of three shards
OPTIONS = {"shard_size": 50, "num_workers": 2, "load": {"delay_s": 0.002}}
TRACED = ("write", "pwrite64", "fsync", "rename")
AIMS = ("shard", "shard", "shard", "window", "supervisor", "both")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Inputs with a bad row here and there, and the folder of an undisturbed job."""
    folder = tmp_path_factory.mktemp("reference")
    lines = [json.dumps({"text": f"row {i % 450}" if i % 40 else ""}) for i in range(ROWS)]
    (folder / "in.jsonl").write_text("\n".join(lines))
    stand_in_job.run(str(folder / "in.jsonl"), str(folder / "out"), {**OPTIONS, "num_workers": 1})
    return folder


class Victim:
    """A running job in a session of its own; `stop` freezes all its processes so that what a kill hits is known."""

    def __init__(self, reference: Path, out: Path) -> None:
        command = [sys.executable, PROGRAM, str(reference / "in.jsonl"), str(out), json.dumps(OPTIONS)]
        self.out, self.since = out, time.time()
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def workers(self) -> list[int]:
        try:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        except OSError:
            return []
        return [int(child) for child in children]

    def hit(self) -> str:
        """What is under way right now; what an earlier kill left does not count."""
        names = {path.name for path in self.out.glob("*") if self.is_fresh(path)}
        parts = {name[5:10] for name in names if name.startswith("part-")}
        done = {path.stem for path in self.out.glob("_manifest/*.json")}
        if parts - done:
            return "between part and manifest"
        if any(name.startswith(".part-") for name in names):
            return "shard in work"
        return "no shard in work"

    def is_fresh(self, path: Path) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return path.stat().st_mtime > self.since
        return False

    def send(self, pids: list[int], number: int) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self, aim: str, rng: random.Random) -> str | None:
        """Kill at a random moment, or in the window when it opens; None where the job was done before."""
        until, begun = time.monotonic() + 30, False
        while time.monotonic() < until:
            if self.process.poll() is not None:
                return None
            hit = self.hit()
            if aim == "window" and hit == "between part and manifest":
                break
            if aim != "window" and not begun and hit != "no shard in work":
                until, begun = time.monotonic() + rng.uniform(0, 1.0), True
            time.sleep(0.0005)
        workers = self.workers()
        everyone = [self.process.pid, *workers]
        self.send(everyone, signal.SIGSTOP)
        hit = self.hit()
        targets = {"supervisor": [self.process.pid], "both": everyone, "window": everyone}.get(aim) or workers[:1]
        if self.process.poll() is not None or not targets:
            self.send(everyone, signal.SIGCONT)
            return None
        self.send(targets, signal.SIGKILL)
        self.since = time.time()
        self.send(everyone, signal.SIGCONT)
        whom = {"supervisor": "supervisor alone", "shard": "worker alone"}.get(aim, "supervisor and workers")
        return f"{whom}: {hit}"


def test_killed_at_random_moments(reference, tmp_path):
    rng = random.Random(KILLS)
    expected = tree(reference / "out")
    log: list[str] = []
    job = 0
    while len(log) < KILLS:  # a job that is done before enough kills is compared, and another one begun
        out = tmp_path / str(job)
        job += 1
        victim = Victim(reference, out)
        while True:
            aim = AIMS[len(log) % len(AIMS)]
            hit = victim.kill(aim, rng) if len(log) < KILLS else None
            if hit is not None:
                log.append(hit)
                print(f"kill {len(log)}: {hit}, {len(list(out.glob('_manifest/*.json')))} shards done", flush=True)
            if hit is None or "supervisor" in hit:
                victim.process.wait(120)
                if (out / "_SUCCESS").exists():
                    break
                victim = Victim(reference, out)
        assert tree(out) == expected
        assert check_job(storage.Storage(out)).problems == []
        shutil.rmtree(out)
    assert sum("shard in work" in hit or "between" in hit for hit in log) >= KILLS // 3
    assert sum("between" in hit for hit in log) >= KILLS // 10
    assert sum("supervisor alone" in hit for hit in log) >= KILLS // 10


# --- every system call that changes the disk ------------------------------------------------------------


class CountedFile:
    """Passes calls on to a file and counts its writes."""

    def __init__(self, file, count):
        self.file, self.count = file, count

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, block):
        self.count("write")
        written = self.file.write(block)
        self.file.flush()
        return written


def run_and_die(given: Path, out: Path, call: str, number: int, after: bool) -> bool:
    """Run a three-shard job in a fork that kills itself at the `number`-th such call; was it killed."""
    pid = os.fork()
    if pid:
        return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    counted = 0

    def count(name):
        nonlocal counted
        counted += name == call
        if name == call and counted == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(name, real):
        def wrapped(*arguments, **keywords):
            if not after:
                count(name)
            result = real(*arguments, **keywords)
            if after:
                count(name)
            return result

        return wrapped

    real_open = os.fdopen
    storage.os.fsync, storage.os.rename = wrap("fsync", os.fsync), wrap("rename", os.rename)
    storage.os.fdopen = lambda *a, **k: CountedFile(real_open(*a, **k), count)  # type: ignore[assignment]
    try:
        stand_in_job.run(str(given), str(out), {"in_process": True, "shard_size": SIZE, "format": "npy"})
        os._exit(0)
    except BaseException:
        os._exit(1)


@pytest.mark.parametrize(
    ("call", "after", "step"),
    [("write", False, 4), ("fsync", False, 2), ("rename", True, 1)]
    if KILLS < 50
    else [(call, after, 1) for call in ("write", "fsync", "rename") for after in (False, True)],
)
def test_killed_at_every_call(reference, tmp_path, call, after, step):
    """Every one in the soak, which also kills after a call as well as before it; some of them otherwise."""
    options = {"in_process": True, "shard_size": SIZE, "format": "npy"}
    stand_in_job.run(str(reference / "in.jsonl"), str(tmp_path / "whole"), dict(options))
    expected = tree(tmp_path / "whole")
    number, kills = 1, 0
    while run_and_die(reference / "in.jsonl", tmp_path / "out", call, number, after):
        kills += 1
        number += step
        stand_in_job.run(str(reference / "in.jsonl"), str(tmp_path / "out"), dict(options))
        assert tree(tmp_path / "out") == expected, f"killed at {call} {number - step}"
        shutil.rmtree(tmp_path / "out")
    assert tree(tmp_path / "out") == expected
    print(f"{kills} kills {'after' if after else 'before'} {call}")
    assert kills * step >= 11  # plan and success, and of each shard two files and a manifest at least


@pytest.fixture
def traced():
    """Runs a job of three shards under strace; what it prints goes nowhere."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace")

    def run(arguments: list[str], log: Path, given: Path, out: Path) -> int:
        options = json.dumps({"in_process": True, "shard_size": SIZE})
        job = [sys.executable, "-B", PROGRAM, str(given), str(out), options]
        done = subprocess.run(["strace", "-f", *arguments, "-o", str(log), *job], capture_output=True, text=True)
        if not log.exists() or "ptrace" in done.stderr:
            pytest.skip("tracing is not allowed here")
        return done.returncode

    return run


@pytest.mark.parametrize(
    ("call", "step"), [(call, 1) for call in TRACED] if KILLS >= 50 else [("fsync", 9), ("rename", 5)]
)
def test_killed_by_the_kernel_at_every_call(reference, tmp_path, traced, call, step):
    """The process goes as the call begins, whoever makes it: our code or a library's. Every one in the soak."""
    given, out = reference / "in.jsonl", tmp_path / "out"
    options = {"in_process": True, "shard_size": SIZE}
    stand_in_job.run(str(given), str(tmp_path / "whole"), dict(options))
    expected = tree(tmp_path / "whole")
    kills = 0
    while True:
        inject = ["-e", f"trace={call}", "-e", f"inject={call}:signal=SIGKILL:when={kills * step + 1}"]
        code = traced(inject, tmp_path / "trace", given, out)
        if code == 0:
            break
        assert code in (-signal.SIGKILL, 128 + signal.SIGKILL), "it failed by itself"
        kills += 1
        stand_in_job.run(str(given), str(out), dict(options))
        assert tree(out) == expected, f"killed at {call} {(kills - 1) * step + 1}"
        shutil.rmtree(out)
    assert tree(out) == expected
    print(f"{kills} kills at {call}")
    least = {"fsync": 22, "rename": 11}.get(call, 0)  # of 11 files, and of their folders
    assert kills * step >= least


def test_synced_in_the_right_order(reference, tmp_path, traced):
    """As the kernel saw it: a file is synced after its last write and before it is renamed, the folder after that."""
    log = tmp_path / "trace"
    arguments = ["-y", "-s", "0", "-e", f"trace={','.join(TRACED)}"]
    assert traced(arguments, log, reference / "in.jsonl", tmp_path / "out") == 0
    synced: set[str] = set()
    waiting: str | None = None  # folder in which a new name is not durable yet
    renamed = []
    for line in log.read_text(errors="replace").splitlines():
        if (call := re.search(r" (write|pwrite64|fsync)\(\d+<([^>]*)>", line)) is not None:
            name, path = call.groups()
            if name == "fsync":
                synced.add(path)
                waiting = None if path == waiting else waiting
            elif path.startswith(str(tmp_path)):
                synced.discard(path)
                assert waiting is None, f"{path} is written before the name in {waiting} is durable"
        elif (call := re.search(r'rename\("([^"]*)", "([^"]*)"\) += 0', line)) is not None:
            before, place = call.groups()
            assert before in synced, f"{before} is renamed before it is synced"
            assert waiting is None
            waiting = str(Path(place).parent)
            renamed.append(str(Path(place).relative_to(tmp_path / "out")))
    assert waiting is None
    names = ("part-{}.parquet", "_errors/{}.jsonl", "_manifest/{}.json")
    shards = [name.format(f"{i:05d}") for i in range(3) for name in names]
    assert renamed == ["plan.json", *shards, "_SUCCESS"]
