"""The benchmarks' own code: inputs, ceiling, peers, and the refusal to time a model that is another."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import TEXTS, tiny_checkpoint

from flashvec.bench import (
    bench_corpus,
    bench_embed,
    bench_fidelity,
    bench_load,
    bench_scaling,
    bench_start,
    ceiling,
    embed_tables,
    measure_row_counts,
    peers,
    report,
    timing,
)
from flashvec.bench.bench_embed import bench_profile
from flashvec.bench.ceiling import Ceiling
from flashvec.bench.lengths import LEAST_WORDS, PROFILES, Texts
from flashvec.bench.own_process import ProcessEndedError
from flashvec.bench.peers import HuggingFace, SentenceTransformers
from flashvec.bench.rows import NOT_INSTALLED
from flashvec.bench.variants import Subject
from flashvec.runtime.encoder import Encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that sentence-transformers opens too."""
    from flashvec.runtime.checkpoint.export import convert

    folder = tmp_path_factory.mktemp("models")
    tiny_checkpoint(folder / "tiny", "llama")
    convert(folder / "tiny", folder / "converted")
    return folder / "converted"


def test_texts_are_new_each_time_and_of_the_wanted_length():
    texts = Texts(None, 1.0)
    for profile, mean in PROFILES.items():
        first, second = (texts.draw(profile, 4000, seed) for seed in (0, 1))
        assert first == texts.draw(profile, 4000, 0) and first != second
        words = [len(t.split()) for t in first]
        assert sum(words) >= 4000
        if mean:
            assert 0.7 * mean < np.mean(words) < 1.4 * mean


def test_texts_need_some_prose(folder, tmp_path, monkeypatch):
    file = tmp_path / "prose" / "a.txt"
    (file.parent / "a folder").mkdir(parents=True)
    for words in (0, LEAST_WORDS - 1):
        file.write_text("word " * words)
        monkeypatch.setattr("sys.argv", ["x", "--model", str(folder), "--texts", str(file), "--dry"])
        with pytest.raises(SystemExit, match=rf"a\.txt holds {words} words: texts are cut from 1,000 or more"):
            bench_embed.main()
    file.write_text("word " * LEAST_WORDS)
    assert len(Texts(file.parent, 1.0).words) == LEAST_WORDS


def test_peers_give_the_same_vectors(folder):
    ours = Encoder.load(folder, dtype="float32").embed(list(TEXTS))
    np.testing.assert_allclose(HuggingFace(str(folder), torch.float32, 512).embed(TEXTS), ours, atol=1e-5)
    np.testing.assert_allclose(SentenceTransformers(str(folder), 512).embed(TEXTS), ours, atol=1e-5)


def test_rows_of_a_profile(folder, monkeypatch):
    monkeypatch.setattr(bench_embed, "TOKENS_PER_RUN", 200)
    monkeypatch.setattr(bench_embed, "WARM_UP_TOKENS", 50)
    monkeypatch.setattr(ceiling, "CEILING_TOKENS", 4096)
    enc = Encoder.load(folder, dtype="float32")
    ceilings = {"float32": Ceiling(enc)}
    both = {"flashvec float32": enc, "hugging face float32": HuggingFace(str(folder), torch.float32, 512)}
    rows = bench_profile("queries", Texts(None, 3.0), enc, both, ceilings, 2)
    assert [row["variant"] for row in rows] == ["flashvec float32", "hugging face float32"]
    assert all(row["tokens_per_s"] > 0 and row["ceiling_tokens_per_s"] > 0 for row in rows)
    table = embed_tables.embed_table([{**r, "model": "m", "cores": 2, "threads": 2, "cpu": "c", "instructions": "i",
                                 "torch": "t", "commit": "x", "date": "d"} for r in rows])  # fmt: skip
    assert table[0].startswith("| tokens/s") and "flashvec float32" in table[2]

    class Other:
        def embed(self, texts):
            return -enc.embed(texts)

    class Broken:
        """Fails at a call: the first compares vectors, the second is timed."""

        def __init__(self, call):
            self.left = call

        def embed(self, texts):
            self.left -= 1
            if self.left <= 0:
                raise RuntimeError("no such\n operator")
            return enc.embed(texts)

    embedders = {"flashvec float32": enc, "other float32": Other(), "broken": Broken(1), "breaks later": Broken(2)}
    rows = bench_profile("queries", Texts(None, 3.0), enc, embedders, ceilings, 2)
    assert [(row["variant"], row.get("failed", "ran")[:28]) for row in rows] == [
        ("flashvec float32", "ran"),
        ("other float32", "median cosine -1.0000 to fla"),
        ("broken", "RuntimeError: no such operat"),
        ("breaks later", "RuntimeError: no such operat"),
    ]
    with pytest.raises(RuntimeError, match="no such"):
        bench_profile("queries", Texts(None, 3.0), enc, {"flashvec": enc, "flashvec 2": Broken(1)}, ceilings, 1)


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_the_ceiling_counts_what_was_multiplied(threads, folder, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", lambda num: None)
    monkeypatch.setattr(ceiling, "CEILING_ROWS", (64, 256))
    monkeypatch.setattr(ceiling, "CEILING_TOKENS", 1024)
    bare, multiplied = ceiling.Ceiling(Encoder.load(folder)), []
    monkeypatch.setattr(ceiling, "linear", lambda x, weight: multiplied.append(len(x)))
    for form, run in bare.forms.items():
        multiplied.clear()
        run(0)
        assert sum(multiplied) == len(bare.weights) * ceiling._tokens_of(form) > 0


def test_each_variant_runs_in_its_own_process_and_those_that_cannot_are_named(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_embed, "TOKENS_PER_RUN", 200)
    monkeypatch.setattr(bench_embed, "WARM_UP_TOKENS", 50)
    monkeypatch.setattr(ceiling, "CEILING_TOKENS", 4096)
    (tmp_path / "sentence_transformers.py").write_text("1 / 0")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(
        bench_embed, "is_installed", lambda package: package in ("transformers", "sentence_transformers")
    )
    done = list(bench_embed.run(Subject(str(folder)), None, ["queries"], 1, has_peers=True))
    rows = {row["variant"]: row for row in done[0]}
    name = "sentence-transformers float32, as installed"
    assert rows[name]["failed"] == "ZeroDivisionError: division by zero"
    others = [row for row in done[0] if "failed" not in row]
    assert others[0]["variant"].startswith("flashvec") and others[-1]["variant"].startswith("hugging face")
    assert all(row["tokens_per_s"] > 0 and 50 < row["peak_mib"] < 8000 for row in others)
    out = capsys.readouterr().out
    missing = [name for name, row in rows.items() if row.get("failed") == NOT_INSTALLED]
    assert [name.split()[0] for name in missing] == ["openvino", "openvino", "onnx", "onnx", "llm2vec"]
    assert all(f"{name}: {NOT_INSTALLED}" in out for name in missing)
    assert {row["max_length"] for row in done[0]} == {512} and len({row["run"] for row in done[0]}) == 1
    machine = {"cores": 2, "threads": 2, "cpu": "c", "instructions": "i", "torch": "t", "commit": "x", "date": "d"}
    lines = embed_tables.embed_table([{**row, **machine} for rows in done for row in rows])
    assert f"Did not run: {name}, queries (ZeroDivisionError: division by zero)." in lines
    assert lines[-1] == f"Did not run: {missing[-1]}, queries ({NOT_INSTALLED})."


class Fixed:
    """Answers with these vectors."""

    def __init__(self, vectors):
        self.vectors = vectors

    def embed(self, texts):
        return self.vectors


def compared(vectors, truth, name="peer"):
    timed = bench_embed._Timed(name, Fixed(vectors), [])
    timed.compare([], truth, "flashvec")
    return timed


def test_vectors_that_are_not_the_models_are_refused():
    truth = np.eye(8, dtype=np.float32)
    assert not compared(truth, truth).failed
    one = truth.copy()
    one[3] = np.nan
    assert compared(one, truth).failed == "median cosine nan to flashvec: not the same model"
    assert compared(truth[:7], truth).failed == "vectors of shape (7, 8), flashvec's are (8, 8)"
    assert compared(truth[:, :4], truth).failed.startswith("vectors of shape (8, 4)")
    alike = np.ones((8, 8), np.float32) + 0.5 * truth  # every text's cosines to the others are high, too
    alike /= np.linalg.norm(alike, axis=1, keepdims=True)
    mean = np.full((8, 8), 8**-0.5, np.float32)
    found = compared(mean, alike)
    assert found.agreement["median_cosine"] > 0.9 and "12% of its vectors lie nearest" in found.failed
    swapped = truth[[1, 0, 2, 3, 4, 5, 6, 7]]  # two of eight texts have each other's vectors
    assert not compared(swapped, truth).failed
    assert compared(swapped, truth).agreement == {"median_cosine": 1.0, "least_cosine": 0.0, "own_nearest": 0.75}
    assert "62% of its vectors" in compared(truth[[1, 2, 0, 3, 4, 5, 6, 7]], truth).failed
    with pytest.raises(ValueError, match="flashvec float32: median cosine nan"):
        compared(one, truth, "flashvec float32")


def test_quick_is_of_few_peers_and_half_the_tokens_and_says_how_long_it_took(folder, monkeypatch, capsys):
    asked = {}
    monkeypatch.setattr(bench_embed, "run", lambda subject, texts, profiles, repetitions, **settings: asked.update(
        settings, profiles=profiles, repetitions=repetitions) or [])  # fmt: skip
    monkeypatch.setattr("sys.argv", ["x", "--model", str(folder), "--quick", "--dry"])
    bench_embed.main()
    assert re.search(r"took 0\.\d minutes", capsys.readouterr().out)
    assert (asked["profiles"], asked["repetitions"], asked["share"]) == (["passages"], 3, 0.5)
    names = peers.ways(str(folder), "float32", Path("x.Q4_1.gguf"))
    left_out = {name for name in names if not re.search(asked["only"], name)}
    quantised = {"onnx runtime int8, sorted", "openvino int8, sorted", "llama.cpp, Q4_1 weights"}
    assert quantised <= left_out and len(names) - len(left_out) == 5
    drawn = []
    monkeypatch.setattr(Texts, "draw", lambda self, profile, tokens, seed: drawn.append((tokens, seed)) or ["a text"])
    enc = Encoder.load(folder, dtype="float32")
    bench_profile("queries", Texts(None, 1.0), enc, {"flashvec float32": enc}, {"float32": Ceiling(enc)}, 1, 0.5)
    assert drawn == [(bench_embed.TOKENS_PER_RUN // 2, 0), (bench_embed.WARM_UP_TOKENS // 2, -1)]


def test_onnx_runtime_gives_the_same_vectors(folder):
    pytest.importorskip("onnxruntime", reason="comes with make peers")
    ours = Encoder.load(folder, dtype="float32").embed(list(TEXTS))
    np.testing.assert_allclose(peers.OnnxRuntime(str(folder), 512).embed(TEXTS), ours, atol=1e-5)
    assert np.median((peers.OnnxRuntime(str(folder), 512, int8=True).embed(TEXTS) * ours).sum(1)) > 0.9


def test_openvino_gives_the_same_vectors(folder):
    pytest.importorskip("nncf", reason="comes with make peers")
    ours = Encoder.load(folder, dtype="float32").embed(list(TEXTS))
    np.testing.assert_allclose(peers.OpenVINO(str(folder), "float32", 512).embed(TEXTS), ours, atol=1e-5)
    assert np.median((peers.OpenVINO(str(folder), "float32", 512, int8=True).embed(TEXTS) * ours).sum(1)) > 0.9


def test_fidelity_rows(folder, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(bench_fidelity, "append_rows", kept.extend)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    arguments = ["bench", "--model", str(folder), "--texts", str(tmp_path / "texts.txt"), "--dtypes", "float32"]
    monkeypatch.setattr("sys.argv", arguments)
    bench_fidelity.main()
    assert kept[0]["passed"] and kept[0]["benchmark"] == "verify"
    assert report.verify_table([{**row, **timing.machine()} for row in kept])[2].startswith(
        "| converted | float32 | flashvec | 1.00000"
    )


def test_products_of_a_layer():
    assert measure_row_counts.products(576, 1536, 9, 3, 64) == [(960, 576), (576, 576), (3072, 576), (576, 1536)]


def test_measured_row_counts_are_entered_beside_other_machines(tmp_path, monkeypatch):
    table = tmp_path / "row_counts.json"
    table.write_text(json.dumps({"about": "x", "disagree": {"elsewhere": {"float32": {"8x8": [16]}}}}))
    monkeypatch.setattr(measure_row_counts, "TABLE", table)
    monkeypatch.setattr(measure_row_counts, "machine_key", lambda packed: "here")
    for shape, differing in (("1024x8", []), ("64x8", [32]), ("1024x8", [48])):
        measure_row_counts.enter("bfloat16", shape, differing)
    found = json.loads(table.read_text())["disagree"]
    assert found == {"elsewhere": {"float32": {"8x8": [16]}}, "here": {"bfloat16": {"64x8": [32], "1024x8": [48]}}}
    assert list(found["here"]["bfloat16"]) == ["64x8", "1024x8"]


def test_a_model_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "--model", str(tmp_path / "none"), "--quick"])
    with pytest.raises(SystemExit, match=r"bench_embed: .*none: no such file or folder"):
        bench_embed.main()


def test_a_program_gets_no_more_memory_than_allowed(folder):
    process = Subject(str(folder), memory_gib=0.5).process("flashvec float32", "float32")
    try:
        assert process.embed(["short"]).shape[0] == 1
        assert process.process is not None
        limits = Path(f"/proc/{process.process.pid}/limits").read_text()
        assert re.search(r"Max data size +536870912 ", limits)
    finally:
        process.close()
    starved = Subject(str(folder), memory_gib=0.05).process("flashvec float32", "float32")
    with pytest.raises(ProcessEndedError, match="memory"):
        starved.embed(["short"])


def test_a_program_ends_with_the_one_that_started_it(folder, tmp_path):
    script = f"""
from flashvec.bench.variants import Subject
process = Subject({str(folder)!r}).process("flashvec float32", "float32")
process.embed(["short"])
print(process.process.pid, flush=True)
process.embed(["long " * 400] * 20000)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("it still runs")


def test_peers_are_chosen_by_name(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(bench_embed, "bench_profile", lambda *arguments: asked.extend(arguments[3]) or [])
    monkeypatch.setattr(bench_embed, "is_installed", lambda package: True)
    list(bench_embed.run(Subject(str(folder)), None, ["queries"], 1, has_peers=True, only="onnx.*32|llm2"))
    assert [name for name in asked if not name.startswith("flashvec")] == [
        "onnx runtime float32, sorted",
        "llm2vec float32, as installed",
    ]
    monkeypatch.setattr("sys.argv", ["x", "--model", str(folder), "--only", "("])
    with pytest.raises(SystemExit, match=r"--only '\('"):
        bench_embed.main()


@pytest.mark.parametrize(
    ("bench", "words", "said"),
    [
        (bench_embed, "--repetitions 0", "--repetitions: 0 is too few, expected at least 1"),
        (bench_embed, "--threads -1", "--threads: -1 is too few"),
        (bench_embed, "--workers 1 0", "--workers: 0 is too few"),
        (bench_embed, "--workers", "--workers: expected at least one"),
        (bench_embed, "--profiles", "--profiles: expected at least one"),
        (bench_embed, "--longest-call 0", "--longest-call is 0, expected more than 0"),
        (bench_embed, "--memory -1", "--memory is -1, expected more than 0"),
        (bench_corpus, "--repetitions 0", "--repetitions is 0, expected at least 1"),
        (bench_corpus, "--texts nowhere", "--texts nowhere: no folder of *.txt with lines of 200 characters"),
        (bench_load, "--repetitions 0", "--repetitions: 0 is too few"),
        (bench_load, "--dtypes", "--dtypes: expected at least one"),
        (bench_scaling, "--repetitions 0", "--repetitions: 0 is too few"),
        (bench_start, "--repetitions 0", "--repetitions: 0 is too few"),
    ],
)
def test_nothing_to_do_is_no_benchmark(bench, words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--model", "nowhere", *words.split()])
    with pytest.raises(SystemExit):
        bench.main()
    assert said in capsys.readouterr().err


def test_a_corpus_benchmark_of_nothing_is_none(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_corpus"])
    with pytest.raises(SystemExit):
        bench_corpus.main()
    assert "give --model and --texts, or --stand-in" in capsys.readouterr().err
