"""ALFWorld's games on disk.  Imports no engine.

They lie in the published layout, whether downloaded (``alfworld-download``) or made by
:mod:`itp.envs.alfworld.generate`::

    ROOT/json_2.1.1/{train,valid_seen,valid_unseen}/<task>-<object>-..-<scene>/trial_*/game.tw-pddl
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from itp.errors import UnplayableGame, UserError
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
GAME_FIELDS = ("pddl_domain", "grammar", "pddl_problem")
"""The texts that the engine reads in a game file."""
GOAL_PARAMS = ("object_target", "parent_target", "toggle_target")
"""What an expert reads of a goal's ``pddl_params``."""


def list_games(split: str, root: str | Path, only_ids: Sequence[int] = ()) -> list[Game]:
    """All playable ALFWorld games of a split, in a fixed order (sorted by path).

    ``root`` is the folder that holds ``json_2.1.1`` (or that folder itself).  ``only_ids`` keeps the
    games at these indices of that order.  Raises UserError where there is no game to play.

    A game whose file can't be read stays in the list, so that the others keep their indices when it has been mended.
    It raises UnplayableGame when it is played.
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
    """``game`` and up to ``n`` - 1 other goals in its world.  Only generated games name such goals (traj_data.json).

    Where that file can't be read, one other goal stands for all: it raises UnplayableGame when it is played.
    """
    if n <= 1:
        return [game]
    try:
        others = _other_missions(game)[:n - 1]
    except UnplayableGame:
        others = [{"task_type": game.task_type}]
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
    solution = _read_game(Path(game.path)).get("walkthrough")
    return len(solution) if isinstance(solution, list) and solution else None


def read_game_file(path: Path) -> dict[str, Any]:
    """What a game file holds.  Raises UnplayableGame where the engine can't load it."""
    data = _read_game(path)
    if missing := [name for name in GAME_FIELDS if not isinstance(data.get(name), str) or not data[name].strip()]:
        raise UnplayableGame(f"{path}: the game file has no {', '.join(missing)}; {MAKE_AGAIN}")
    return data


def is_whole(game: Game) -> bool:
    """Whether the game's file can be read."""
    try:
        read_game_file(Path(game.path))
    except UnplayableGame:
        return False
    return True


def _read_game(path: Path) -> dict[str, Any]:
    try:
        return read_object(path, advice=MAKE_AGAIN)
    except UserError as error:
        raise UnplayableGame(f"{path}: not a readable game file ({error})") from error


def _posed_goal(game: Game) -> dict[str, Any]:
    if not game.goal:
        return _traj_data(game.path)
    others = _other_missions(game)
    if len(others) < game.goal:
        raise UnplayableGame(f"{game.path}: traj_data.json beside it has no goal {game.goal}; {MAKE_AGAIN}")
    return others[game.goal - 1]


def _other_missions(game: Game) -> list[dict[str, Any]]:
    where, others = f"{Path(game.path).with_name('traj_data.json')}", _traj_data(game.path).get("other_missions", [])
    fields = {"task_type": str, "pddl_params": dict, "task_desc": str}
    with _unplayable():
        if not isinstance(others, list):
            raise UserError(f"{where}: 'other_missions' isn't a list; {MAKE_AGAIN}")
        return [_goal(checked_object(goal, f"{where}: goal {i}", fields, MAKE_AGAIN), f"{where}: goal {i}")
                for i, goal in enumerate(others, start=1)]


@functools.lru_cache(maxsize=4096)
def _traj_data(game_path: str) -> dict[str, Any]:
    with _unplayable():
        return _goal(read_object(Path(game_path).with_name("traj_data.json"), {"pddl_params": dict}, MAKE_AGAIN),
                     f"{Path(game_path).with_name('traj_data.json')}")


def _goal(goal: dict[str, Any], where: str) -> dict[str, Any]:
    """A goal that has what experts read.  Raises UserError, which begins with ``where``."""
    checked_object(goal["pddl_params"], f"{where}: pddl_params", dict.fromkeys(GOAL_PARAMS, str), MAKE_AGAIN)
    return goal


@contextlib.contextmanager
def _unplayable() -> Iterator[None]:
    """A goal that can't be read makes its game one that can't be played."""
    try:
        yield
    except UserError as error:
        raise UnplayableGame(str(error)) from error


def _list_alfworld(split: str, root: Path) -> list[Game]:
    base = root if root.name == "json_2.1.1" else root / "json_2.1.1"
    folder = base / split
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder} (give the folder that holds json_2.1.1/{split})")
    games, broken = [], []
    for directory, folders, files in sorted(os.walk(folder)):
        # The engine's own filter: tasks with a movable receptacle or a sliced object have no text game.
        name = os.path.relpath(directory, folder)
        if "game.tw-pddl" not in (*folders, *files) or "movable" in name or "Sliced" in name:
            continue
        path = Path(directory) / "game.tw-pddl"
        task_type = _task_type(Path(directory))
        if task_type not in ALFWORLD_TASK_TYPES:
            continue
        try:
            if not _read_game(path).get("solvable"):
                continue
        except UnplayableGame as error:
            broken.append(error)
        games.append(Game("alfworld", split, str(path.parent.relative_to(folder)), str(path), task_type))
    if broken and len(broken) == len(games):  # then the folder is at fault, not a game
        raise broken[0]
    return games


def _task_type(trial: Path) -> str:
    """The task type in the folder's name (``<task>-<object>-..-<scene>/trial_*``)."""
    return trial.parent.name.split("-", 1)[0]
