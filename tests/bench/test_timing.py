import json
import re
import subprocess

from flashvec.bench import timing


def test_variants_take_turns_in_an_order_that_rotates():
    calls = []
    variants = {name: (lambda i, name=name: calls.append((i, name))) for name in "abc"}
    seconds = timing.interleave(variants, 3)
    assert calls == [(0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "c"), (1, "a"), (2, "c"), (2, "a"), (2, "b")]
    assert all(len(times) == 3 and min(times) >= 0 for times in seconds.values())


def test_rows_are_appended_with_the_machines_facts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "bench" / "results")
    (tmp_path / "bench").mkdir()
    for value in (1, 2):
        path = timing.append_rows([{"benchmark": "x", "value": value}])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["value"] for row in rows] == [1, 2]
    assert {"cpu", "instructions", "cores", "threads", "torch", "commit", "date"} <= set(rows[0])
    assert f"1 rows added to {path}" in capsys.readouterr().err


def test_spread():
    assert timing.spread([9.0, 10.0, 12.0]) == "±15%"


def test_this_machine_has_a_name():
    assert timing.device_name() and re.fullmatch(r"[0-9a-f]{7,}\+?|code-[0-9a-f]{8}", timing.machine()["commit"])


def test_another_projects_commit_is_not_taken_for_this_ones(tmp_path, monkeypatch):
    for words in (["init"], ["commit", "--allow-empty", "--message", "theirs"]):
        who = ["-c", "user.name=they", "-c", "user.email=they@example.org"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)
    installed = tmp_path / ".venv" / "flashvec" / "bench" / "timing.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    monkeypatch.setattr(timing, "__file__", str(installed))
    assert re.fullmatch(r"code-[0-9a-f]{8}", timing.machine()["commit"])
