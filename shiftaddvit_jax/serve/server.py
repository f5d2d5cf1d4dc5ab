"""The process: a socket, signals, and an end that answers what it holds."""

import ipaddress
import math
import signal
import socket

import uvicorn
from starlette.applications import Starlette


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, on which nothing is answered yet.

    Raises:
      ValueError: the address can't be had.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"port must be from 0 to {2**16 - 1}, got {port}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        hint = "choose another port, or 0 for any free one"
        raise ValueError(f"{host}, port {port}, can't be listened on: {error.strerror}; {hint}") from None
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether this machine alone reaches a socket."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def address(listener: socket.socket) -> str:
    """The address of a socket as a URL."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if listener.family == socket.AF_INET6 else f"http://{host}:{port}"


def run(app: Starlette, listener: socket.socket, seconds: float, said: str) -> None:
    """Answer requests until SIGTERM or Ctrl-C, then those that are held, for so many seconds at most.

    Args:
      app: what answers.
      listener: where.
      seconds: after the signal.
      said: printed once requests are answered.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(seconds),
    )
    # Uvicorn raises the signal again after its end, for who called: that is the end, not an error.
    before = {each: signal.signal(each, lambda *_: None) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        _Server(config, said).run([listener])
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


class _Server(uvicorn.Server):
    def __init__(self, config, said):
        super().__init__(config)
        self._said = said

    async def startup(self, sockets=None):
        await super().startup(sockets)
        print(self._said, flush=True)
