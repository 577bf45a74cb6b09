"""`flashvec serve` passes on what it is told, and warns of a door left open."""

import asyncio

import httpx
import numpy as np
import pytest
import uvicorn
from tiny_models import tiny_adapter, tiny_checkpoint
from typer.testing import CliRunner

from flashvec import Encoder
from flashvec.runtime import cli_serve
from flashvec.runtime.cli import app


@pytest.fixture
def served(monkeypatch):
    """What uvicorn would have been given."""
    seen = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: seen.update(app=app, **options))
    return seen


@pytest.mark.filterwarnings("default")  # the command sets filters of its own
def test_options_reach_the_server(tmp_path, served, monkeypatch):
    tiny_adapter(tiny_checkpoint(tmp_path / "tiny", "llama"), tmp_path / "adapter")
    monkeypatch.setenv(cli_serve.KEY, "secret")
    options = ["--host", "0.0.0.0", "--port", "9", "--max-inputs", "3"]
    options += ["--adapter", str(tmp_path / "adapter"), "--layers", "1"]
    done = CliRunner().invoke(app, ["serve", str(tmp_path / "tiny"), *options])
    assert done.exit_code == 0, done.output
    assert served["host"] == "0.0.0.0" and served["port"] == 9 and "open to other machines" not in done.output
    transport = httpx.ASGITransport(served["app"])

    async def ask(headers, texts):
        async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=headers) as client:
            return await client.post("/v1/embeddings", json={"model": "tiny", "input": texts})

    key = {"Authorization": "Bearer secret"}
    assert asyncio.run(ask({}, ["a"])).status_code == 401
    assert asyncio.run(ask(key, ["a"] * 4)).status_code == 400
    answer = asyncio.run(ask(key, ["a"])).json()["data"][0]["embedding"]
    adapted = Encoder.load(tmp_path / "tiny", adapters=tmp_path / "adapter", layers=1)
    np.testing.assert_array_equal(np.float32(answer), adapted.embed("a"))


@pytest.mark.filterwarnings("default")
def test_an_open_door_is_named(tmp_path, served, monkeypatch):
    tiny_checkpoint(tmp_path / "tiny", "llama")
    monkeypatch.delenv(cli_serve.KEY, raising=False)
    done = CliRunner().invoke(app, ["serve", str(tmp_path / "tiny"), "--host", "0.0.0.0"])
    assert done.exit_code == 0 and f"no key is asked for: set {cli_serve.KEY}" in done.output
