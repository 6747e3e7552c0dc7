"""What the tests of OpenAILM share: a key that must not leak, a free port, a client that is closed."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from itp.lm.openai import OpenAILM

KEY_ENV, KEY = "ITP_TEST_KEY", "sk-this-must-never-be-seen"


def ask(lm: OpenAILM, call: Callable[[OpenAILM], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        try:
            return await call(lm)
        finally:
            await lm.close()

    return asyncio.run(run())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
