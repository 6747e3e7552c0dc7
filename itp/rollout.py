"""The driver: games x a method -> episodes, N at a time.

Evaluation, data collection and online RL use it.  A method is written as if for one
episode; that its model calls become batches is the business of the LMs (:mod:`itp.lm`).
A game may be played several times in order (:class:`Trials`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from itp.envs.base import EnvDied, Observation
from itp.envs.pool import EnvPool
from itp.envs.replay import reach
from itp.errors import PromptTooLong, UnplayableGame, UserError
from itp.games import Game
from itp.lm.base import Usage, metered
from itp.lm.scheduler import BatchBarrier
from itp.methods.base import Decision, EarlierTrial, Method, View
from itp.seeding import derive_seed
from itp.text.state import State

log = logging.getLogger(__name__)

MAX_RESTARTS = 3
"""How often an episode is started again after its environment process died."""

AHEAD = 2
"""Games that are loaded while others are played, so that no model waits for that."""

BROKEN_SHOWN = 10
"""Broken games, as many as an error names."""

Seat = Callable[[], contextlib.AbstractAsyncContextManager[None]]
"""What an episode holds while it is played."""


@dataclass
class Step:
    """One executed decision: the state it was taken in, and what the environment answered."""

    state: State
    decision: Decision
    observation: str
    reward: float
    score: float
    done: bool
    invalid: bool
    usage: dict[str, Usage] = field(default_factory=dict)
    seconds: float = 0.0
    """From observation to action: what the decision took."""
    info: dict[str, Any] = field(default_factory=dict)
    """What else the engine reported."""


@dataclass
class Episode:
    """A finished episode.

    ``reason``: success, step_limit, prompt_too_long, or how the engine ended it (engine_end where there is one way
    only).  env_died and unplayable: nothing was played, see :class:`LeftOut`.
    ``first``: the state that it began in.  ``trial``: how many episodes of the game came before.
    """

    game: Game
    steps: list[Step] = field(default_factory=list)
    success: bool = False
    score: float = 0.0
    reason: str = "step_limit"
    restarts: int = 0
    unfinished: dict[str, Usage] = field(default_factory=dict)
    """What was asked of each model for an action that wasn't chosen, because a prompt was too long."""
    fault: str = ""
    """Why the game is unplayable."""
    first: State | None = None
    trial: int = 0

    @property
    def left_out(self) -> bool:
        """Whether nothing was played."""
        return self.reason in ("env_died", "unplayable")

    @property
    def usage(self) -> dict[str, Usage]:
        """What the whole episode asked of each model."""
        total: dict[str, Usage] = {}
        for asked in (*(step.usage for step in self.steps), self.unfinished):
            for role, usage in asked.items():
                total.setdefault(role, Usage())
                total[role] += usage
        return total


@dataclass
class LeftOut:
    """Games of a run that weren't played.

    ``lost``: those whose environment died again and again, by their ids.  ``broken``: why the others can't be played.
    """

    lost: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def takes(self, episode: Episode) -> bool:
        """Whether nothing was played in ``episode``, which is noted then."""
        if episode.reason == "env_died":
            self.lost.append(episode.game.game_id)
        elif episode.reason == "unplayable":
            self.broken.append(episode.fault)
        return episode.left_out

    def check_none_lost(self, what: str) -> None:
        """Raises UserError where games were lost, before anything is made of the others: they only need another try.

        ``what`` they are called.
        """
        if self.lost:
            raise UserError(f"{len(self.lost)} {what} lost their environment process again and again "
                            f"({', '.join(self.lost[:3])}); start the same command again to play them")

    def check_none_broken(self, what_now: str = "the same command plays them once they are mended") -> None:
        """Raises UserError where games were broken, which names them: at the end of a run."""
        if found := list(dict.fromkeys(self.broken)):
            more = f"; and {len(found) - BROKEN_SHOWN} more (see the warnings above)" * (len(found) > BROKEN_SHOWN)
            raise UserError(f"{len(found)} left out: {'; '.join(found[:BROKEN_SHOWN])}{more}; the others are played, "
                            f"and {what_now}")


class Trials(Protocol):
    """What has several trials of each game played, and keeps them."""

    def earlier(self, game: Game) -> tuple[EarlierTrial, ...] | None:
        """The ended trials of ``game`` that are kept, in order; None where no trial more is wanted."""

    def keep(self, episode: Episode) -> None:
        """Keep a trial.  The next one of its game starts after that."""

    def keep_note(self, game: Game, trial: int, note: str, usage: dict[str, Usage]) -> None:
        """Keep what the method said of a kept trial, and what it asked of each model for that."""


async def run_episodes(pool: EnvPool, method: Method, games: Iterable[Game], *, max_steps: int, seed: int,
                       concurrency: int, barrier: BatchBarrier | None = None,
                       trials: Trials | None = None) -> AsyncIterator[Episode]:
    """Play every game once, or as often as ``trials`` says, ``concurrency`` at a time; yield the episodes as they end.

    ``concurrency`` + AHEAD environments are open.  Each takes the next of ``games`` when its last one has ended.  An
    episode has ``max_steps`` steps at most, or as many as its game's protocol says.

    The random choices of an episode derive from (seed, game, step, trial), so neither the concurrency nor the order of
    the games changes what happens in it.  The trials of a game are played one after the other.  A prompt that the
    model's context doesn't hold ends its episode, and counts as no success.  A broken game is left out
    (:class:`LeftOut`).  Any other error of a method ends the run.
    """
    todo = iter(games)
    finished: asyncio.Queue[Episode | None] = asyncio.Queue()  # None: all workers have ended, or one failed
    seats = asyncio.Semaphore(concurrency)

    @contextlib.asynccontextmanager
    async def seat() -> AsyncIterator[None]:
        async with seats:
            if barrier is not None:
                barrier.add(live=1)
            try:
                yield
            finally:
                if barrier is not None:
                    barrier.add(live=-1)

    async def worker() -> None:
        game = next(todo, None)
        if game is None:
            return
        async with pool.session() as env:
            while game is not None:
                async for episode in _trials_of(game, env):
                    finished.put_nowait(episode)
                game = next(todo, None)

    async def _trials_of(game: Game, env) -> AsyncIterator[Episode]:
        if trials is None:
            yield await play(env, method, game, max_steps=max_steps, seed=seed, seat=seat)
            return
        while (earlier := trials.earlier(game)) is not None:
            if earlier and not earlier[-1].note:
                earlier = await _with_note(earlier, game, method, trials, seed=seed, seat=seat)
            episode = await play(env, method, game, max_steps=max_steps, seed=seed, seat=seat, earlier=earlier)
            trials.keep(episode)
            yield episode
            if episode.left_out:
                return

    workers = [asyncio.create_task(worker()) for _ in range(concurrency + AHEAD)]
    everyone = asyncio.gather(*workers)
    everyone.add_done_callback(lambda _: finished.put_nowait(None))
    try:
        while (episode := await finished.get()) is not None:
            yield episode
        everyone.result()  # raises what a worker raised
    finally:
        for task in workers:
            task.cancel()
        # Also where nobody takes the next episode any more: then no one else would look at what ``everyone`` raised.
        await asyncio.gather(*workers, everyone, return_exceptions=True)


async def _with_note(earlier: tuple[EarlierTrial, ...], game: Game, method: Method, trials: Trials, *, seed: int,
                     seat: Seat) -> tuple[EarlierTrial, ...]:
    """``earlier`` with what ``method`` says of the last one, which is kept before the next trial starts."""
    trial = len(earlier) - 1
    async with seat():
        with metered() as usage:
            try:
                note = await method.look_back(earlier[-1], derive_seed(seed, game.game_id, "look back", trial))
            except PromptTooLong as error:
                log.warning("%s, trial %d: no note is made of it: %s", game.game_id, trial + 1, error)
                note = ""
    if note or usage:
        trials.keep_note(game, trial, note, usage)
    return (*earlier[:-1], replace(earlier[-1], note=note))


def step_seed(seed: int, game: Game, step: int, trial: int) -> int:
    """The seed of a step; a first trial has those of a game that is played once."""
    return derive_seed(seed, game.game_id, step, *(("trial", trial) if trial else ()))


async def run_workers(worker: Callable[[], Awaitable[None]], n: int) -> None:
    """``n`` of ``worker`` at a time, each to its end.

    The first error cancels the others, and is raised when all have ended.
    """
    workers = [asyncio.create_task(worker()) for _ in range(n)]
    try:
        await asyncio.gather(*workers)
    finally:
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def play(env, method: Method, game: Game, *, max_steps: int, seed: int, seat: Seat,
               begin: State | None = None, earlier: tuple[EarlierTrial, ...] = ()) -> Episode:
    """One episode on one environment session, started again if the environment's process dies.

    The game is loaded first; ``seat`` is held from the first step to the last.  ``begin``: the state with its whole
    history where the episode begins, which then has up to ``max_steps`` steps more and doesn't repeat those before.
    ``earlier``: the trials of the game before this one.
    """
    async def start() -> Observation:
        return await env.reset(game) if begin is None else await reach(env, game, begin)

    for restarts in range(MAX_RESTARTS + 1):
        try:
            observation = await start()
            async with seat():
                if not env.alive:  # another game's accident, while this one waited
                    observation = await start()
                state = begin or State(observation.task, observation.text)
                episode = await _play_once(env, method, game, observation, state, max_steps=max_steps, seed=seed,
                                           earlier=earlier)
        except EnvDied as died:
            log.warning("%s: %s; starting the episode again", game.game_id, died)
            continue
        except UnplayableGame as error:
            log.warning("left out: %s", error)
            return Episode(game, reason="unplayable", restarts=restarts, fault=str(error))
        episode.restarts = restarts
        return episode
    return Episode(game, reason="env_died", restarts=MAX_RESTARTS)


async def _play_once(env, method: Method, game: Game, observation: Observation, state: State, *, max_steps: int,
                     seed: int, earlier: tuple[EarlierTrial, ...]) -> Episode:
    episode, first = Episode(game, first=state, trial=len(earlier)), len(state.history)
    for step in range(first, first + (game.max_steps or max_steps)):
        view = View(game, step, state, observation, step_seed(seed, game, step, len(earlier)),
                    tuple(s.decision for s in episode.steps), tuple(s.invalid for s in episode.steps), earlier)
        start = time.perf_counter()
        try:
            with metered() as usage:
                decision = await method.act(view)
        except PromptTooLong as error:
            log.warning("%s, step %d: the episode ends here: %s", game.game_id, step, error)
            episode.reason, episode.unfinished = "prompt_too_long", usage
            break
        seconds = time.perf_counter() - start
        result = await env.step(decision.action)
        observation = result.obs
        episode.steps.append(Step(state, decision, observation.text, result.reward, result.score, result.done,
                                  result.invalid, usage, seconds, result.info))
        state = state.after(decision.action, observation.text)
        episode.score, episode.success = result.score, result.success
        if result.done:
            episode.reason = "success" if result.success else result.info.get("ending", "engine_end")
            break
    return episode
