"""Environment processes: real processes that are killed, stopped, orphaned and interrupted."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from itp.envs.alfworld.env import AlfworldEnv
from itp.envs.alfworld.games import list_games
from itp.envs.base import Observation, StepResult
from itp.envs.pool import EnvDied, EnvPool, processes_for
from itp.errors import UserError
from itp.games import Game

ROOT = Path(__file__).resolve().parents[1]


class TwoPartError(Exception):
    """Can be pickled but not unpickled."""

    def __init__(self, part: str, other: str) -> None:
        super().__init__(part + other)


class ToyEnv:
    """Does what its actions say, and tells where it lives."""

    want_admissible = False
    made = 0

    def __init__(self, fail: str = "") -> None:
        if fail:
            raise UserError(fail)
        ToyEnv.made += 1
        self.game_id = ""

    def reset(self, game: Game) -> Observation:
        if game.game_id == "bad":
            raise UserError("games/bad: not a game; make it again")
        self.game_id = game.game_id
        return Observation(f"{os.getpid()}", game.game_id)

    def step(self, action: str) -> StepResult:
        verb, _, argument = action.partition(" ")
        if verb == "sleep":
            time.sleep(float(argument))
        elif verb == "exit":
            os._exit(7)
        elif verb == "raise":
            raise TwoPartError("a", "b")
        says = {"modules": ",".join(sys.modules), "made": str(ToyEnv.made), "environ": os.environ.get(argument, "")}
        return StepResult(Observation(says.get(verb, action), self.game_id), 0.0, False, False, 0.0, False, False)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("wanted, episodes, beside, made", [
    (2, 16, 1, 2), (8, 16, 1, 6), (8, 3, 1, 3), (8, 16, 2, 3), (8, 16, 4, 1), (8, 16, 12, 1), (1, 16, 1, 1)])
def test_no_more_processes_than_processors_or_episodes(monkeypatch: pytest.MonkeyPatch, wanted: int, episodes: int,
                                                       beside: int, made: int) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(beside))
    assert processes_for(wanted, episodes) == made


def toy(number: object) -> Game:
    return Game("toy", "train", str(number), "", "")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: list[int], seconds: float = 10.0) -> bool:
    """Whether all these processes end within some seconds."""
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, pids))


@pytest.mark.asyncio
async def test_sessions_are_spread_and_kept_apart() -> None:
    async with EnvPool(ToyEnv, 2) as pool:
        async def episode(number: int) -> tuple[str, list[tuple[str, str]]]:
            async with pool.session() as env:
                home = (await env.reset(toy(number))).text
                return home, [(r.obs.task, r.obs.text) for r in [await env.step(f"say {number} {i}") for i in range(5)]]

        episodes = await asyncio.gather(*(episode(number) for number in range(16)))
        for number, (_, said) in enumerate(episodes):
            assert said == [(str(number), f"say {number} {i}") for i in range(5)]
        homes = [home for home, _ in episodes]
        assert sorted(homes.count(home) for home in set(homes)) == [8, 8]
        # The next session uses an environment that is there already.
        async with pool.session() as env:
            await env.reset(toy("next"))
            assert (await env.step("made")).obs.text == "8"
        pids = pool.pids()
        assert len(pids) == 2
    assert gone(pids, 0)


@pytest.mark.asyncio
async def test_the_process_is_lean() -> None:
    async with EnvPool(ToyEnv, 1) as pool, pool.session() as env:
        await env.reset(toy(0))
        assert "torch" not in (await env.step("modules")).obs.text.split(",")
        assert (await env.step("environ OMP_NUM_THREADS")).obs.text == "1"
        assert (await env.step("environ PYTHONHASHSEED")).obs.text == "0"


@pytest.mark.asyncio
async def test_a_killed_process_is_replaced() -> None:
    async with EnvPool(ToyEnv, 2) as pool:
        async with pool.session() as one, pool.session() as other, pool.session() as third:
            home = int((await one.reset(toy(1))).text)
            assert int((await third.reset(toy(3))).text) == home
            assert int((await other.reset(toy(2))).text) != home
            pending = asyncio.create_task(one.step("sleep 30"))
            await asyncio.sleep(0.1)
            os.kill(home, signal.SIGKILL)
            with pytest.raises(EnvDied, match="ended by itself"):
                await pending
            with pytest.raises(EnvDied):  # lived there too, and asked nothing meanwhile
                await third.step("say hello")
            assert (await other.step("say hello")).obs.text == "say hello"
            assert int((await one.reset(toy(4))).text) not in (home, int((await other.reset(toy(5))).text))
            await third.reset(toy(6))
            assert (await third.step("say again")).obs == Observation("say again", "6")
            assert pool.deaths == 1 and not alive(home)
            with pytest.raises(EnvDied, match="exit status 7"):
                await one.step("exit")
            assert pool.deaths == 2


@pytest.mark.asyncio
async def test_a_process_that_hangs_is_killed_and_replaced() -> None:
    async with EnvPool(ToyEnv, 1, step_timeout=0.5) as pool, pool.session() as env:
        home = int((await env.reset(toy(1))).text)
        os.kill(home, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(EnvDied, match="didn't answer for 0.5 s"):
            await env.step("say hello")
        assert 0.4 < time.monotonic() - start < 3 and gone([home], 0)
        assert int((await env.reset(toy(2))).text) != home


@pytest.mark.asyncio
async def test_waiting_in_line_and_a_busy_loop_are_no_timeouts() -> None:
    async with EnvPool(ToyEnv, 1, step_timeout=0.6) as pool:
        async def nap() -> str:
            async with pool.session() as env:
                await env.reset(toy(0))
                return (await env.step("sleep 0.25")).obs.text

        assert await asyncio.gather(*(nap() for _ in range(5))) == ["sleep 0.25"] * 5  # 1.25 s in one process
        async with pool.session() as env:
            await env.reset(toy(1))
            pending = asyncio.create_task(env.step("say hello"))
            await asyncio.sleep(0)
            time.sleep(0.9)  # what a model does that computes in the event loop's thread
            assert (await pending).obs.text == "say hello"
        assert pool.deaths == 0


@pytest.mark.asyncio
async def test_errors_travel_and_kill_nothing() -> None:
    async with EnvPool(ToyEnv, 1) as pool, pool.session() as env:
        home = (await env.reset(toy(1))).text
        with pytest.raises(UserError, match="^games/bad: not a game; make it again$"):
            await env.reset(toy("bad"))
        with pytest.raises(RuntimeError, match="TwoPartError: ab") as caught:
            await env.step("raise")
        assert "in step" in str(caught.value.__cause__)
        assert (await env.reset(toy(2))).text == home and pool.deaths == 0
    async with EnvPool(functools.partial(ToyEnv, fail="no engine here"), 1) as pool, pool.session() as env:
        with pytest.raises(UserError, match="no engine here"):
            await env.reset(toy(1))


@pytest.mark.asyncio
async def test_a_cancelled_call_leaves_the_process_in_order() -> None:
    async with EnvPool(ToyEnv, 1) as pool:
        async with pool.session() as env:
            await env.reset(toy(1))
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(env.step("sleep 0.3"), 0.05)
        async with pool.session() as env:
            assert (await env.reset(toy(2))).task == "2"
            assert (await env.step("say hello")).obs == Observation("say hello", "2")


@pytest.mark.asyncio
async def test_close_ends_what_waits_and_what_hangs() -> None:
    pool = EnvPool(ToyEnv, 2)
    async with pool.session() as env, pool.session() as other:
        await env.reset(toy(1))
        await other.reset(toy(2))
        pids = pool.pids()
        os.kill(pids[1], signal.SIGSTOP)
        pending = asyncio.create_task(env.step("sleep 30"))
        await asyncio.sleep(0.1)
        await pool.close()
        assert gone(pids, 0)
        with pytest.raises(EnvDied, match="closed"):
            await pending
        with pytest.raises(EnvDied, match="closed"):
            await env.reset(toy(1))
    await pool.close()
    at_once = EnvPool(ToyEnv, 1)
    async with at_once.session():
        pids = at_once.pids()
        await at_once.close()  # before the process is up
    assert len(pids) == 1 and gone(pids, 0)


PARENT = """
import asyncio, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is started with it ignored
sys.path.insert(0, {tests!r})
from test_pool import ToyEnv, toy
from itp.envs.pool import EnvPool

async def main():
    async with EnvPool(ToyEnv, 2) as pool:
        async with pool.session() as idle, pool.session() as busy:
            await idle.reset(toy(1))
            await busy.reset(toy(2))
            step = asyncio.create_task(busy.step("sleep 60"))
            await asyncio.sleep(0.2)
            print(*pool.pids(), flush=True)
            {ending}

asyncio.run(main())
"""


@pytest.mark.parametrize(("ending", "kill", "status"), [
    ("await step", signal.SIGKILL, -signal.SIGKILL),
    ("await step", signal.SIGTERM, -signal.SIGTERM),
    ("await step", signal.SIGINT, -signal.SIGINT),
    ("raise SystemExit(3)", None, 3),
])
def test_no_process_outlives_its_parent(ending: str, kill: signal.Signals | None, status: int) -> None:
    program = PARENT.format(tests=str(Path(__file__).parent), ending=ending)
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True, cwd=ROOT)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2 and (kill is None or all(map(alive, pids)))
    if kill is not None:
        parent.send_signal(kill)
    parent.communicate(timeout=30)
    assert parent.returncode == status
    assert gone(pids)


@pytest.mark.asyncio
async def test_alfworld_in_processes_says_what_it_says_here(games_root: Path) -> None:
    games = list_games("train", games_root)[:2]
    here = AlfworldEnv(want_admissible=True)
    expected = [[here.reset(game), here.step("look"), here.step("inventory")] for game in games]
    here.close()
    async with EnvPool(functools.partial(AlfworldEnv, want_admissible=True), 1) as pool:
        async def episode(game: Game) -> list:
            async with pool.session() as env:
                return [await env.reset(game), await env.step("look"), await env.step("inventory")]

        assert await asyncio.gather(*map(episode, games)) == expected
