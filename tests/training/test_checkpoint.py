"""Checkpoints: kill -9 and go on, damage, other settings, a full disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from full_disk import full_disk
from safetensors.torch import load_file
from training_runs import config_for

from flashvec.training import loop, run
from flashvec.training.checkpoint import ResumeError, average_parameters, checkpoints, load_checkpoint, save_checkpoint
from flashvec.training.run import run_training
from flashvec.training.settings import to_yaml

ROOT = Path(__file__).parents[2]


def test_killed_at_any_moment_and_resumed_gives_the_same_bits(tmp_path):
    config = config_for("mntp", tmp_path, output=str(tmp_path / "whole"), loop={"steps": 30})
    run_training(config)
    values = yaml.safe_load(to_yaml(config)) | {"output": str(tmp_path / "killed")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "flashvec.runtime.cli", "train", "mntp", str(tmp_path / "run.yaml"), "--json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 300
    while len(checkpoints(tmp_path / "killed")) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = checkpoints(tmp_path / "killed")
    assert done and not (tmp_path / "killed" / "adapter_model.safetensors").exists(), "it was to be killed midway"
    assert subprocess.run(command, env=env, capture_output=True).returncode == 0
    whole, killed = (tmp_path / name / "adapter_model.safetensors" for name in ("whole", "killed"))
    assert whole.read_bytes() == killed.read_bytes()
    log = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 31))


def small_state(value=1.0):
    parameters = {"x": torch.full((3,), value, requires_grad=True)}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    parameters["x"].grad = torch.ones(3)
    optimizer.step()
    return parameters, optimizer


def saved(tmp_path, steps=(1, 2), keep=5):
    for step in steps:
        parameters, optimizer = small_state(float(step))
        save_checkpoint(tmp_path, step, parameters, optimizer, "own", keep)
    return parameters


@pytest.mark.parametrize("file", ["parameters.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(file, damage, tmp_path, caplog):
    saved(tmp_path)
    path = checkpoints(tmp_path)[-1] / file
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-7] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
        if file == "state.json" and damage == "changed":
            path.write_text('{"step": 2, "digests": null}')
    parameters, optimizer = small_state(9.0)
    assert load_checkpoint(tmp_path, parameters, optimizer, "own") == 1
    assert "checkpoint-00000002 is damaged" in caplog.text
    assert torch.equal(parameters["x"].detach(), small_state(1.0)[0]["x"].detach())


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    config = config_for("mntp", tmp_path, loop={"steps": 2})
    with held_by_another_process(tmp_path / "out"), pytest.raises(ResumeError, match="out: another process trains"):
        run_training(config)
    assert run_training(config)["step"] == 2  # a lock ends with its process


@contextmanager
def held_by_another_process(folder):
    folder.mkdir()
    code = (
        "import pathlib, sys, time; from flashvec.training.checkpoint import held\n"
        "with held(pathlib.Path(sys.argv[1])): print(flush=True), time.sleep(300)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], env=env, stdout=subprocess.PIPE)
    process.stdout.readline()
    try:
        yield
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("change", [{"step": 1}, {"step": -2}, {"step": "two"}, {"step": None}, {"fingerprint": ...}])
def test_a_state_that_was_edited_is_damage(change, tmp_path, caplog):
    saved(tmp_path)
    path = checkpoints(tmp_path)[-1] / "state.json"
    state = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in state.items() if value is not ...}))
    assert load_checkpoint(tmp_path, *small_state(9.0), "own") == 1
    assert "checkpoint-00000002 is damaged" in caplog.text


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"step": 1e400, "fingerprint": "own"}', "[]"], ids=["deep", "inf", "list"]
)
def test_a_state_that_is_none_is_damage(content, tmp_path, caplog):
    saved(tmp_path)
    (checkpoints(tmp_path)[-1] / "state.json").write_text(content)
    assert load_checkpoint(tmp_path, *small_state(9.0), "own") == 1
    assert "checkpoint-00000002 is damaged" in caplog.text


def test_all_damaged_is_an_error_and_no_checkpoint_is_a_start(tmp_path):
    parameters, optimizer = small_state()
    assert load_checkpoint(tmp_path, parameters, optimizer, "own") == 0
    saved(tmp_path)
    for folder in checkpoints(tmp_path):
        (folder / "state.json").write_text("half")
    with pytest.raises(ResumeError, match="all 2 checkpoints are damaged"):
        load_checkpoint(tmp_path, parameters, optimizer, "own")
    shutil.rmtree(checkpoints(tmp_path)[0])
    with pytest.raises(ResumeError, match=r"the only checkpoint is damaged \(checkpoint-00000002: "):
        load_checkpoint(tmp_path, parameters, optimizer, "own")


def test_other_settings_are_refused(tmp_path):
    parameters, optimizer = small_state()
    saved(tmp_path)
    with pytest.raises(ResumeError, match="other settings"):
        load_checkpoint(tmp_path, parameters, optimizer, "another")
    run_training(config_for("mntp", tmp_path, loop={"steps": 2}))
    with pytest.raises(ResumeError, match=r"other loop\.steps \(2, now 3\), mask_probability \(0\.2, now 0\.5\): give"):
        run_training(config_for("mntp", tmp_path, loop={"steps": 3}, mask_probability=0.5))
    (tmp_path / "texts.txt").write_text("another text of this run\n" * 9)
    with pytest.raises(ResumeError, match="other contents of the files that it reads"):
        run_training(config_for("mntp", tmp_path, loop={"steps": 2}))


def test_only_the_last_are_kept(tmp_path):
    saved(tmp_path, range(1, 6), keep=2)
    assert [p.name[-1] for p in checkpoints(tmp_path)] == ["4", "5"]


def test_a_stops_own_checkpoint_takes_no_others_place_and_goes_with_the_next(tmp_path):
    parameters, optimizer = small_state(1.0)
    kept = []
    for step in (2, 4, 5, 6, 7, 8):
        save_checkpoint(tmp_path, step, parameters, optimizer, "own", 2, lambda step: step % 2 == 0)
        kept.append("".join(path.name[-1] for path in checkpoints(tmp_path)))
    assert kept == ["2", "24", "245", "46", "467", "68"]
    save_checkpoint(tmp_path, 3, parameters, optimizer, "own", 5, lambda step: step % 2 == 0)  # those after it damaged
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["3", "6", "8"]


def test_a_checkpoint_that_was_due_stays_so_where_the_next_are_due_at_other_steps(tmp_path):
    parameters, optimizer = small_state(1.0)
    for step, every in ((2, 2), (4, 2), (5, 2), (7, 7), (8, 7)):
        save_checkpoint(tmp_path, step, parameters, optimizer, "own", 3, lambda step, every=every: step % every == 0)
    assert [path.name[-1] for path in checkpoints(tmp_path)] == ["2", "4", "7", "8"]


def test_the_mean_of_a_resumed_run_is_that_of_an_uninterrupted_one(tmp_path):
    loop = {"steps": 6, "average_checkpoints": 2}
    run_training(config_for("mntp", tmp_path, output=str(tmp_path / "whole"), loop=loop))
    parts = config_for("mntp", tmp_path, output=str(tmp_path / "parts"), loop=loop)
    for until in (1, 3, 5, None):
        run_training(parts, until=until)
    stored = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert stored[0] == stored[1]


def test_the_mean_of_the_last_is_the_result(tmp_path):
    run_training(config_for("mntp", tmp_path, loop={"steps": 6, "average_checkpoints": 2}))
    last, before = (load_file(folder / "parameters.safetensors") for folder in checkpoints(tmp_path / "out"))
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    name = "base_model.model.layers.1.mlp.down_proj.lora_B.weight"
    want = (last["model/layers.1.down.b"] + before["model/layers.1.down.b"]) / 2
    torch.testing.assert_close(stored[name], want)
    assert not torch.equal(stored[name], last["model/layers.1.down.b"])
    damaged = checkpoints(tmp_path / "out")[-1] / "state.json"
    damaged.write_text("")
    parameters = {key: torch.zeros_like(x) for key, x in last.items()}
    assert average_parameters(tmp_path / "out", parameters, 2) == 1


def test_a_full_disk_leaves_the_one_before(tmp_path):
    saved(tmp_path, (1,))
    with full_disk(), pytest.raises(OSError, match=r"checkpoint-00000002 could not be written \(Error while serializ"):
        saved(tmp_path, (2,))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000001"]
    assert load_checkpoint(tmp_path, *small_state(), "own") == 1


def test_a_run_that_has_ended_is_not_begun_again(tmp_path, monkeypatch):
    """Unless a setting of what it leaves, or a file that it read, is another one."""
    config = config_for("mntp", tmp_path, loop={"steps": 2})
    last = run_training(config)
    whole = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    with monkeypatch.context() as patch:
        patch.setattr(run, "load_model", lambda *args, **keys: pytest.fail("loaded"))
        assert run_training(config) == last
        for name in ("seen.npy", "train.yaml", "log.jsonl", "adapter_model.safetensors"):
            kept = (tmp_path / "out" / name).read_bytes()
            (tmp_path / "out" / name).unlink()
            assert loop.finished(config) is None, name
            (tmp_path / "out" / name).write_bytes(kept)
        weights = tmp_path / "out" / "adapter_model.safetensors"
        weights.write_bytes((kept := weights.read_bytes())[:100])
        assert loop.finished(config) is None
        weights.write_bytes(kept)
        assert loop.finished(config) == last == loop.finished(replace(config, device="cpu"))
        assert loop.finished(config_for("mntp", tmp_path, loop={"steps": 4})) is None
        state = checkpoints(tmp_path / "out")[-1] / "state.json"
        kept = state.read_bytes()
        state.write_text("[2]")
        assert loop.finished(config) is None
        state.write_bytes(kept)
    run_training(config_for("mntp", tmp_path, loop={"steps": 2}, lora={"saved_as": "bfloat16"}))
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size < 0.7 * whole
    (tmp_path / "texts.txt").write_text("another text\nand one more\n")
    with pytest.raises(ResumeError, match="other contents of the files"):
        run_training(config_for("mntp", tmp_path, loop={"steps": 2}, lora={"saved_as": "bfloat16"}))
