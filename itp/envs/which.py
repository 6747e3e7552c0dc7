"""Which environment a program plays: the games of a split, and what makes an engine, by ``--env``.

The one place besides the environments' own programs that knows them by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from itp.config import flag
from itp.envs.alfworld import AlfworldEnv
from itp.envs.alfworld_missions import MissionEnv
from itp.envs.base import TextEnv
from itp.envs.scienceworld import ScienceworldEnv
from itp.envs.scienceworld_games import ScienceworldFlags
from itp.envs.scienceworld_games import list_games as list_scienceworld
from itp.games import ENVIRONMENTS, Game, list_games, with_other_missions


@dataclass
class EnvFlags(ScienceworldFlags):
    """The flags of a program that plays either environment."""

    env: str = flag("alfworld", help="environment", choices=ENVIRONMENTS)
    missions: int = flag(1, help="ALFWorld: missions in the world of each game: its own and others posed in words")


def games_of(flags: EnvFlags, split: str, root: str) -> list[Game]:
    """The games of a split; ``root`` is the folder of ALFWorld's."""
    return list_scienceworld(split, flags) if flags.env == "scienceworld" else list_games("alfworld", split, root)


def missions_of(flags: EnvFlags, game: Game) -> list[Game]:
    """``game``, and for ALFWorld the other missions in its world."""
    return with_other_missions(game, flags.missions) if flags.env == "alfworld" else [game]


def scienceworld_engine(flags: ScienceworldFlags, *, want_admissible: bool, expert: str = "") -> Callable[[], TextEnv]:
    """The same for ScienceWorld alone."""
    return functools.partial(ScienceworldEnv, want_admissible, expert, flags.jar_path, flags.env_step_limit)


def engine_of(flags: EnvFlags, *, want_admissible: bool, expert: str = "") -> Callable[[], TextEnv]:
    """What makes an engine, picklable.  ``expert``: ALFWorld's handcoded or planner, ScienceWorld's gold."""
    if flags.env == "scienceworld":
        return scienceworld_engine(flags, want_admissible=want_admissible, expert=expert)
    return functools.partial(MissionEnv if flags.missions > 1 else AlfworldEnv, want_admissible, expert=expert)
