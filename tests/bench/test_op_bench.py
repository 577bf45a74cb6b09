"""The ops' benchmarks run, on tiny tensors: their forms agree, forward and backward, and a rate is noted."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flashvec.bench import (
    bench_add_rms_norm,
    bench_cross_entropy,
    bench_info_nce,
    bench_lora,
    bench_mean_pool,
    bench_norm_rope,
    bench_rms_norm,
    bench_rope,
    bench_swiglu,
    op_bench,
)
from flashvec.bench.op_bench import Size, here

PROBLEMS = {
    "rms_norm": bench_rms_norm.problem,
    "add_rms_norm": lambda size: bench_add_rms_norm.problem(size, post=False),
    "add_rms_norm with a post norm": lambda size: bench_add_rms_norm.problem(size, post=True),
    "rope": bench_rope.problem,
    "norm_rope": bench_norm_rope.problem,
    "swiglu": lambda size: bench_swiglu.problem(size, "gelu_tanh"),
    "mean_pool": lambda size: bench_mean_pool.problem(size, length=3),
    "lora": lambda size: bench_lora.problem(size, None),
    "lora with dropout": lambda size: bench_lora.problem(size, bench_lora.DROPOUT),
    "cross_entropy": bench_cross_entropy.problem,
    "info_nce": lambda size: bench_info_nce.problem(size, None),
    "info_nce with prefixes": lambda size: bench_info_nce.problem(size, [8, 16]),
}
RANDOM = {"lora with dropout": "torch"}  # the form that draws masks of its own


class Benchmark:
    """Stands for pytest-benchmark's fixture: runs once."""

    def __init__(self):
        self.extra_info, self.stats = {}, None

    def __call__(self, run):
        run()
        self.stats = SimpleNamespace(stats=SimpleNamespace(median=2e-3))


@pytest.mark.parametrize("name", PROBLEMS)
def test_forms_agree_and_are_timed(name, device):
    problem = PROBLEMS[name](Size(6, 24, 40, 2, 1, 8, 50, torch.float32, device))
    assert "reference" in problem.forms and "ours" in problem.forms
    gradients = {}
    for form, run in problem.forms.items():
        if RANDOM.get(name) != form:
            problem.check(form)
        for direction, moved in (("forward", problem.forward_work), ("backward", problem.backward_work)):
            benchmark = Benchmark()
            getattr(problem, direction)(benchmark, form)
            assert benchmark.extra_info[problem.unit] == pytest.approx(moved / 2e-3 / 1e9, rel=1e-3)
        leaves = [x.detach().requires_grad_() for x in problem.leaves]
        outputs = run(*leaves)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        gradients[form] = torch.autograd.grad(sum(out.square().sum() for out in outputs), leaves)
    gradients.pop(RANDOM.get(name), None)
    for got in gradients.values():
        for x, y in zip(got, gradients["reference"], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * max(1.0, y.abs().max().item()))


def test_a_form_that_is_wrong_is_not_timed(device):
    problem = bench_swiglu.problem(Size(2, 8, 8, 1, 1, 8, 50, torch.float32, device), "silu")
    problem = replace(problem, forms=dict(problem.forms) | {"ours": lambda x: x[:, :8]})
    with pytest.raises(AssertionError, match="ours is off by"):
        problem.forward(Benchmark(), "ours")


def test_there_is_a_size_for_this_machine(device):
    assert here().device == device


@pytest.mark.parametrize("file", sorted(Path(op_bench.__file__).parent.glob("bench_*.py")), ids=lambda file: file.stem)
def test_a_benchmarks_file_does_something_when_run(file):
    assert '\nif __name__ == "__main__":\n' in file.read_text()


def test_an_ops_benchmark_is_run_by_pytest(monkeypatch, capfd):
    monkeypatch.setattr("sys.argv", ["bench_rope", "--collect-only", "-q"])
    with pytest.raises(SystemExit, match="0"):
        op_bench.run_file(bench_rope.__file__)
    assert "bench_rope.py::test_forward[ours]" in capfd.readouterr().out
