import asyncio
import copy
import pickle

import numpy as np
import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import TextNode
from tiny_models import TEXTS

from flashvec.runtime.integrations.llama_index import FlashvecEmbedding

NODES = [TextNode(text=text) for text in TEXTS]


@pytest.fixture(scope="module")
def embedding(prompted_folder):
    return FlashvecEmbedding(prompted_folder, load={"dtype": "float32"})


def test_vectors_with_the_models_prompts(embedding, prompted):
    np.testing.assert_array_equal(
        embedding.get_text_embedding_batch(list(TEXTS)), prompted.encode_document(list(TEXTS))
    )
    np.testing.assert_array_equal(embedding.get_text_embedding(TEXTS[0]), prompted.encode_document(TEXTS[0]))
    np.testing.assert_array_equal(embedding.get_query_embedding("who sleeps?"), prompted.encode_query("who sleeps?"))
    assert embedding.get_text_embedding_batch([]) == []


def test_asynchronous_forms(embedding):
    async def ask():
        return await asyncio.gather(
            embedding.aget_text_embedding_batch(list(TEXTS)),
            embedding.aget_text_embedding(TEXTS[0]),
            embedding.aget_query_embedding("who sleeps?"),
        )

    batch, text, query = asyncio.run(ask())
    assert batch == embedding.get_text_embedding_batch(list(TEXTS))
    assert text == batch[0] and query == embedding.get_query_embedding("who sleeps?")


def test_a_batch_is_one_call(embedding, monkeypatch):
    sizes = []
    embed = embedding.encoder.embed
    monkeypatch.setattr(
        embedding.encoder, "embed", lambda texts, **given: sizes.append(len(texts)) or embed(texts, **given)
    )
    embedding.get_text_embedding_batch(list(TEXTS) * 3)
    assert sizes == [3 * len(TEXTS)]


def test_an_index_finds_what_is_nearest(prompted):
    plain = FlashvecEmbedding(prompted, query_instruction="", document_instruction="", truncate_dim=16)
    retriever = VectorStoreIndex(NODES, embed_model=plain).as_retriever(similarity_top_k=1)
    (found,) = retriever.retrieve("The cat sleeps.")
    assert found.text == "The cat sleeps." and found.score == pytest.approx(1)
    (found,) = asyncio.run(retriever.aretrieve("summit"))
    assert found.text == "summit"


def test_a_step_of_a_pipeline_whose_cache_knows_it(embedding, prompted_folder):
    def run(step, cache=None):
        settings = {} if cache is None else {"cache": cache}
        pipeline = IngestionPipeline(transformations=[step], **settings)
        return [node.embedding for node in pipeline.run(nodes=copy.deepcopy(NODES))], pipeline.cache

    first, cache = run(embedding)
    np.testing.assert_array_equal(first, embedding.get_text_embedding_batch(list(TEXTS)))
    again = FlashvecEmbedding(prompted_folder, load={"dtype": "float32"})
    tokens = again.encoder.num_tokens_run
    assert run(again, cache)[0] == first and again.encoder.num_tokens_run == tokens
    other = FlashvecEmbedding(prompted_folder, load={"dtype": "float32"}, document_instruction="another: ")
    assert run(other, cache)[0] != first


def test_kept_as_a_name_and_settings(embedding, prompted):
    values = embedding.to_dict()
    again = FlashvecEmbedding.from_dict(values)
    assert again.get_query_embedding("x") == embedding.get_query_embedding("x")
    pickled = pickle.dumps(embedding)
    assert len(pickled) < 10_000
    assert pickle.loads(pickled).get_query_embedding("x") == embedding.get_query_embedding("x")
    assert embedding._sides is not None  # pickling left it as it was
    assert copy.deepcopy(embedding).encoder is embedding.encoder
    one, two = FlashvecEmbedding(prompted), FlashvecEmbedding(prompted)
    assert one.model_name != two.model_name
    with pytest.raises(TypeError, match="weights are not pickled"):
        pickle.dumps(one)
    with pytest.raises(TypeError, match="no name to load it by"):
        FlashvecEmbedding.from_dict(one.to_dict())


def test_fields_that_are_set_later_count(prompted_folder, prompted):
    embedding = FlashvecEmbedding(prompted_folder, load={"dtype": "float32"})
    whole, encoder = embedding.get_text_embedding("x"), embedding.encoder
    embedding.truncate_dim = 4
    assert len(embedding.get_text_embedding("x")) == 4 and embedding.encoder is encoder
    narrow = embedding.model_copy(update={"truncate_dim": 8, "document_instruction": "other: "})
    np.testing.assert_array_equal(
        narrow.get_text_embedding("x"), prompted.embed("x", instruction="other: ", truncate_dim=8)
    )
    assert len(embedding.get_text_embedding("x")) == 4 and narrow.encoder is encoder
    embedding.truncate_dim, embedding.load = None, {"dtype": "float32", "layers": 1}
    assert embedding.get_text_embedding("x") != whole and len(embedding.encoder.decoder.layers) == 1
    held = FlashvecEmbedding(prompted)
    held.normalize = False
    assert held.encoder is prompted
    np.testing.assert_array_equal(
        held.get_query_embedding("x"), prompted.embed("x", prompt_name="query", normalize=False)
    )


def test_what_is_refused(embedding, prompted_folder, prompted):
    with pytest.raises(TypeError, match="does not take colour"):
        FlashvecEmbedding(prompted_folder, colour="red")
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        FlashvecEmbedding(prompted_folder, load={"colour": "red"})
    with pytest.raises(TypeError, match="model is list"):
        FlashvecEmbedding(["a"])
    with pytest.raises(TypeError, match="the query is int"):
        embedding.get_query_embedding(3)
    with pytest.raises(TypeError, match=r"texts\[1\] is int"):
        embedding.get_text_embedding_batch(["a", 3])
