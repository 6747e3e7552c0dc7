"""A state again: a game is moved to the state of an episode by the episode's own actions.

Both engines repeat themselves: an ALFWorld game has no chance in it, and ScienceWorld's JVMs run with fixed hash codes
(:mod:`itp.envs.scienceworld.env`), without which its texts differ from one JVM to another.  Each observation on the way
is compared with the state's.
"""

from __future__ import annotations

from itp.envs.base import Observation
from itp.envs.pool import EnvHandle
from itp.errors import UserError
from itp.games import Game
from itp.text.state import State

SHOWN = 200
"""Characters of an observation that an error shows at most."""


async def reach(env: EnvHandle, game: Game, state: State) -> Observation:
    """Start ``game`` and move it to ``state``, which has its whole history; the observation there.

    Raises UserError where the game doesn't answer as the history says, UnplayableGame and EnvDied as engines do.
    """
    observation = await env.reset(game)
    check_same(game, "at its start", f"{observation.task}\n{observation.text}", f"{state.task}\n{state.first}")
    return await follow(env, game, state, 0) or observation


async def follow(env: EnvHandle, game: Game, state: State, passed: int) -> Observation | None:
    """The same from where the first ``passed`` actions of the history have led; None where that is all of it."""
    observation = None
    for i, (action, recorded) in enumerate(state.history[passed:], start=passed + 1):
        observation = (await env.step(action)).obs
        check_same(game, f"after step {i}, {action!r},", observation.text, recorded)
    return observation


def check_same(game: Game, when: str, seen: str, recorded: str) -> None:
    """Raises UserError where a copy of ``game`` says something else than the episode saw."""
    if seen != recorded:
        raise UserError(f"{game.game_id}: {when} its copy here says {seen[:SHOWN]!r}, and the episode saw "
                        f"{recorded[:SHOWN]!r}; a state can be reached again only in a game that repeats itself")
