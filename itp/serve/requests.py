"""Requests under way: their number and time are limited, they end with their clients, and they are finished at the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from fastapi import HTTPException, Request

from itp.serve.settings import ServeSettings

GONE = 499
"""The status of a request whose client has closed its connection (nginx's number); nobody reads it."""


class Requests:
    """``under_way``: decisions that are made or in the queue."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.under_way = 0
        self.ending = False
        self._tasks: set[asyncio.Task] = set()
        self._canceled_at_the_end: set[asyncio.Task] = set()

    async def run(self, request: Request, work: Coroutine[Any, Any, Any], decisions: int = 1) -> Any:
        """The result of ``work``, which makes so many ``decisions``.

        Raises HTTPException: 503 where too many are under way or the server ends, 504 where it took too long, 499 where
        the client has gone, which ends the work.
        """
        if self.ending or self.under_way + decisions > self.settings.max_waiting:
            work.close()
            why = "the server is shutting down" if self.ending else "too many requests under way"
            raise HTTPException(503, f"{why}; try again later", {"Retry-After": "1"})
        task, gone = asyncio.create_task(work), asyncio.create_task(_gone(request))
        self._tasks.add(task)
        self.under_way += decisions
        try:
            done, _ = await asyncio.wait({task, gone}, timeout=self.settings.request_s,
                                         return_when=asyncio.FIRST_COMPLETED)
            return self._result(task, done)
        finally:
            task.cancel()
            gone.cancel()
            self.under_way -= decisions
            self._tasks.discard(task)
            self._canceled_at_the_end.discard(task)

    def _result(self, task: asyncio.Task, done: set[asyncio.Task]) -> Any:
        if not done:
            raise HTTPException(504, f"no answer within {self.settings.request_s:g} s (--request_s)")
        if task not in done:
            raise HTTPException(GONE, "the client has gone")
        if task in self._canceled_at_the_end:
            raise HTTPException(503, "the server is shutting down, and this request wasn't finished in time")
        return task.result()

    def end(self) -> None:
        """Take no requests any more; those under way have ``shutdown_s`` to finish, and are then answered with 503."""
        if not self.ending:
            self.ending = True
            asyncio.get_running_loop().call_later(self.settings.shutdown_s, self._cancel)

    def _cancel(self) -> None:
        self._canceled_at_the_end |= {task for task in self._tasks if not task.done()}
        for task in self._canceled_at_the_end:
            task.cancel()


async def _gone(request: Request) -> None:
    """Returns when the client has closed its connection.  The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
