from tiny_models import SENTENCES, tiny_checkpoint

from flashvec.bench import bench_corpus


def test_rows(tmp_path):
    tiny_checkpoint(tmp_path / "model")
    (tmp_path / "texts").mkdir()
    lines = [f"{' '.join(SENTENCES)} {i}" for i in range(40)]
    (tmp_path / "texts" / "a.txt").write_text("\n".join(["<doc id=1>", *lines, "short", lines[0]]))
    texts = bench_corpus.paragraphs(tmp_path / "texts", 30)
    assert len(set(texts)) == 30 and all("doc" not in text[:5] for text in texts)
    overhead, reuse = bench_corpus.measure_overhead(str(tmp_path / "model"), texts, 64, 2, 1)
    assert overhead["layers"] == 1
    assert overhead["variant"] == "overhead" and 0.2 < overhead["ratio"] < 20 and 0 < overhead["embed_share"] <= 1
    assert reuse["variant"] == "reuse, 1 % edited" and reuse["ratio"] > 0
    assert bench_corpus.measure_planning(3)["files"] == 3
    assert bench_corpus.measure_memory(200)["rows"] == 200
    memory = bench_corpus.measure_model_memory(str(tmp_path / "model"), tmp_path / "texts", 10, 64, None)
    assert memory["rows"] == 10 and 0 < memory["weights_mib"] < memory["peak_mib"]
