"""ALFWorld's games on disk.  Imports no engine.

They lie in the published layout, whether downloaded (``alfworld-download``) or made by
:mod:`itp.envs.alfworld.generate`::

    ROOT/json_2.1.1/{train,valid_seen,valid_unseen}/<task>-<object>-..-<scene>/trial_*/game.tw-pddl
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from itp.errors import UserError
from itp.files import checked_object, read_object
from itp.games import Game, resolve_split

MAKE_AGAIN = "download or make the game again"

ALFWORLD_GAMES = {"train": 3553, "valid_seen": 140, "valid_unseen": 134}
"""The number of playable games in each split of the published set."""

ALFWORLD_TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)


def list_games(split: str, root: str | Path, only_ids: Sequence[int] = ()) -> list[Game]:
    """All playable ALFWorld games of a split, in a fixed order (sorted by path).

    ``root`` is the folder that holds ``json_2.1.1`` (or that folder itself).  ``only_ids`` keeps the
    games at these indices of that order.  Raises UserError where there is no game to play.
    """
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


def with_alternative_goals(game: Game, n: int) -> list[Game]:
    """``game`` and up to ``n`` - 1 other goals in its world.  Only generated games name such goals (traj_data.json)."""
    others = _other_missions(game)[:n - 1]
    return [game, *(dataclasses.replace(game, game_id=f"{game.game_id}@{i}", task_type=goal["task_type"], goal=i)
                    for i, goal in enumerate(others, start=1))]


def task_params(game: Game) -> dict[str, object]:
    """The parameters of an ALFWorld game's goal (``pddl_params``), which experts alone may know."""
    return _posed_goal(game)["pddl_params"]


def posed_task(game: Game) -> str:
    """The task sentence of a goal other than the game's own."""
    return _posed_goal(game)["task_desc"]


def golden_steps(game: Game) -> int | None:
    """The length of the solution in the game file (alfworld's ``walkthrough``); None where there is none."""
    if game.env != "alfworld" or game.goal:
        return None
    return len(read_object(game.path, advice=MAKE_AGAIN).get("walkthrough", ())) or None


def _posed_goal(game: Game) -> dict[str, Any]:
    if not game.goal:
        return _traj_data(game.path)
    others = _other_missions(game)
    if len(others) < game.goal:
        raise UserError(f"{game.path}: traj_data.json beside it has no goal {game.goal}; {MAKE_AGAIN}")
    return others[game.goal - 1]


def _other_missions(game: Game) -> list[dict[str, Any]]:
    where, others = f"{Path(game.path).with_name('traj_data.json')}", _traj_data(game.path).get("other_missions", [])
    if not isinstance(others, list):
        raise UserError(f"{where}: 'other_missions' isn't a list; {MAKE_AGAIN}")
    fields = {"task_type": str, "pddl_params": dict, "task_desc": str}
    return [checked_object(goal, f"{where}: goal {i}", fields, MAKE_AGAIN) for i, goal in enumerate(others, start=1)]


@functools.lru_cache(maxsize=4096)
def _traj_data(game_path: str) -> dict[str, Any]:
    return read_object(Path(game_path).with_name("traj_data.json"), {"pddl_params": dict}, MAKE_AGAIN)


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
    """The task type in the folder's name (``<task>-<object>-..-<scene>/trial_*``)."""
    return trial.parent.name.split("-", 1)[0]


def _is_solvable(path: Path) -> bool:
    try:
        return bool(read_object(path, advice=MAKE_AGAIN).get("solvable"))
    except UserError as error:
        raise UserError(f"{path}: not a readable game file ({error})") from error
