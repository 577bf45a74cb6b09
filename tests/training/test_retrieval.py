import json
from dataclasses import replace

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from collection_samples import write_smart
from huggingface_hub.errors import LocalEntryNotFoundError
from scipy.spatial.distance import cosine
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sklearn.metrics import ndcg_score
from tiny_models import TEXTS, tiny_tokenizer
from training_runs import tiny_base
from typer.testing import CliRunner

from flashvec import Encoder
from flashvec.runtime.cli import app
from flashvec.runtime.whitening import POWER
from flashvec.training.collection_files import Collection, read_collection
from flashvec.training.hf_encoder import HfEncoder, _settings
from flashvec.training.retrieval import ndcg, ranking_score, retrieval_score, search_prompts

MODULES = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))


def write_bert(folder):
    bert = transformers.BertConfig(
        vocab_size=420, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    transformers.BertModel(bert).save_pretrained(folder)
    tiny_tokenizer(folder)


def test_ndcg_is_scikit_learns():
    rng = np.random.default_rng(0)
    for _ in range(20):
        gains, scores = rng.integers(0, 4, 30).astype(float), rng.normal(size=30)
        gains[0] = 1.0
        ranked = gains[np.argsort(-scores)]
        assert ndcg(ranked[:10], gains, 10) == pytest.approx(ndcg_score([gains], [scores], k=10))


def test_score_of_a_known_ranking(tmp_path):
    collection = read_collection(write_smart(tmp_path))
    table = {
        "The river flows to the sea.": [1, 0],
        "Stones lie still.": [0, 1],
        "What flows?": [2, 1],
        "What lies?": [3, 1],
    }
    embed = lambda texts: np.array([table[t] for t in texts], float)  # noqa: E731
    found = retrieval_score(embed, embed, collection)
    assert found["ndcg@10"] == pytest.approx(100 * (1 + 1 / np.log2(3)) / 2, abs=1e-3)
    assert (found["recall@100"], found["queries"], found["documents"]) == (100, 2, 2)


def test_whitening_is_that_of_an_encoder_fitted_to_the_documents(tmp_path):
    tiny_base(tmp_path / "base")
    documents = {f"d{i}": f"{text} {i}" for i, text in enumerate(TEXTS * 3)}
    queries = {f"q{i}": text for i, text in enumerate(TEXTS)}
    relevance = {f"q{i}": {f"d{(5 * i + 2) % len(documents)}": 1.0} for i in range(len(queries))}
    collection = Collection(documents, queries, relevance)
    plain, fitted = (Encoder.load(tmp_path / "base", dtype="float32") for _ in range(2))
    fitted.whiten(list(documents.values()))
    whitened = retrieval_score(
        *[lambda texts: plain.embed(texts, normalize=False)] * 2, collection, 10, whitening=POWER
    )
    assert whitened == retrieval_score(fitted.embed, fitted.embed, collection, 10)
    assert whitened != retrieval_score(plain.embed, plain.embed, collection, 10)


def test_a_document_that_is_the_query_itself_is_left_out(tmp_path):
    """As BEIR's measures do it; two that only share a name are two."""
    documents = {"q1": "a river", "d2": "a stream", "q2": "stones"}
    collection = Collection(documents, {"q1": "a river", "q2": "a pebble"}, {"q1": {"d2": 1.0}, "q2": {"q2": 1.0}})
    found = ranking_score([np.array([1.0, 0.9, 0.1]), np.array([0.1, 0.2, 0.9])], collection)
    assert found["ndcg@10"] == 100 and found["recall@100"] == 100


def test_command_runs_ours_and_hugging_faces_encoders(tmp_path):
    write_smart(tmp_path)
    tiny_base(tmp_path / "base")
    write_bert(tmp_path / "bert")
    for model, more in (("base", ["--whiten", "0.25"]), ("base", []), ("bert", ["--backend", "hf"])):
        command = ["evaluate", "retrieval", str(tmp_path / model), str(tmp_path / "x.ALL"), "--json", *more]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        assert 0 < json.loads(result.stdout)["ndcg@10"] <= 100
    result = CliRunner().invoke(app, ["evaluate", "retrieval", "x", str(tmp_path / "x.ALL"), "--backend", "onnx"])
    assert "known are flashvec and hf" in str(result.exception)


@pytest.mark.parametrize("mode", ["cls", "mean"])
def test_a_sentence_transformers_folder_is_run_as_it_says(mode, tmp_path):
    write_bert(tmp_path / "bert")
    modules = [Transformer(str(tmp_path / "bert"), max_seq_length=7), Pooling(16, mode)]
    library = SentenceTransformer(modules=modules, device="cpu")
    library.save(str(tmp_path / "saved"))
    encoder = HfEncoder(str(tmp_path / "saved"))
    texts = ["a river", "stones " * 9, "x"]
    want = library.encode([f"say: {text}!" for text in texts])
    np.testing.assert_allclose(encoder.embed(texts, "say: {text}!"), want, atol=1e-5)
    assert np.abs(encoder.embed(texts) - want).max() > 1e-3


@pytest.mark.parametrize(
    ("file", "values", "named"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "max"}, "pooling is 'max'; backend hf knows mean and cls"),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "cls.mean"),
        ("modules.json", [{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}], "Dense in '2_Dense'"),
        ("modules.json", [{"type": "a.Transformer", "path": "../up"}], "Transformer in '../up'"),
        ("adapter_config.json", {"peft_type": "LORA"}, "is an adapter, which backend hf does not merge: leave --back"),
        ("sentence_bert_config.json", {"max_seq_length": 0}, "max_seq_length is 0; expected a positive"),
    ],
)
def test_a_folder_that_is_more_than_mean_or_cls_is_refused(file, values, named, tmp_path):
    write_bert(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    modules = [{"type": f"sentence_transformers.models.{x}", "path": y} for x, y in MODULES]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / file).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=named):
        HfEncoder(str(tmp_path))


def test_hugging_face_vectors_do_not_depend_on_padding(tmp_path):
    tiny_base(tmp_path / "base")
    encoder = HfEncoder(str(tmp_path / "base"))
    texts = ["a river", "stones " * 9, "x"]
    for text, vector in zip(texts, encoder.embed(texts), strict=True):
        assert cosine(vector, encoder.embed([text])[0]) < 1e-5


def test_a_hub_that_is_not_reached_says_nothing_of_pooling(monkeypatch):
    """Offline, a model whose modules.json was never fetched must not be pooled by guess."""

    def offline(model, name):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(ValueError, match=r"owner/model: modules\.json, which may state its pooling, is not here"):
        HfEncoder("owner/model")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda model, name: huggingface_hub._CACHED_NO_EXIST)
    assert _settings("owner/model") == ("", "mean", None)


def test_queries_and_documents_get_their_prompts():
    assert search_prompts({"query", "passage", "other"}, None) == ({"prompt_name": "query"}, {"prompt_name": "passage"})
    assert search_prompts({"query"}, "Find: ") == ({"instruction": "Find: "}, {"instruction": ""})
    assert search_prompts((), None) == ({"instruction": ""}, {"instruction": ""})


def test_the_command_searches_as_the_model_says(tmp_path):
    path = write_smart(tmp_path)
    tiny_base(tmp_path / "base")
    encoder = Encoder.load(tmp_path / "base", dtype="float32")
    encoder.spec = replace(encoder.spec, prompts={"query": "a stone is: ", "document": "cloud, willow: "})
    encoder.save(tmp_path / "own")
    collection = read_collection(path)
    score = retrieval_score(encoder.encode_query, encoder.encode_document, collection)
    result = CliRunner().invoke(app, ["evaluate", "retrieval", str(tmp_path / "own"), str(path), "--json"])
    assert json.loads(result.stdout)["ndcg@10"] == pytest.approx(score["ndcg@10"], abs=1e-3)
