"""Perfect imagination: the game itself answers in place of a world model (``--wm_backend engine``).

A second copy of the episode's game is moved to the state that a method asks about, it executes the action, and its
observation is what is imagined: what a world model without errors would say.  So what a policy loses by a wrong world
model can be told from what it loses because it reads imagined steps badly.  The method sees observations only, as from
a world model; it isn't told whether an imagined game is won.  An imagined game goes on after its end, as the engine
lets it.

A state is reached by the actions of its history (:mod:`itp.envs.replay`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from itp.envs.base import TextEnv
from itp.envs.pool import EnvHandle, EnvPool
from itp.envs.replay import follow, reach
from itp.games import Game
from itp.lm.base import Generation, asking
from itp.text.state import State

NAME = "engine (perfect imagination)"
"""The name of the world model in results, so that nobody takes them for those of a learned one."""


class EngineWorldModel:
    """Simulators of games, in processes of their own: the games that are played are never touched.

    ``make_env`` and ``processes``: see :class:`itp.envs.pool.EnvPool`.  At most ``simulators`` games are open; more
    requests at a time wait for each other.  A simulator that is on the way to a state goes on from where it is, and
    any other one starts its game anew.
    """

    def __init__(self, make_env: Callable[[], TextEnv], processes: int, simulators: int) -> None:
        self.pool = EnvPool(make_env, processes)
        self._sessions = contextlib.AsyncExitStack()
        self._seats = asyncio.Semaphore(simulators)
        self._unopened = simulators
        self._idle: list[_Simulator] = []  # the one that was used last is at the end

    def at(self, game: Game, real: State) -> EngineDynamics:
        """What methods ask at the state ``real`` of an episode of ``game``."""
        return EngineDynamics(self, game, real)

    async def observe(self, game: Game, state: State, action: str) -> str:
        """The game's answer to ``action`` in ``state``, which has its whole history.

        Raises UserError where the game doesn't answer as the history says, UnplayableGame and EnvDied as engines do.
        """
        async with self._seats:
            simulator = await self._take(game, state)
            try:
                return await simulator.observe(game, state, action)
            finally:
                self._idle.append(simulator)

    async def _take(self, game: Game, state: State) -> _Simulator:
        """The simulator with the shortest way to ``state``; it isn't idle any more."""
        near = [simulator for simulator in self._idle if simulator.is_on_the_way(game, state)]
        loaded = [simulator for simulator in self._idle if simulator.game == game]
        if near:
            chosen = max(near, key=lambda simulator: len(simulator.reached.history))
        elif loaded:
            chosen = loaded[0]
        elif self._unopened:
            self._unopened -= 1
            return _Simulator(await self._sessions.enter_async_context(self.pool.session()))
        else:
            chosen = self._idle[0]
        self._idle.remove(chosen)
        return chosen

    async def close(self) -> None:
        await self._sessions.aclose()
        await self.pool.close()


@dataclass(frozen=True)
class EngineDynamics:
    """A :class:`itp.agent.world_model.Dynamics` for one step of an episode: of ``game``, in its state ``real``.

    A request counts as one call of the world model, without tokens.
    """

    engine: EngineWorldModel
    game: Game
    real: State

    async def step(self, states: Sequence[State], actions: Sequence[str]) -> list[str]:
        """The game's observations after ``actions`` in ``states`` (same length), which follow from the real state."""
        asked = zip(states, actions, strict=True)
        return list(await asyncio.gather(*(self._observe(self.whole(state), action) for state, action in asked)))

    async def sample(self, state: State, action: str, n: int, seed: int, temperature: float = 1.0) -> list[str]:
        """``n`` times the game's only answer, whatever ``seed`` and ``temperature``."""
        return await self.step([state], [action]) * n

    async def _observe(self, state: State, action: str) -> str:
        with asking("world_model") as answers:
            observation = await self.engine.observe(self.game, state, action)
            answers.append(Generation(observation, 0, 0, 0, "stop"))
        return observation

    def whole(self, state: State) -> State:
        """``state`` with its whole history, of which a method may have left out real steps.

        Raises ValueError for a state that doesn't follow from the real one.
        """
        imagined = len(state.history) + state.omitted - len(self.real.history)
        if 0 <= imagined <= len(state.history):
            tail = state.history[len(state.history) - imagined:]
            whole = replace(self.real, history=(*self.real.history, *tail))
            if state.omitted or whole == state:
                return whole
        raise ValueError(f"{self.game.game_id}: an imagined state that doesn't follow from the episode's")


@dataclass(eq=False)  # each is itself, also where two have reached the same state
class _Simulator:
    """An environment, and the state that it is in.  ``reached`` is None where that isn't known."""

    env: EnvHandle
    game: Game | None = None
    reached: State | None = None

    def is_on_the_way(self, game: Game, state: State) -> bool:
        """Whether ``state`` begins with the state that it is in."""
        here = self.reached
        return (here is not None and self.env.alive and self.game == game
                and here == replace(state, history=state.history[:len(here.history)]))

    async def observe(self, game: Game, state: State, action: str) -> str:
        """Move to ``state``, and execute ``action`` there."""
        passed = len(self.reached.history) if self.is_on_the_way(game, state) else -1
        self.reached = None  # until it is there: a call on the way may fail or be given up
        if passed < 0:
            self.game = game
            await reach(self.env, game, state)
        else:
            await follow(self.env, game, state, passed)
        result = await self.env.step(action)
        self.reached = state.after(action, result.obs.text)
        return result.obs.text
