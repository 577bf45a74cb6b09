"""`bench/bench_attention.py` runs what it says it runs."""

from types import SimpleNamespace

import pytest
import torch

from flashvec.bench import bench_attention as bench


class Benchmark:
    def __init__(self) -> None:
        self.calls = 0
        self.extra_info: dict[str, float] = {}
        self.stats = SimpleNamespace(stats=SimpleNamespace(median=0.5))

    def __call__(self, run) -> None:
        run()
        self.calls += 1


@pytest.fixture
def small(monkeypatch):
    batch = bench.batch
    monkeypatch.setattr(bench, "batch", lambda lengths, device: batch(lengths, device, 128))


@pytest.mark.parametrize("name", bench.FORMS)
@pytest.mark.parametrize("lengths", ["64", "log-normal 30"])
def test_forward_forms(name, lengths, small):
    benchmark = Benchmark()
    if name == "kernel" and bench.here() == "cpu":
        with pytest.raises(pytest.skip.Exception, match="not on cpu"):
            bench.test_forward(benchmark, lengths, name)
        return
    bench.test_forward(benchmark, lengths, name)
    assert benchmark.calls == 1 and benchmark.extra_info["useful_tflops"] > 0


def test_backward(small):
    benchmark = Benchmark()
    bench.test_backward(benchmark, "64", "reference")
    assert benchmark.calls == 1
    b = bench.batch("64", "cpu")
    gradients = b.gradients(bench.reference)()
    assert [g.shape for g in gradients] == [b.tensors[name].shape for name in "qkv"]


def test_a_wrong_form_is_not_timed(small):
    b = bench.batch("64", "cpu")
    with pytest.raises(AssertionError, match="off by"):
        bench.check(b, lambda *a: bench.reference(*a) * 1.01)
    assert torch.equal(b.run(bench.chosen), b.run(bench.cpu_form))
