"""The socket that an app listens on, and its end."""

import socket
import sys

try:
    import uvicorn
except ImportError as error:
    raise ImportError(f"the server needs {error.name}: pip install 'flashvec[serve]'") from None

from fastapi import FastAPI

UNREAD_S = 60  # an answer that its client leaves unread for so long is dropped with the connection
BACKLOG = 2048


def listen(app: FastAPI, host: str, port: int, name: str, end_s: int) -> None:
    """Serve until SIGINT or SIGTERM; then answer what was accepted, for at most `end_s` seconds.

    Raises:
        OSError: the address cannot be had; names it.
    """
    with bound_socket(host, port) as listening:
        at = listening.getsockname()
        print(f"{name} at http://{f'[{at[0]}]' if ':' in at[0] else at[0]}:{at[1]}/v1/embeddings", file=sys.stderr)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=end_s, server_header=False)
        uvicorn.Server(config).run(sockets=[listening])


def bound_socket(host: str, port: int, unread_s: float = UNREAD_S) -> socket.socket:
    """A listening socket whose connections end where nobody reads what is sent for `unread_s` seconds.

    Without that limit (tcp(7), Linux alone) a client that asks and never reads holds its answer in memory for ever.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * unread_s))
    return listening
