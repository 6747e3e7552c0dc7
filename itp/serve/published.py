"""What IMPLEMENT's server is sent, as what this project works with.

A published state is ``{agent_location, inventory, world_state: {receptacle: {visited, open, objects}}}``, the JSON of a
:class:`itp.text.belief.Belief`.  A history is lines such as ``3. You successfully go to shelf 1.`` and ``4. You attempt
to open drawer 1 but fail.``  Conditions are those of :mod:`itp.text.conditions`.  :func:`text_state` makes the text
state that a policy is prompted with: the game's sentences, as the state and the history imply them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict

from itp.envs.alfworld.vocabulary import openable_types
from itp.errors import UserError
from itp.methods.base import EarlierTrial
from itp.text.alfworld_phrases import (
    CARRIES, MOVE_OR_PUT, NAME, NOTHING_HAPPENS, OPENING, SEES, TAKE, TRANSFORM, arrived, closed, go_to, kind, listed,
    moved, opened, picked_up, sight, transformed, turned_on,
)
from itp.text.belief import MIDDLE, NOT_OPENABLE, Belief
from itp.text.conditions import Conditions, FailedAction, failed_of, object_lists_of
from itp.text.state import State

T = TypeVar("T")

_DONE = re.compile(r"(?:\d+\.\s*)?You successfully (.+?)\.?\s*")
_FAILED = re.compile(r"(?:\d+\.\s*)?You (?:attempt|attempted) to (.+?),? but (?:fail|failed)\.?\s*")
_FORM = "docs/serving.md shows the form"


MAX_TEXT = 10_000
"""Characters of a text at most: several times the longest observation.  Reading takes time that grows with
their square."""


def _readable(text: str) -> str:
    """``text``, if it isn't too long, and is Unicode that can be written; JSON can hold half a character."""
    if len(text) > MAX_TEXT:
        raise ValueError(f"has {len(text)} characters, and may have {MAX_TEXT}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds half of a surrogate pair") from error
    return text


Text = Annotated[str, AfterValidator(_readable)]


class ReceptacleState(BaseModel):
    """``open``: "N/A" for what can't be closed, or isn't known."""

    model_config = ConfigDict(extra="forbid")

    visited: bool = False
    open: bool | Literal["N/A"] = NOT_OPENABLE
    objects: list[Text] | None = None


class PublishedState(BaseModel):
    """``inventory``: the objects held, as a list or as text; ``""``, ``"nothing"`` and null for none."""

    model_config = ConfigDict(extra="forbid")

    agent_location: Text = MIDDLE
    inventory: list[Text] | Text | None = None
    world_state: dict[Text, ReceptacleState]


def belief_of(state: PublishedState) -> Belief:
    """Raises UserError for what names no receptacles or objects."""
    location = state.agent_location.strip() or MIDDLE
    belief = Belief.from_json(state.model_dump() | {"agent_location": location, "inventory": _held(state.inventory)})
    if belief.location and belief.location not in belief.places:
        raise UserError(f"agent_location {location!r}: neither a receptacle of world_state nor {MIDDLE!r}")
    return belief


def _held(inventory: list[str] | str | None) -> list[str]:
    if not isinstance(inventory, str):
        return inventory or []
    names = [name.strip().removeprefix("a ") for name in inventory.split(",") if name.strip()]
    return [] if names in (["nothing"], ["none"], ["None"], ["empty"]) else names


def _object_lists(value: Any) -> dict[str, tuple[str, ...]]:
    return object_lists_of({} if value is None else value, "object lists", _FORM)


def _failed(value: Any) -> tuple[FailedAction, ...]:
    failed = failed_of([] if value is None else value, "failed actions", _FORM)
    for one in failed:
        _readable(one.action)
    return failed


def _refusing(read: Callable[[Any], T]) -> Callable[[Any], T]:
    """``read``, whose UserError becomes an error of the request's field."""
    def checked(value: Any) -> T:
        try:
            return read(value)
        except UserError as error:
            raise ValueError(str(error)) from error
    return checked


PublishedBelief = Annotated[PublishedState, AfterValidator(_refusing(belief_of))]
"""A published state in a request, which is read as a Belief."""
ObjectLists = Annotated[Any, AfterValidator(_refusing(_object_lists))]
Failed = Annotated[Any, AfterValidator(_refusing(_failed))]
"""Conditions in a request, one state's; null for none."""


def perceive(before: Belief, action: str, success: bool, observation: str) -> dict[str, Any]:
    """The published state after ``action`` was answered with ``observation``; as it was where the action failed."""
    return before.after(action, observation if success else NOTHING_HAPPENS).to_json()


def history_of(lines: Sequence[str] | str) -> list[tuple[str, bool]]:
    """(action, did it succeed) of a published history.  Raises UserError for a line that is none."""
    if isinstance(lines, str):
        lines = lines.splitlines()
    history = []
    for line in (line.strip() for line in lines if line.strip()):
        if match := _FAILED.fullmatch(line):
            history.append((match[1], False))
        elif match := _DONE.fullmatch(line):
            history.append((match[1], True))
        else:
            raise UserError(f"history line {line[:80]!r}: neither 'You successfully ...' nor 'You attempt to ... but "
                            "fail'")
    return history


def text_state(goal: str, belief: Belief, lines: Sequence[str] | str) -> State:
    """The text state of an episode: its first observation, and after each action what the game will have said.

    What was where at the time is what is there now, without the takes and puts since.  Raises UserError.
    """
    history = history_of(lines)
    text = State(goal, first_observation(belief))
    contents = {name: set(place.objects) for name, place in belief.places.items()}
    for action, done in reversed(history):
        _undo(contents, action if done else "")
    actions = {action for action, done in history if done}
    openable = {name for name, place in belief.places.items() if place.open is not None}
    were_open = {name for name in openable if belief.places[name].open and f"open {name}" not in actions}
    room = _Room(contents, openable, openable - were_open)
    for action, done in history:
        text = text.after(action, room.said(action) if done else NOTHING_HAPPENS)
    return text


def first_observation(belief: Belief) -> str:
    """What the game says first in a room with these places."""
    return f"{OPENING} Looking quickly around you{SEES}{listed(belief.places)}."


def earlier_trial(goal: str, belief: Belief, known: Conditions) -> EarlierTrial:
    """An earlier trial that showed what is ``known``; the types of objects get numbers from 1 on.  Raises UserError."""
    text, room = State(goal, first_observation(belief)), {}
    for place, types in known.object_lists.items():
        room[place] = {f"{what} {n}" for what, many in Counter(types).items() for n in range(1, many + 1)}
        if wrong := [thing for thing in room[place] if not re.fullmatch(NAME, thing)]:
            raise UserError(f"object list of {place}: {wrong[0].rpartition(' ')[0]!r} is no type such as 'mug'")
    openable = {name for name in room if kind(name) in openable_types()}
    showing = _Room(room, openable, set(openable))
    for place in room:
        for action in (go_to(place), f"open {place}")[:2 if place in openable else 1]:
            text = text.after(action, showing.said(action))
    begin = len(text.history)
    for one in known.failed:
        text = text.after(go_to(one.location), arrived(one.location)) if one.location in belief.places else text
        text = text.after(one.action, NOTHING_HAPPENS)
    invalid = [False] * begin + [seen == NOTHING_HAPPENS for _, seen in text.history[begin:]]
    return EarlierTrial(text, tuple(invalid), success=False)


def _undo(contents: dict[str, set[str]], action: str) -> None:
    """Put back what ``action`` took, and take what it put down."""
    if match := TAKE.fullmatch(action):
        contents.setdefault(match[2], set()).add(match[1])
    elif match := MOVE_OR_PUT.fullmatch(action):
        contents.setdefault(match[2], set()).discard(match[1])


class _Room:
    """What the game says of successful actions.  ``contents``, ``closed``: as at the start of the episode."""

    def __init__(self, contents: dict[str, set[str]], openable: set[str], closed: set[str]) -> None:
        self.contents, self.openable, self.closed = contents, openable, closed
        self.held, self.location = set(), ""

    def said(self, action: str) -> str:
        verb, _, name = action.partition(" ")
        if match := TAKE.fullmatch(action):
            self.contents.setdefault(match[2], set()).discard(match[1])
            self.held.add(match[1])
            return picked_up(match[1], match[2])
        if match := MOVE_OR_PUT.fullmatch(action):
            self.contents.setdefault(match[2], set()).add(match[1])
            self.held.discard(match[1])
            return moved(match[1], match[2])
        if match := TRANSFORM.fullmatch(action):
            return transformed(match[1], match[2], action.rpartition(" with ")[2])
        if action.startswith("go to "):
            self.location = action.removeprefix("go to ")
            return self._seen(self.location)
        if verb == "open":
            self.closed.discard(name)
            return opened(name, self.contents.get(name, ()))
        if verb == "close":
            self.closed.add(name)
            return closed(name)
        if verb == "use":
            return turned_on(name)
        if action == "inventory":
            return f"{CARRIES} {listed(self.held)}." if self.held else "You are not carrying anything."
        if verb == "examine" and name in self.contents:
            return self._seen(name).removeprefix(f"{arrived(name)} ")
        if action == "look" and self.location:
            return f"You are facing the {self.location}. Next to it{SEES}nothing."
        return ""

    def _seen(self, place: str) -> str:
        is_open = place not in self.closed if place in self.openable | self.closed else None
        return sight(place, is_open, self.contents.get(place, ()))
