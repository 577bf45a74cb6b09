import json

import pytest
import torch
from training_runs import config_for

from flashvec.bench import bench_quality, report
from flashvec.bench.bench_quality import bm25_score, readings
from flashvec.training.collection_files import Collection
from flashvec.training.run import run_training


def test_readings():
    names = [(reading.variant, reading.load.get("layers")) for reading in readings(30, "a", [15, 30], untrained=True)]
    assert names == [
        ("untrained, bidirectional, mean", 30),
        ("untrained, bidirectional, mean, 15 layers", 15),
        ("untrained, causal, mean", 30),
        ("untrained, causal, mean, 15 layers", 15),
        ("untrained, causal, one-word prompt, layer 28", 28),
        ("trained, bidirectional, mean", 30),
        ("trained, bidirectional, mean, 15 layers", 15),
    ]
    assert [r.variant for r in readings(30, "a", [], untrained=False)] == ["trained, bidirectional, mean"]
    assert len(list(readings(30, (), [15], untrained=True))) == 5


def test_rows_of_every_reading_and_file(tmp_path, monkeypatch, capsys):
    run_training(config_for("contrastive", tmp_path, loop={"steps": 1}))
    pairs = tmp_path / "pairs.jsonl"
    words = ("river", "stone", "winter", "falcon")
    pairs.write_text(
        "".join(
            json.dumps({"sentence1": a, "sentence2": b, "score": float(a == b)}) + "\n" for a in words for b in words
        )
    )
    monkeypatch.setattr(bench_quality, "append_rows", lambda rows: kept.extend(rows))
    kept: list[dict] = []
    arguments = ["x", "--model", str(tmp_path / "base"), "--adapter", str(tmp_path / "out"), "--depths", "1"]
    monkeypatch.setattr("sys.argv", [*arguments, "--sts", str(pairs)])
    bench_quality.main()
    assert [row["variant"].split(",")[0] for row in kept] == ["untrained"] * 5 + ["trained"] * 2
    assert all(row["pairs"] == 16 and row["data"] == "pairs" and -100 <= row["score"] <= 100 for row in kept)
    assert capsys.readouterr().out.count("Spearman") == 7
    for wrong in (arguments, ["x", "--model", "m", "--sts", "f", "--trained-only"]):
        monkeypatch.setattr("sys.argv", wrong)
        with pytest.raises(SystemExit, match="2"):
            bench_quality.main()


def test_bm25_finds_words_by_their_stems_and_rows_carry_their_name(tmp_path, monkeypatch, capsys):
    documents = {"a": "The cats chase mice.", "b": "Dogs were barking.", "c": "The river froze in winter."}
    collection = Collection(documents, {"q": "a barking dog", "r": "chasing a cat"}, {"q": {"b": 1.0}, "r": {"a": 2.0}})
    assert bm25_score(collection)["ndcg@10"] == 100
    wrong = Collection(documents, collection.queries, {"q": {"c": 1.0}, "r": {"c": 1.0}})
    assert bm25_score(wrong)["ndcg@10"] < 80
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": k, "text": t}) + "\n" for k, t in documents.items())
    )
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "a barking dog"}) + "\n")
    (folder / "qrels" / "test.tsv").write_text("query\tcorpus\tscore\nq\tb\t1\n")
    run_training(config_for("contrastive", tmp_path, loop={"steps": 1}))
    monkeypatch.setattr(bench_quality, "append_rows", lambda rows: kept.extend(rows))
    kept: list[dict] = []
    arguments = ["--model", str(tmp_path / "base"), "--adapter", str(tmp_path / "out"), "--retrieval", str(folder)]
    monkeypatch.setattr("sys.argv", ["x", *arguments, "--name", "SimCSE"])
    bench_quality.main()
    assert [row["variant"].split(",")[0] for row in kept] == ["BM25", *["untrained"] * 6, *["SimCSE"] * 2]
    assert [row["data"] for row in kept] == ["beir", *["beir", "beir, whitened"] * 4]
    assert kept[0]["score"] == 100 and all(row["measure"] == "nDCG@10" and row["queries"] == 1 for row in kept)
    monkeypatch.setattr("sys.argv", ["x", *arguments, "--trained-only", "--dry"])
    bench_quality.main()
    out = capsys.readouterr().out
    assert len(kept) == 9 and out.splitlines()[-1].startswith("trained, bidirectional, mean")
    with monkeypatch.context() as without:
        without.setattr(bench_quality.importlib.util, "find_spec", lambda name: None)
        assert not list(bench_quality.measure_bm25("m", torch.float32, [folder]))
    assert capsys.readouterr().out == "no BM25: it needs pip install bm25s PyStemmer\n"
    monkeypatch.setattr("sys.argv", ["x", "--model", str(tmp_path / "none"), "--sts", "f"])
    with pytest.raises(SystemExit, match=r"bench_quality: .*none: no such file or folder"):
        bench_quality.main()


def test_words_and_another_encoder(tmp_path, monkeypatch, capsys):
    run_training(config_for("mntp", tmp_path, loop={"steps": 1}))
    tagged = tmp_path / "tagged.conll"
    tagged.write_text("\n".join("the\tDET\nriver\tNOUN\nfroze\tVERB\n" for _ in range(6)) + "\n")
    monkeypatch.setattr(bench_quality, "append_rows", lambda rows: kept.extend(rows))
    kept: list[dict] = []
    arguments = ["x", "--model", str(tmp_path / "base"), "--adapter", str(tmp_path / "out"), "--name", "MNTP"]
    arguments += ["--beside", str(tmp_path / "base"), "--words", "pos", str(tagged), str(tagged)]
    monkeypatch.setattr("sys.argv", [*arguments, "--max-sentences", "4", "--shift"])
    bench_quality.main()
    names = ["untrained, bidirectional, mean", "untrained, causal, mean", "MNTP, bidirectional, mean", "base"]
    assert [row["variant"] for row in kept] == names  # the reading with a prompt has no words
    assert [row["shift"] for row in kept] == [0, 0, 1, 0]  # only the adapter's states lie one place to the left
    assert all((row["data"], row["measure"], row["sentences"]) == ("tagged pos", "accuracy", 4) for row in kept)
    assert all(0 <= row["score"] <= 100 and row["deviation"] >= 0 and row["words"] == 12 for row in kept)
    assert capsys.readouterr().out.count("accuracy") == 4
    trees = tmp_path / "trees.conllu"
    lines = [("the", "DET", 2, "det"), ("river", "NOUN", 3, "nsubj"), ("froze", "VERB", 0, "root")]
    sentence = "".join(f"{n}\t{w}\t_\t{u}\t_\t_\t{h}\t{r}\t_\t_\n" for n, (w, u, h, r) in enumerate(lines, 1))
    trees.write_text(f"{sentence}\n" * 4)
    kept.clear()
    monkeypatch.setattr("sys.argv", [*arguments[:-4], "--words", "chunk", str(trees), str(trees)])
    bench_quality.main()
    assert len(kept) == 4
    assert all((row["data"], row["measure"]) == ("trees chunk", "accuracy") and 0 <= row["f1"] <= 100 for row in kept)
    monkeypatch.setattr("sys.argv", ["x", "--model", "m", "--words", "tags", "a", "b"])
    with pytest.raises(SystemExit, match="2"):
        bench_quality.main()
    assert "--words tags: known are pos, ner, chunk" in capsys.readouterr().err


def test_a_table_has_a_column_for_each_set():
    machine = {"cpu": "c", "instructions": "i", "cores": 2, "threads": 2, "torch": "t", "commit": "a", "date": "d"}
    about = {"benchmark": "quality", "model": "m", "dtype": "torch.float32", **machine}
    rows = [
        {**about, "variant": "untrained", "data": "sts", "measure": "Spearman", "score": 28.4},
        {**about, "variant": "trained", "data": "sts", "measure": "Spearman", "score": 70.0},
        {**about, "variant": "trained", "data": "cisi", "measure": "nDCG@10", "score": 31.25, "queries": 9},
        {**about, "variant": "trained", "data": "cisi, whitened", "measure": "nDCG@10", "score": 40.0, "queries": 9},
        {**about, "variant": "trained", "data": "sts", "measure": "Spearman", "score": 76.04},
        {**about, "variant": "all-MiniLM", "data": "sts", "measure": "Spearman", "score": 86.7},
        {**about, "variant": "trained, cut", "data": "sts", "measure": "Spearman", "score": 70.0},
        {
            **about,
            "variant": "MNTP, 8 layers",
            "data": "ud pos",
            "measure": "accuracy",
            "score": 91.26,
            "deviation": 0.12,
            "words": 9,
        },
    ]
    lines = report.quality_table(rows)
    assert lines[0] == "| | sts (Spearman) |"
    assert "| untrained | 28.4 |" in lines and "| trained | 76.0 |" in lines
    search = lines.index("| search (whitened) | cisi (nDCG@10) |")
    assert lines[search + 2 : search + 4] == ["| trained | 31.2 (40.0) |", ""]
    words = lines.index("| words | ud pos (accuracy) |")  # a table of their own, for readings that have any
    assert lines[words + 2] == "| MNTP, 8 layers | 91.3 ± 0.1 |" and not any("MNTP" in line for line in lines[:words])
    assert lines[-2].startswith("m, float32, on 2 cores of c")
