import pytest
from tiny_models import tiny_checkpoint

from flashvec.bench import bench_scaling, plots
from flashvec.bench.lengths import Texts
from flashvec.runtime.encoder import Encoder

TINY_SHAPES = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
               "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2000}  # fmt: skip


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A tiny model and short sweeps."""
    tiny_checkpoint(tmp_path / "tiny", "llama")
    monkeypatch.setattr(bench_scaling, "LENGTHS", (4, 16, 4096))
    monkeypatch.setattr(bench_scaling, "COUNTS", (1, 3))
    monkeypatch.setattr(bench_scaling, "BUDGETS", (64,))
    monkeypatch.setattr(bench_scaling, "TOKENS_PER_RUN", 64)
    monkeypatch.setitem(bench_scaling.CONFIGS, "tiny", TINY_SHAPES)
    return tmp_path / "tiny"


def test_points_of_every_sweep(small):
    encoder = Encoder.load(small, dtype="float32")
    texts = Texts.for_encoder(None, encoder)
    found = bench_scaling.points(encoder, "tiny", texts, ["tiny"], 2)
    assert [(point.sweep, point.at) for point in found[:-2]] == [
        ("length", 4), ("length", 16), ("texts", 1), ("texts", 3), ("budget", 64)
    ]  # fmt: skip
    assert [point.sweep for point in found[-2:]] == ["model", "model"] and found[-2].at < found[-1].at
    for point in found[:2]:  # every text has the length that the point stands for
        own = encoder.count_tokens(point.texts[0])
        assert (own >= point.at).all() and point.tokens()[0] == point.at * len(own) == 64
    assert all(len(point.texts) == 3 and point.texts[0] != point.texts[1] for point in found)
    assert len(found[3].texts[0]) == 3


def test_rows_and_their_plot(small, monkeypatch, capsys):
    kept: list[dict] = []
    monkeypatch.setattr(bench_scaling, "append_rows", kept.extend)
    monkeypatch.setattr("sys.argv", ["x", "--model", str(small), "--shapes", "tiny", "--repetitions", "2"])
    bench_scaling.main()
    assert {row["sweep"] for row in kept} == set(plots.SWEEPS) and len(kept) == 7
    assert len({row["run"] for row in kept}) == 1
    assert all(row["tokens_per_s"] > 0 and row["ms_per_call"] > 0 and row["repetitions"] == 2 for row in kept)
    assert capsys.readouterr().out.count("tokens/s") == 7
    machine = {"cpu": "c", "instructions": "i", "cores": 2, "threads": 2, "torch": "t", "commit": "a", "date": "d"}
    monkeypatch.setattr(plots, "read_rows", lambda benchmark: [{**row, **machine} for row in kept])
    drawn = plots.svg_of(plots.scaling_plot, 10, 2.8)
    assert all(name in drawn for name in plots.SWEEPS.values())


def test_a_model_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "--model", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"bench_scaling: .*none: no such file or folder"):
        bench_scaling.main()


@pytest.mark.parametrize(("prose", "said"), [("a few words", "holds 3 words"), (None, "No such file")])
def test_texts_that_are_too_short_or_not_there_are_one_line(prose, said, small, tmp_path, monkeypatch):
    file = tmp_path / "prose.txt"
    if prose is not None:
        file.write_text(prose)
    monkeypatch.setattr("sys.argv", ["x", "--model", str(small), "--texts", str(file)])
    with pytest.raises(SystemExit, match=rf"bench_scaling: .*{said}"):
        bench_scaling.main()


def test_the_plot_is_of_one_run_and_one_model():
    machine = {"cpu": "c", "instructions": "i", "cores": 2, "threads": 2, "torch": "t", "dtype": "d", "date": "1"}
    sweeps = [("length", "m", 1), ("length", "m", 2), ("model", "m", 100), ("model", "larger", 300)]
    first = [{**machine, "sweep": s, "model": m, "at": at, "commit": "a"} for s, m, at in sweeps]
    other = [{**row, "model": row["model"].replace("m", "n")} for row in first]
    for changes in ({"run": "5"}, {"commit": "b"}):  # another model's run, fewer points of it, and the same day
        later = [{**row, **changes} for row in other[:3]]
        assert plots.newest_scaling_rows([*first, *later]) == later
        assert plots.newest_scaling_rows([*[{**row, "date": "2"} for row in first], *later])[0]["model"] == "m"
    lengths = [row for row in plots.newest_scaling_rows([*first, *other]) if row["sweep"] == "length"]
    assert lengths == other[:2]
