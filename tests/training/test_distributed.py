"""Several processes over gloo give the gradient of one, and refuse to drift apart."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gloo_worker import step_gradient
from safetensors.torch import load_file
from training_runs import config_for, write_pairs

from flashvec.training.distributed import World, own_device
from flashvec.training.run import run_training
from flashvec.training.settings import ConfigError

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def launch(size, code_or_file, *arguments):
    """Start `size` processes as torchrun would, and wait for them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join([str(ROOT), str(HERE.parent)])
    processes = []
    for rank in range(size):
        env = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        env = {**os.environ, **env, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *code_or_file, *arguments]
        processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    return [(p.communicate(timeout=300)[1], p.returncode) for p in processes]


def test_two_and_four_processes_give_the_gradient_of_one(tmp_path):
    """Unequal tokens, ragged negatives, numbers of micro-batches that differ."""
    shared = {"batch_size": 7, "loop": {"micro_batch_tokens": 60}}
    pairs = {"pairs": [str(write_pairs(tmp_path / "pairs.jsonl", negatives=3))], "temperature": 0.5, "depths": [1, 2]}
    pairs["words"] = 0.25
    teacher = {"prompts": ['"{text}" means', "In a word, {text} is"], "whitening_texts": 40, "depths": [1, 2]}
    values = {"contrastive": {**shared, **pairs}, "mntp": shared, "distill": {**shared, **teacher}}
    want = {name: step_gradient(name, tmp_path, own) for name, own in values.items()}
    for size in (2, 4):
        for error, code in launch(size, [str(HERE.parent / "gloo_worker.py")], str(tmp_path), json.dumps(values)):
            assert code == 0, error[-2000:]
        for name, (loss, gradient) in want.items():
            found = load_file(tmp_path / f"{name}-{size}.safetensors")
            assert abs(float(found["loss"]) - loss) <= 1e-6
            assert gradient.any() and float((found["gradient"] - gradient).norm() / gradient.norm()) <= 1e-6


SHARDED = {
    "kept": {"micro_batch_tokens": 60, "activation_gib": 1.0},
    "encoded twice": {"micro_batch_tokens": 60, "activation_gib": 1e-9},
    "run again": {"micro_batch_tokens": 60, "recompute": True},
}


@pytest.mark.parametrize("loop", SHARDED.values(), ids=SHARDED)
def test_a_base_in_parts_gives_the_gradient_of_the_whole(loop, tmp_path):
    """With a part of the products' bytes in each process; masks of dropout among what must be the same."""
    pairs = {"pairs": [str(write_pairs(tmp_path / "pairs.jsonl", negatives=3))], "temperature": 0.5, "depths": [1, 2]}
    values = {"contrastive": {"batch_size": 7, "attention_dropout": 0.1, **pairs}, "mntp": {"batch_size": 7}}
    want = {name: step_gradient(name, tmp_path, own | {"loop": loop}) for name, own in values.items()}
    sharded = {name: own | {"loop": {**loop, "shard_base": True}} for name, own in values.items()}
    for error, code in launch(3, [str(HERE.parent / "gloo_worker.py")], str(tmp_path), json.dumps(sharded)):
        assert code == 0, error[-2000:]
    for name, (loss, gradient) in want.items():
        found = load_file(tmp_path / f"{name}-3.safetensors")
        whole = load_file(tmp_path / f"{name}-1.safetensors")
        assert abs(float(found["loss"]) - loss) <= 1e-6
        assert gradient.any() and float((found["gradient"] - gradient).norm() / gradient.norm()) <= 1e-6
        assert int(found["held"]) < int(whole["held"]) * 0.4


def test_micro_batches_are_as_many_as_the_other_processes_have(monkeypatch):
    world, packs = World(), [np.array([3, 1, 4]), np.array([5]), np.array([9, 2])]
    for least_of_counts, least_rows, sizes in ((-5, 6, [1, 1, 1, 1, 2]), (-3, 6, [3, 1, 2]), (-6, 2, [3, 3])):
        answers = iter([least_of_counts, least_rows])
        monkeypatch.setattr(world, "least", lambda value, answers=answers: min(value, next(answers)))
        found = world.evened(packs)
        assert sorted(map(len, found)) == sorted(sizes) and list(np.concatenate(found)) == [3, 1, 4, 5, 9, 2]


@pytest.mark.parametrize(("name", "own"), [("distill", {}), ("mntp", {"train": "body"})])
def test_only_updates_of_a_frozen_base_are_trained_over_its_parts(name, own, tmp_path):
    with pytest.raises(ConfigError, match=r"loop.shard_base is True; expected false: only MNTP and contrastive"):
        config_for(name, tmp_path, loop={"shard_base": True}, **own)


DRIFT = """
import torch
from flashvec.training.distributed import World
world = World()
try:
    world.check_equal([torch.ones(3)], 4)
    world.check_equal([torch.ones(3) + world.rank * 1e-6], 5)
finally:
    world.close()  # as a run does: gloo's threads may abort a process that ends with its group open
"""


def test_processes_that_differ_stop():
    for error, code in launch(2, ["-c", DRIFT]):
        assert code == 1 and "step 5: processes hold different parameters" in error


LOOP = """
import os
import sys
from pathlib import Path
from gloo_worker import close_for_good
from training_runs import config_for, write_texts
from flashvec.training.distributed import World
from flashvec.training.run import run_training
world, folder = World(), Path(sys.argv[1])  # held throughout, as in gloo_worker.py
try:
    config = config_for("mntp", folder, output=str(folder / "two"), dtype="float32")
    run_training(config, until=2)
    run_training(config)
    own = folder / str(world.rank)
    own.mkdir()
    write_texts(own / "own.txt", 30 + world.rank)
    os.chdir(own)
    run_training(config_for("mntp", folder, output=str(folder / "other"), texts=["own.txt"]))
finally:
    close_for_good(world)
"""


def test_two_processes_train_save_and_resume_as_one_does_and_refuse_other_texts(tmp_path):
    run_training(config_for("mntp", tmp_path, output=str(tmp_path / "one"), dtype="float32"))
    for error, code in launch(2, ["-c", LOOP], str(tmp_path)):
        assert code == 1 and "RuntimeError: processes were given different settings, or files of diff" in error, error
        assert "still holds the group" not in error
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert (tmp_path / "one" / "seen.npy").read_bytes() == (tmp_path / "two" / "seen.npy").read_bytes()
    assert (tmp_path / "two" / "adapter_model.safetensors").is_file() and not (tmp_path / "other").exists()


def test_shares_hold_every_row_once_and_have_like_work(monkeypatch):
    lengths = np.random.default_rng(0).integers(3, 60, 37)
    shares = []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        world = World()
        world.size = 4
        shares.append(world.share(lengths))
    assert sorted(np.concatenate(shares)) == list(range(37))
    tokens = [lengths[share].sum() for share in shares]
    assert max(tokens) < 1.25 * min(tokens)


def test_fewer_rows_than_processes_are_refused():
    world = World()
    world.size = 3
    with pytest.raises(ValueError, match="2 sequences for 3 processes"):
        world.share(np.array([4, 5]))


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device(None) == torch.device("cpu")
    with pytest.raises(ValueError, match="device is cuda, but torch finds no GPU here"):
        own_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device("cpu") == torch.device("cpu") and own_device("cuda:1") == torch.device("cuda:1")
    assert own_device(None) == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device("cuda") == own_device(None) == torch.device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 3 of this machine has no GPU, there are 2: start as many processes"):
        own_device("cuda")


def test_alone_nothing_is_exchanged():
    world, x = World(), torch.ones(2)
    assert world.is_first and world.sum(x) is x
    world.check_equal([x], 1)
