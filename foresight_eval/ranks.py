"""Several processes, started by ``torchrun`` or ``accelerate launch``, that share the games of one evaluation.

Each takes the next game from a counter in the launcher's c10d store, so that a long game holds up nobody, and
writes to the same result folder.  A file ``{idx}.json`` is a finished game.  When a process dies, the launcher
ends the others and starts all of them anew (``torchrun --max-restarts N``), or the same command is given again:
the games that have no file yet are then everybody's.  Which process plays a game changes nothing in it.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")
POLL_S = 0.2
PATIENCE = timedelta(hours=1)
"""How long one waits for another to start.  If that one has died, the launcher ends all sooner."""


class Ranks:
    """This process and those beside it; usually it is alone.

    ``restarted``: the launcher has started these processes before.
    """

    def __init__(self) -> None:
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        if self.count > 1:
            from torch.distributed import rendezvous

            self._store, _, _ = next(rendezvous("env://", timeout=PATIENCE))
            self.restarted |= self._store.check(["start"])

    @property
    def first(self) -> bool:
        return self.rank == 0

    def meet(self) -> None:
        """Wait for all; the first one comes when it has prepared what all use.

        The launcher's store may hold what processes wrote before a restart, and torchrun's count of restarts differs
        between nodes.  So the first makes a name for this start, under which all keys are from here on, and says it
        to each by the name that one has given itself.
        """
        if self.count == 1:
            return
        from torch.distributed import PrefixStore

        me = uuid.uuid4().hex
        self._store.set(f"hello/{self.rank}", me)
        start = [me]
        if self.first:
            while self._store.add(f"{me}/met", 0) < self.count - 1:
                others = [self._store.get(f"hello/{rank}").decode() for rank in range(1, self.count)]
                self._store.set("start", json.dumps([me, *others]))
                time.sleep(POLL_S)
        else:
            while self.rank >= len(start) or start[self.rank] != me:
                time.sleep(POLL_S)
                start = json.loads(self._store.get("start"))
            self._store.add(f"{start[0]}/met", 1)
        self._store = PrefixStore(start[0], self._store)

    def share(self, things: Sequence[T]) -> Iterator[T]:
        """Those of ``things``, the same in every process, that this one is to take; decided one by one."""
        if self.count == 1:
            yield from things
            return
        while (i := self._store.add("taken", 1) - 1) < len(things):
            yield things[i]

    async def finished(self, lost: int) -> int:
        """What all processes lost together, in the first process once all have finished; 0 in the others."""
        if self.count == 1:
            return lost
        self._store.add("lost", lost)
        self._store.add("finished", 1)
        while self.first and self._store.add("finished", 0) < self.count:
            await asyncio.sleep(POLL_S)
        return self._store.add("lost", 0) if self.first else 0
