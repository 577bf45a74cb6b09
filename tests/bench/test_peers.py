"""Peers in other processes and libraries: the reference implementation, llama.cpp, and what starting costs."""

import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import TEXTS, tiny_checkpoint

from flashvec.bench import bench_start, embed_worker, own_process, peers, peers_llama_cpp, peers_llm2vec
from flashvec.bench.own_process import ProcessEndedError
from flashvec.bench.peers import HuggingFace
from flashvec.bench.rows import NOT_INSTALLED
from flashvec.bench.variants import OURS, Subject
from flashvec.runtime.checkpoint.export import convert
from flashvec.runtime.encoder import Encoder

ROOT = Path(__file__).parents[2]
REFERENCE = """
import json, pathlib
import torch

class LLM2Vec:
    @classmethod
    def from_pretrained(cls, folder, **settings):
        self = cls()
        self.config = json.loads((pathlib.Path(folder) / "config.json").read_text())
        assert settings["max_length"] == settings["doc_max_length"] and settings["pooling_mode"] == "mean"
        return self

    def encode(self, texts, **settings):
        if "crash" in texts:
            raise RuntimeError("no such text")
        return torch.tensor([[len(text) + 1.0, self.config["rope_theta"]] for text in texts])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_checkpoint(folder / "tiny", "llama")
    convert(folder / "tiny", folder / "converted")
    return folder / "converted"


@pytest.fixture
def reference(tmp_path, monkeypatch):
    """A package of the reference's shape, in this interpreter."""
    (tmp_path / "llm2vec.py").write_text(REFERENCE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(peers_llm2vec, "PYTHON", sys.executable)
    assert peers_llm2vec.WORKER.name == f"{embed_worker.__name__.rpartition('.')[2]}.py"


def test_vectors_of_another_process(folder, reference):
    peer = peers_llm2vec.Llm2Vec(folder, 64)
    theta = json.loads((folder / "config.json").read_text())["rope_parameters"]["rope_theta"]
    expected = np.array([[len(text) + 1.0, theta] for text in TEXTS], np.float32)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_array_equal(peer.embed(TEXTS), expected)
    np.testing.assert_array_equal(peer.embed(TEXTS[:1]), expected[:1])  # it waits for more
    with pytest.raises(ProcessEndedError, match=r"^RuntimeError: no such text$"):
        peer.embed(["crash"])
    np.testing.assert_array_equal(peer.embed(TEXTS[:1]), expected[:1])  # by another process
    peer.close()


WORKER = """
import json, sys, time
settings = json.loads(sys.argv[1])
for line in sys.stdin:
    texts = json.loads(line)
    if "sleep" in texts:
        time.sleep(60)
    if "die" in texts:
        print("last", file=sys.stderr, flush=True)
        __import__("os").kill(__import__("os").getpid(), 9)
    sys.stdout.write(json.dumps({"shape": [len(texts), 1], "peak_mib": settings["threads"]}) + "\\n")
    sys.stdout.flush()
    sys.stdout.buffer.write(b"\\0\\0\\0\\x40" * len(texts))
    sys.stdout.flush()
"""


def test_a_process_that_dies_or_takes_too_long(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    process = own_process.OwnProcess([sys.executable, tmp_path / "worker.py"], {}, longest_call_s=5)
    assert process.embed(["a", "b"]).tolist() == [[1.0], [1.0]] and process.peak_mib == torch.get_num_threads()
    with pytest.raises(ProcessEndedError, match="its process ended with status -9"):
        process.embed(["die"])
    process.longest_call_s = 0.5
    with pytest.raises(ProcessEndedError, match="1 texts took more than 0 s"):
        process.embed(["sleep"])
    process.longest_call_s = 5
    assert process.embed(["a"]).tolist() == [[1.0]]
    process.close()
    process.close()


def test_a_folder_for_older_readers(folder, tmp_path):
    peers_llm2vec.write_for_older(folder, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    assert all(isinstance(pair, str) for pair in tokenizer["model"]["merges"])
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "tokenizer_config.json").is_file() and not (tmp_path / "flashvec.json").exists()


def test_the_reference_itself_gives_the_same_vectors(tmp_path):
    if not peers_llm2vec.PYTHON.exists():
        pytest.skip("comes with make peers")
    tiny_checkpoint(tmp_path / "tiny", "llama", bos=False)  # whose state it would leave out of the mean
    folder = tmp_path / "converted"
    convert(tmp_path / "tiny", folder)
    peer = peers_llm2vec.Llm2Vec(folder, 64)
    texts = [text for text in TEXTS if text.strip()]
    enc = Encoder.load(folder, dtype="float32")
    np.testing.assert_allclose(peer.embed(texts), enc.embed(texts), atol=1e-5)
    peer.close()


def test_llama_cpp_gets_texts_by_length_and_looks_both_ways(monkeypatch):
    seen = {}

    class Llama:
        ctx = "context"

        def __init__(self, file, **settings):
            seen.update(settings, file=file)

        def n_embd(self):
            return 2

        def embed(self, texts, normalize):
            assert normalize and texts == sorted(texts, key=len, reverse=True)
            return [[len(text), 0.0] for text in texts]

    causal = {}
    module = types.SimpleNamespace(
        Llama=Llama, LLAMA_POOLING_TYPE_MEAN=1, llama_set_causal_attn=lambda context, on: causal.update({context: on})
    )
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    peer = peers_llama_cpp.LlamaCpp("x.gguf", 64)
    assert peer.embed(["a", "ccc", "bb"])[:, 0].tolist() == [1, 3, 2]
    assert (
        causal == {"context": False}
        and seen["pooling_type"] == 1
        and seen["n_ubatch"] == seen["n_batch"] == seen["n_ctx"] == 64
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peers_as_installed_give_the_models_vectors_in_the_order_of_the_texts(folder, dtype, monkeypatch):
    ways = {name: way for name, way in peers.ways(str(folder), dtype).items() if name.endswith("as installed")}
    ours = Encoder.load(folder, dtype="float32").embed(list(TEXTS))
    for name in ("hugging face float32, as installed", f"sentence-transformers {dtype}, as installed"):
        peer = ways[name].open()
        exact = 1e-5 if "float32" in name else 0.05
        np.testing.assert_allclose(peer.embed(TEXTS), ours, atol=exact)
        assert (np.abs(peer.embed(TEXTS) - ours).max() > 1e-5) == ("bfloat16" in name)
    padded = []
    peer = ways["hugging face float32, as installed"].open()
    monkeypatch.setattr(peers, "BATCH_SIZE", 2)
    monkeypatch.setattr(peers, "_pad", lambda rows, pad=peers._pad: padded.extend(map(len, rows)) or pad(rows))
    peer.embed(TEXTS)
    assert padded == [len(row) for row in peer._tokenise(TEXTS)]


def test_sorted_batches_hold_no_more_than_others_get(folder, monkeypatch):
    peer = peers.ways(str(folder), "float32")["hugging face float32, sorted"].open()
    sizes: list[int] = []
    monkeypatch.setattr(peers, "BUDGET", 64)
    monkeypatch.setattr(
        peers, "_pad", lambda rows, pad=peers._pad: sizes.append(len(rows) * max(map(len, rows))) or pad(rows)
    )
    texts = [*TEXTS, "a long text of many words " * 4]
    found = peer.embed(texts)
    assert max(sizes[1:]) <= 64 and len(sizes) > 2
    np.testing.assert_allclose(found, Encoder.load(folder, dtype="float32").embed(texts), atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"pooling": ("last",)},
        {"pooling": ("mean", "max")},
        {"prompts": {"query": "Query: "}, "default_prompt_name": "query"},
        {"layout": "llm2vec", "span": "template", "template": "Text: {text}"},
    ],
)
def test_a_model_of_other_means_is_told_apart_from_a_wrong_one(change, tmp_path):
    tiny_checkpoint(tmp_path / "tiny", "llama")
    encoder = Encoder.load(tmp_path / "tiny", dtype="float32")
    encoder.spec = replace(encoder.spec, **change)
    encoder.save(tmp_path / "saved")
    with pytest.raises(ValueError, match="the model has another pooling, a prompt or a dense layer"):
        HuggingFace(str(tmp_path / "saved"), torch.float32, 512)


def test_which_peers_a_model_has(folder, tmp_path):
    names = list(peers.ways(str(folder), "float32", tmp_path / "small.Q8_0.gguf"))
    assert names[-3:] == [
        "sentence-transformers float32, as installed",
        "llm2vec float32, as installed",
        "llama.cpp, Q8_0 weights",
    ]
    assert not any("llama.cpp" in name for name in peers.ways(str(folder), "float32"))
    theirs = [name for name in names if "sentence" in name or "hugging" in name]
    assert [name for name in theirs if "as installed" in name] == [
        "hugging face float32, as installed",
        "sentence-transformers float32, as installed",
    ]
    assert set(peers.ways(str(folder), "bfloat16")) >= {
        "hugging face float32, as installed",
        "sentence-transformers float32, as installed",
        "sentence-transformers bfloat16, as installed",
    }
    assert "llama.cpp, Q4_1 weights" in peers.ways("some.Q4_1.gguf", "float32")


def test_starting_ours(folder):
    seconds, peak = bench_start.measure_once(OURS, Subject(str(folder)), "float32")
    assert 0.1 < seconds < 120 and 50 < peak < 8000
    with pytest.raises(ProcessEndedError, match="KeyError: 'nobody'"):
        bench_start.measure_once("nobody", Subject(str(folder)), "float32")


def test_rows_of_starting(folder, monkeypatch):
    def once(name, subject, dtype):
        if name.startswith("sentence"):
            raise ProcessEndedError("it broke")
        return 2.0, 100

    monkeypatch.setattr(bench_start, "measure_once", once)
    monkeypatch.setattr(bench_start, "is_installed", lambda package: package != "openvino")
    rows = {row["variant"]: row for row in bench_start.measure(Subject(str(folder)), "float32", 2)}
    assert rows["flashvec"]["seconds"] == 2.0 and rows["flashvec"]["peak_mib"] == 100
    assert rows["sentence-transformers float32, as installed"]["failed"] == "it broke"
    assert rows["openvino float32, sorted"]["failed"] == NOT_INSTALLED
    assert len({row["run"] for row in rows.values()}) == 1


def test_a_start_of_ours_that_fails_is_one_line(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(bench_start, "append_rows", kept.extend)
    monkeypatch.setattr("sys.argv", ["x", "--model", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"bench_start: .*none: no such file or folder"):
        bench_start.main()
    assert not kept


def test_an_environment_without_the_reference_has_none(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    monkeypatch.setattr(peers_llm2vec, "PYTHON", tmp_path / "bin" / "python")
    assert not peers.is_installed(peers.LLM2VEC)
    (tmp_path / "lib" / "python3.11" / "site-packages" / "llm2vec").mkdir(parents=True)
    assert peers.is_installed(peers.LLM2VEC)


def test_what_does_not_install_leaves_the_other_peers():
    recipe = (ROOT / "Makefile").read_text().split("\npeers:")[1].split("\n\n")[0].splitlines()[1:]
    installs = [line for line in recipe if " install " in line]
    assert len(installs) >= 4 and all(line.startswith("\t-") for line in installs)
