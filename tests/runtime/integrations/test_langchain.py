import asyncio

import numpy as np
import pytest
from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore
from tiny_models import TEXTS

from flashvec.runtime.integrations.langchain import FlashvecEmbeddings


@pytest.fixture(scope="module")
def embeddings(prompted_folder):
    return FlashvecEmbeddings(prompted_folder, dtype="float32")


def test_vectors_with_the_models_prompts(embeddings, prompted):
    documents = embeddings.embed_documents(list(TEXTS))
    assert type(documents) is list and type(documents[0]) is list and type(documents[0][0]) is float
    np.testing.assert_array_equal(documents, prompted.encode_document(list(TEXTS)))
    np.testing.assert_array_equal(embeddings.embed_query("who sleeps?"), prompted.encode_query("who sleeps?"))
    assert embeddings.embed_documents([]) == []


def test_asynchronous_forms(embeddings):
    async def ask():
        return await asyncio.gather(embeddings.aembed_documents(list(TEXTS)), embeddings.aembed_query("who sleeps?"))

    documents, query = asyncio.run(ask())
    assert documents == embeddings.embed_documents(list(TEXTS)) and query == embeddings.embed_query("who sleeps?")


def test_a_vector_store_finds_what_is_nearest(prompted):
    same = FlashvecEmbeddings(prompted, query_instruction="", document_instruction="", truncate_dim=16)
    store = InMemoryVectorStore.from_documents([Document(text) for text in TEXTS], same)
    ((found, score),) = store.similarity_search_with_score("The cat sleeps.", k=1)
    assert found.page_content == "The cat sleeps." and score == pytest.approx(1)
    vectors = prompted.embed([*TEXTS, "prices"], truncate_dim=16)
    expected = TEXTS[int(np.argmax(vectors[:-1] @ vectors[-1]))]
    retriever = store.as_retriever(search_kwargs={"k": 1})
    assert [d.page_content for d in asyncio.run(retriever.ainvoke("prices"))] == [expected]


def test_what_is_refused(embeddings, prompted_folder, prompted):
    with pytest.raises(TypeError, match="the documents are one str"):
        embeddings.embed_documents("a text")
    with pytest.raises(TypeError, match=r"texts\[0\] is int"):
        embeddings.embed_documents([3])
    with pytest.raises(TypeError, match="the query is list: give one str"):
        embeddings.embed_query(["a"])
    with pytest.raises(TypeError, match="unexpected keyword argument 'model_kwargs'"):
        FlashvecEmbeddings(prompted_folder, model_kwargs={})
    with pytest.raises(TypeError, match="loaded already: device"):
        FlashvecEmbeddings(prompted, device="cpu")
    with pytest.raises(ValueError, match="truncate_dim is 1000"):
        FlashvecEmbeddings(prompted, truncate_dim=1000)
