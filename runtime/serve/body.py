"""What a client may send, and how it is told of what it may not: OpenAI's shapes for both.

A body is untrusted: its size is counted while it arrives, nesting and types are checked before anything is embedded,
and no text of it stands in a message or a log.
"""

import asyncio
import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError


@dataclass(frozen=True)
class Limits:
    """What one request, and all that wait, may take.

    Args:
        inputs: texts of a request (OpenAI's own limit).
        body_bytes: of a request's JSON.
        requests: read or waiting at the same time; more are turned away with 429 before their bodies are read.
        waiting_tokens: of all requests that wait; more are turned away with 429, and so are those that would wait
            longer than `answer_s` at the speed of the last rounds.
        body_s: in which a body must have arrived.
        answer_s: in which its vectors must be there.
    """

    inputs: int = 2048
    body_bytes: int = 16 << 20
    requests: int = 256
    waiting_tokens: int = 1 << 20
    body_s: float = 30.0
    answer_s: float = 300.0


class Refused(Exception):
    """An answer other than 200, in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    def response(self) -> JSONResponse:
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        body = {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
        return JSONResponse(body, self.status, self.headers)


def _texts(given: Any) -> Any:
    """A text or some texts as they are. Pydantic's own check keeps an error for each wrong one of millions."""
    if isinstance(given, str) or (isinstance(given, list) and given and all(isinstance(text, str) for text in given)):
        return given
    raise ValueError("no text and no list of texts")


class Wanted(BaseModel):
    """The body of POST /v1/embeddings."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str
    input: Annotated[Any, PlainValidator(_texts)]
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[int, Field(gt=0)] | None = None

    @property
    def texts(self) -> list[str]:
        texts: list[str] = [self.input] if isinstance(self.input, str) else self.input
        return texts


async def read(request: Request, limits: Limits) -> Wanted:
    """A request's body, checked.

    Raises:
        Refused: 400, 408 or 413.
    """
    try:
        async with asyncio.timeout(limits.body_s):
            content = await _content(request, limits.body_bytes)
    except TimeoutError:
        raise Refused(408, f"the body did not arrive within {limits.body_s:g} s") from None
    try:
        found: Any = json.loads(content.decode())
    except UnicodeDecodeError:
        raise Refused(400, "the body is not UTF-8") from None
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON, or nested too deeply") from None
    try:
        wanted = Wanted.model_validate(found)
    except ValidationError as error:
        raise _refused(error, found) from None
    if len(wanted.texts) > limits.inputs:
        raise Refused(400, f"input holds {len(wanted.texts)} texts, at most {limits.inputs} fit", param="input")
    return wanted


async def _content(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "")
    parts, size = [], int(declared) if declared.isdecimal() and len(declared) < 20 else 0
    if size <= limit:
        size = 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > limit:
                break
    if size > limit:
        raise Refused(413, f"the body is larger than {limit} bytes: send fewer texts at once")
    return b"".join(parts)


def _is_token_number(given: Any) -> bool:
    """Or a list of them: clients that tokenise themselves send one for each text."""
    given = given[0] if isinstance(given, list) and given else given
    return isinstance(given, int) and not isinstance(given, bool)


def _refused(error: ValidationError, found: Any) -> Refused:
    """The first complaint, without what was sent."""
    first = error.errors(include_input=False, include_url=False)[0]
    param = str(first["loc"][0]) if first["loc"] else None
    if param == "input" and isinstance(found, dict):
        given = found.get("input")
        if given == []:
            message = "input is empty: send a text or a list of texts"
        elif isinstance(given, list) and _is_token_number(given[0]):
            message = "input holds token numbers: send texts (for LangChain: check_embedding_ctx_length=False)"
        else:
            message = "input must be a text or a list of texts"
        return Refused(400, message, param=param)
    return Refused(400, f"{param}: {first['msg']}" if param else "the body must be a JSON object", param=param)
