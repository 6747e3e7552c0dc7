"""Processes that a launcher (torchrun, accelerate, deepspeed) started side by side; usually this one is alone."""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")
POLL_S = 0.2
PATIENCE = timedelta(hours=1)
"""The longest time that a process waits for another to start.  If one dies, the launcher stops all of them earlier."""


def local_processes() -> int:
    """How many processes a launcher started side by side on this machine; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def rank_and_count() -> tuple[int, int]:
    """The number of this process among all processes of the launcher, and how many there are; (0, 1) without one."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def rank_devices(policy: str, world_model: str, pairs: bool = True) -> tuple[str, str]:
    """Where this process's models go.  Among several on a machine with GPUs: one for both, or two if there are enough.

    ``pairs``: whether a second one is of use.  Alone, or where no GPU is wanted: as given.
    """
    import torch

    here = local_processes()
    if here == 1 or not policy.startswith("cuda") or not torch.cuda.device_count():
        return policy, world_model
    local = int(os.environ["LOCAL_RANK"])
    if pairs and torch.cuda.device_count() >= 2 * here:
        return f"cuda:{2 * local}", f"cuda:{2 * local + 1}"
    one = f"cuda:{local % torch.cuda.device_count()}"
    return one, one


def is_first_process() -> bool:
    """Whether this is the process that writes."""
    return rank_and_count()[0] == 0


class Processes:
    """The processes that train together, as `accelerate launch` starts them; usually this one alone.

    Each plays its share of the games on its own device; gradients are added up.
    """

    def __init__(self) -> None:
        self.rank, self.count = rank_and_count()
        self._together = None
        if self.count > 1:
            import torch
            from accelerate import PartialState

            # Without this, accelerate doesn't connect processes that have no GPU, and each would train alone.
            self._together = PartialState(cpu=not torch.accelerator.is_available())

    def share(self, values: Sequence[Any]) -> list[Any]:
        """This process's part of ``values``."""
        return list(values[self.rank::self.count])

    def gather(self, values: list[Any]) -> list[Any]:
        """The lists of all processes, one after the other, in every process."""
        if self._together is None:
            return values
        from accelerate.utils import gather_object

        return gather_object(values)

    def add_up(self, tensors: Iterable[Any]) -> None:
        """Each tensor becomes its sum over the processes, in place."""
        if self._together is not None:
            import torch.distributed

            for tensor in tensors:
                torch.distributed.all_reduce(tensor)


class Ranks:
    """This process and those beside it; usually it is alone.

    ``restarted``: the launcher has started these processes before.
    """

    def __init__(self) -> None:
        self.rank, self.count = rank_and_count()
        self.restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        if self.count > 1:
            from torch.distributed import rendezvous

            self._store, _, _ = next(rendezvous("env://", timeout=PATIENCE))
            self.restarted |= self._store.check(["start"])

    @property
    def first(self) -> bool:
        return self.rank == 0

    def meet(self) -> None:
        """Wait for all processes; process 0 comes when it has prepared what all use.

        The launcher's store survives a restart, and torchrun's count of restarts differs between nodes.  So process 0
        picks a new key prefix for this start.  It publishes the prefix with the random id of every process.
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

    async def finished(self, found: dict[str, list[str]]) -> dict[str, list[str]]:
        """What all processes found, in the first process once all have finished; nothing in the others."""
        if self.count == 1:
            return found
        self._store.set(f"found/{self.rank}", json.dumps(found))
        self._store.add("finished", 1)
        while self.first and self._store.add("finished", 0) < self.count:
            await asyncio.sleep(POLL_S)
        everyones = [json.loads(self._store.get(f"found/{rank}")) for rank in range(self.count)] if self.first else []
        return {name: [one for each in everyones for one in each[name]] for name in found}
