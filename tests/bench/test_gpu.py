"""The GPU benchmark without a GPU: every path but the device itself, at tiny shapes on the CPU."""

import json
import subprocess
import sys
import types
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from flashvec.bench import (
    attention_candidates,
    compile_ahead,
    criterion,
    device_time,
    gpu,
    gpu_attention,
    gpu_checks,
    gpu_ops,
    gpu_session,
    op_problems,
    peers_gpu,
    timing,
)
from flashvec.bench.gpu_session import Budget, Session, Wrong, compare
from flashvec.bench.op_problems import OPS, Size
from flashvec.bench.problems import AttentionShape, Maker, Problem, attention_problem
from flashvec.kernels import attention_fwd, backend

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
TINY = Size((3, 1, 17), 24, 40, 4, 2, 16, V=50)


def session(folder: Path, minutes: float = 10.0, **more) -> Session:
    watch = device_time.HostStopwatch()
    return Session(CPU, watch, Budget(minutes), folder, {"commit": "abc"}, repetitions=2, **more)


def rows_in(folder: Path) -> list[dict]:
    return [json.loads(line) for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]


# --- problems and their judge -------------------------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_kernels_of_ops_pass_their_check(op, interpreted):
    before = backend.launches.total()
    assert gpu_checks.check(op, partial(OPS[op], TINY), CPU, torch.float16, 1).faults == []
    assert backend.launches.total() > before


@pytest.mark.parametrize(
    "shape",
    [
        AttentionShape((5, 0, 70, 1), 4, 2, 16),
        AttentionShape((5, 40), 4, 2, 16, rotate="norms", window=3),
        AttentionShape((5, 40), 4, 2, 16, rotate="rope", selected=True),
        AttentionShape((5, 40), 2, 1, 16, drop=0.25),
    ],
    ids=str,
)
def test_attention_passes_its_check(shape, interpreted):
    case = partial(attention_problem, replace(shape))
    verdict = gpu_checks.check("attention", case, CPU, torch.float16, 1)
    assert verdict.faults == [] and 0 < verdict.worst <= 1
    assert backend.launches["_attention_fwd_kernel"]


def broken(run) -> Problem:
    problem = OPS["swiglu"](TINY, Maker(CPU, torch.float16))
    return replace(problem, run=run)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda x, calls: x * 1.01, "off by"),
        (lambda x, calls: x + calls * 2e-4, "other bits when run again"),
        (lambda x, calls: torch.where(torch.arange(len(x))[:, None] == 7, x * 1.0005, x), "depends on what else"),
        (lambda x, calls: x.new_empty(x.shape) + 0 * x, "off by nan"),
    ],
)
def test_a_wrong_op_is_found(fault, message):
    calls = []

    def run(t):
        calls.append(1)
        (out,) = OPS["swiglu"](TINY, Maker(CPU, torch.float16)).reference(t)
        return (fault(out, len(calls)),)

    verdict = gpu_checks.judge(broken(run), "swiglu", torch.float16)
    assert any(message in found for found in verdict.faults), verdict.faults
    assert not verdict.row()["passed"]


def test_an_error_of_a_long_text_is_judged_by_long_texts():
    """Beside a text of one token, whose values are larger, it was within what is allowed."""
    problem = attention_problem(AttentionShape((1, 300, 40, 2), 2, 1, 16), Maker(CPU, torch.float16))
    row = torch.arange(343)[:, None, None]
    long = (row >= 1) & (row < 301)

    def run(t):
        (out,) = problem.reference(t)
        return (torch.where(long, out + 2e-3, out),)

    whole = problem.reference(problem.tensors)[0]
    truth = problem.reference({key: x.double() for key, x in problem.tensors.items()})[0]
    assert criterion.distance(run(problem.tensors)[0], whole, truth).passed
    assert gpu_checks.judge(problem, "attention", torch.float16).faults == []
    verdict = gpu_checks.judge(replace(problem, run=run), "attention", torch.float16)
    wrong = [fault for fault in verdict.faults if "off by" in fault]
    assert len(wrong) == 1 and wrong[0].startswith("out 0 off by") and verdict.worst > 1


def test_an_op_that_raises_is_a_verdict():
    def run(t):
        raise RuntimeError("no such kernel\nsecond line")

    verdict = gpu_checks.check("x", lambda maker: broken(run), CPU, torch.float16, 0)
    assert verdict.faults == ["RuntimeError: no such kernel"] and not verdict.passed


def test_large_problems_are_judged_by_their_last_units(monkeypatch):
    monkeypatch.setattr(gpu_checks, "PAST_INT32", 2**20)
    for name, case in gpu_checks.large_cases().items():
        if "add_rms_norm" not in name:
            assert gpu_checks.check_large(name, case, CPU, torch.float32).faults == [], name


def test_units_are_taken_in_their_order():
    problem = attention_problem(AttentionShape((2, 3, 1), 1, 1, 4), Maker(CPU, torch.float32))
    part, by_row = problem.take([2, 0])
    assert by_row["out 0"].tolist() == [5, 0, 1]
    assert torch.equal(part.tensors["k"], problem.tensors["k"][[5, 0, 1]])
    again = AttentionShape((2, 3, 1), 1, 1, 4).taken([2, 0]).taken([1])
    assert again.lengths == (2,) and again.identities == (7,)


def test_criterion_judges_nan_and_nothing():
    x = torch.ones(3)
    assert criterion.distance(x, x, x.double()).passed
    assert not criterion.distance(x * float("nan"), x, x.double()).passed
    assert criterion.distance(x[:0], x[:0], x[:0].double()).passed


# --- what is recorded and compiled ahead ----------------------------------------------------------------------


def test_every_step_is_recorded_at_its_real_size():
    """On tensors without storage: shapes, launchers and candidates are those that a GPU will meet."""
    steps = gpu.kernel_steps()
    names = [name for name, *_ in steps]
    assert len(set(names)) == len(names)
    for name, _, _, record in steps:
        if record is None:
            continue
        with backend.recording(backend.TARGETS["sm_90"]) as recorder, compile_ahead._Launchers():
            record()
        assert recorder.launches or not name.startswith(("attention", "check attention")), name


COMPILE = """
import os, sys
import torch
from flashvec.bench.compile_ahead import Ahead, _NamedDriver
from flashvec.bench import gpu_attention as g
from flashvec.kernels import attention, attention_fwd, backend
from flashvec.kernels.backend import TARGETS, triton

def count():
    return len(os.listdir(os.environ["TRITON_CACHE_DIR"]))

shape = g.AttentionShape((64, 16), 4, 2, 16)
def step():
    problem = g.attention_tensors(shape, g.Maker(torch.device("meta"), torch.float16))
    g.ours(shape, problem).run()

ahead = Ahead({"one": step, "same": step, "broken": lambda: 1 / 0}, TARGETS["sm_90"], 1)
assert ahead.num_kernels == 1 and "ZeroDivisionError" in ahead.problems["broken"], ahead.problems
assert ahead.wait("one") == [] and ahead.wait("unknown") == []
ahead.close()
before = count()
assert before

def compile_only(kernel, grid, *args, **keywords):  # what a launch on real tensors compiles
    if 0 not in grid:
        keywords = {key: value for key, value in keywords.items() if key not in backend.OPTIONS or value is not None}
        kernel.warmup(*args, grid=grid, **keywords, enable_fp_fusion=True)

triton.runtime.driver.set_active(_NamedDriver(TARGETS["sm_90"]))
attention_fwd.launch, attention.implementation = compile_only, lambda x: "triton"
g.ours(shape, g.attention_tensors(shape, g.Maker(torch.device("cpu"), torch.float16))).run()
assert count() == before, (before, count())
"""


def test_what_is_compiled_ahead_is_what_a_launch_asks_for(tmp_path):
    env = {"PATH": "/usr/bin:/bin", "TRITON_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


# --- timing -----------------------------------------------------------------------------------------------


def test_variants_that_fail_become_rows(tmp_path):
    def missing():
        raise peers_gpu.Missing("not installed")

    def wrong():
        raise Wrong("off by 3")

    def crashes():
        return lambda i: 1 / 0

    counted = []
    builders = {"a": lambda: counted.append, "b": missing, "c": wrong, "d": crashes}
    found = compare(session(tmp_path), builders, 2)
    assert found["a"]["us"] > 0 and found["a"]["timing"] == "host" and set(counted) == {0, 1}
    assert found["b"] == {"missing": "not installed"} and found["c"] == {"wrong": "off by 3"}
    assert found["d"] == {"missing": "ZeroDivisionError: division by zero"}


def test_sets_outgrow_the_cache():
    assert device_time.num_sets(1e9) == 2 and device_time.num_sets(60e6) == 3 and device_time.num_sets(1) == 6


FEW = ("flashvec", "candidate one tile 64x64 4w 1s", "torch sdpa, padded", "torch sdpa, cuDNN")


@pytest.mark.parametrize("lengths", [(20, 20), (20, 7, 30)], ids=str)
def test_attention_groups(lengths, tmp_path, monkeypatch, interpreted):
    group = gpu_attention.Group(AttentionShape(lengths, 4, 2, 16), "short", "forward")
    every = gpu_attention.variants(group)
    assert {"torch flex, document mask", "flash_attn 3"} < set(every)
    few = {name: every[name] for name in (*FEW, "flash_attn 3", "torch flex, document mask")}
    monkeypatch.setattr(gpu_attention, "variants", lambda group: few)
    s = session(tmp_path, ceilings={"tflops": 1e-6})
    gpu_attention.time_group(s, group, torch.float16)
    rows = {row["variant"]: row for row in rows_in(tmp_path)}
    assert rows == {row["variant"]: {**row, "commit": "abc"} for row in s.rows} and not s.wrong
    timed = {name for name, row in rows.items() if row.get("tflops")}
    assert timed == {*FEW, "torch flex, document mask"} - ({"torch sdpa, cuDNN"} if len(lengths) == 3 else set())
    assert "not installed" in rows["flash_attn 3"]["missing"]
    lines = gpu_attention.summary(s.rows)
    assert len(lines) == 2 and "(one tile 64x64 4w 1s)" in lines[1]


@pytest.mark.parametrize("length", [64, 128, 256, 2048])
@pytest.mark.parametrize("K", [64, 128])
def test_candidates_take_the_place_of_the_tables_for_a_while(K, length):
    shape = AttentionShape((length, length // 2), 8, 2, K)
    table = attention_fwd.forward_configs
    for candidate in attention_candidates.candidates(shape, "forward").values():
        with attention_candidates.chosen(candidate):
            assert attention_fwd.forward_configs("any", "arguments") == candidate.forward
        assert attention_fwd.forward_configs is table
    backward = attention_candidates.candidates(shape, "backward")
    assert backward and all(candidate.backward for candidate in backward.values())
    assert any(name.startswith("one tile") for name in backward) == (length <= max(attention_candidates.ONE_TILE[K]))


def test_backward_groups(tmp_path):
    group = gpu_attention.Group(AttentionShape((20, 7), 4, 2, 16), "short", "backward")
    who = {
        name: gpu_attention.variants(group)[name] for name in ("flashvec", "torch sdpa, padded", "torch sdpa, jagged")
    }
    s = session(tmp_path)
    gpu_attention.time_group(s, group, torch.float32, who)
    assert [row.get("missing") for row in s.rows] == [None] * 3 and not s.wrong
    assert all(row["tflops"] > 0 for row in s.rows)


def test_a_wrong_variant_is_not_timed(tmp_path):
    group = gpu_attention.Group(AttentionShape((20, 7), 4, 2, 16), "short", "forward")

    def slightly_off(shape, t):
        call = gpu_attention.ours(shape, t)
        return replace(call, run=lambda: call.run() * 1.02)

    def other(shape, t):
        call = gpu_attention.ours(shape, t)
        return replace(call, run=lambda: call.run() * 1.2)

    s = session(tmp_path)
    gpu_attention.time_group(s, group, torch.float32, {"flashvec": slightly_off, "near": slightly_off, "far": other})
    ours, near, far = s.rows
    assert "off by" in ours["wrong"] and "us" not in ours and len(s.wrong) == 1
    assert "us" in near and "wrong" in far


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_op_groups(direction, tmp_path):
    s = session(tmp_path, ceilings={"gb_per_s": 10.0, "tflops": 1.0})
    for op in OPS:
        gpu_ops.time_group(s, gpu_ops.OpGroup(op, "tiny", TINY, direction), torch.float32, compiled=False)
    assert not s.wrong and all("us" in row for row in s.rows), s.rows
    assert all("share" in row and ("gb_per_s" in row) != ("tflops" in row) for row in s.rows)
    assert len(gpu_ops.summary(s.rows)) == 1 + len(OPS)


def test_compiled_forms_stand_beside():
    problem = OPS["swiglu"](TINY, Maker(CPU, torch.float32))
    assert list(gpu_ops.forms(problem, True)) == ["flashvec", "torch", "torch, compiled"]
    lora_like = replace(problem, torch_form=problem.run)
    assert gpu_ops.forms(lora_like, False)["torch"] is problem.run


# --- the command ------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--part", "kernels"]) == 2
    assert capsys.readouterr().out == "bench.gpu: torch sees no GPU here; nothing was measured\n"


def test_it_starts_as_a_module_of_a_bare_copy(tmp_path):
    """Not installed, from the repository's root, by its folder's own name."""
    if torch.cuda.is_available():
        pytest.skip("would measure")
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--part", "embed"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr


def fake_steps(*names):
    ran = []
    return [(name, 5.0, lambda s, name=name: ran.append(name), None) for name in names], ran


def test_steps_stop_with_the_budget(tmp_path):
    times = iter([0.0, 0.0, 0.0, 56.0, 56.0])
    s = session(tmp_path)
    s.budget = Budget(1.0, lambda: next(times))
    steps, ran = fake_steps("a", "b")
    gpu.run_steps(s, steps)
    assert ran == ["a"] and s.skipped == ["b"]
    assert any("1 steps found no time or memory: b" in line for line in gpu.summary(s))


def test_a_whole_run(tmp_path, monkeypatch, capsys):
    """Yardsticks, checks, timing, the child's table, rows in $OUT and exit code 1 for the one check that fails."""
    shape = AttentionShape((20, 7), 2, 1, 16)
    bad = partial(gpu_checks.check, "bad", lambda maker: 1 / 0, CPU, torch.float16, 0)
    steps = [
        ("good", 0.0, partial(gpu._check, "good", partial(OPS["rope"], TINY), torch.float16), None),
        ("bad", 0.0, lambda s: gpu._keep_verdict(s, bad()), None),
        ("attention", 0.0, partial(gpu._time_attention, gpu_attention.Group(shape, "short", "forward")), None),
        ("rope", 0.0, partial(gpu._time_op, gpu_ops.OpGroup("rope", "tiny", TINY, "forward")), None),
    ]
    every = gpu_attention.variants
    monkeypatch.setattr(gpu_attention, "variants", lambda g: {"flashvec": every(g)["flashvec"]})
    monkeypatch.setattr(gpu_attention.time_group, "__defaults__", (torch.float16, None))
    monkeypatch.setattr(gpu_ops, "forms", lambda problem, compiled: {"flashvec": problem.run})
    monkeypatch.setattr(gpu, "kernel_steps", lambda: steps)
    monkeypatch.setattr(gpu_session.Session, "repetitions", 3)
    monkeypatch.setattr(gpu, "measure_ceilings", partial(gpu.measure_ceilings, size=32, copied_bytes=4096))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "device", lambda *a: CPU)
    monkeypatch.setattr(gpu, "DeviceStopwatch", lambda device: device_time.HostStopwatch())
    monkeypatch.setattr(gpu, "machine", lambda: {"commit": "x", "torch": torch.__version__})
    monkeypatch.setattr(gpu, "gpu_facts", lambda: {"triton": "3", "gpu": "none"})
    monkeypatch.setattr(gpu_session, "write_rows", lambda rows, facts, folder: write(rows, facts, folder))
    monkeypatch.setenv("OUT", str(tmp_path))

    def write(rows, facts, folder):
        with (folder / "fake.jsonl").open("a") as file:
            file.writelines(json.dumps({**row, **facts}) + "\n" for row in rows)

    code = gpu.main(["--part", "kernels", "--jobs", "0", "--commit", "abc123"])
    printed = capsys.readouterr().out
    assert code == 1
    rows = rows_in(tmp_path)
    assert [row["benchmark"] for row in rows] == ["gpu ceiling", *["gpu check"] * 2, "gpu attention", "gpu op"]
    assert all(row["commit"] == "abc123" and row["triton"] == "3" for row in rows)
    assert rows[3]["share_of_matmul"] >= 0 and rows[4]["gb_per_s"] > 0
    for part in ("TFLOP/s, copy", "rope", "attention, useful", "1 of 2 checks passed", "WRONG: bad"):
        assert part in printed, printed


def test_a_lost_device_ends_the_run(tmp_path, monkeypatch):
    s = session(tmp_path)
    s.device = torch.device("cuda")
    monkeypatch.setattr(
        torch.cuda, "synchronize", lambda d: (_ for _ in ()).throw(RuntimeError("illegal access\nmore"))
    )
    s.step = "some step"
    with pytest.raises(gpu_session.DeviceLost, match="some step: illegal access"):
        s.settle()


def test_target_is_read_from_the_drivers_tool():
    assert gpu.target_of({"compute_capability": "9.0"}).name == "sm_90"
    assert gpu.target_of({"compute_capability": "8.6"}).name == "sm_80"
    assert gpu.target_of({"compute_capability": "12.0"}).name == "sm_120"
    assert gpu.target_of({}) is None and gpu.target_of({"compute_capability": "7.5"}) is None


def test_gpu_facts_without_a_gpu_are_versions(monkeypatch):
    def absent(*a, **k):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(timing.subprocess, "run", absent)
    assert timing.gpu_facts()["triton"] == timing._version("triton")
    printed = "580.1, 9.0, 1980, 1980, 2619, 700.00\n"
    monkeypatch.setattr(timing.subprocess, "run", lambda *a, **k: types.SimpleNamespace(stdout=printed))
    facts = timing.gpu_facts()
    assert facts["driver"] == "580.1" and facts["compute_capability"] == "9.0" and facts["sm_mhz"] == "1980"


def test_a_copy_without_history_has_a_digest(monkeypatch):
    def no_git(*a, **k):
        raise FileNotFoundError("git")

    monkeypatch.setattr(timing.subprocess, "run", no_git)
    assert timing._commit() == timing._commit() and timing._commit().startswith("code-")


def test_problem_sizes_are_odd_enough():
    assert sum(gpu_checks.EDGES) % 16 == 0 and np.array(gpu_checks.EDGES).min() == 0
    assert op_problems.RANK == 16
