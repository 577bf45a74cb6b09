"""The same class, the same results, and two libraries that take nothing else."""

import inspect

import numpy as np
import pytest
import torch
from keybert import KeyBERT
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.util import semantic_search
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import CountVectorizer
from tiny_models import TEXTS, tiny_checkpoint

from flashvec import Encoder
from flashvec.runtime.integrations.sentence_transformers import FlashvecSentenceTransformer

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def ours(prompted_folder):
    return FlashvecSentenceTransformer(prompted_folder, dtype="float32")


@pytest.fixture(scope="module")
def theirs(prompted_folder):
    return SentenceTransformer(str(prompted_folder), device="cpu")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch_size": 3, "show_progress_bar": False, "device": "cpu"},
        {"prompt": "Find: "},
        {"prompt_name": "query", "normalize_embeddings": True},
        {"truncate_dim": 8},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"output_value": "token_embeddings"},
        {"precision": "binary"},
    ],
    ids=str,
)
@pytest.mark.parametrize("texts", [list(TEXTS), TEXTS[0]], ids=["list", "str"])
def test_encode(ours, theirs, texts, settings):
    a, b = ours.encode(texts, **settings), theirs.encode(texts, **settings)
    assert type(a) is type(b)
    for x, y in zip(a, b, strict=True) if isinstance(a, list) else [(a, b)]:
        if "output_value" in settings:
            y = y[-len(x) :]  # of a batch that is padded on the left they give the padding too
        assert x.shape == y.shape and x.dtype == y.dtype
        if "precision" in settings:
            assert (x != y).mean() < 0.1  # a sign flips where a value is next to zero
        else:
            np.testing.assert_allclose(x, y, atol=TOLERANCE * max(1.0, float(abs(y).max())))


def test_queries_and_documents(ours, theirs):
    for name in ("encode_query", "encode_document"):
        a, b = getattr(ours, name)(list(TEXTS)), getattr(theirs, name)(list(TEXTS))
        np.testing.assert_allclose(a, b, atol=TOLERANCE)
    assert np.abs(ours.encode_query(list(TEXTS)) - ours.encode_document(list(TEXTS))).max() > 0.01


def test_texts_by_their_older_name(ours, theirs):
    for name in ("encode", "encode_query"):
        a, b = (getattr(model, name)(sentences=list(TEXTS)) for model in (ours, theirs))
        np.testing.assert_allclose(a, b, atol=TOLERANCE)


def test_parameters_are_that_classs():
    theirs = inspect.signature(SentenceTransformer.encode).parameters
    ours = inspect.signature(FlashvecSentenceTransformer.encode).parameters
    assert list(ours)[:-1] == list(theirs)[:-1]


def test_facts(ours, theirs):
    assert isinstance(ours, SentenceTransformer)
    for name in ("max_seq_length", "device", "dtype", "prompts", "default_prompt_name", "similarity_fn_name"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.get_embedding_dimension() == theirs.get_embedding_dimension() == 32
    assert ours.tokenizer(list(TEXTS))["input_ids"] == theirs.tokenizer(list(TEXTS))["input_ids"]
    assert ours.tokenize(["a text"])["input_ids"].tolist() == theirs.tokenize(["a text"])["input_ids"].tolist()
    a, b = ours.encode(TEXTS[:2]), ours.encode(TEXTS[2:4])
    torch.testing.assert_close(ours.similarity(a, b), theirs.similarity(a, b))
    torch.testing.assert_close(ours.similarity_pairwise(a, b), theirs.similarity_pairwise(a, b))
    with ours.truncate_embeddings(8):
        assert ours.encode(["a"]).shape == (1, 8) and ours.get_embedding_dimension() == 8


def test_length_can_be_set(prompted_folder, theirs):
    short, text = FlashvecSentenceTransformer(prompted_folder, dtype="float32"), TEXTS[3]
    short.max_seq_length = 5
    with pytest.warns(UserWarning, match="max_length=5"):
        cut = short.encode(text)
    whole, theirs.max_seq_length = theirs.max_seq_length, 5
    try:
        np.testing.assert_allclose(cut, theirs.encode(text), atol=TOLERANCE)
    finally:
        theirs.max_seq_length = whole


def test_saved_folder_is_that_librarys(ours, tmp_path):
    ours.save_pretrained(str(tmp_path / "saved"))
    np.testing.assert_allclose(
        SentenceTransformer(str(tmp_path / "saved"), device="cpu").encode(TEXTS[0]),
        ours.encode(TEXTS[0]),
        atol=TOLERANCE,
    )


def test_what_was_set_is_saved_and_nothing_else_is_lost(prompted_folder, tmp_path):
    model = FlashvecSentenceTransformer(prompted_folder, dtype="float32")
    model.max_seq_length, model.truncate_dim = 12, 8
    model.prompts["query"], model.default_prompt_name = "Find: ", "query"
    model.similarity_fn_name = "dot"
    for name in (".git/HEAD", "README.md", "data/texts.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    for _ in range(2):  # the second time over the first
        model.save(str(tmp_path))
    assert {(tmp_path / name).read_text() for name in (".git/HEAD", "README.md", "data/texts.csv")} == {"mine"}

    again = SentenceTransformer(str(tmp_path), device="cpu")
    for name in ("max_seq_length", "truncate_dim", "prompts", "default_prompt_name", "similarity_fn_name"):
        assert getattr(again, name) == getattr(model, name), name
    with pytest.warns(UserWarning, match="max_length=12"):
        vectors = model.encode(list(TEXTS))
        np.testing.assert_array_equal(FlashvecSentenceTransformer(tmp_path, dtype="float32").encode(TEXTS), vectors)
    np.testing.assert_allclose(again.encode(list(TEXTS)), vectors, atol=TOLERANCE)
    assert vectors.shape == (len(TEXTS), 8) and model.encoder.spec.truncate_dim is None


def test_a_model_without_prompts_is_saved_without(tmp_path):
    """That class gives every model empty ones for queries and documents."""
    tiny_checkpoint(tmp_path / "model", "llama")
    model = FlashvecSentenceTransformer(tmp_path / "model", dtype="float32")
    model.save(str(tmp_path / "saved"))
    assert Encoder.load(tmp_path / "saved").spec == model.encoder.spec
    assert (tmp_path / "saved" / "modules.json").is_file()


def test_settings_that_do_not_fit_are_not_saved(prompted_folder, tmp_path):
    for name, value, message in (
        ("truncate_dim", 33, "truncate_dim is 33"),
        ("max_seq_length", 1000, "max_length is 1000, the model has 512"),
        ("default_prompt_name", "title", "default_prompt_name is 'title'; this model's prompts are: query, document"),
    ):
        model = FlashvecSentenceTransformer(prompted_folder, dtype="float32")
        setattr(model, name, value)
        with pytest.raises(ValueError, match=message):
            model.save(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()


def test_its_functions_take_it(ours):
    corpus = ours.encode(list(TEXTS), convert_to_tensor=True)
    hits = semantic_search(ours.encode("The cat sleeps.", convert_to_tensor=True), corpus, top_k=1)
    assert hits[0][0]["corpus_id"] == TEXTS.index("The cat sleeps.")


def test_its_evaluators_take_it(ours, theirs):
    texts = list(TEXTS)
    scores = [i / len(texts) for i in range(len(texts))]
    evaluate = EmbeddingSimilarityEvaluator(texts, texts[::-1], scores)  # asks for the precision None
    assert evaluate(ours) == pytest.approx(evaluate(theirs))


def test_keybert(ours, theirs):
    """The library's own choice of keywords, by our vectors and by sentence-transformers'."""
    documents = [TEXTS[3], "A decoder reads from left to right; an encoder reads everything at once."]
    ours_found = KeyBERT(ours).extract_keywords(documents, keyphrase_ngram_range=(1, 2), top_n=4, use_mmr=True)
    theirs_found = KeyBERT(theirs).extract_keywords(documents, keyphrase_ngram_range=(1, 2), top_n=4, use_mmr=True)
    assert [[word for word, _ in found] for found in ours_found] == [[w for w, _ in found] for found in theirs_found]
    assert all(len(found) == 4 for found in ours_found)


def test_bertopic(ours, theirs):
    bertopic = pytest.importorskip(
        "bertopic", reason="installed without its dependencies: pip install --no-deps bertopic"
    )
    snow = [f"The summit number {i} was covered in snow and nobody had climbed it." for i in range(10)]
    bread = [f"Mix {i} cups of flour with water, then wait for the dough to rise." for i in range(10)]

    def topics(model):
        topic_model = bertopic.BERTopic(
            embedding_model=model,
            umap_model=PCA(4, random_state=0),
            hdbscan_model=KMeans(2, n_init=3, random_state=0),
            vectorizer_model=CountVectorizer(stop_words="english"),
        )
        found, _ = topic_model.fit_transform(snow + bread)
        return found, topic_model

    found, topic_model = topics(ours)
    assert len(set(found[:10])) == len(set(found[10:])) == 1 and found[0] != found[10]
    assert "flour" in {word for word, _ in topic_model.get_topic(found[10])}
    assert topic_model.find_topics(bread[3], top_n=1)[0] == [found[10]]
    assert topics(theirs)[0] == found


def test_what_is_refused(ours, prompted_folder):
    with pytest.raises(TypeError, match=r"texts\[0\] is int"):
        ours.encode([3])
    with pytest.raises(ValueError, match="prompt_name is 'title'; this model's prompts are: query, document"):
        ours.encode(["a"], prompt_name="title")
    with pytest.raises(ValueError, match="output_value is None"):
        ours.encode(["a"], output_value=None)
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        ours.encode(["a"], colour="red")
    with pytest.raises(ValueError, match="no pools of processes"):
        ours.encode(["a"], pool={})
    with pytest.raises(ValueError, match=r"is torch\.float32 on cpu"):
        ours.half()
    assert ours.to("cpu").float().eval() is ours
    with pytest.raises(ValueError, match="train with `flashvec train`"):
        ours(ours.tokenize(["a"]))
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        FlashvecSentenceTransformer(prompted_folder, colour="red")
    assert ours.encode([]).shape == (0, 32)
