"""The server as its clients meet it: OpenAI's own client, 200 requests at once, and bodies that nobody should send."""

import asyncio
import base64
import json
import socket
import threading
import time

import httpx
import numpy as np
import openai
import pytest
from pydantic import ValidationError
from running_server import Server, refused
from tiny_models import TEXTS, tiny_checkpoint

from flashvec import Encoder
from flashvec.runtime.serve.app import create_app
from flashvec.runtime.serve.body import Limits, Wanted
from flashvec.runtime.serve.listen import bound_socket

KEY = "a key"


@pytest.fixture(scope="module")
def enc(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_checkpoint(folder, "llama")
    return Encoder.load(folder, dtype="float32", max_length=64)


@pytest.fixture(scope="module")
def server(enc):
    limits = Limits(inputs=50, body_bytes=100_000, body_s=1.0)
    with Server(create_app(enc, name="tiny", api_key=KEY, limits=limits)) as server:
        yield server


@pytest.fixture
def client(server):
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30) as client:
        yield client


# --- OpenAI's client ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_openai_client(server, enc, encoding):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY)
    texts = list(TEXTS[:4])
    answer = client.embeddings.create(model="tiny", input=texts, encoding_format=encoding)
    rows = [item.embedding for item in answer.data]
    if encoding == "base64":
        rows = [np.frombuffer(base64.b64decode(row), "<f4") if isinstance(row, str) else row for row in rows]
    assert np.array_equal(np.array(rows, dtype=np.float32), enc.embed(texts))
    assert [item.index for item in answer.data] == [0, 1, 2, 3] and answer.model == "tiny"
    assert answer.usage.prompt_tokens == enc.count_tokens(texts).sum() == answer.usage.total_tokens
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_dimensions_are_those_of_truncate_dim(server, enc):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY)
    answer = client.embeddings.create(model="tiny", input=TEXTS[1], dimensions=8)
    assert np.array_equal(np.float32(answer.data[0].embedding), enc.embed(TEXTS[1], truncate_dim=8))


def test_openai_client_gets_its_own_errors(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="another", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="API key"):
        client.embeddings.create(model="tiny", input="x")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    with pytest.raises(openai.NotFoundError, match="only tiny"):
        client.embeddings.create(model="gpt", input="x")


def figures(server, *names):
    """Values of metrics."""
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return [float(next(line for line in lines if line.startswith(f"{name} ")).split()[1]) for name in names]


@pytest.mark.parametrize("words", ["Instruct: find it Query: ", 'Say of "{text}" in one word:'])
def test_an_instruction_counts_as_the_text_does(enc, words):
    text = "word " * 4
    alone, wrapped = enc.count_tokens(text), enc.count_tokens(text, instruction=words)
    assert alone + 5 < wrapped < 64
    longer = "word " * 20
    assert enc.count_tokens(longer) <= 64 < enc.count_tokens(longer, instruction=words)
    with Server(create_app(enc, name="tiny", instruction=words)) as server:
        fits = httpx.post(f"{server.url}/v1/embeddings", json={"model": "tiny", "input": text})
        refused_body = httpx.post(f"{server.url}/v1/embeddings", json={"model": "tiny", "input": longer})
    assert np.array_equal(np.float32(fits.json()["data"][0]["embedding"]), enc.embed(text, instruction=words))
    assert fits.json()["usage"]["prompt_tokens"] == wrapped
    assert "at most 64 fit" in refused(refused_body, 400)


@pytest.mark.parametrize(
    ("words", "why"), [("{text} {text}", "more than once"), ("word " * 70, "nothing would be left")]
)
def test_an_instruction_that_serves_no_text_is_refused_at_once(enc, words, why):
    with pytest.raises(ValueError, match=why):
        create_app(enc, name="tiny", instruction=words)


# --- load ---------------------------------------------------------------------------------------------------


def test_two_hundred_at_once_are_neither_lost_nor_mixed(server, enc):
    texts = [[f"text {i} {j} " + TEXTS[i % 3] for j in range(i % 3 + 1)] for i in range(200)]

    async def all_of_them():
        limits = httpx.Limits(max_connections=200)
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=server.url, headers=headers, limits=limits, timeout=120) as client:
            asked = [client.post("/v1/embeddings", json={"model": "tiny", "input": own}) for own in texts]
            return await asyncio.gather(*asked)

    rounds = "flashvec_round_requests_sum", "flashvec_round_requests_count"
    before = figures(server, *rounds)
    answers = asyncio.run(all_of_them())
    assert [answer.status_code for answer in answers] == [200] * 200
    pieces, count = (now - then for now, then in zip(figures(server, *rounds), before, strict=True))
    assert pieces >= 200 and count < 100, "they were not embedded together"
    for own, answer in zip(texts, answers, strict=True):
        got = np.float32([item["embedding"] for item in answer.json()["data"]])
        assert np.array_equal(got, enc.embed(own))


def test_too_much_is_turned_away_with_a_time(enc):
    app = create_app(enc, name="tiny", limits=Limits(waiting_tokens=20), batch_tokens=20)
    text = "a long text " * 5

    async def all_of_them(url):
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            return await asyncio.gather(
                *(client.post("/v1/embeddings", json={"model": "tiny", "input": text}) for _ in range(40))
            )

    with Server(app) as server:
        answers = asyncio.run(all_of_them(server.url))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    turned_away = next(answer for answer in answers if answer.status_code == 429)
    assert int(turned_away.headers["Retry-After"]) >= 1 and "try again" in refused(turned_away, 429)


def test_an_answer_that_takes_too_long_is_given_up(enc, monkeypatch):
    embed = type(enc).embed

    def slow(*arguments, **settings):
        time.sleep(1.0)
        return embed(*arguments, **settings)

    monkeypatch.setattr(type(enc), "embed", slow)
    with Server(create_app(enc, name="tiny", limits=Limits(answer_s=0.2))) as server:
        answer = httpx.post(f"{server.url}/v1/embeddings", json={"model": "tiny", "input": "x"})
    assert "no answer within 0.2 s" in refused(answer, 503)


def test_too_many_at_once_are_turned_away_unread(enc):
    with Server(create_app(enc, name="tiny", limits=Limits(requests=2, body_s=5.0))) as server:
        head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n"
        held = [socket.create_connection(server.socket.getsockname()) for _ in range(2)]
        for connection in held:
            connection.sendall(head)  # the body is still to come
        while len(server.server.server_state.tasks) < 2:
            time.sleep(0.005)
        body = {"model": "tiny", "input": "x"}
        turned_away = httpx.post(f"{server.url}/v1/embeddings", json=body)
        assert "try again" in refused(turned_away, 429) and "Retry-After" in turned_away.headers
        for connection in held:
            connection.close()
        while server.server.server_state.tasks:
            time.sleep(0.005)
        assert httpx.post(f"{server.url}/v1/embeddings", json=body).status_code == 200


# --- hostile bodies -----------------------------------------------------------------------------------------

BODIES = {
    "not JSON": (b"{", 400, "not JSON"),
    "not UTF-8": (b'{"model": "tiny", "input": "\xff"}', 400, "not UTF-8"),
    "nested deeply": (b"[" * 50_000, 400, "nested too deeply"),
    "a list": (b"[]", 400, "JSON object"),
    "no model": (b'{"input": "x"}', 400, "model"),
    "no input": (b'{"model": "tiny"}', 400, "input"),
    "no texts": (b'{"model": "tiny", "input": []}', 400, "input is empty"),
    "a number": (b'{"model": "tiny", "input": 5}', 400, "input must be a text or a list of texts"),
    "token numbers": (b'{"model": "tiny", "input": [1, 2]}', 400, "token numbers"),
    "truths": (b'{"model": "tiny", "input": [true]}', 400, "a text or a list of texts"),
    "lists of texts": (b'{"model": "tiny", "input": [["a"]]}', 400, "a text or a list of texts"),
    "lists of token numbers": (b'{"model": "tiny", "input": [[1, 2]]}', 400, "token numbers"),
    "mixed": (b'{"model": "tiny", "input": ["x", null]}', 400, "a text or a list of texts"),
    "too many texts": (json.dumps({"model": "tiny", "input": ["x"] * 51}).encode(), 400, "51 texts, at most 50"),
    "too large": (b" " * 100_001, 413, "larger than 100000 bytes"),
    "too long a text": (json.dumps({"model": "tiny", "input": "word " * 500}).encode(), 400, "at most 64 fit"),
    "dimensions 0": (b'{"model": "tiny", "input": "x", "dimensions": 0}', 400, "dimensions"),
    "too many dimensions": (b'{"model": "tiny", "input": "x", "dimensions": 33}', 400, "the model has 32"),
    "dimensions as a word": (b'{"model": "tiny", "input": "x", "dimensions": "8"}', 400, "dimensions"),
    "dimensions as a truth": (b'{"model": "tiny", "input": "x", "dimensions": true}', 400, "dimensions"),
    "a number as model": (b'{"model": 3, "input": "x"}', 400, "model"),
    "another encoding": (b'{"model": "tiny", "input": "x", "encoding_format": "hex"}', 400, "encoding_format"),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_bad_body_is_refused_in_words(client, name):
    content, status, message = BODIES[name]
    assert message in refused(client.post("/v1/embeddings", content=content), status)


def test_a_list_of_numbers_is_one_error():
    """One for each would be gigabytes, of a body of some megabytes."""
    with pytest.raises(ValidationError) as error:
        Wanted.model_validate({"model": "tiny", "input": [1] * 1000})
    assert error.value.error_count() == 1


def test_no_message_repeats_what_was_sent(client):
    answer = client.post("/v1/embeddings", json={"model": "tiny", "input": {"secret words": 1}})
    assert "secret" not in refused(answer, 400)


@pytest.mark.filterwarnings("ignore::flashvec.runtime.texts.TextWarning")
def test_a_lone_surrogate_is_embedded_as_encoder_embed_does(client, enc):
    answer = client.post("/v1/embeddings", content=b'{"model": "tiny", "input": "a \\ud800 b"}')
    assert answer.status_code == 200
    assert np.array_equal(np.float32(answer.json()["data"][0]["embedding"]), enc.embed("a \ufffd b"))


def test_a_body_without_length_is_counted_while_it_arrives(client):
    answer = client.post("/v1/embeddings", content=(b" " * 10_000 for _ in range(1000)))
    assert "larger than" in refused(answer, 413)


def test_a_body_that_does_not_come_is_given_up(server):
    with socket.create_connection(server.socket.getsockname()) as slow:
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 50\r\n\r\n"
        slow.sendall(head.encode() + b"{")
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


def test_a_client_that_hangs_up_harms_nobody(server, client):
    body = json.dumps({"model": "tiny", "input": ["a b c"] * 50}).encode()
    for _ in range(5):
        with socket.create_connection(server.socket.getsockname()) as gone:
            head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            gone.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    assert client.post("/v1/embeddings", json={"model": "tiny", "input": "x"}).status_code == 200


def test_hanging_up_within_a_body_is_no_failure_of_the_server(enc, caplog):
    with Server(create_app(enc, name="tiny")) as server:
        with socket.create_connection(server.socket.getsockname()) as gone:
            gone.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
            while not server.server.server_state.tasks:
                time.sleep(0.005)
        while server.server.server_state.tasks:
            time.sleep(0.005)
        answered = httpx.get(f"{server.url}/metrics").text
    assert 'flashvec_requests_total{status="499"} 1.0' in answered and 'status="500"' not in answered
    assert not caplog.records


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux alone ends connections that are not read")
def test_a_client_that_never_reads_is_dropped(enc):
    listening = bound_socket("127.0.0.1", 0, unread_s=0.5)
    with Server(create_app(enc, name="tiny"), listening) as server:
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(listening.getsockname())
            body = json.dumps({"model": "tiny", "input": ["x"] * 2048}).encode()
            head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            deaf.sendall(head.encode() + body)
            while not figures(server, "flashvec_texts_total")[0] or server.server.server_state.tasks:
                time.sleep(0.01)
            assert server.server.server_state.connections, "the answer is on its way"
            until = time.monotonic() + 30
            while server.server.server_state.connections and time.monotonic() < until:
                time.sleep(0.05)
            assert not server.server.server_state.connections
        assert httpx.get(f"{server.url}/health").status_code == 200


# --- health, figures, ends ----------------------------------------------------------------------------------


def test_health_and_metrics_ask_for_no_key(server, client):
    client.post("/v1/embeddings", json={"model": "tiny", "input": ["x", "y"]})
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "model": "tiny"}
    figures = httpx.get(f"{server.url}/metrics").text
    assert 'flashvec_requests_total{status="200"}' in figures and "flashvec_round_seconds_count" in figures
    assert refused(httpx.get(f"{server.url}/v1/models"), 401)


@pytest.mark.filterwarnings("ignore::flashvec.runtime.texts.TruncationWarning")
def test_cut_where_told_to(enc):
    with Server(create_app(enc, name="tiny", truncate=True)) as server:
        answer = httpx.post(f"{server.url}/v1/embeddings", json={"model": "tiny", "input": "word " * 500})
    assert answer.status_code == 200 and answer.json()["usage"]["prompt_tokens"] == 64


def test_what_is_being_embedded_is_answered_before_it_stops(enc):
    with Server(create_app(enc, name="tiny")) as server:
        answers = []
        body = {"model": "tiny", "input": ["a b c d"] * 1000}
        ask = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60))
        )
        ask.start()
        while not server.server.server_state.tasks:
            time.sleep(0.005)
    ask.join()
    assert answers[0].status_code == 200 and len(answers[0].json()["data"]) == 1000
