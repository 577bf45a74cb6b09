import json

import pytest
import torch

from flashvec.bench import bench_packed, timing
from flashvec.kernels.linear import can_pack


def test_both_forms_take_turns_and_agree(folder, tmp_path, monkeypatch, capsys):
    if not can_pack(torch.zeros(1, 1)):
        pytest.skip("this torch packs no fp32 weights")
    monkeypatch.setattr(bench_packed, "COUNTS", (1, 3))
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "bench" / "results")
    arguments = ["--model", str(folder), "--dtype", "float32", "--repetitions", "2", "--keep"]
    monkeypatch.setattr("sys.argv", ["bench_packed", *arguments])
    bench_packed.main()
    (kept,) = (tmp_path / "bench" / "results").glob("*.jsonl")
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [(row["texts"], row["variant"]) for row in rows] == [(n, v) for n in (1, 3) for v in ("plain", "packed")]
    assert all(row["largest_difference"] < 1e-5 and row["repetitions"] == 2 for row in rows)
    assert {row["over_plain"] for row in rows if row["variant"] == "plain"} == {1.0}
    assert "x plain  off by" in capsys.readouterr().out


def test_a_dtype_that_is_not_packed_is_one_line(folder, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench_packed", "--model", str(folder), "--dtype", "float16"])
    with pytest.raises(SystemExit, match=r"bench_packed: this machine's torch packs no weights of torch\.float16"):
        bench_packed.main()
