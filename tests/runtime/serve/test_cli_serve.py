"""`flashvec serve` passes on what it is told, and warns of a door left open."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from tiny_models import tiny_adapter, tiny_checkpoint
from typer.testing import CliRunner

from flashvec import Encoder
from flashvec.runtime import cli_serve
from flashvec.runtime.cli import app
from flashvec.runtime.serve import listen


@pytest.fixture
def served(monkeypatch):
    """What would have been listened with."""
    seen = {}

    def listening(app, host, port, name, end_s):
        seen.update(app=app, host=host, port=port, end_s=end_s)

    monkeypatch.setattr(listen, "listen", listening)
    return seen


@pytest.mark.filterwarnings("default")  # the command sets filters of its own
def test_options_reach_the_server(tmp_path, served, monkeypatch):
    tiny_adapter(tiny_checkpoint(tmp_path / "tiny", "llama"), tmp_path / "adapter")
    monkeypatch.setenv(cli_serve.KEY, "secret")
    options = ["--host", "0.0.0.0", "--port", "9", "--max-inputs", "3", "--max-seconds", "7"]
    options += ["--adapter", str(tmp_path / "adapter"), "--layers", "1"]
    options += ["--attention", "causal", "--pooling", "mean, last", "--truncate-dim", "40"]
    done = CliRunner().invoke(app, ["serve", str(tmp_path / "tiny"), *options])
    assert done.exit_code == 0, done.output
    assert served["host"] == "0.0.0.0" and served["port"] == 9 and served["end_s"] == 7
    assert "open to other machines" not in done.output
    transport = httpx.ASGITransport(served["app"])

    async def ask(headers, texts):
        async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=headers) as client:
            return await client.post("/v1/embeddings", json={"model": "tiny", "input": texts})

    key = {"Authorization": "Bearer secret"}
    assert asyncio.run(ask({}, ["a"])).status_code == 401
    assert asyncio.run(ask(key, ["a"] * 4)).status_code == 400
    answer = asyncio.run(ask(key, ["a"])).json()["data"][0]["embedding"]
    own = {"layers": 1, "attention": "causal", "pooling": ["mean", "last"], "truncate_dim": 40}
    adapted = Encoder.load(tmp_path / "tiny", adapters=tmp_path / "adapter", **own)
    np.testing.assert_array_equal(np.float32(answer), adapted.embed("a"))


@pytest.mark.filterwarnings("default")
def test_an_open_door_is_named(tmp_path, served, monkeypatch):
    tiny_checkpoint(tmp_path / "tiny", "llama")
    monkeypatch.delenv(cli_serve.KEY, raising=False)
    done = CliRunner().invoke(app, ["serve", str(tmp_path / "tiny"), "--host", "0.0.0.0"])
    assert done.exit_code == 0 and f"no key is asked for: set {cli_serve.KEY}" in done.output


@pytest.fixture
def command(tmp_path):
    """The real command, and what it says where it listens."""
    tiny_checkpoint(tmp_path / "tiny", "llama")
    started = []

    def start(*options):
        words = [sys.executable, "-m", "flashvec.runtime.cli", "serve", str(tmp_path / "tiny"), "--port", "0", *options]
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=os.environ | {cli_serve.KEY: ""})
        started.append(process)
        listens = next(line for line in process.stderr if "/v1/embeddings" in line)
        url = listens.split(" at ")[1].split("/v1")[0]
        while True:  # it says so before it answers
            try:
                httpx.get(f"{url}/health")
                return process, url
            except httpx.TransportError:
                time.sleep(0.02)

    yield start
    for process in started:
        process.kill()
        process.communicate()


def asked(url, answers):
    """A thread that waits for the answer to a long request, whose first round is done."""

    def ask():
        try:
            answers.append(httpx.post(f"{url}/v1/embeddings", json=body, timeout=600))
        except httpx.TransportError as error:
            answers.append(error)

    body = {"model": "tiny", "input": ["some words to read " * 20] * 2000}
    thread = threading.Thread(target=ask)
    thread.start()
    with httpx.Client(timeout=600) as client:  # one: making them takes the processor that the server needs
        while "flashvec_round_seconds_count 0.0" in client.get(f"{url}/metrics").text:
            time.sleep(0.01)
    assert not answers, "the request was answered before anybody asked it to end"
    return thread


def test_sigterm_ends_it_once_what_it_accepted_is_answered(command):
    process, url = command("--truncate")
    answers = []
    ask = asked(url, answers)
    process.send_signal(signal.SIGTERM)
    ask.join()
    assert answers[0].status_code == 200 and len(answers[0].json()["data"]) == 2000
    process.wait(30)
    assert process.returncode in (0, -signal.SIGTERM)
    assert "Traceback" not in process.stderr.read()


def test_a_second_ctrl_c_ends_it_at_once(command):
    process, url = command("--truncate")
    answers = []
    ask = asked(url, answers)
    process.send_signal(signal.SIGINT)
    assert "Ctrl-C again ends it at once" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    process.wait(30)
    ask.join()
    assert isinstance(answers[0], httpx.TransportError)
    assert process.returncode == -signal.SIGINT and process.stderr.read() == ""


def test_an_address_that_is_taken_is_named(tmp_path):
    tiny_checkpoint(tmp_path / "tiny", "llama")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "flashvec.runtime.cli", "serve", str(tmp_path / "tiny"), "--port", port],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 1 and f"cannot listen on 127.0.0.1 port {port}: Address already in use" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_part_is_named_with_the_extra(tmp_path):
    tiny_checkpoint(tmp_path / "tiny", "llama")
    for package in ("uvicorn", "fastapi"):
        (tmp_path / f"{package}.py").write_text(f"raise ImportError('No module named {package}', name='{package}')")
        done = subprocess.run(
            [sys.executable, "-m", "flashvec.runtime.cli", "serve", str(tmp_path / "tiny")],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"},
        )
        (tmp_path / f"{package}.py").unlink()
        assert done.returncode == 1 and f"the server needs {package}: pip install 'flashvec[serve]'" in done.stderr


def test_a_device_that_is_not_here_is_one_line(tmp_path):
    tiny_checkpoint(tmp_path / "tiny", "llama")
    done = subprocess.run(
        [sys.executable, "-m", "flashvec.runtime.cli", "serve", str(tmp_path / "tiny"), "--device", "cuda:99"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("flashvec: device is 'cuda:99'")
