"""The symbolic state of an ALFWorld episode: what its observations say about the room, and nothing else.

A belief is updated from actions and their answers alone, by the engine's own rules: what is taken is held, what is
moved lies there, what is seen replaces what was seen there before.  Nothing unseen is claimed, so a place that wasn't
visited has no objects.  :func:`changes` compares two beliefs fact by fact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from itp.text.alfworld_phrases import MOVE_OR_PUT, NOTHING_HAPPENS, TAKE, contents, receptacles
from itp.text.facts import Fact, facts
from itp.text.state import State

_ENDS = {"hot": "cool", "cool": "hot"}
"""A condition that ends another one."""


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


def changes(before: Belief, after: Belief) -> frozenset[tuple[str, Fact]]:
    """The facts that became true (``+``) and those that ceased to be (``-``)."""
    old, new = before.facts(), after.facts()
    return frozenset({("+", fact) for fact in new - old} | {("-", fact) for fact in old - new})


def delta_f1(state: State, action: str, predicted: str, true: str) -> float | None:
    """F1 of the changes that a predicted observation makes to the belief in ``state``; None where nothing changes."""
    before = Belief.of(state)
    a, b = (changes(before, before.after(action, observation)) for observation in (predicted, true))
    return 2 * len(a & b) / (len(a) + len(b)) if b or a else None
