"""The driver on the real engine in real processes: whole episodes, the same at any concurrency, and accidents."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import os
import re
import signal
from pathlib import Path

import psutil
import pytest

from itp import rollout
from itp.agent.policy import Policy
from itp.envs.alfworld.env import AlfworldEnv
from itp.envs.alfworld.games import list_games
from itp.envs.base import Observation, StepResult
from itp.envs.pool import EnvPool
from itp.errors import PromptTooLong
from itp.games import Game
from itp.lm.base import GenParams, Usage
from itp.lm.local import LocalLM
from itp.lm.scheduler import BatchBarrier
from itp.methods.actors import ExpertActor, RandomWalk
from itp.methods.base import Decision, Method, View
from itp.methods.settings import MethodSettings
from itp.methods.sft import Sft
from itp.rollout import Episode, run_episodes
from itp.text.state import State
from tests.tiny import write_tiny_model
from tests.toy import ToyLM


@pytest.fixture(scope="module")
def games(games_root: Path) -> list[Game]:
    return [game for split in ("train", "seen", "unseen") for game in list_games(split, games_root)]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, games: list[Game]) -> Path:
    """A random model that knows the name of every thing in the games: choices must differ in their tokens."""
    things = {name.lower() for game in games for name in re.findall(r"([A-Za-z]+)_bar_", Path(game.path).read_text())}
    words = sorted(name + part for name in things for part in ("", "basin"))  # the engine says sinkbasin for a sink
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), words=words)


def make_pool(processes: int = 1, want_admissible: bool = True) -> EnvPool:
    return EnvPool(functools.partial(AlfworldEnv, want_admissible=want_admissible), processes)


async def run(pool: EnvPool, method: Method, games: list[Game], *, max_steps: int = 40, seed: int = 1,
              concurrency: int = 4, barrier: BatchBarrier | None = None) -> dict[str, Episode]:
    """Episodes by game id; every game must come exactly once."""
    episodes = [e async for e in run_episodes(pool, method, games, max_steps=max_steps, seed=seed,
                                              concurrency=concurrency, barrier=barrier)]
    assert sorted(e.game.game_id for e in episodes) == sorted(g.game_id for g in games)
    return {e.game.game_id: e for e in episodes}


def run_alone(method: Method, games: list[Game], *, want_admissible: bool = False, **options) -> dict[str, Episode]:
    """:func:`run` in an event loop and on a pool of its own."""
    async def main() -> dict[str, Episode]:
        async with make_pool(want_admissible=want_admissible) as pool:
            return await run(pool, method, games, **options)

    return asyncio.run(main())


def story(episodes: dict[str, Episode]) -> dict[str, list]:
    """All that happened, without how long it took or what it cost."""
    return {name: [(s.state, s.decision, s.observation, s.reward, s.score, s.done, s.invalid) for s in e.steps]
            for name, e in episodes.items()}


def test_an_expert_wins_and_the_engine_says_so(games: list[Game]) -> None:
    episodes = run_alone(ExpertActor(), games)
    for episode in episodes.values():
        assert episode.success and episode.reason == "success" and episode.score == 100 and episode.restarts == 0
        assert [s.done for s in episode.steps] == [False] * (len(episode.steps) - 1) + [True]
        assert [s.score for s in episode.steps[:-1]] == [0] * (len(episode.steps) - 1)
        state = episode.steps[0].state
        assert state.history == ()
        for step in episode.steps:
            assert step.state == state
            state = state.after(step.decision.action, step.observation)

    # The same actions, played on one engine in this process, give the same text and the same end.
    env = AlfworldEnv()
    for episode in list(episodes.values())[:3]:
        first = env.reset(episode.game)
        assert episode.steps[0].state == State(first.task, first.text)
        results = [env.step(step.decision.action) for step in episode.steps]
        assert [r.obs.text for r in results] == [s.observation for s in episode.steps]
        assert [r.success for r in results] == [False] * (len(results) - 1) + [True]
    env.close()


def test_the_step_limit_ends_an_episode_and_is_no_success(games: list[Game]) -> None:
    episodes = run_alone(RandomWalk(), games, want_admissible=True, max_steps=3)
    assert {(len(e.steps), e.reason, e.success) for e in episodes.values()} == {(3, "step_limit", False)}


def test_actions_the_engine_does_not_know_are_executed_and_counted(games: list[Game]) -> None:
    class Wizard:
        name, want_admissible = "wizard", False

        async def act(self, view: View) -> Decision:
            return Decision("cast spell" if view.step % 2 else "inventory")

    episodes = run_alone(Wizard(), games[:2], max_steps=4)
    for episode in episodes.values():
        assert [s.invalid for s in episode.steps] == [False, True, False, True]
        assert episode.steps[1].observation == "Nothing happens."


@pytest.mark.parametrize("selection, temperature, max_steps", [("generate", 0.7, 3), ("constrained", 2.0, 5)])
def test_concurrency_changes_nothing(games: list[Game], tiny_model: Path, selection: str, temperature: float,
                                     max_steps: int) -> None:
    async def sampled(pool: EnvPool, concurrency: int, seed: int,
                      games: list[Game]) -> tuple[dict[str, Episode], list[int]]:
        barrier = BatchBarrier()
        lm = LocalLM.load(str(tiny_model), barrier=barrier)
        policy = Policy(lm, selection=selection, temperature=temperature, top_p=0.95, history_keep_steps=2)
        try:
            return await run(pool, Sft(policy, None, MethodSettings()), games, max_steps=max_steps, seed=seed,
                             concurrency=concurrency, barrier=barrier), lm.batches
        finally:
            await lm.close()

    async def main() -> list[tuple[dict[str, Episode], list[int]]]:
        async with make_pool() as pool:
            return [await sampled(pool, 1, 3, games[:8]), await sampled(pool, 8, 3, games[7::-1]),
                    await sampled(pool, 2, 4, games[:2])]

    (alone, batches), (together, full_batches), (other_seed, _) = asyncio.run(main())

    def rounded(episodes: dict[str, Episode]) -> dict[str, list]:
        # The last digits of a log-probability depend on the shape of the batch.
        return {name: [(*s[:1], dataclasses.replace(s[1], logprob=s[1].logprob and round(s[1].logprob, 3)), *s[2:])
                       for s in steps] for name, steps in story(episodes).items()}

    assert rounded(together) == rounded(alone)
    assert max(batches) == 1 and max(full_batches) == 8
    chosen = {s.decision.action for e in alone.values() for s in e.steps}
    assert len(chosen) > 5  # sampled, not one action again and again
    for name, episode in other_seed.items():
        assert [step.decision.action for step in episode.steps] != [s.decision.action for s in alone[name].steps]
    # One call a step, metered where it was asked.
    for episode in together.values():
        assert episode.usage["policy"].calls == len(episode.steps) == max_steps
        total = Usage()
        for step in episode.steps:
            total += step.usage["policy"]
        assert episode.usage["policy"] == total and total.completion_tokens > 0


def test_an_error_of_a_method_ends_the_run_and_leaves_no_process(games: list[Game]) -> None:
    class Faulty(ExpertActor):
        async def act(self, view: View) -> Decision:
            if view.game == games[5] and view.step == 1:
                raise ZeroDivisionError("planner")
            return await super().act(view)

    pool = make_pool(processes=2)

    async def failing() -> list[int]:
        pids: list[int] = []
        with pytest.raises(ZeroDivisionError, match="planner"):
            try:
                async for _ in run_episodes(pool, Faulty(), games, max_steps=40, seed=1, concurrency=3):
                    pids += pool.pids()
            finally:
                pids += pool.pids()
                await pool.close()
        assert len(asyncio.all_tasks()) == 1
        return pids

    pids = asyncio.run(failing())
    assert len(set(pids)) == 2 and not any(psutil.pid_exists(pid) for pid in pids)


def test_a_prompt_that_is_too_long_ends_its_own_episode_alone(games: list[Game]) -> None:
    class Wordy(ExpertActor):
        async def act(self, view: View) -> Decision:
            if view.game == games[1] and view.step == 2:
                await ToyLM("world_model").generate(["before"], GenParams())
                raise PromptTooLong("a prompt of 9 tokens")
            return await super().act(view)

    undisturbed, episodes = run_alone(ExpertActor(), games[:4]), run_alone(Wordy(), games[:4])
    ended = episodes.pop(games[1].game_id)
    assert (ended.reason, ended.success, ended.score, ended.restarts) == ("prompt_too_long", False, 0, 0)
    assert ended.usage["world_model"].calls == 1  # of the step that ended it
    story_of = story(undisturbed)
    assert story({ended.game.game_id: ended})[ended.game.game_id] == story_of.pop(ended.game.game_id)[:2]
    assert story(episodes) == story_of and all(e.success for e in episodes.values())


def test_leaving_early_stops_the_other_episodes(games: list[Game]) -> None:
    async def first_only() -> None:
        pool = make_pool()
        episodes = run_episodes(pool, ExpertActor(), games, max_steps=40, seed=1, concurrency=4)
        assert (await anext(episodes)).success
        await episodes.aclose()
        assert len(asyncio.all_tasks()) == 1
        await pool.close()

    asyncio.run(first_only())


class Killer(RandomWalk):
    """Plays at random, and kills the environments' process at step 2 of one game, ``times`` times."""

    def __init__(self, pool: EnvPool, victim: Game, times: int) -> None:
        self.pool, self.victim, self.times = pool, victim, times

    async def act(self, view: View) -> Decision:
        if view.game == self.victim and view.step == 2 and self.times:
            self.times -= 1
            for pid in self.pool.pids():
                os.kill(pid, signal.SIGKILL)
        return await super().act(view)


def test_a_killed_environment_is_replaced_and_its_episodes_start_again(games: list[Game]) -> None:
    pool = make_pool()

    async def main() -> tuple[dict[str, Episode], dict[str, Episode]]:
        async with pool:
            undisturbed = await run(pool, RandomWalk(), games, max_steps=6, concurrency=3)
            killer = Killer(pool, games[4], times=1)
            return undisturbed, await run(pool, killer, games, max_steps=6, concurrency=3)

    undisturbed, episodes = asyncio.run(main())
    assert story(episodes) == story(undisturbed)
    assert pool.deaths == 1
    assert episodes[games[4].game_id].restarts == 1
    restarted = [name for name, e in episodes.items() if e.restarts]
    assert len(restarted) <= 3 and all(episodes[name].restarts == 1 for name in restarted)  # those being played
    assert all(e.restarts == 0 for e in undisturbed.values())


def test_an_environment_that_always_dies_costs_its_own_game_only(games: list[Game], monkeypatch) -> None:
    monkeypatch.setattr(rollout, "MAX_RESTARTS", 1)
    pool = make_pool()
    killer = Killer(pool, games[1], times=99)

    async def main() -> dict[str, Episode]:
        async with pool:
            return await run(pool, killer, games[:3], max_steps=6, concurrency=1)

    episodes = asyncio.run(main())
    lost = episodes[games[1].game_id]
    assert (lost.reason, lost.success, lost.steps, lost.restarts) == ("env_died", False, [], 1)
    assert 99 - killer.times == pool.deaths == 2
    assert all(len(episodes[g.game_id].steps) == 6 for g in (games[0], games[2]))


def test_games_are_loaded_while_others_are_played() -> None:
    """With a stand-in for the pool, whose loading takes as long as an episode."""
    events: list[tuple[str, str]] = []
    barrier = BatchBarrier()

    class Env:
        alive = True

        async def reset(self, game: Game) -> Observation:
            events.append(("load", game.game_id))
            await asyncio.sleep(0.02)
            return Observation("You are in a room.", "look around")

        async def step(self, action: str) -> StepResult:
            await asyncio.sleep(0.01)
            return StepResult(Observation("Nothing happens.", "look around"), 0.0, False, False, 0.0, False, True)

    class Pool:
        @contextlib.asynccontextmanager
        async def session(self):
            yield Env()

    class Look:
        name, want_admissible = "look", False

        async def act(self, view: View) -> Decision:
            assert barrier.live == 1  # loading doesn't count
            if view.step == 0:
                events.append(("play", view.game.game_id))
            return Decision("look")

    async def main() -> list[str]:
        games = [Game("alfworld", "train", str(i), "", "") for i in range(6)]
        return [e.game.game_id async for e in run_episodes(Pool(), Look(), games, max_steps=2, seed=1, concurrency=1,
                                                           barrier=barrier)]

    assert asyncio.run(main()) == list("012345")
    assert barrier.live == 0
    assert [game for what, game in events if what == "play"] == list("012345")
    loaded = [sum(what == "load" for what, _ in events[:events.index(("play", str(i)))]) for i in range(6)]
    assert loaded[:3] == [3, 4, 5] and max(loaded) == 6  # the one played next, and two more
