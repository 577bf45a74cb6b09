"""`flashvec serve` on the command line."""

import os
import warnings
from typing import Annotated

import typer

from flashvec.runtime.cli_corpus import Adapters, Attention, Layers, Pooling, pooling_modes

LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEY = "FLASHVEC_API_KEY"


def serve(
    model: Annotated[str, typer.Argument(help="Model folder, GGUF file or hub id.", show_default=False)],
    adapter: Adapters = None,
    layers: Layers = None,
    attention: Attention = None,
    pooling: Pooling = None,
    truncate_dim: Annotated[int | None, typer.Option(help="Keep the leading dimensions.", min=1)] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; by default this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model; default its folder's name.")] = None,
    instruction: Annotated[str | None, typer.Option(help="Written before each text, or around it with {text}.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens per text.", min=1)] = None,
    truncate: Annotated[bool, typer.Option(help="Cut texts that are too long instead of refusing them.")] = False,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens embedded together; default 2,048 on a CPU, 8,192 on a GPU.", min=1)
    ] = None,
    max_inputs: Annotated[int, typer.Option(help="Texts of one request.", min=1)] = 2048,
    max_body_mb: Annotated[int, typer.Option(help="Megabytes of one request.", min=1)] = 16,
    max_requests: Annotated[int, typer.Option(help="Requests at the same time; more get 429.", min=1)] = 256,
    max_waiting_tokens: Annotated[int, typer.Option(help="Beyond these, requests get 429.", min=1)] = 1 << 20,
    max_seconds: Annotated[int, typer.Option(help="For an answer, and for those still owed at the end.", min=1)] = 300,
) -> None:
    """Serve vectors over HTTP as OpenAI's /v1/embeddings does; also /health and /metrics.

    An API key is taken from the environment variable FLASHVEC_API_KEY, where other users of the machine do not see it.

    Example: `flashvec serve ./smollm2-encoder --port 8000`
    """
    from flashvec.runtime.encoder import Encoder
    from flashvec.runtime.serve.app import create_app  # names what is to be installed
    from flashvec.runtime.serve.body import Limits
    from flashvec.runtime.serve.listen import listen
    from flashvec.runtime.texts import TextWarning, TruncationWarning

    key = os.environ.get(KEY) or None
    if key is None and host not in LOOPBACK:
        typer.echo(f"note: {host} is open to other machines and no key is asked for: set {KEY}", err=True)
    for category in (TruncationWarning, TextWarning):  # of texts that clients send, one line each would fill the log
        warnings.simplefilter("ignore", category)
    encoder = Encoder.load(
        model,
        adapters=adapter or (),
        layers=layers,
        attention=attention,  # type: ignore[arg-type]
        pooling=pooling_modes(pooling),
        truncate_dim=truncate_dim,
        dtype=dtype,
        device=device,
        max_length=max_length,
    )
    called = name or os.path.basename(os.path.normpath(model))
    limits = Limits(
        inputs=max_inputs,
        body_bytes=max_body_mb << 20,
        requests=max_requests,
        waiting_tokens=max_waiting_tokens,
        answer_s=max_seconds,
    )
    app = create_app(
        encoder,
        name=called,
        api_key=key,
        limits=limits,
        batch_tokens=batch_tokens,
        instruction=instruction,
        truncate=truncate,
    )
    listen(app, host, port, called, max_seconds)
