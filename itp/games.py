"""Games and the lists of them, per environment and split.  Imports no engine.

ScienceWorld's games are in its engine: :mod:`itp.envs.scienceworld_games` lists them.  ALFWorld games lie in the
published layout, whether downloaded (``alfworld-download``) or made by :mod:`itp.envs.alfworld_games`::

    ROOT/json_2.1.1/{train,valid_seen,valid_unseen}/<task>-<object>-..-<scene>/trial_*/game.tw-pddl
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from itp.runtime import UserError

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

ALFWORLD_GAMES = {"train": 3553, "valid_seen": 140, "valid_unseen": 134}
"""How many playable games the published set has."""

ENVIRONMENTS = ("alfworld", "scienceworld")
K_MAX = {"alfworld": 5, "scienceworld": 8}
"""The paper's K_max."""

ALFWORLD_TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)


@dataclass(frozen=True)
class Game:
    """One game: enough to load it in another process and to name it in a result.

    ``mission``: 0 is the game's own; n poses the n-th other mission of its ``traj_data.json`` in the same
    world (see :func:`with_other_missions`), for gathering training data only.
    ``path``: ALFWorld's game file; ScienceWorld's ``task/variation/simplification``.
    ``max_steps``: the steps that the protocol gives this game; 0: as many as the program says.
    """

    env: str
    split: str
    game_id: str
    path: str
    task_type: str
    mission: int = 0
    max_steps: int = 0


def resolve_split(name: str) -> str:
    """``dev``, ``seen``, ``test``, ... to the folder's name; anything unknown is an error."""
    if name not in SPLIT_ALIASES:
        raise UserError(f"unknown split {name!r}: choose one of {', '.join(SPLIT_ALIASES)}")
    return SPLIT_ALIASES[name]


def list_games(env: str, split: str, root: str | Path, only_ids: Sequence[int] = ()) -> list[Game]:
    """All playable ALFWorld games of a split, in a fixed order (sorted by path).

    ``root`` is the folder that holds ``json_2.1.1`` (or that folder itself).  ``only_ids`` keeps the
    games at these indices of that order.  Raises UserError where there is no game to play.
    """
    if env != "alfworld":
        raise UserError(f"unknown environment {env!r}: choose alfworld")
    games = _list_alfworld(resolve_split(split), Path(root))
    if not games:
        raise UserError(
            f"no playable game under {root} for split {split!r}: download ALFWorld's with "
            f"`alfworld-download --data-dir {root}`, or make some with "
            f"`python -m itp.envs.alfworld_games --out {root}`"
        )
    out_of_range = [i for i in only_ids if not 0 <= i < len(games)]
    if out_of_range:
        raise UserError(f"only_ids {out_of_range}: split {split!r} has games 0..{len(games) - 1}")
    return [games[i] for i in only_ids] if only_ids else games


def spread(items: Sequence[T], n: int) -> Sequence[T]:
    """``n`` of the items, at equal distances (0, or more than there are: all).

    Lists of games are sorted by task, so that the first ``n`` would be of one type.
    """
    return [items[i * len(items) // n] for i in range(n)] if 0 < n < len(items) else items


def with_other_missions(game: Game, n: int) -> list[Game]:
    """``game`` and up to ``n`` - 1 others in its world, where its ``traj_data.json`` names them (made games do)."""
    others = _traj_data(game.path).get("other_missions", [])[:n - 1]
    return [game, *(dataclasses.replace(game, game_id=f"{game.game_id}@{i}", task_type=mission["task_type"], mission=i)
                    for i, mission in enumerate(others, start=1))]


def task_params(game: Game) -> dict[str, object]:
    """What the mission of an ALFWorld game is about (``pddl_params``): for teachers only."""
    return _mission(game)["pddl_params"]


def posed_task(game: Game) -> str:
    """The task sentence of a mission that isn't the game's own."""
    return _mission(game)["task_desc"]


def golden_steps(game: Game) -> int | None:
    """The length of the solution that comes with a game (alfworld's ``walkthrough``); None where none does."""
    if game.env != "alfworld" or game.mission:
        return None
    return len(json.loads(Path(game.path).read_text(encoding="utf-8")).get("walkthrough", ())) or None


def _mission(game: Game) -> dict[str, Any]:
    data = _traj_data(game.path)
    return data["other_missions"][game.mission - 1] if game.mission else data


@functools.lru_cache(maxsize=4096)
def _traj_data(game_path: str) -> dict[str, Any]:
    path = Path(game_path).with_name("traj_data.json")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        data["pddl_params"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise UserError(f"{path}: no readable pddl_params ({error}); download or make the game again") from error
    return data


def _list_alfworld(split: str, root: Path) -> list[Game]:
    base = root if root.name == "json_2.1.1" else root / "json_2.1.1"
    folder = base / split
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder} (give the folder that holds json_2.1.1/{split})")
    games = []
    for directory, _, files in sorted(os.walk(folder)):
        # The engine's own filter: tasks with a movable receptacle or a sliced object have no text game.
        name = os.path.relpath(directory, folder)
        if "game.tw-pddl" not in files or "movable" in name or "Sliced" in name:
            continue
        path = Path(directory) / "game.tw-pddl"
        if not _is_solvable(path):
            continue
        task_type = _task_type(Path(directory))
        if task_type in ALFWORLD_TASK_TYPES:
            game_id = str(path.parent.relative_to(folder))
            games.append(Game("alfworld", split, game_id, str(path), task_type))
    return games


def _task_type(trial: Path) -> str:
    """The task type as the folder's name gives it (``<task>-<object>-..-<scene>/trial_*``)."""
    return trial.parent.name.split("-", 1)[0]


def _is_solvable(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_text(encoding="utf-8")).get("solvable"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a readable game file ({error}); download or make it again") from error
