"""Symbolic rules of an environment: where a rule's conditions hold, an action has a known answer.

A rule is a data structure, and only what this file knows can be in it: nothing of a rule file is executed::

    {"action": "take {0} from {1}", "if": [{"fact": ["in", "{0}", "{1}"], "holds": false}], "then": "Nothing happens."}

``action``: a command whose names are the slots ``{0}``, ``{1}``, in their order.  ``if``: facts of the symbolic state
before the action (:meth:`itp.text.belief.Belief.facts`, and those of :func:`known_facts`) that hold or don't hold.
``then``: the environment's answer.  Its slots are those of the action, ``{here}``, where the agent is, ``{held}``, the
one object that it holds, and ``{in 0}``, what is known to be in the place of slot 0, as the engine lists it.

:func:`lift` makes such texts of what happened, and :meth:`Rule.answer` is its inverse.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from itp.errors import UserError
from itp.files import checked_object, read_object
from itp.text.alfworld_phrases import NAME, NOTHING_HAPPENS, SEES, contents, kind, listed
from itp.text.belief import Belief
from itp.text.facts import Fact

PREDICATES = {"at": 1, "held": 1, "open": 1, "closed": 1, "visited": 1, "place": 1, "here": 1, "known": 1, "hot": 1,
              "cool": 1, "clean": 1, "lit": 1, "in": 2, "is": 2, "holding": 0}
"""The predicates of conditions, with the number of their arguments.

Besides those of beliefs: ``place``: the room lists it; ``here``: it was seen where the agent is; ``known``: it was
seen; ``is``: its type; ``holding``: something is held.
"""
_SLOT = re.compile(r"\{(\d+|here|held|in \d+)\}")
_FORM = 'a rule has the form {"action": ..., "if": [{"fact": [...], "holds": true}, ...], "then": ...}'


@dataclass(frozen=True, order=True)
class Condition:
    """A fact with slots, and whether it is to hold."""

    fact: Fact
    holds: bool = True

    def __str__(self) -> str:
        return " ".join((*("not" for _ in range(not self.holds)), *self.fact))


@dataclass(frozen=True)
class Situation:
    """An action in a symbolic state.  ``action``: with slots; ``names``: what stands in them; ``facts``: what holds."""

    action: str
    names: tuple[str, ...]
    belief: Belief
    facts: frozenset[Fact]

    @classmethod
    def of(cls, belief: Belief, action: str) -> Situation:
        template, names = lift_action(action)
        return cls(template, names, belief, known_facts(belief))

    def holds(self, condition: Condition) -> bool:
        predicate, *arguments = condition.fact
        ground = [self.names[int(a[1:-1])] if _SLOT.fullmatch(a) else a for a in arguments]
        if predicate == "is":
            return (kind(ground[0]) == ground[1]) == condition.holds
        return ((predicate, *ground) in self.facts) == condition.holds


@dataclass(frozen=True)
class Rule:
    """``then`` is the answer to ``action`` wherever all ``conditions`` hold."""

    action: str
    conditions: tuple[Condition, ...]
    then: str

    @property
    def fails(self) -> bool:
        """Whether it is a precondition: what is lacking where the action can't be carried out."""
        return self.then == NOTHING_HAPPENS

    def applies(self, situation: Situation) -> bool:
        return situation.action == self.action and all(map(situation.holds, self.conditions))

    def answer(self, situation: Situation) -> str | None:
        """The answer that the rule predicts; None where it doesn't apply, or where a slot has no known value."""
        return fill(self.then, situation) if self.applies(situation) else None

    def __str__(self) -> str:
        return f"{self.action}: {' and '.join(map(str, self.conditions)) or 'always'} -> {self.then}"

    def to_json(self) -> dict[str, Any]:
        return {"action": self.action, "then": self.then,
                "if": [{"fact": list(condition.fact), "holds": condition.holds} for condition in self.conditions]}

    @classmethod
    def from_json(cls, value: Any, where: str) -> Rule:
        """The inverse of :meth:`to_json`.  Raises UserError, which begins with ``where``, for any other form."""
        checked_object(value, where, {"action": str, "if": list, "then": str}, _FORM)
        slots = set(re.findall(r"\{\d+\}", value["action"]))
        for row in value["if"]:
            checked_object(row, f"{where}: if", {"fact": list, "holds": bool}, _FORM)
            predicate, *arguments = row["fact"] or [""]
            if not all(isinstance(part, str) for part in row["fact"]) or PREDICATES.get(predicate) != len(arguments):
                raise UserError(f"{where}: {str(row['fact'])[:60]} is no fact; known are {', '.join(PREDICATES)}")
            if unknown := [a for a in arguments if a.startswith("{") and a not in slots]:
                raise UserError(f"{where}: {value['action']!r} has no slot {unknown[0]}")
        for slot in _SLOT.findall(value["then"]):
            if slot not in ("here", "held") and f"{{{slot.removeprefix('in ')}}}" not in slots:
                raise UserError(f"{where}: {value['action']!r} has no slot for {{{slot}}}")
        return cls(value["action"], tuple(Condition(tuple(row["fact"]), row["holds"]) for row in value["if"]),
                   value["then"])


@functools.cache
def read_rules(path: str) -> tuple[Rule, ...]:
    """The rules of a file of ``python -m world_model.rules``.  Raises UserError where one isn't a rule."""
    rows = read_object(path, {"rules": list}, "give the rules.json of python -m world_model.rules")["rules"]
    return tuple(Rule.from_json(row, f"{path}: rule {i}") for i, row in enumerate(rows, start=1))


def predicted(rules: Sequence[Rule], belief: Belief, action: str) -> tuple[Rule, str] | None:
    """The first of ``rules`` that knows the answer to ``action``, and that answer."""
    situation = Situation.of(belief, action)
    return next(((rule, said) for rule in rules if (said := rule.answer(situation)) is not None), None)


def known_facts(belief: Belief) -> frozenset[Fact]:
    """The facts of ``belief``, and what follows from them."""
    there = {thing for place in belief.places.values() for thing in place.objects}
    here = belief.places[belief.location].objects if belief.location in belief.places else ()
    return belief.facts() | {("place", name) for name in belief.places} | {("here", thing) for thing in here} | {
        ("known", thing) for thing in there | belief.inventory} | {("holding",) for _ in range(bool(belief.inventory))}


def lift_action(action: str) -> tuple[str, tuple[str, ...]]:
    """A command with slots in the place of its names, and the names."""
    template = action.strip()
    names = tuple(re.findall(NAME, template))
    for i, name in enumerate(names):
        template = template.replace(name, f"{{{i}}}", 1)
    return template, names


def lift(observation: str, situation: Situation) -> str:
    """An answer with slots in the place of what the situation determines."""
    said, belief = observation, situation.belief
    for shown in contents(observation):
        place = belief.places.get(shown.place)
        if place and place.visited and shown.place in situation.names:
            there = f"{SEES}{listed(place.objects)}."
            said = said.replace(there, f"{SEES}{{in {situation.names.index(shown.place)}}}.", 1)
    values = [(name, f"{{{i}}}") for i, name in enumerate(situation.names)]
    values += [(belief.location, "{here}")] * bool(belief.location)
    values += [(thing, "{held}") for thing in belief.inventory if len(belief.inventory) == 1]
    for name, slot in values:
        said = re.sub(rf"\b{re.escape(name)}\b", slot, said)
    return said


def fill(then: str, situation: Situation) -> str | None:
    """The inverse of :func:`lift`; None where a slot has no known value."""
    values = [_value(slot, situation) for slot in _SLOT.findall(then)]
    if None in values:
        return None
    rest = iter(values)
    return _SLOT.sub(lambda _: next(rest), then)


def _value(slot: str, situation: Situation) -> str | None:
    belief, names = situation.belief, situation.names
    if slot == "here":
        return belief.location or None
    if slot == "held":
        return next(iter(belief.inventory)) if len(belief.inventory) == 1 else None
    if not slot.startswith("in "):
        return names[int(slot)]
    place = belief.places.get(names[int(slot[3:])])
    return listed(place.objects) if place and place.visited else None
