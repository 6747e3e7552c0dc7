"""What earlier trials in the same room tell about the next one: IMPLEMENT's two kinds of conditions.

An *object list* holds the types of the objects that a receptacle showed at its first visit of a trial, without their
numbers.  A *failed action* holds an action that the engine didn't take, with the agent's place, what it held, and the
state of the receptacle that the action names last.  A world model that was trained with them
(:mod:`world_model.data_processing.metaicl`) predicts what a receptacle holds, and what doesn't work, from few or many.

They are written as two files, in the published form, by a key for each room::

    object_lists.json     {KEY: {"cabinet 1": ["mug", "plate"]}}
    failed_actions.json   {KEY: [["heat mug 1 with fridge 1", "fridge 1", "mug 1", {"visited": false, ...}]]}

Here KEY is the id of the game (the release hashes the path of a result, which is the same for no two trials).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from itp.errors import UserError
from itp.files import read_object, write_json
from itp.text.alfworld_phrases import NAME, contents, kind
from itp.text.belief import Belief
from itp.text.state import State

T = TypeVar("T")

OBJECT_LISTS, FAILED_ACTIONS = "object_lists.json", "failed_actions.json"
NEVER = ("nothing", "examine", "help", "inventory", "look")
"""Words of actions that are never conditions."""
AT_RANDOM = 15
"""Conditions of each kind that aren't relevant to the action, at most."""
_WRITE_AGAIN = "write it with python -m foresight_eval.extract_conditions"
_TARGET = re.compile(rf"({NAME})$")


@dataclass(frozen=True)
class FailedAction:
    """An action that failed.  ``location``, ``inventory`` and ``target`` are the published form's values."""

    action: str
    location: str
    inventory: Any
    target: Mapping[str, Any]

    @property
    def row(self) -> list[Any]:
        return [self.action, self.location, self.inventory, dict(self.target)]


@dataclass(frozen=True)
class Conditions:
    """Object lists by receptacle, and failed actions; both in the order in which they were met."""

    object_lists: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    failed: tuple[FailedAction, ...] = ()

    def __add__(self, later: Conditions) -> Conditions:
        """Those of two trials: of two lists of one receptacle the earlier one, and each failure once."""
        new = tuple(one for one in later.failed if one not in self.failed)
        return Conditions({**later.object_lists, **self.object_lists}, (*self.failed, *new))

    @classmethod
    def of(cls, state: State, invalid: Sequence[bool]) -> Conditions:
        """Those of one trial, of which ``state`` is the last state and ``invalid`` tells which actions failed."""
        belief, lists, failed = Belief.of(State(state.task, state.first)), {}, []
        for (action, observation), wrong in zip(state.history, invalid, strict=True):
            for place, things, _ in contents(observation):
                lists.setdefault(place, types(things))
            if wrong and not names_nothing(action) and (one := failed_in(belief, action)) not in failed:
                failed.append(one)
            belief = belief.after(action, observation)
        return cls(lists, tuple(failed))

    @classmethod
    def of_all(cls, trials: Iterable[tuple[State, Sequence[bool]]]) -> Conditions:
        """Those of several trials in the same room, in order."""
        return sum((cls.of(state, invalid) for state, invalid in trials), cls())

    def chosen(self, belief: Belief, action: str, opens: Collection[str], draw: random.Random,
               at_random: int = AT_RANDOM) -> Conditions:
        """Those that a prediction of ``action`` is given: all relevant ones, and ``at_random`` others of each kind.

        A list is relevant if it is the target receptacle's.  A failure is relevant if it happened at the same place,
        with the same inventory, or to the same action.  Only ``open``, and ``go to`` a receptacle whose type isn't in
        ``opens``, show contents; no other action is given lists.
        """
        now, target, lists, failed = belief.to_json(), target_of(action), [], []
        if shows_contents(action, opens):
            lists = _chosen([*self.object_lists.items()], lambda row: row[0] == target, draw, at_random)
        if not names_nothing(action):
            failed = _chosen(self.failed, lambda one: (
                one.location == now["agent_location"] or one.inventory == now["inventory"] or one.action == action
            ), draw, at_random)
        return Conditions(dict(lists), tuple(failed))


def _chosen(items: Sequence[T], relevant: Callable[[T], bool], draw: random.Random, at_random: int) -> list[T]:
    others = [i for i, item in enumerate(items) if not relevant(item)]
    kept = set(draw.sample(others, min(at_random, len(others))))
    return [item for i, item in enumerate(items) if i in kept or relevant(item)]


def types(things: Iterable[str]) -> tuple[str, ...]:
    """The types of objects, in their order."""
    return tuple(map(kind, things))


def names_nothing(action: str) -> bool:
    """Whether the action is one that is never a condition."""
    return any(word in NEVER for word in action.split())


def target_of(action: str) -> str:
    """The receptacle or object that the action names last; empty where it names none."""
    match = _TARGET.search(action.strip())
    return match[1] if match else ""


def shows_contents(action: str, opens: Collection[str]) -> bool:
    """Whether the action shows what a receptacle holds: ``open``, or ``go to`` one that can't be closed."""
    verb, target = action.strip().partition(" ")[0], target_of(action)
    return bool(target) and (verb == "open" or verb == "go" and kind(target) not in opens)


def failed_in(belief: Belief, action: str) -> FailedAction:
    """``action``, which failed in ``belief``."""
    now = belief.to_json()
    return FailedAction(action, now["agent_location"], now["inventory"], now["world_state"].get(target_of(action), {}))


# --- the two files


def write_conditions(folder: str | Path, rooms: Mapping[str, Conditions]) -> None:
    """Write both files, by the rooms' keys."""
    write_json(Path(folder) / OBJECT_LISTS, {key: {place: list(things) for place, things in room.object_lists.items()}
                                             for key, room in rooms.items()})
    write_json(Path(folder) / FAILED_ACTIONS, {key: [one.row for one in room.failed] for key, room in rooms.items()})


def read_conditions(folder: str | Path) -> dict[str, Conditions]:
    """What :func:`write_conditions`, or the release, wrote.  Raises UserError, which names file and key."""
    lists, failed = (read_object(Path(folder) / name, advice=_WRITE_AGAIN) for name in (OBJECT_LISTS, FAILED_ACTIONS))
    return {key: Conditions(object_lists_of(lists.get(key, {}), f"{folder}/{OBJECT_LISTS}: {key[:60]!r}"),
                            failed_of(failed.get(key, []), f"{folder}/{FAILED_ACTIONS}: {key[:60]!r}"))
            for key in dict.fromkeys([*lists, *failed])}


def object_lists_of(value: Any, where: str, advice: str = _WRITE_AGAIN) -> dict[str, tuple[str, ...]]:
    """Object lists from JSON.  Raises UserError, which begins with ``where`` and ends with ``advice``."""
    if not isinstance(value, dict) or not all(
            re.fullmatch(NAME, place) and isinstance(things, list) and all(isinstance(thing, str) for thing in things)
            for place, things in value.items()):
        raise UserError(f"{where}: not lists of object types by receptacle, such as "
                        f'{{"cabinet 1": ["mug", "plate"]}}; {advice}')
    return {place: tuple(things) for place, things in value.items()}


def failed_of(value: Any, where: str, advice: str = _WRITE_AGAIN) -> tuple[FailedAction, ...]:
    """Failed actions from JSON.  Raises UserError, which begins with ``where`` and ends with ``advice``."""
    rows = value if isinstance(value, list) else [None]
    for row in rows:
        if not (isinstance(row, list) and len(row) == 4 and isinstance(row[0], str) and isinstance(row[1], str)
                and isinstance(row[2], (str, list, type(None))) and isinstance(row[3], (dict, type(None)))):
            raise UserError(f"{where}: not rows of action, location, inventory and the target's state; {advice}")
    return tuple(FailedAction(*row[:3], row[3] or {}) for row in rows)
