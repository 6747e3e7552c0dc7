"""When a batch starts, and which model of a device computes it.

Coroutines only queue what they want of a model.  :class:`BatchBarrier` says when a batch is complete: when every live
episode waits for some model.  :class:`DeviceScheduler` runs the batches of the models on one device, one at a time.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from itp.devices import free_bytes


class ScheduledModel(Protocol):
    """A model that runs its batches when it is told to: :class:`itp.lm.local.LocalLM`."""

    role: str

    @property
    def waiting_prompts(self) -> int:
        """Prompts that wait for an answer."""

    @property
    def cache_bytes_used(self) -> int:
        """Memory that its computed prefixes take now."""

    def fit_memory(self, share: int) -> None:
        """Make use of ``share`` bytes of the device."""

    async def run_batch(self) -> None:
        """Answer what waits, one kind of call at a time."""


class BatchBarrier:
    """Counts the live episodes, and how many of them wait for a model.

    A batch starts when every live episode waits for some model, since then nobody can still join; or when nobody
    has come for ``patience_s``, because an environment is slow.  The models of a run share one barrier.
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
        """``live`` more episodes (fewer, where it is negative)."""
        self.live += live
        self.changed.set()

    @contextmanager
    def wait(self, who: object) -> Iterator[None]:
        """Around a request of episode ``who``, which counts once, however many requests it has under way."""
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
        """Return when everyone waits, or when nobody has come for a while."""
        await asyncio.sleep(0)  # let the coroutines that are ready put their requests first
        while len(self.waiting) < self.live:
            self.changed.clear()
            try:
                await asyncio.wait_for(self.changed.wait(), self.patience_s)
            except asyncio.TimeoutError:  # an alias of TimeoutError since Python 3.11
                if not self.changed.is_set():  # or somebody came while the event loop was busy
                    return


class DeviceScheduler:
    """The models on one device.  One of them computes at a time; meanwhile requests to the others gather."""

    RESUME_TURNS = 4
    """Turns of the event loop between two batches: whoever was answered stops waiting before the next one starts.
    An answer passes the future of its job, the gather of its call, the method, and the barrier."""

    def __init__(self, barrier: BatchBarrier, device: str) -> None:
        self.barrier, self.device = barrier, device
        self._models: list[ScheduledModel] = []
        self._memory_shared = False
        self._worker: asyncio.Task | None = None

    def join(self, model: ScheduledModel) -> None:
        self._models.append(model)
        self._memory_shared = False

    def leave(self, model: ScheduledModel) -> None:
        self._models.remove(model)

    def wake(self) -> None:
        """See to it that the requests that wait are answered."""
        if self._worker is None or self._worker.done():
            self._worker = asyncio.get_running_loop().create_task(self._serve())

    async def _serve(self) -> None:
        """Run batches until nobody waits for one."""
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
        """Share the device's memory among its models.  Not before the first batch: only then all are loaded."""
        free = None if self._memory_shared else free_bytes(self.device)
        self._memory_shared = True
        if free is not None:
            total = free + sum(model.cache_bytes_used for model in self._models)
            for model in self._models:
                model.fit_memory(total // len(self._models))

    def _next(self) -> ScheduledModel | None:
        """The policy, until twice as many prompts wait for the world model.

        Most of the policy's answers lead to a request to the world model, whose long answers cost less apiece in a
        full batch.
        """
        waiting = [model for model in self._models if model.waiting_prompts]
        return max(waiting, key=lambda m: m.waiting_prompts * (1 if m.role == "world_model" else 2), default=None)
