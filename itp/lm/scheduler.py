"""The start of a batch, and the choice of the model on a device that computes next.

Coroutines only queue their requests.  :class:`BatchBarrier` decides when a batch is complete, which is when every live
episode waits for a model.  :class:`DeviceScheduler` runs the batches of the models on one device, one at a time.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Protocol

from itp.devices import free_bytes


class ScheduledModel(Protocol):
    """A model whose batches the scheduler starts: :class:`itp.lm.local.LocalLM`."""

    role: str

    @property
    def waiting_prompts(self) -> int:
        """The number of prompts that wait for an answer."""

    @property
    def cache_bytes_used(self) -> int:
        """The memory that its computed prefixes take now."""

    def fit_memory(self, share: int) -> None:
        """Set the sizes of cache and batches for ``share`` bytes of the device."""

    async def run_batch(self) -> None:
        """Answer all waiting requests of one kind of call."""

    def fail(self, error: BaseException) -> None:
        """Raise ``error`` for all waiting requests."""


class BatchBarrier:
    """Counts the live episodes, and the episodes among them that wait for a model.

    A batch starts when every live episode waits for a model, since no other request can come then.  It also starts when
    no request has come for ``patience_s``, because an environment is slow.  The models of a run share one barrier.
    """

    def __init__(self, patience_s: float = 0.03) -> None:
        self.patience_s = patience_s
        self.live = 0
        self.waiting: Counter[object] = Counter()
        self.changed = asyncio.Event()
        self._schedulers: dict[str, DeviceScheduler] = {}

    def scheduler(self, device: str) -> DeviceScheduler:
        """The scheduler of ``device``."""
        return self._schedulers.setdefault(device, DeviceScheduler(self, device))

    def add(self, live: int) -> None:
        """Count ``live`` more episodes; fewer, if it is negative."""
        self.live += live
        self.changed.set()

    @asynccontextmanager
    async def episode(self) -> AsyncIterator[None]:
        """Around an episode that asks models: it is live meanwhile."""
        self.add(live=1)
        try:
            yield
        finally:
            self.add(live=-1)

    @asynccontextmanager
    async def away(self) -> AsyncIterator[None]:
        """Around what someone who counts as live does without asking a model."""
        self.add(live=-1)
        try:
            yield
        finally:
            self.add(live=1)

    @contextmanager
    def wait(self, who: object) -> Iterator[None]:
        """Put this around a request of episode ``who``.  An episode counts once, however many requests it waits for."""
        self.waiting[who] += 1
        self.changed.set()
        try:
            yield
        finally:
            self.waiting[who] -= 1
            if not self.waiting[who]:
                del self.waiting[who]
            self.changed.set()

    async def complete(self) -> None:
        """Return when every episode waits, or when no request has come for a while."""
        await asyncio.sleep(0)  # let the coroutines that are ready queue their requests first
        while len(self.waiting) < self.live:
            self.changed.clear()
            try:
                await asyncio.wait_for(self.changed.wait(), self.patience_s)
            except asyncio.TimeoutError:  # an alias of TimeoutError since Python 3.11
                if not self.changed.is_set():  # it is set if a request came while the event loop was busy
                    return


class DeviceScheduler:
    """The models on one device.  One of them computes at a time, and requests to the others queue meanwhile."""

    RESUME_TURNS = 4
    """Turns of the event loop between two batches, so that answered episodes stop waiting before the next batch starts.
    An answer passes through four stages: the future of its job, the gather of its call, the method, and the barrier."""

    def __init__(self, barrier: BatchBarrier, device: str) -> None:
        self.barrier, self.device = barrier, device
        self._models: list[ScheduledModel] = []
        self._memory_shared = False
        self._worker: asyncio.Task | None = None

    def join(self, model: ScheduledModel) -> None:
        """From now on ``model`` computes on this device, too."""
        self._models.append(model)
        self._memory_shared = False

    def leave(self, model: ScheduledModel) -> None:
        """``model`` is closed and computes no more."""
        self._models.remove(model)

    def wake(self) -> None:
        """Start the worker, unless it runs, so that waiting requests get an answer."""
        if self._worker is None or self._worker.done():
            self._worker = asyncio.get_running_loop().create_task(self._serve())
            self._worker.add_done_callback(self._ended)

    def _ended(self, worker: asyncio.Task[None]) -> None:
        """An error between two batches goes to everyone who waits, because no batch comes any more."""
        if not worker.cancelled() and (error := worker.exception()) is not None:
            for model in self._models:
                model.fail(error)

    async def _serve(self) -> None:
        """Run batches until no request waits."""
        while True:
            await self.barrier.complete()
            model = self._next()
            if model is None:
                return
            self._share_memory()
            await model.run_batch()
            for _ in range(self.RESUME_TURNS):
                await asyncio.sleep(0)

    def _share_memory(self) -> None:
        """Share the device's free memory among its models, once all of them are loaded: at the first batch."""
        free = None if self._memory_shared else free_bytes(self.device)
        self._memory_shared = True
        if free is not None:
            total = free + sum(model.cache_bytes_used for model in self._models)
            for model in self._models:
                model.fit_memory(total // len(self._models))

    def _next(self) -> ScheduledModel | None:
        """The policy, until twice as many prompts wait for the world model.

        Most of the policy's answers lead to a request to the world model.  The world model's answers are long, so each
        costs less in a full batch.
        """
        waiting = [model for model in self._models if model.waiting_prompts]
        return max(waiting, key=lambda m: m.waiting_prompts * (1 if m.role == "world_model" else 2), default=None)
