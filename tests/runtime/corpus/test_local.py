"""Workers that die, shards that kill, jobs that must stop."""

import sys

import pytest
from stand_in import COMMAND, DIM, embed_with_stand_in, tree

from flashvec.runtime.corpus.local import ErrorBudget, LocalFleet, WorkerError
from flashvec.runtime.corpus.settings import JobSettings


def test_a_shard_that_kills_its_worker_is_set_aside(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {i:02d}\n" for i in range(40)))
    events = []
    result = embed_with_stand_in(
        tmp_path / "a.txt", tmp_path / "out", shard_size=10, load={"dies_on": "line 15"}, on_event=events.append
    )
    assert result.set_aside == (1,) and result.shards == 3
    assert [e["shard"] for e in events if e["event"] == "retry"] == [1, 1]
    assert "killed by signal 9" in next(e["message"] for e in events if e["event"] == "set_aside")
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_a_limit_over_all_shards(tmp_path):
    (tmp_path / "a.txt").write_text("good line\n\n" * 20)
    with pytest.raises((WorkerError, ValueError), match="max_errors"):
        embed_with_stand_in(tmp_path / "a.txt", tmp_path / "out", shard_size=8, max_errors=10)
    done = {name: content for name, content in tree(tmp_path / "out").items() if name.startswith("part")}
    assert 1 <= len(done) < 5
    result = embed_with_stand_in(tmp_path / "a.txt", tmp_path / "out", shard_size=8, max_errors=None)
    assert result.errors == 20 and done.items() <= tree(tmp_path / "out").items()


def test_a_model_that_cannot_be_loaded(tmp_path):
    with LocalFleet({"model": str(tmp_path / "nothing")}) as fleet, pytest.raises(WorkerError, match="no such file"):
        fleet.facts()


def test_a_program_that_is_no_worker(tmp_path):
    command = (sys.executable, "-c", "raise SystemExit('cannot start')")
    with LocalFleet({}, command=command) as fleet, pytest.raises(WorkerError, match="exit code 1: cannot start"):
        fleet.facts()


def test_a_worker_that_is_killed_while_it_loads(tmp_path):
    command = (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)")
    said = r"^a worker ended before the first shard: process \d+ was killed by signal 9 \(is memory short\?\)$"
    with LocalFleet({}, command=command) as fleet, pytest.raises(WorkerError, match=said):
        fleet.facts()


def test_questions(tmp_path):
    with LocalFleet({}, [None, None], COMMAND) as fleet:
        assert fleet.facts().dim == DIM
        low, high = fleet.ask("ranges", ["a", "b", "c"], JobSettings(dims=4))["ranges"]
        assert len(low) == 4 and all(a < b for a, b in zip(low, high, strict=True))
        assert list(fleet.run("", [], ErrorBudget(None, 0))) == []
