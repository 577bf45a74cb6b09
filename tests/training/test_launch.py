"""Several processes of one command: that they find each other, and what is told when one fails."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from flashvec.training import distributed
from flashvec.training.launch import launch

MODULE = """
import os, sys
from flashvec.training.distributed import World
world = World()
with open(f"{sys.argv[1]}/{world.rank}", "w") as file:
    file.write(f"{world.least(world.rank + 5)} {os.environ['OMP_NUM_THREADS']}")
world.close()
sys.exit(int(sys.argv[2]) if world.rank == 1 else 0)
"""
INTERRUPTED = """
import pathlib, sys
from flashvec.training.launch import launch
try:
    launch(2, "waiting", [sys.argv[1]])
except KeyboardInterrupt:
    pathlib.Path(sys.argv[1], "interrupted").touch()
"""
WAITING_AS_ONE = """
import os, pathlib, sys, time
from flashvec.training.distributed import World
world = World()
pathlib.Path(sys.argv[1], f"{world.rank} {os.getpid()}").touch()
time.sleep(300)
"""
WAITING = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1], os.environ['RANK']).touch(); time.sleep(300)"


@pytest.fixture(autouse=True)
def _modules(tmp_path, monkeypatch):
    (tmp_path / "several.py").write_text(MODULE)
    (tmp_path / "waiting.py").write_text(WAITING)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))


@pytest.mark.parametrize("status", [0, 3])
def test_processes_find_each_other_and_a_failure_is_told(status, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # kept as it is
    assert launch(2, "several", [str(tmp_path), str(status)]) == status
    assert [(tmp_path / name).read_text() for name in "01"] == ["5 1", "5 1"]


def test_a_process_that_was_killed_is_named(tmp_path, caplog):
    (tmp_path / "killed.py").write_text(
        "import os, time; os.environ['RANK'] == '1' and os.kill(os.getpid(), 9); time.sleep(300)"
    )
    assert launch(2, "killed", []) == 1
    assert "process 2 of 2 was ended by SIGKILL" in caplog.text and "process 1" not in caplog.text


def test_an_interrupt_stops_them_all(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED, str(tmp_path)], start_new_session=True)
    for _ in range(600):
        if all((tmp_path / name).exists() for name in "01"):
            break
        time.sleep(0.1)
    os.killpg(process.pid, 2)
    assert process.wait(60) == 0 and (tmp_path / "interrupted").exists()
    with pytest.raises(ProcessLookupError):  # once the whole group has ended
        for _ in range(300):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl(2) is Linux's")
def test_a_killed_launcher_leaves_no_process_at_work(tmp_path):
    (tmp_path / "as_one.py").write_text(WAITING_AS_ONE)
    (tmp_path / "out").mkdir()
    run = f"from flashvec.training.launch import launch; launch(2, 'as_one', [{str(tmp_path / 'out')!r}])"
    process = subprocess.Popen([sys.executable, "-c", run])
    for _ in range(600):
        if len(found := list((tmp_path / "out").iterdir())) == 2:
            break
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert len(found) == 2
    for path in found:
        assert _ends(int(path.name.split()[1]))


def test_a_process_that_another_launcher_started_is_not_bound_to_it(monkeypatch):
    bound = []
    monkeypatch.setattr(distributed.ctypes, "CDLL", lambda name: bound.append(name))
    for launcher in (None, "1234567890"):
        if launcher is not None:
            monkeypatch.setenv(distributed.LAUNCHER, launcher)
        distributed._end_with_launcher()
    assert not bound


def _ends(pid: int) -> bool:
    """Within half a minute; a process that has ended may wait for one to ask for its status."""
    for _ in range(300):
        try:
            if "State:\tZ" in pathlib.Path(f"/proc/{pid}/status").read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False
