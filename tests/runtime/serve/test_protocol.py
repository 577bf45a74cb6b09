"""HTTP's own manners and OpenAI's smaller ones: methods, names of models, keys, nulls."""

import httpx
import openai
import pytest
from running_server import Server, refused
from tiny_models import tiny_checkpoint

from flashvec import Encoder
from flashvec.runtime.serve.app import create_app

KEY = "secret"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_checkpoint(folder, "llama")
    with Server(create_app(Encoder.load(folder, dtype="float32"), name="tiny", api_key=KEY)) as server:
        yield server


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30) as client:
        yield client


def test_other_paths_and_methods(server, client):
    answer = client.get("/v1/embeddings")
    assert refused(answer, 405) and answer.headers["Allow"] == "POST"
    refused(client.get("/v2"), 404)
    refused(client.post("/v1/embeddings/", json={"model": "tiny", "input": "x"}), 404)  # no redirect to a named host
    assert httpx.head(f"{server.url}/health").status_code == 200


def test_a_model_by_its_name(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY)
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="only tiny"):
        client.models.retrieve("owner/other")


def test_a_null_encoding_is_the_default_one(client):
    body = {"model": "tiny", "input": "x", "encoding_format": None}
    (item,) = client.post("/v1/embeddings", json=body).json()["data"]
    assert isinstance(item["embedding"], list)


def test_the_keys_scheme_is_named_and_read_in_any_case(server):
    def ask(key):
        return httpx.get(f"{server.url}/v1/models", headers={"Authorization": key})

    assert ask(f"bearer {KEY}").status_code == ask(f"BEARER {KEY}").status_code == 200
    for wrong in (KEY, f"Basic {KEY}", "Bearer", "Bearer other", ""):
        assert refused(ask(wrong), 401) and ask(wrong).headers["WWW-Authenticate"] == "Bearer"
