"""Games, environments and splits by name.  Imports no engine.

:mod:`itp.envs.alfworld.games` and :mod:`itp.envs.scienceworld.games` list the games of a split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from itp.errors import UserError

T = TypeVar("T")
SPLITS = ("train", "valid_seen", "valid_unseen")
SPLIT_ALIASES = {
    "train": "train",
    "valid_seen": "valid_seen",
    "seen": "valid_seen",
    "dev": "valid_seen",
    "valid_unseen": "valid_unseen",
    "unseen": "valid_unseen",
    "test": "valid_unseen",
}
ENVIRONMENTS = ("alfworld", "scienceworld")
K_MAX = {"alfworld": 5, "scienceworld": 8}
"""The paper's K_max."""


@dataclass(frozen=True)
class Game:
    """One game: enough to load it in another process and to name it in a result.

    ``goal``: 0 is the game's own; n poses the n-th other goal of its ``traj_data.json`` in the same
    world (see :func:`itp.envs.alfworld.games.with_alternative_goals`), for gathering training data only.
    ``path``: ALFWorld's game file; ScienceWorld's ``task/variation/simplification``.
    ``max_steps``: the steps that the protocol gives this game; 0: as many as the program says.
    """

    env: str
    split: str
    game_id: str
    path: str
    task_type: str
    goal: int = 0
    max_steps: int = 0


def resolve_split(name: str) -> str:
    """``dev``, ``seen``, ``test``, ... to the folder's name; anything unknown is an error."""
    if name not in SPLIT_ALIASES:
        raise UserError(f"unknown split {name!r}: choose one of {', '.join(SPLIT_ALIASES)}")
    return SPLIT_ALIASES[name]


def spread(items: Sequence[T], n: int) -> Sequence[T]:
    """``n`` of the items, at equal distances (0, or more than there are: all).

    Lists of games are sorted by task, so that the first ``n`` would be of one type.
    """
    return [items[i * len(items) // n] for i in range(n)] if 0 < n < len(items) else items
