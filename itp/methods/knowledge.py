"""The knowledge of WKM as data: symbolic states with the next action, and what solved and failed attempts did.

Names of places and objects don't carry over to other games, so states and actions are written with types in their
places, and the types that the task names are roles, ``<1>``, ``<2>`` in its order: ``put a hot <1> in <2>``, ``take <1>
from shelf``.  Whether a place was seen is said with it: ``go to drawer, new``.

state knowledge   entries (features of the symbolic state, next action, count), of the steps of solved episodes.  Two
                  states are as similar as their features: |A ∩ B| / |A ∪ B|
task knowledge    by task with roles, of solved against failed episodes: what most solved ones do, in which order, and
                  what failed ones do more often
"""

from __future__ import annotations

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from itp.envs.alfworld.vocabulary import object_types, place_types
from itp.errors import UserError
from itp.files import checked_object, read_object
from itp.text.alfworld_phrases import NAME, kind
from itp.text.belief import Belief
from itp.text.state import State

Features = frozenset[str]
_LOOKS = ("go", "open", "close", "look", "inventory", "examine")
"""Verbs of actions that change no object."""
USUAL = 0.5
"""Share of the solved episodes of a task that do what task knowledge names."""
_FORM = "give the file of python -m world_model.knowledge"


@dataclass(frozen=True)
class Knowledge:
    """``entries``: (features, next action, count).  ``tasks``: task knowledge by task with roles."""

    entries: tuple[tuple[Features, str, int], ...] = ()
    tasks: Mapping[str, str] = field(default_factory=dict)

    def next_actions(self, features: Features, neighbors: int) -> Counter[str]:
        """How often each action followed in the ``neighbors`` most similar states, of equals the first on file."""
        near = sorted(self.entries, key=lambda entry: similarity(entry[0], features), reverse=True)
        found: Counter[str] = Counter()
        for _, action, count in near:
            found[action] += min(count, neighbors - found.total())
            if found.total() == neighbors:
                break
        return found

    def to_json(self) -> dict[str, Any]:
        return {"tasks": dict(self.tasks), "entries": [{"state": sorted(features), "action": action, "count": count}
                                                       for features, action, count in self.entries]}

    @classmethod
    def from_json(cls, value: Any, where: str) -> Knowledge:
        """The inverse of :meth:`to_json`.  Raises UserError, which begins with ``where``, for any other form."""
        checked_object(value, where, {"tasks": dict, "entries": list}, _FORM)
        entries = []
        for i, row in enumerate(value["entries"], start=1):
            checked_object(row, f"{where}: entry {i}", {"state": list, "action": str, "count": int}, _FORM)
            if row["count"] < 1 or not all(isinstance(feature, str) for feature in row["state"]):
                raise UserError(f"{where}: entry {i}: a count below 1, or a feature that is no text; {_FORM}")
            entries.append((frozenset(row["state"]), row["action"], row["count"]))
        if not all(isinstance(said, str) for said in value["tasks"].values()):
            raise UserError(f"{where}: tasks: knowledge that is no text; {_FORM}")
        return cls(tuple(entries), value["tasks"])


@functools.cache
def read_knowledge(path: str) -> Knowledge:
    """The knowledge in a file.  Raises UserError."""
    return Knowledge.from_json(read_object(path, advice=_FORM), path)


def similarity(one: Features, other: Features) -> float:
    """The share of what both have of what either has."""
    return len(one & other) / len(one | other) if one or other else 1.0


# ---------------------------------------------------------------- with roles


def roles_of(task: str) -> dict[str, str]:
    """The types that ``task`` names, in its order, as roles."""
    words = dict.fromkeys(word for word in re.findall(r"[a-z]+", task.lower())
                          if word in object_types() or word in place_types())
    return {word: f"<{i}>" for i, word in enumerate(words, start=1)}


def task_with_roles(task: str) -> str:
    """The task's words with roles in the place of types, in small letters without punctuation."""
    roles = roles_of(task)
    return " ".join(roles.get(word, word) for word in re.findall(r"[a-z]+", task.lower()))


def features_of(state: State) -> Features:
    """What the symbolic state says, with types and roles, and the action before."""
    roles, belief = roles_of(state.task), Belief.of(state)
    here = belief.places[belief.location].objects if belief.location in belief.places else frozenset()
    seen = {thing for place in belief.places.values() for thing in place.objects}
    found = {f"task {task_with_roles(state.task)}", f"at {_type(belief.location, roles) if belief.location else '-'}"}
    found |= {f"held {_type(thing, roles)}" for thing in belief.inventory} or {"held nothing"}
    for said, things in (("here", here), ("seen", seen)):
        found |= {f"{said} {roles[kind(thing)]}" for thing in things if kind(thing) in roles}
    found |= {f"{word} {roles[kind(thing)]}" for thing, words in belief.conditions.items() for word in words
              if kind(thing) in roles}
    found |= {f"delivered {roles[kind(thing)]} {roles[kind(name)]}" for name, place in belief.places.items()
              for thing in place.objects if kind(thing) in roles and kind(name) in roles}
    if belief.location in belief.places and belief.places[belief.location].open is False:
        found.add("closed here")
    if state.history:
        before = State(state.task, state.first, state.history[:-1], state.omitted)
        found.add(f"after {action_with_roles(before, state.history[-1][0])}")
    return frozenset(found)


def action_with_roles(state: State, action: str, belief: Belief | None = None) -> str:
    """An action with types and roles; of going and opening also whether the place was seen."""
    roles, belief = roles_of(state.task), belief or Belief.of(state)
    names = re.findall(NAME, action)
    said = re.sub(NAME, lambda match: _type(match[0], roles), action.strip())
    if action.startswith(("go to ", "open ")) and names:
        place = belief.places.get(names[0])
        said += ", seen" if place and place.visited else ", new"
    return said


def _type(name: str, roles: Mapping[str, str]) -> str:
    return roles.get(kind(name), kind(name))


# ---------------------------------------------------------------- from episodes

Episode = tuple[Sequence[tuple[State, str]], bool]
"""Steps of (state, next action), and whether it was solved."""


def learned(episodes: Iterable[Episode]) -> Knowledge:
    """The knowledge in ``episodes``: states of the solved ones, tasks by both."""
    counts: Counter[tuple[Features, str]] = Counter()
    by_task: dict[str, dict[bool, list[list[str]]]] = defaultdict(lambda: {True: [], False: []})
    for steps, solved in episodes:
        actions = [action_with_roles(state, action) for state, action in steps]
        by_task[task_with_roles(steps[0][0].task)][solved].append(actions)
        if solved:
            counts.update((features_of(state), action) for (state, _), action in zip(steps, actions, strict=True))
    entries = sorted(((features, action, n) for (features, action), n in counts.items()),
                     key=lambda entry: (sorted(entry[0]), entry[1]))
    said = {task: _task_knowledge(both[True], both[False]) for task, both in sorted(by_task.items()) if both[True]}
    return Knowledge(tuple(entries), said)


def _task_knowledge(solved: Sequence[Sequence[str]], failed: Sequence[Sequence[str]]) -> str:
    """What most of ``solved`` do, by the mean place where they first do it, and what ``failed`` do more often."""
    places: dict[str, list[float]] = defaultdict(list)
    for actions in solved:
        for action in dict.fromkeys(a for a in actions if a.split(" ")[0] not in _LOOKS):
            places[action].append(actions.index(action) / len(actions))
    usual = [action for action, at in places.items() if len(at) >= USUAL * len(solved)]
    usual.sort(key=lambda action: sum(places[action]) / len(places[action]))
    told = f"Solved in {sum(map(len, solved)) / len(solved):.0f} steps" + (f" by: {', '.join(usual)}" if usual else "")
    if failed:
        more = {action: _a_time(action, failed) - _a_time(action, solved) for actions in failed for action in actions}
        worst = max(sorted(more), key=more.__getitem__)
        if more[worst] > 1:
            told += f". A failed attempt does this {more[worst]:.0f} times more than a solved one: {worst}"
    return told + "."


def _a_time(action: str, attempts: Sequence[Sequence[str]]) -> float:
    return sum(actions.count(action) for actions in attempts) / len(attempts)


def with_names(knowledge: str, task: str) -> str:
    """Task knowledge with the types that ``task`` names."""
    for name, role in roles_of(task).items():
        knowledge = knowledge.replace(role, name)
    return knowledge
