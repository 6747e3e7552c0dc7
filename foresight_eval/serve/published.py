"""The published form of a symbolic state, to and from what this project works with.

A published state is ``{agent_location, inventory, world_state: {receptacle: {visited, open, objects}}}``.  Objects
carry their conditions: ``mug 1(hot)``.  A history is lines such as ``3. You successfully go to shelf 1.`` and ``4. You
attempt to open drawer 1 but fail.``  :func:`belief_of` and :func:`published_form` translate states.  :func:`text_state`
makes the text state that a policy is prompted with: the game's sentences, as the state and the history imply them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from itp.errors import UserError
from itp.methods.base import EarlierTrial
from itp.text.alfworld_phrases import (
    CARRIES, MOVE_OR_PUT, NOTHING_HAPPENS, OPENING, SEES, TAKE, TRANSFORM, arrival, arrived, go_to, listed, moved,
    picked_up,
)
from itp.text.belief import Belief, Place
from itp.text.state import State

MIDDLE = "middle of the room"
"""Where an episode starts."""
_NAMED = re.compile(r"[a-z]+ \d+")
_OBJECT = re.compile(r"([a-z]+ \d+)((?:\s*\([a-z]+\))*)")
_DONE = re.compile(r"(?:\d+\.\s*)?You successfully (.+?)\.?\s*")
_FAILED = re.compile(r"(?:\d+\.\s*)?You (?:attempt|attempted) to (.+?),? but (?:fail|failed)\.?\s*")
_SAID = {"lit": "on"}
"""A condition that the published form has another word for."""
_MEANT = {said: own for own, said in _SAID.items()}


def _encodable(text: str) -> str:
    """``text``, if it is Unicode that can be written; JSON can hold half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds half of a surrogate pair") from error
    return text


def _receptacle(name: str) -> str:
    if not _NAMED.fullmatch(name):
        raise ValueError(f"{name!r} is no name such as 'shelf 1'")
    return name


def _object(name: str) -> str:
    if not _OBJECT.fullmatch(name.strip()):
        raise ValueError(f"{name!r} is no object such as 'mug 1' or 'mug 1(hot)'")
    return name.strip()


Text = Annotated[str, AfterValidator(_encodable)]
Receptacle = Annotated[str, AfterValidator(_receptacle)]
Thing = Annotated[str, AfterValidator(_object)]


class ReceptacleState(BaseModel):
    """``open``: "N/A" for what can't be closed, or isn't known."""

    model_config = ConfigDict(extra="forbid")

    visited: bool = False
    open: bool | Literal["N/A"] = "N/A"
    objects: list[Thing] = Field(default_factory=list)


class PublishedState(BaseModel):
    """``inventory``: the objects held, as a list or as text; ``""``, ``"nothing"`` and null for none."""

    model_config = ConfigDict(extra="forbid")

    agent_location: Text = MIDDLE
    inventory: list[Thing] | Text | None = None
    world_state: dict[Receptacle, ReceptacleState]


def belief_of(state: PublishedState) -> Belief:
    """Raises UserError for an inventory that names no objects."""
    places, conditions = {}, {}
    for name, place in state.world_state.items():
        things = dict(map(_split, place.objects))
        conditions |= things
        places[name] = Place(place.visited, None if place.open == "N/A" else place.open, frozenset(things))
    held = dict(_split(name) for name in _inventory(state.inventory))
    conditions = {name: words for name, words in (conditions | held).items() if words}
    location = state.agent_location.strip()
    if location and location != MIDDLE and location not in places:
        raise UserError(f"agent_location {location!r}: neither a receptacle of world_state nor {MIDDLE!r}")
    return Belief("" if location == MIDDLE else location, frozenset(held), places, conditions)


def _inventory(given: list[str] | str | None) -> list[str]:
    if not isinstance(given, str):
        return given or []
    names = [name.strip().removeprefix("a ") for name in given.split(",") if name.strip()]
    if names in ([], ["nothing"], ["none"], ["None"], ["empty"]):
        return []
    if wrong := [name for name in names if not _OBJECT.fullmatch(name)]:
        raise UserError(f"inventory {wrong[0]!r}: no object such as 'mug 1' or 'mug 1(hot)'")
    return names


def _split(name: str) -> tuple[str, frozenset[str]]:
    """An object's name and its conditions."""
    thing, said = _OBJECT.fullmatch(name).groups()
    return thing, frozenset(_MEANT.get(word, word) for word in re.findall(r"[a-z]+", said))


def published_form(belief: Belief) -> dict[str, Any]:
    """The JSON of a belief; names and conditions in alphabetical order, receptacles as they became known.

    ``inventory`` is null where nothing is held, a name where it is one object, and a list where it is several.
    """
    def named(things: Iterable[str]) -> list[str]:
        return [thing + "".join(f"({_SAID.get(word, word)})" for word in sorted(belief.conditions.get(thing, ())))
                for thing in sorted(things)]

    held = named(belief.inventory)
    return {"agent_location": belief.location or MIDDLE,
            "inventory": None if not held else held[0] if len(held) == 1 else held,
            "world_state": {name: {"visited": place.visited, "open": "N/A" if place.open is None else place.open,
                                   "objects": named(place.objects)} for name, place in belief.places.items()}}


def perceive(state: PublishedState, action: str, success: bool, observation: str) -> dict[str, Any]:
    """The published state after ``action`` was answered with ``observation``; as it was where the action failed."""
    belief = belief_of(state)
    return published_form(belief.after(action, observation if success else NOTHING_HAPPENS))


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


def text_state(goal: str, state: PublishedState, lines: Sequence[str] | str) -> State:
    """The text state of an episode: its first observation, and after each action what the game will have said.

    What was where at the time is what is there now, without the takes and puts since.  Raises UserError.
    """
    belief, history = belief_of(state), history_of(lines)
    text = State(goal, first_observation(belief))
    contents = {name: set(place.objects) for name, place in belief.places.items()}
    for action, done in reversed(history):
        _undo(contents, action if done else "")
    actions = {action for action, done in history if done}
    openable = {name for name, place in belief.places.items() if place.open is not None}
    opened = {name for name in openable if belief.places[name].open and f"open {name}" not in actions}
    room = _Room(contents, openable, openable - opened)
    for action, done in history:
        text = text.after(action, room.said(action) if done else NOTHING_HAPPENS)
    return text


def first_observation(belief: Belief) -> str:
    """What the game says first in a room with these places."""
    return f"{OPENING} Looking quickly around you{SEES}{listed(belief.places)}."


ObjectLists = dict[Receptacle, list[Text]]
FailedAction = tuple[Text, Text, list[Thing] | Text | None, Any]
"""The action, where the agent stood, what it held, and the state of what the action names."""


def earlier_trial(goal: str, state: PublishedState, object_lists: ObjectLists,
                  failed: Sequence[FailedAction]) -> EarlierTrial:
    """An earlier trial that showed what the published conditions say.

    ``object_lists``: the types of what receptacles held, which get numbers from 1 on.  Raises UserError.
    """
    belief = belief_of(state)
    text, room = State(goal, first_observation(belief)), {}
    for place, kinds in object_lists.items():
        counted = Counter(kinds)
        room[place] = {f"{kind} {n + 1}" for kind in counted for n in range(counted[kind])}
        if wrong := [thing for thing in room[place] if not _NAMED.fullmatch(thing)]:
            raise UserError(f"object list of {place}: {wrong[0].rpartition(' ')[0]!r} is no type such as 'mug'")
    openable = {name for name in room if name in belief.places and belief.places[name].open is not None}
    showing = _Room(room, openable, set(openable))
    for place in room:
        for action in (go_to(place), f"open {place}")[:2 if place in openable else 1]:
            text = text.after(action, showing.said(action))
    begin = len(text.history)
    for action, place, *_ in failed:
        text = text.after(go_to(place), arrived(place)) if place in belief.places else text
        text = text.after(action, NOTHING_HAPPENS)
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
            return f"You {match[1]} the {match[2]} using the {action.rpartition(' with ')[2]}."
        if action.startswith("go to "):
            self.location = action.removeprefix("go to ")
            return self._seen(self.location)
        if verb == "open":
            self.closed.discard(name)
            return f"You open the {name}. {self._inside(name)}"
        if verb == "close":
            self.closed.add(name)
            return f"You close the {name}."
        if verb == "use":
            return f"You turn on the {name}."
        if action == "inventory":
            return f"{CARRIES} {listed(self.held)}." if self.held else "You are not carrying anything."
        if verb == "examine" and name in self.contents:
            return self._seen(name).removeprefix(f"{arrived(name)} ")
        if action == "look" and self.location:
            return f"You are facing the {self.location}. Next to it{SEES}nothing."
        return ""

    def _inside(self, place: str) -> str:
        return f"The {place} is open. In it{SEES}{listed(self.contents.get(place, ()))}."

    def _seen(self, place: str) -> str:
        if place in self.closed:
            return f"{arrived(place)} The {place} is closed."
        if place in self.openable:
            return f"{arrived(place)} {self._inside(place)}"
        return f"{arrival(place)}{listed(self.contents.get(place, ()))}."
