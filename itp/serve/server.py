"""The server's process: its socket, its signals, its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator

import uvicorn

from itp.errors import UserError
from itp.serve.app import make_app
from itp.serve.planner import Planner
from itp.serve.requests import Requests
from itp.serve.settings import LOOPBACK, ServeSettings

log = logging.getLogger(__name__)

LAST_WORDS_S = 5
"""Seconds that answers of 503 have to leave, when the time for requests under way is over."""


class _Server(uvicorn.Server):
    """Ends with status 0 after SIGTERM; uvicorn's own raises the signal again when it has shut down."""

    def __init__(self, config: uvicorn.Config, requests: Requests) -> None:
        super().__init__(config)
        self._requests = requests

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _end(self) -> None:
        log.info("shutting down; %d decisions are under way", self._requests.under_way)
        self._requests.end()
        self.should_exit = True


async def serve(settings: ServeSettings) -> None:
    """Load the models and answer requests until SIGTERM or Ctrl-C.  Raises UserError."""
    with _listening(settings) as listening:
        planner, requests = await Planner.load(settings), Requests(settings)
        try:
            config = uvicorn.Config(make_app(settings, planner, requests), log_config=None, access_log=False,
                                    timeout_graceful_shutdown=int(settings.shutdown_s) + LAST_WORDS_S)
            host, port = listening.getsockname()[:2]
            log.info("serving %s at http://%s:%d", settings.method, f"[{host}]" if ":" in host else host, port)
            await _Server(config, requests).serve(sockets=[listening])
        finally:
            await planner.close()
    log.info("%d decisions were made", planner.decisions)


@contextlib.contextmanager
def _listening(settings: ServeSettings) -> Iterator[socket.socket]:
    """The socket, before the models are loaded: a port in use is said at once.  Raises UserError."""
    if settings.host not in LOOPBACK and not settings.token_env:
        log.warning("--host %s: whoever reaches this address may ask; --token_env admits only those with a token",
                    settings.host)
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        # Requests that come while the models are loaded wait in the socket's queue.
        made = socket.create_server((settings.host, settings.port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(f"--host {settings.host} --port {settings.port}: can't listen there "
                        f"({error.strerror or error}); choose another") from error
    with made:
        yield made
