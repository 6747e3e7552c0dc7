"""The flags of the server."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import ClassVar

from itp.agent_settings import AgentSettings
from itp.config import flag
from itp.errors import UserError
from itp.games import ENVIRONMENTS
from itp.lm.server import ENGINE

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SHORTEST_TOKEN = 16


@dataclass
class ServeSettings(AgentSettings):
    """The server: where it listens, and its limits."""

    FIRST_FLAGS: ClassVar[tuple[str, ...]] = (
        "policy_model", "wm_model", "method", "env", "host",
        "port", "max_k", "fixed_k", "token_env", "concurrency")
    env: str = flag("alfworld", help="environment that the states are of", choices=tuple(ENVIRONMENTS))
    host: str = flag("127.0.0.1", help="address to listen at; others than this machine's own let in everybody who "
                                       "reaches it, so give --token_env, too")
    port: int = flag(30972, at_least=0, below=65536, help="port to listen at (0: any that is free)")
    token_env: str = flag("", help="environment variable that holds the token which requests must bear (empty: none)")
    max_body_bytes: int = flag(1 << 20, at_least=1, help="bytes of a request's body at most")
    body_s: float = flag(10.0, above=0, help="seconds that the body of a request may take to arrive")
    request_s: float = flag(120.0, above=0, help="seconds that a request may take, with its time in the queue")
    max_waiting: int = flag(256, at_least=1, help="decisions under way or in the queue at most; more are refused")
    shutdown_s: float = flag(30.0, at_least=0, help="seconds that requests under way have to finish after SIGTERM")
    concurrency: int = flag(64, at_least=1, help="decisions that are made at a time")
    policy_device: str = flag("", help="device of the policy")
    wm_device: str = flag("", help="device of the world model")
    max_k: int = flag(-1, help="K_max: steps to imagine at most; -1: what the K-head was trained with, else 2 "
                               "(ScienceWorld: 3)")

    @property
    def has_world_model(self) -> bool:
        return bool(self.wm_model) or self.wm_backend != "local"


def check_service(settings: ServeSettings) -> None:
    """Refuse flags that make no server, before any model is loaded.  Raises UserError."""
    if settings.wm_backend == ENGINE:
        raise UserError("--wm_backend engine imagines in the game itself, and a server has only its states; give "
                        "--wm_model")
    token_of(settings)


def token_of(settings: ServeSettings) -> str:
    """The token that requests must bear; empty for none.  Raises UserError, which doesn't quote it."""
    if not settings.token_env:
        return ""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", settings.token_env):
        raise UserError("--token_env takes the name of an environment variable; the token itself goes into it")
    token = os.environ.get(settings.token_env, "").strip()
    if len(token) < _SHORTEST_TOKEN or not (token.isascii() and token.isprintable()):
        raise UserError(f"--token_env {settings.token_env}: the variable must hold a token of at least "
                        f"{_SHORTEST_TOKEN} printable ASCII characters")
    return token
