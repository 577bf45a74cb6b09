"""`flashvec serve`: OpenAI's /v1/embeddings over an `Encoder`.

Requests are embedded together (`batcher.py`). Needs the extra `serve`: pip install 'flashvec[serve]'.
"""

import asyncio
import base64
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

try:
    from fastapi import FastAPI, Request, Response
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from starlette.exceptions import HTTPException as StarletteHTTPException
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise ImportError(f"the server needs {error.name}: pip install 'flashvec[serve]'") from None

from flashvec.runtime import prepare
from flashvec.runtime.devices import SpreadEncoder
from flashvec.runtime.encoder import Encoder
from flashvec.runtime.serve.batcher import Batcher, Busy, Round
from flashvec.runtime.serve.body import Limits, Refused, Wanted, read
from flashvec.runtime.texts import as_texts

BATCH_TOKENS = 8192
BATCH_TOKENS_CPU = 2048  # one pack: more is no faster there, and a short request would wait the longer for its turn
COUNTERS = 2  # threads
COUNTED_CHARS = 1 << 16  # at a time, if they are several texts: then others have their turn
MAX_TOKEN_CHARS = 256  # a run of spaces or dashes is the longest token there is, of up to 128
GONE = 499  # the client hung up: nobody reads this

Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)


class Metrics:
    """Prometheus figures of one app."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("flashvec_requests", "Requests, by status", ["status"], registry=self.registry)
        self.seconds = Histogram("flashvec_request_seconds", "From request to answer", registry=self.registry)
        self.texts = Counter("flashvec_texts", "Texts embedded", registry=self.registry)
        self.tokens = Counter("flashvec_tokens", "Tokens embedded", registry=self.registry)
        self.round_requests = Histogram(
            "flashvec_round_requests", "Requests in a round", buckets=[2**i for i in range(11)], registry=self.registry
        )
        self.round_seconds = Histogram("flashvec_round_seconds", "Embedding a round", registry=self.registry)
        self.waiting = Gauge("flashvec_waiting_tokens", "Tokens of requests that wait", registry=self.registry)

    def on_round(self, done: Round) -> None:
        self.texts.inc(done.texts)
        self.tokens.inc(done.tokens)
        self.round_requests.observe(done.requests)
        self.round_seconds.observe(done.seconds)


def create_app(
    encoder: Encoder,
    *,
    name: str,
    api_key: str | None = None,
    limits: Limits | None = None,
    batch_tokens: int | None = None,
    instruction: str | None = None,
    truncate: bool = False,
) -> FastAPI:
    """An ASGI app.

    Args:
        encoder: the model.
        name: what clients call it.
        api_key: what they must send as a bearer token; None lets everybody in.
        limits: of requests.
        batch_tokens: embedded in one round; default 2,048 on a CPU, 8,192 on a GPU.
        instruction: written before each text, as in `Encoder.embed`.
        truncate: cut texts that are too long; otherwise they are refused.

    Raises:
        ValueError: an instruction that `Encoder.embed` refuses, or that leaves no room for a text.
    """
    bounds, metrics = limits or Limits(), Metrics()
    longest = encoder.spec.max_length
    if instruction is not None and int(_count(encoder, [""], instruction, longest)[0]) >= longest:
        raise ValueError(f"the instruction alone fills max_length, {longest} tokens: nothing would be left of a text")

    def embed(texts: list[str], dimensions: int | None) -> np.ndarray:
        vectors: np.ndarray = encoder.embed(
            texts, truncate_dim=dimensions, instruction=instruction, show_progress=False, output="numpy"
        )
        return vectors

    on_cpu = encoder.device.type == "cpu" and not isinstance(encoder, SpreadEncoder)
    batcher = Batcher(
        embed,
        batch_tokens=batch_tokens or (BATCH_TOKENS_CPU if on_cpu else BATCH_TOKENS),
        max_waiting_tokens=bounds.waiting_tokens,
        max_waiting_s=bounds.answer_s,
        on_round=metrics.on_round,
    )
    # A count under way cannot be stopped when its client leaves: it has threads of its own, which no answer waits for.
    counters = ThreadPoolExecutor(COUNTERS, "flashvec-count")
    card = {"id": name, "object": "model", "created": 0, "owned_by": "flashvec"}
    requests = 0  # that are read or wait for their answer
    metrics.waiting.set_function(lambda: batcher.waiting_tokens)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        counters.shutdown(wait=False, cancel_futures=True)
        await batcher.close()

    app = FastAPI(
        title="flashvec", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.state.batcher = batcher

    @app.exception_handler(Refused)
    async def _refused(request: Request, error: Refused) -> Response:
        return error.response()

    @app.exception_handler(StarletteHTTPException)
    async def _unknown(request: Request, error: StarletteHTTPException) -> Response:
        headers = dict(error.headers or {})  # of a method that a path does not have: those that it has
        return Refused(error.status_code, str(error.detail), headers=headers).response()

    def authorise(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.strip().encode("latin-1", "replace"), (api_key or "").encode())
        if api_key is not None and not (scheme.lower() == "bearer" and is_right):
            headers = {"WWW-Authenticate": "Bearer"}
            raise Refused(401, "wrong or missing API key", code="invalid_api_key", headers=headers)

    def check_name(model: str) -> None:
        if model != name:
            raise Refused(404, f"this server has no such model, only {name}", param="model", code="model_not_found")

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def _health() -> dict[str, str]:
        return {"status": "ok", "model": name}

    @app.get("/metrics")
    async def _metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def _models(request: Request) -> dict[str, Any]:
        authorise(request)
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}")
    async def _model(request: Request, model: str) -> dict[str, Any]:
        authorise(request)
        check_name(model)
        return card

    @app.post("/v1/embeddings")
    async def _embeddings(request: Request) -> Response:
        nonlocal requests
        started = time.perf_counter()
        requests += 1
        try:
            response = await answer(request)
        except ClientDisconnect:  # before its body was here
            response = Response(status_code=GONE)
        except Refused as error:
            response = error.response()
        except Busy as error:
            headers = {"Retry-After": str(error.retry_after_s)}
            response = Refused(429, str(error), code="rate_limit_exceeded", headers=headers).response()
        except Exception:
            logger.exception("a request failed")
            response = Refused(500, "the server could not embed this request; its log says why").response()
        finally:
            requests -= 1
        metrics.requests.labels(response.status_code).inc()
        metrics.seconds.observe(time.perf_counter() - started)
        return response

    async def answer(request: Request) -> Response:
        authorise(request)
        if requests > bounds.requests:  # before its body takes memory
            raise Busy(batcher.retry_after())
        wanted = await read(request, bounds)
        check_name(wanted.model)
        size, longest = encoder.spec.embedding_size, encoder.spec.max_length
        if wanted.dimensions is not None and wanted.dimensions > size:
            raise Refused(400, f"dimensions is {wanted.dimensions}, the model has {size}", param="dimensions")

        async def embedded() -> tuple[np.ndarray, int]:
            if not truncate:  # no vocabulary has such tokens: this one need not be asked
                _refuse_long(np.array([len(text) for text in wanted.texts]) > MAX_TOKEN_CHARS * longest, longest)
            counted = []
            for first, texts in _slices(wanted.texts):
                count = partial(_count, encoder, texts, instruction, longest + 1)
                counted.append(await asyncio.get_running_loop().run_in_executor(counters, count))
                if not truncate:
                    _refuse_long(counted[-1] > longest, longest, first)
            counts = np.minimum(np.concatenate(counted), longest)
            return await batcher.submit(wanted.texts, counts, wanted.dimensions), int(counts.sum())

        answered = await _answer(request, embedded(), bounds.answer_s)
        if answered is None:
            return Response(status_code=GONE)
        body = await asyncio.to_thread(_body, wanted, name, *answered)
        return Response(body, media_type="application/json")

    return app


def _slices(texts: list[str]) -> Iterator[tuple[int, list[str]]]:
    """Texts of some `COUNTED_CHARS` together, and the number of the first."""
    first, chars = 0, 0
    for i, text in enumerate(texts):
        if i > first and chars + len(text) > COUNTED_CHARS:
            yield first, texts[first:i]
            first, chars = i, 0
        chars += len(text)
    yield first, texts[first:]


def _refuse_long(is_too_long: np.ndarray, longest: int, first: int = 0) -> None:
    if is_too_long.any():
        row = first + int(np.argmax(is_too_long))
        message = f"input[{row}] has too many tokens, at most {longest} fit (the server was not told to cut texts)"
        raise Refused(400, message, param="input", code="context_length_exceeded")


def _count(encoder: Encoder, texts: list[str], instruction: str | None, limit: int) -> np.ndarray:
    """Tokens of each text as `Encoder.count_tokens` counts them, at most `limit`: a longer text is read no further."""
    rows, _ = as_texts(texts)
    instructions = encoder._instructions(instruction, None, len(rows))
    prepared = prepare.prepare(replace(encoder.spec, compat=None), rows, instructions, encoder.tokenizer)
    lengths: np.ndarray = encoder.tokenizer.encode(prepared.strings, limit).lengths
    return lengths


async def _answer(request: Request, answer: Awaitable[Answer], limit_s: float) -> Answer | None:
    """What is awaited, or None once the client has hung up; what it asked for is then not embedded.

    Raises:
        Refused: 503, it takes longer than `limit_s`.
    """

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    asked, gone = asyncio.ensure_future(answer), asyncio.ensure_future(hung_up())
    try:
        done, _ = await asyncio.wait({asked, gone}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if asked in done:
            return asked.result()
        if not done:
            raise Refused(503, f"no answer within {limit_s:g} s", code="timeout")
        return None
    finally:
        asked.cancel()
        gone.cancel()


def _body(wanted: Wanted, name: str, vectors: np.ndarray, tokens: int) -> bytes:
    """JSON, row by row: other threads, the one that answers /health among them, get their turn in between."""

    def shown(vector: np.ndarray) -> Any:
        if wanted.encoding_format == "base64":
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        return vector.tolist()

    compact = partial(json.dumps, allow_nan=False, separators=(",", ":"))
    rows = (compact({"object": "embedding", "index": i, "embedding": shown(v)}) for i, v in enumerate(vectors))
    usage = compact({"prompt_tokens": tokens, "total_tokens": tokens})
    return f'{{"object":"list","model":{compact(name)},"usage":{usage},"data":[{",".join(rows)}]}}'.encode()
