"""The socket that an app listens on, and its end."""

import signal
import socket
import sys
from types import FrameType

try:
    import uvicorn
except ImportError as error:
    raise ImportError(f"the server needs {error.name}: pip install 'flashvec[serve]'") from None

from fastapi import FastAPI

from flashvec.runtime.console import printable

UNREAD_S = 60  # an answer that its client leaves unread for so long is dropped with the connection
BACKLOG = 2048


def listen(app: FastAPI, host: str, port: int, name: str, end_s: int) -> None:
    """Serve until SIGINT or SIGTERM; then answer what was accepted, for at most `end_s` seconds.

    A second SIGINT ends it at once.

    Raises:
        OSError: the address cannot be had; names it.
    """
    with bound_socket(host, port) as listening:
        at = listening.getsockname()
        print(
            f"{printable(name)} at http://{f'[{at[0]}]' if ':' in at[0] else at[0]}:{at[1]}/v1/embeddings",
            file=sys.stderr,
        )
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=end_s, server_header=False)
        _Server(config).run(sockets=[listening])


class _Server(uvicorn.Server):
    """Says why it is still there after Ctrl-C, and ends at the second one without a traceback of every request."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGINT and self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        super().handle_exit(sig, frame)
        if sig == signal.SIGINT and self.server_state.tasks:
            print("answering what was accepted; Ctrl-C again ends it at once", file=sys.stderr)


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
