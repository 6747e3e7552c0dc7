"""The environments by name (``--env``): the games of a split, and a callable that makes an engine.

The place where an environment becomes games and an engine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from itp.config import flag
from itp.envs.alfworld.env import AlfworldEnv
from itp.envs.alfworld.games import list_games, with_alternative_goals
from itp.envs.alfworld.goals import GoalEnv
from itp.envs.base import TextEnv
from itp.envs.scienceworld.env import ScienceworldEnv
from itp.envs.scienceworld.games import ScienceworldFlags, list_games as list_scienceworld
from itp.games import ENVIRONMENTS, Game


@dataclass
class EnvFlags(ScienceworldFlags):
    """The flags of a program that can play both environments."""

    env: str = flag("alfworld", help="environment", choices=ENVIRONMENTS)
    missions: int = flag(1, help="ALFWorld: goals in the world of each game: its own and others posed in words")


def games_of(flags: EnvFlags, split: str, root: str) -> list[Game]:
    """The games of a split; ``root`` is the folder of ALFWorld's games."""
    return list_scienceworld(split, flags) if flags.env == "scienceworld" else list_games(split, root)


def goals_of(flags: EnvFlags, game: Game) -> list[Game]:
    """``game``, and for ALFWorld the other goals in its world."""
    return with_alternative_goals(game, flags.missions) if flags.env == "alfworld" else [game]


def scienceworld_engine(flags: ScienceworldFlags, *, want_admissible: bool, expert: str = "") -> Callable[[], TextEnv]:
    """A picklable callable that makes a ScienceWorld engine.  ``expert``: gold, or empty."""
    return functools.partial(ScienceworldEnv, want_admissible, expert, flags.jar_path, flags.env_step_limit)


def engine_of(flags: EnvFlags, *, want_admissible: bool, expert: str = "") -> Callable[[], TextEnv]:
    """A picklable callable that makes an engine.  ``expert``: ALFWorld's handcoded or planner, ScienceWorld's gold."""
    if flags.env == "scienceworld":
        return scienceworld_engine(flags, want_admissible=want_admissible, expert=expert)
    return functools.partial(GoalEnv if flags.missions > 1 else AlfworldEnv, want_admissible, expert=expert)
