"""What stands before the application: who may ask, and how large a body is and how long it takes to arrive."""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from itp.serve.settings import ServeSettings, token_of

OPEN = ("/health",)
"""Paths that need no token."""


class Guard:
    """ASGI middleware."""

    def __init__(self, app: Any, settings: ServeSettings) -> None:
        self.app, self.settings = app, settings
        self._expected = f"Bearer {token}".encode() if (token := token_of(settings)) else b""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b"")
        if self._expected and scope["path"] not in OPEN and not hmac.compare_digest(given, self._expected):
            refused = JSONResponse({"detail": "a bearer token is needed, and this is not it"}, 401,
                                   {"WWW-Authenticate": "Bearer"})
            await refused(scope, receive, send)
            return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.settings.max_body_bytes:
            await JSONResponse({"detail": self._too_large}, 413)(scope, receive, send)
            return
        await self.app(scope, self._limited(receive), send)

    @property
    def _too_large(self) -> str:
        return f"the body has more than {self.settings.max_body_bytes} bytes (--max_body_bytes)"

    def _limited(self, receive: Any) -> Any:
        """``receive`` for a body within the limits.  What comes after the body isn't waited for with a limit."""
        size, whole = 0, False
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.settings.body_s

        async def limited() -> Any:
            nonlocal size, whole
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - loop.time()))
            except asyncio.TimeoutError as error:
                raise HTTPException(408, f"the body didn't arrive within {self.settings.body_s:g} s") from error
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > self.settings.max_body_bytes:
                raise HTTPException(413, self._too_large)
            return message

        return limited
