"""Rows of loading and of parity: measured in processes of their own, shown in tables."""

import json
import mmap
import sys

import parity
import pytest
from tiny_models import tiny_adapter, tiny_checkpoint

from flashvec.bench import bench_load, bench_parity, load_worker, report

MACHINE = {"cpu": "c", "instructions": "i", "cores": 2, "threads": 2, "torch": "t", "commit": "x", "date": "d"}

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux
def test_loading_as_rows(tmp_path, monkeypatch, capsys):
    model = tiny_checkpoint(tmp_path / "tiny")
    tiny_adapter(model, tmp_path / "adapter")
    kept = []
    monkeypatch.setattr(bench_load, "append_rows", kept.extend)
    loads = []
    once = bench_load.load_once
    monkeypatch.setattr(bench_load, "load_once", lambda *load: loads.append(load) or (
        once(*load) if len(loads) < 2 else {"seconds": len(loads), "weights_bytes": 2**20, "peak_bytes": 2**21}
    ))  # fmt: skip
    arguments = [
        "--model",
        tmp_path / "tiny",
        "--adapter",
        tmp_path / "adapter",
        "--dtypes",
        "float32",
        "--repetitions",
    ]
    monkeypatch.setattr("sys.argv", ["x", *map(str, arguments), "3"])
    bench_load.main()
    assert [load[1:] for load in loads] == [("float32", ())] * 4 + [("float32", (tmp_path / "adapter",))] * 4
    assert [(row["format"], row["seconds"]) for row in kept] == [("safetensors", 3), ("safetensors and an adapter", 7)]
    assert "safetensors and an adapter   float32     7.00 s  weights 1 MiB, peak 2 MiB" in capsys.readouterr().out
    lines = report.load_table([{**row, **MACHINE} for row in kept])
    assert lines[2:4] == [
        "| safetensors | float32 | 3.0 | 1 | 2 |",
        "| safetensors and an adapter | float32 | 7.0 | 1 | 2 |",
    ]


@linux
def test_weights_are_counted_and_memory_is_seen(tmp_path, monkeypatch, capsys):
    model = tiny_checkpoint(tmp_path / "tiny")
    monkeypatch.setattr("sys.argv", ["x", str(tmp_path / "tiny"), "float32"])
    load_worker.main()
    found = json.loads(capsys.readouterr().out)
    assert found["weights_bytes"] == 4 * (sum(p.numel() for p in model.parameters()) - 32)  # the last norm's are apart
    before = load_worker.anonymous_bytes()
    with mmap.mmap(-1, 2**26, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:  # never pages that malloc kept
        held[:: mmap.PAGESIZE] = b"x" * (2**26 // mmap.PAGESIZE)
        assert load_worker.anonymous_bytes() - before > 2**25


def test_a_model_that_does_not_load_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "--model", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"^bench_load: .*none: no such file or folder"):
        bench_load.main()


COMPARES = """
from parity import note

def test_it():
    assert note("family", "llama", "causal", 2e-7) < note("family", "llama", "causal", 1.234e-6)
    note("layout", "GGUF", "transformers", 0.0)
"""


def test_differences_as_rows(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(bench_parity, "append_rows", kept.extend)
    monkeypatch.setattr(bench_parity, "ROOT", tmp_path)
    monkeypatch.setattr(bench_parity, "TESTS", ["test_it.py"])
    monkeypatch.setenv("PYTHONPATH", str(parity.__file__).rpartition("/")[0])
    monkeypatch.setattr("sys.argv", ["x"])
    with pytest.raises(SystemExit, match=r"test_it\.py: no such file; run it in a copy"):
        bench_parity.main()
    (tmp_path / "test_it.py").write_text(COMPARES)
    bench_parity.main()
    assert [(row["largest_difference"], row["comparisons"]) for row in kept] == [(1.2e-6, 2), (0.0, 1)]
    lines = report.parity_tables([{**row, **MACHINE} for row in kept])
    assert "| llama |  | 1.2e-06 |" in lines and "| GGUF | transformers | 0.0e+00 |" in lines
    (tmp_path / "test_it.py").write_text("def test_it():\n    assert False\n")
    with pytest.raises(SystemExit, match="the tests do not pass"):
        bench_parity.main()
    assert len(kept) == 2
