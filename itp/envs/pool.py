"""Processes that hold environments, awaitable from asyncio.

::

    async with EnvPool(functools.partial(AlfworldEnv, want_admissible=True), processes=2) as pool:
        async with pool.session() as env:                # any number at a time
            obs = await env.reset(game)
            result = await env.step("look")

A process holds one environment for each of its sessions and serves requests in the order of their arrival.  A finished
session leaves its environment to the next one.  A process that dies or doesn't answer in time is killed and replaced.
Its sessions get :class:`EnvDied` from their current call or from their next ``step``, and they go on with ``reset``.
An exception of an environment (UnplayableGame for a broken game file, EnvDied where only its own engine died) reaches
the caller unchanged, and the process lives on.

The processes are fresh interpreters that import only what ``make_env`` needs, without torch and without the program's
main module.  They run with ``OMP_NUM_THREADS=1``, because there are several, and with ``PYTHONHASHSEED=0``, because the
choices of ALFWorld's handcoded expert depend on the order of sets.  No process is left behind: each one ends when its
socket ends and when its parent dies.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ctypes
import itertools
import logging
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import traceback
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from itp.distributed import local_processes
from itp.envs.base import EnvDied, Observation, StepResult, TextEnv
from itp.errors import UserError
from itp.games import Game

log = logging.getLogger(__name__)

CLOSE_GRACE = 3.0
"""Seconds that a process has to close its environments before it is killed."""
START_TIMEOUT = 120.0

_LENGTH = struct.Struct("!I")


def processes_for(wanted: int, episodes: int) -> int:
    """``wanted`` processes, but no more than the episodes at a time and than this process's share of the processors.

    The processes that a launcher started side by side share the processors of the machine.
    """
    processors = (os.cpu_count() or 1) // local_processes()
    return min(wanted, episodes, max(1, processors))


class EnvHandle:
    """One session's environment.  Made by :meth:`EnvPool.session`; one call at a time."""

    def __init__(self, slot: _Slot, number: int) -> None:
        self._slot = slot
        self._number = number
        self._worker: _Worker | None = None

    @property
    def alive(self) -> bool:
        """Whether its process has lived since the last ``reset``."""
        return self._worker is not None and not self._worker.dead

    async def reset(self, game: Game) -> Observation:
        """Start ``game``, in a new process if the old one has died."""
        self._worker = await self._slot.worker()
        return await self._worker.call(self._number, "reset", game, self._slot.pool.reset_timeout)

    async def step(self, action: str) -> StepResult:
        """Raises EnvDied when the process has died since ``reset``."""
        if self._worker is None:
            raise RuntimeError("step() before reset()")
        return await self._worker.call(self._number, "step", action, self._slot.pool.step_timeout)


class EnvPool:
    """``processes`` processes, each with the environments of its sessions.

    ``make_env`` must be picklable (a class, a module's function, or a ``functools.partial`` of one).  The timeouts, in
    seconds, count from the moment when the process begins with the request.  A pool belongs to the event loop in which
    its first session starts.
    """

    def __init__(self, make_env: Callable[[], TextEnv], processes: int, *,
                 step_timeout: float = 60.0, reset_timeout: float = 120.0) -> None:
        if processes < 1:
            raise UserError(f"{processes} environment processes: give 1 or more")
        if getattr(make_env, "__module__", None) == "__main__":
            raise ValueError("make_env is defined in the main program, which the processes don't import")
        self.step_timeout = step_timeout
        self.reset_timeout = reset_timeout
        self.make_env = pickle.dumps(make_env)
        self.deaths = 0
        """The number of processes so far that died or were killed because they didn't answer."""
        self.busy_s = 0.0
        """Seconds of work, summed over the processes."""
        self._slots = [_Slot(self) for _ in range(processes)]
        self._closed = False

    async def __aenter__(self) -> EnvPool:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[EnvHandle]:
        """An environment for the caller alone, in the process with the fewest sessions."""
        if self._closed:
            raise RuntimeError("the pool is closed")
        for slot in self._slots:  # all now, so that they start in parallel
            slot.start()
        slot = min(self._slots, key=lambda s: len(s.taken))
        number = slot.take()
        try:
            yield EnvHandle(slot, number)
        finally:
            slot.give_back(number)

    def pids(self) -> list[int]:
        """The process ids of the living processes."""
        return [slot.current.process.pid for slot in self._slots if slot.current and not slot.current.dead]

    async def close(self) -> None:
        """End all processes.  Calls that still wait get EnvDied.  Safe to call twice."""
        self._closed = True
        await asyncio.gather(*(slot.current.close() for slot in self._slots if slot.current))


class _Slot:
    """A place for one process after another, and the numbers of the environments in it."""

    def __init__(self, pool: EnvPool) -> None:
        self.pool = pool
        self.current: _Worker | None = None
        self.taken: set[int] = set()
        self._free: list[int] = []
        self._fresh = itertools.count()

    def take(self) -> int:
        number = self._free.pop() if self._free else next(self._fresh)
        self.taken.add(number)
        return number

    def give_back(self, number: int) -> None:
        self.taken.remove(number)
        self._free.append(number)

    def start(self) -> None:
        if self.pool._closed:
            raise EnvDied("the pool is closed")
        if self.current is None or self.current.dead:
            self.current = _Worker(self.pool)

    async def worker(self) -> _Worker:
        """The living process, once it is ready.  Raises the error that stopped its start."""
        self.start()
        worker = self.current
        await asyncio.shield(worker.ready)
        return worker


class _Worker(asyncio.Protocol):
    """The parent's end of one process: requests go out, and answers come back in the same order.

    It is a Protocol rather than a reading task, because the event loop delivers received data before it runs timers.
    So an answer that arrived while the loop was busy never counts as a timeout.
    """

    def __init__(self, pool: EnvPool) -> None:
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._waiting: collections.deque[tuple[asyncio.Future, float]] = collections.deque()
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None
        self._busy_since = 0.0
        self._closing = False
        self.dead = ""
        """The reason why the process has ended; empty while it lives."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            self.process = _start_process(theirs)
        self.ready = self._loop.create_task(self._connect(ours))
        # No other session may await this start; without the callback asyncio would complain about its exception.
        self.ready.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _connect(self, ours: socket.socket) -> None:
        await self._loop.create_connection(lambda: self, sock=ours)
        if self.dead:
            raise EnvDied(self.dead)
        # The first answer means that the process runs and has the callable that makes environments.
        answer = self._expect(START_TIMEOUT)
        self._send((sys.path, self._pool.make_env))
        await answer

    async def call(self, number: int, what: str, argument: Any, timeout: float) -> Any:
        if self.dead or self._transport is None or self._transport.is_closing():
            raise EnvDied(self.dead or "the environment's process is gone")
        answer = self._expect(timeout)
        self._send((number, what, argument))
        return await answer

    def _send(self, message: Any) -> None:
        data = pickle.dumps(message)
        self._transport.write(_LENGTH.pack(len(data)) + data)

    def _expect(self, timeout: float) -> asyncio.Future:
        answer = self._loop.create_future()
        self._waiting.append((answer, timeout))
        if len(self._waiting) == 1:
            self._busy_since = self._loop.time()
            self._start_timer()
        return answer

    def _start_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = None
        if self._waiting:
            self._timer = self._loop.call_later(self._waiting[0][1], self._timed_out)

    def _timed_out(self) -> None:
        self._end(f"the environment's process didn't answer for {self._waiting[0][1]:g} s")

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                return
            ok, value = pickle.loads(self._buffer[_LENGTH.size:end])
            del self._buffer[:end]
            answer, _ = self._waiting.popleft()
            if not self._waiting:
                self._pool.busy_s += self._loop.time() - self._busy_since
            self._start_timer()
            if answer.cancelled():
                continue
            if ok:
                answer.set_result(value)
            else:
                error, where = value
                error.__cause__ = _InProcess(where)
                answer.set_exception(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end("the environment's process ended by itself")

    def _end(self, why: str) -> None:
        """Kill the rest of the process, and raise EnvDied in all calls that wait for it."""
        if self.dead:
            return
        self.dead = why
        if self._timer:
            self._timer.cancel()
        if not self._closing:
            self._kill()
            self._pool.deaths += 1
            self.dead = f"{why} (pid {self.process.pid}, exit status {self.process.returncode})"
            log.warning("%s; a new one takes its place", self.dead)
        self._transport.abort()
        for answer, _ in self._waiting:
            if not answer.done():
                answer.set_exception(EnvDied(self.dead))
        self._waiting.clear()

    def _kill(self) -> None:
        # The whole group: an environment may have started a process of its own (ScienceWorld's Java).
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    async def close(self) -> None:
        if self.dead:
            return
        self._closing = True
        while self._transport is None:
            await asyncio.sleep(0)
        self._end("the pool is closed")  # the process sees the end of its socket, closes its environments, and ends
        try:
            deadline = self._loop.time() + CLOSE_GRACE
            while self.process.poll() is None and self._loop.time() < deadline:
                await asyncio.sleep(0.02)
        finally:
            self._kill()


class _InProcess(Exception):
    """The traceback of an exception in the environment's process."""

    def __str__(self) -> str:
        return "\n" + self.args[0]


def _start_process(end: socket.socket) -> subprocess.Popen:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "PYTHONPATH": path}
    # A session of its own, so that Ctrl-C reaches the parent alone.  The output of an engine goes to stderr.
    return subprocess.Popen([sys.executable, "-m", "itp.envs.pool", str(end.fileno()), str(os.getpid())], env=env,
                            pass_fds=[end.fileno()], stdin=subprocess.DEVNULL, stdout=2, start_new_session=True)


# --- in the process


def _serve(end: socket.socket, parent: int) -> None:
    """Answer requests until the socket ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with(parent)
    stream = end.makefile("rwb")
    envs: dict[int, TextEnv] = {}
    make_env: Callable[[], TextEnv] | None = None
    try:
        while (message := _read(stream)) is not None:
            try:
                if make_env is None:
                    sys.path[:], pickled = message
                    make_env = pickle.loads(pickled)
                    answer = (True, None)
                else:
                    answer = (True, _answer(envs, make_env, *message))
            except Exception as error:  # every error goes to the caller
                answer = (False, (_picklable(error), traceback.format_exc()))
            _write(stream, answer)
    except (BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone
    finally:
        for env in envs.values():
            env.close()


def _answer(envs: dict[int, TextEnv], make_env: Callable[[], TextEnv], number: int, what: str, argument: Any) -> Any:
    if number not in envs:
        envs[number] = make_env()
    if what == "reset":
        return envs[number].reset(argument)
    return envs[number].step(argument)


def _picklable(error: Exception) -> Exception:
    """The exception, or a RuntimeError with its text if it can't be pickled or a future doesn't take it."""
    if isinstance(error, StopIteration):  # a future refuses it, so that the caller would wait for ever
        return RuntimeError(f"{type(error).__name__}: {error}")
    try:
        pickle.loads(pickle.dumps(error))
    except (TypeError, AttributeError, pickle.PicklingError):
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _read(stream: Any) -> Any:
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    size = _LENGTH.unpack(head)[0]
    data = stream.read(size)
    return pickle.loads(data) if len(data) == size else None


def _write(stream: Any, message: Any) -> None:
    data = pickle.dumps(message)
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def _die_with(parent: int) -> None:
    """Have Linux kill this process when its parent dies, even in the middle of an engine's step.

    More exactly, it dies with the parent's thread that started it, which is the thread of the pool's event loop.
    """
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(0)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
