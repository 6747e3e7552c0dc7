"""The symbolic state of an ALFWorld episode: what its observations say about the room, and nothing else.

A belief is updated from actions and their answers alone, by the engine's own rules: what is taken is held, what is
moved lies there, what is seen replaces what was seen there before.  Nothing unseen is claimed, so a place that wasn't
visited has no objects.  :func:`changes` compares two beliefs fact by fact.

:meth:`Belief.to_json` is the form in which IMPLEMENT (*Model-Based Imaginative Planning for Embodied Agents*, ACL 2026)
writes it::

    {"agent_location": "microwave 1", "inventory": "mug 1(hot)",
     "world_state": {"cabinet 1": {"visited": true, "open": false, "objects": ["mug 2"]},
                     "shelf 1": {"visited": false, "open": "N/A", "objects": []}}}

``inventory`` is null where nothing is held.  ``open`` is "N/A" where a place can't be closed.  Departure: it is "N/A"
too where nobody has seen yet whether a place is closed, because a belief claims nothing unseen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from itp.errors import UserError
from itp.files import Fields, checked_object
from itp.text.alfworld_phrases import MOVE_OR_PUT, NAME, NOTHING_HAPPENS, TAKE, contents, receptacles
from itp.text.facts import Fact, facts
from itp.text.state import State

_ENDS = {"hot": "cool", "cool": "hot"}
"""A condition that ends another one."""

MIDDLE = "middle of the room"
"""The location before the first ``go to``, in the published form."""
NOT_OPENABLE = "N/A"
_NOTHING = (None, "", "nothing")
"""Inventories of nothing; the first is the one that is written."""
_WRITTEN = {"hot": "hot", "cool": "cool", "clean": "clean", "lit": "on"}
_READ = {written: word for word, written in _WRITTEN.items()}
_THING = re.compile(rf"({NAME})((?: ?\([a-z]+\))*)")
"""An object with its conditions, as ``mug 1(clean)(hot)``."""
_STATE: Fields = {"agent_location": str, "inventory": (str, list, type(None)), "world_state": dict}
_PLACE: Fields = {"visited": bool, "objects": (list, type(None))}
_FORM = 'a state has the form {"agent_location": ..., "inventory": ..., "world_state": {...}}'


@dataclass(frozen=True)
class Place:
    """A receptacle.  ``visited``: its contents were seen.  ``open``: None where it can't be closed, or isn't known."""

    visited: bool = False
    open: bool | None = None
    objects: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Belief:
    """What is known.  ``location``: a place, empty in the middle of the room.  ``conditions``: of objects and lamps."""

    location: str = ""
    inventory: frozenset[str] = frozenset()
    places: Mapping[str, Place] = field(default_factory=dict)
    conditions: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, state: State) -> Belief:
        """The belief after all of ``state``'s steps; steps that it omits are unknown."""
        belief = cls(places={name: Place() for name in receptacles(state.first)})
        for action, observation in state.history:
            belief = belief.after(action, observation)
        return belief

    def after(self, action: str, observation: str) -> Belief:
        """The belief after ``action`` was answered with ``observation``."""
        if observation.strip() == NOTHING_HAPPENS:
            return self
        said = facts(observation)
        belief = self._moved(action.strip(), said)
        for predicate, name, *_ in said:
            if predicate == "at":
                belief = replace(belief, location=name)
            elif predicate in ("closed", "open"):
                belief = belief._with_place(name, open=predicate == "open")
            elif predicate in ("hot", "cool", "clean", "lit"):
                belief = belief._with_condition(name, predicate)
            elif predicate == "held" and action.strip() == "inventory":
                belief = replace(belief, inventory=frozenset(f[1] for f in said if f[0] == "held") - {"nothing"})
        for place, things, opened in contents(observation):
            belief = belief._with_place(place, visited=True, objects=frozenset(things),
                                        open=True if opened else belief._place(place).open)
        return belief

    def _moved(self, action: str, said: frozenset[Fact]) -> Belief:
        """The belief after an object was taken or put down, if the engine confirms it."""
        if (match := TAKE.fullmatch(action)) and ("held", match[1]) in said:
            place = self._place(match[2])
            return replace(self._with_place(match[2], objects=place.objects - {match[1]}),
                           inventory=self.inventory | {match[1]})
        if (match := MOVE_OR_PUT.fullmatch(action)) and ("in", match[1], match[2]) in said:
            place = self._place(match[2])
            return replace(self._with_place(match[2], objects=place.objects | {match[1]}),
                           inventory=self.inventory - {match[1]})
        return self

    def _place(self, name: str) -> Place:
        return self.places.get(name, Place())

    def _with_place(self, name: str, **changed: object) -> Belief:
        return replace(self, places={**self.places, name: replace(self._place(name), **changed)})

    def _with_condition(self, name: str, condition: str) -> Belief:
        before = self.conditions.get(name, frozenset())
        return replace(self, conditions={**self.conditions, name: before - {_ENDS.get(condition)} | {condition}})

    def facts(self) -> frozenset[Fact]:
        """Every fact of the belief."""
        return frozenset({("at", self.location), *(("held", thing) for thing in self.inventory),
                          *((word, thing) for thing, words in self.conditions.items() for word in words),
                          *(("visited", name) for name, place in self.places.items() if place.visited),
                          *(("open" if place.open else "closed", name) for name, place in self.places.items()
                            if place.open is not None),
                          *(("in", thing, name) for name, place in self.places.items() for thing in place.objects)})

    # --- the published form

    def to_json(self) -> dict[str, Any]:
        """The published form.  Conditions of objects that are neither held nor at a known place aren't in it."""
        held = self._written(self.inventory)
        return {"agent_location": self.location or MIDDLE,
                "inventory": None if not held else held[0] if len(held) == 1 else held,
                "world_state": {name: {"visited": place.visited,
                                       "open": NOT_OPENABLE if place.open is None else place.open,
                                       "objects": self._written(place.objects)}
                                for name, place in self.places.items()}}

    def _written(self, things: Iterable[str]) -> list[str]:
        return [name + "".join(f"({_WRITTEN[word]})" for word in sorted(self.conditions.get(name, ())))
                for name in sorted(things)]

    @classmethod
    def from_json(cls, value: Any, where: str = "state") -> Belief:
        """The inverse of :meth:`to_json`.  Raises UserError, which begins with ``where``, for any other form."""
        checked_object(value, where, _STATE, _FORM)
        location, held = value["agent_location"], value["inventory"]
        held = [] if held in _NOTHING else held
        conditions: dict[str, frozenset[str]] = {}
        return cls("" if location == MIDDLE else _name(location, f"{where}: agent_location"),
                   _things([held] if isinstance(held, str) else held, f"{where}: inventory", conditions),
                   {_name(name, f"{where}: world_state"): _place_of(place, f"{where}: {name[:40]}", conditions)
                    for name, place in value["world_state"].items()},
                   conditions)

    @classmethod
    def parse(cls, text: str, where: str = "state") -> Belief:
        """The belief that a model wrote as JSON, with or without words or a code block around it.  Raises UserError."""
        begin, end = text.find("{"), text.rfind("}")
        if begin < 0 or end < begin:
            raise UserError(f"{where}: no JSON object in {text[:60]!r}; {_FORM}")
        try:
            value = json.loads(text[begin:end + 1])
        except (ValueError, RecursionError) as error:  # a number or a nesting beyond what Python takes, too
            raise UserError(f"{where}: not JSON ({error}); {_FORM}") from error
        return cls.from_json(value, where)


def _place_of(value: Any, where: str, conditions: dict[str, frozenset[str]]) -> Place:
    checked_object(value, where, _PLACE, _FORM)
    if not isinstance(opened := value.get("open"), bool) and opened != NOT_OPENABLE:
        raise UserError(f"{where}: open is {str(opened)[:40]!r}, not true, false or {NOT_OPENABLE!r}; {_FORM}")
    opened = None if opened == NOT_OPENABLE else opened
    return Place(value["visited"], opened, _things(value["objects"] or [], f"{where}: objects", conditions))


def _things(values: Iterable[Any], where: str, conditions: dict[str, frozenset[str]]) -> frozenset[str]:
    """The names of objects.  Their conditions are added to ``conditions``."""
    names = set()
    for value in values:
        match = _THING.fullmatch(value) if isinstance(value, str) else None
        words = re.findall(r"[a-z]+", match[2]) if match else []
        if match is None or not _READ.keys() >= set(words):
            raise UserError(f"{where}: {str(value)[:40]!r} isn't an object such as 'mug 1' or 'mug 1(hot)', with "
                            f"conditions of {', '.join(_READ)}; {_FORM}")
        names.add(match[1])
        if words:
            conditions[match[1]] = conditions.get(match[1], frozenset()) | {_READ[word] for word in words}
    return frozenset(names)


def _name(value: str, where: str) -> str:
    if not re.fullmatch(NAME, value):
        raise UserError(f"{where}: {value[:40]!r} isn't a receptacle such as 'cabinet 1'; {_FORM}")
    return value


def changes(before: Belief, after: Belief) -> frozenset[tuple[str, Fact]]:
    """The facts that became true (``+``) and those that ceased to be (``-``)."""
    old, new = before.facts(), after.facts()
    return frozenset({("+", fact) for fact in new - old} | {("-", fact) for fact in old - new})


def delta_f1(state: State, action: str, predicted: str, true: str) -> float | None:
    """F1 of the changes that a predicted observation makes to the belief in ``state``; None where nothing changes."""
    before = Belief.of(state)
    a, b = (changes(before, before.after(action, observation)) for observation in (predicted, true))
    return 2 * len(a & b) / (len(a) + len(b)) if b or a else None
