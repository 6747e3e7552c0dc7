"""The ALFWorld expert: it reaches a goal from observations alone, by systematic search.

It knows the goal, the observations, and two static tables of common sense: the kinds of objects that each kind of
receptacle can hold, and the kinds that can be opened.  So a model that reads the same text can learn all its choices.
Each choice is a simple function of that text:

* The expert looks for the object in receptacles that it hasn't seen, in the order of the first observation.  Plausible
  open receptacles come first, then plausible closed ones, then those of the goal's own type, and implausible ones last.
  A plausible receptacle in front of the expert precedes all others.
* It takes the nearest object that it has found, and heats, cools or cleans it.  It brings it to the nearest receptacle
  of the goal's type, or to the receptacle that holds the other of two objects.
* It puts an object without use down on the nearest open place.

Other agents may act in between: :meth:`Expert.observe` takes every action with its answer, and :meth:`Expert.act` gives
the next action in the situation after it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

from itp.text.alfworld_phrases import (
    MOVE_OR_PUT, NOTHING_HAPPENS, TAKE, TRANSFORM, contents, go_to, kind, move, receptacles, take, transform,
)

TOOLS = {
    "pick_heat_then_place_in_recep": ("heat", "microwave"),
    "pick_cool_then_place_in_recep": ("cool", "fridge"),
    "pick_clean_then_place_in_recep": ("clean", "sinkbasin"),
}
UNDOES = {"heat": "cool", "cool": "heat"}
LAMPS = ("desklamp", "floorlamp")
LAMP_STANDS = ("desk", "sidetable", "dresser", "shelf", "coffeetable", "diningtable", "tvstand")


@functools.cache
def _common_sense() -> tuple[dict[str, frozenset[str]], frozenset[str]]:
    """Object types by receptacle type, and the receptacle types that open; in the games' lower case."""
    from alfworld.gen import constants

    valid = constants.VAL_RECEPTACLE_OBJECTS
    holds = {place.lower(): frozenset(map(str.lower, objects)) for place, objects in valid.items()}
    stands = {r: holds.get(r, frozenset()) | set(LAMPS) for r in LAMP_STANDS}
    return {**holds, **stands}, frozenset(r.lower() for r in constants.OPENABLE_CLASS_LIST)


class Expert:
    """The expert of one episode.  ``task_params``: the ``pddl_params`` of the game's traj_data.json.

    ``first_observation`` is the first observation of the episode, which lists the room's receptacles.
    """

    def __init__(self, task_params: Mapping[str, object], task_type: str, first_observation: str):
        self.target, self.goal_kind, self.lamp_kind = (
            str(task_params[key]).lower() for key in ("object_target", "parent_target", "toggle_target")
        )
        self.task_type = task_type
        self.verb, self.tool = TOOLS.get(task_type, ("", ""))
        self.listing = receptacles(first_observation)
        self._order = {name: index for index, name in enumerate(self.listing)}
        self._holds, self._opens = _common_sense()
        self.at = ""
        self.hand = ""
        self.contents: dict[str, list[str]] = {}
        self._open: set[str] = set()
        self._transformed: set[str] = set()
        self._lit: set[str] = set()
        self._refused: set[str] = set()

    # --- what it has seen

    def observe(self, action: str, observation: str) -> None:
        """Note the answer to an action, whoever chose the action."""
        if observation.strip() == NOTHING_HAPPENS:
            if action == self.act():
                # The action should work by all that the expert knows, so this engine never takes it.
                self._refused.add(action)
            return
        verb, _, rest = action.strip().partition(" ")
        if verb == "go":
            self.at = rest.removeprefix("to ")
        elif verb == "open":
            self._open.add(rest)
        elif verb == "close":
            self._open.discard(rest)
        elif verb == "use":
            self._lit.add(rest)
        elif match := TAKE.fullmatch(action.strip()):
            self.hand = match[1]
            if match[1] in self.contents.get(match[2], ()):
                self.contents[match[2]].remove(match[1])
        elif match := MOVE_OR_PUT.fullmatch(action.strip()):
            self.hand = ""
            self.contents.setdefault(match[2], []).append(match[1])
        elif match := TRANSFORM.fullmatch(action.strip()):
            self._transform(match[1], match[2])
        for place, things, opened in contents(observation):
            self.contents[place] = things
            if opened:
                self._open.add(place)

    def _transform(self, verb: str, name: str) -> None:
        if verb == self.verb:
            self._transformed.add(name)
        elif UNDOES.get(verb) == self.verb:
            self._transformed.discard(name)

    # --- what follows from it

    @property
    def finished(self) -> bool:
        """Whether the goal is reached, by all observations so far."""
        if self.task_type == "look_at_obj_in_light":
            lit_here = self._lit.intersection(self.contents.get(self.at, ()))
            return kind(self.hand) == self.target and any(kind(name) == self.lamp_kind for name in lit_here)
        wanted = 2 if self.task_type == "pick_two_obj_and_place" else 1
        return any(self._delivered(place) >= wanted for place in self.listing if kind(place) == self.goal_kind)

    def _delivered(self, place: str) -> int:
        return sum(kind(name) == self.target and self._ready(name) for name in self.contents.get(place, ()))

    def _ready(self, name: str) -> bool:
        return not self.verb or name in self._transformed

    def _closed(self, place: str) -> bool:
        return kind(place) in self._opens and place not in self._open

    def _plausible(self, what: str, place: str) -> bool:
        return what in self._holds.get(kind(place), ())

    def _near(self, place: str) -> tuple[bool, int]:
        """Sort key of places: the place in front first, then the order of the first observation."""
        return place != self.at, self._order[place]

    def _goal(self) -> str:
        """The receptacle to bring the object to: one that holds a delivered object already, else the nearest."""
        goals = [place for place in self.listing if kind(place) == self.goal_kind]
        return min(goals, key=lambda place: (-self._delivered(place), *self._near(place)), default="")

    # --- what it does

    def act(self) -> str:
        """The next action; ``look`` where no action is left."""
        if self.finished:
            return "look"
        return next((action for action in self._wishes() if action not in self._refused), "look")

    def thought(self) -> str:
        """The reason for the next action in one line: what the expert looks for or holds, and what it has ruled out."""
        if self.finished:
            return "The task is done."
        if not self.hand:
            return f"I look for a {self.target}. {self._whereabouts(self.target)}"
        if kind(self.hand) != self.target:
            return f"I have {self.hand} but no use for it."
        if self.task_type == "look_at_obj_in_light":
            return f"I have {self.hand} and look for a {self.lamp_kind}. {self._whereabouts(self.lamp_kind)}"
        if not self._ready(self.hand):
            return f"I have {self.hand} and must {self.verb} it with a {self.tool}."
        return f"I have {self.hand} and bring it to {self._goal()}."

    def _whereabouts(self, what: str) -> str:
        """Where ``what`` is, or where it isn't and where the expert looks next."""
        step = self.act()
        place = next((p for p in self.listing if step.endswith(f" {p}")), self.at)
        found = [name for name in self.contents.get(place, ()) if kind(name) == what]
        if found:
            return f"There is {found[0]} at {place}."
        ruled_out = f"There is none at {self.at}. " if self.at in self.contents else ""
        return f"{ruled_out}Next is {place}."

    def _wishes(self) -> Iterator[str]:
        """Actions in order of preference.  The later ones are for engines that refuse the first."""
        if not self.hand:
            yield from self._fetch()
        elif kind(self.hand) != self.target:
            yield from self._put_down()
        elif self.task_type == "look_at_obj_in_light":
            yield from self._use_lamp()
        elif not self._ready(self.hand):
            for place in sorted((p for p in self.listing if kind(p) == self.tool), key=self._near):
                yield transform(self.verb, self.hand, place) if place == self.at else go_to(place)
        else:
            yield self._reach(self._goal(), move(self.hand, self._goal()))
            yield from self._put_down()

    def _fetch(self) -> Iterator[str]:
        keep = self._goal() if self.task_type == "pick_two_obj_and_place" else ""
        found = [
            (not self._ready(name), *self._near(place), place, name)
            for place, names in self.contents.items() if place in self._order and place != keep
            for name in names if kind(name) == self.target
        ]
        for *_, place, name in sorted(found):
            if take(name, place) not in self._refused:
                yield self._reach(place, take(name, place))
        yield from self._search(self.target)

    def _search(self, what: str) -> Iterator[str]:
        unseen = [place for place in self.listing if place not in self.contents]

        def rank(place: str) -> tuple[bool, bool, bool, bool, int]:
            plausible = self._plausible(what, place)
            in_front = place == self.at and plausible
            return (not in_front, not plausible, kind(place) == self.goal_kind, self._closed(place), self._order[place])

        for place in sorted(unseen, key=rank):
            yield self._reach(place, f"examine {place}")

    def _use_lamp(self) -> Iterator[str]:
        lamps = [
            (*self._near(place), place, name)
            for place, names in self.contents.items() if place in self._order
            for name in names if kind(name) == self.lamp_kind
        ]
        for *_, place, name in sorted(lamps):
            yield f"use {name}" if place == self.at else go_to(place)
        yield from self._search(self.lamp_kind)

    def _put_down(self) -> Iterator[str]:
        places = [place for place in self.listing if self._plausible(kind(self.hand), place)]
        for place in sorted(places, key=lambda place: (self._closed(place), *self._near(place))):
            if move(self.hand, place) not in self._refused:
                yield self._reach(place, move(self.hand, place))

    def _reach(self, place: str, action: str) -> str:
        """``action``, or the action that must come before ``action`` is possible at ``place``."""
        if place != self.at:
            return go_to(place)
        return f"open {place}" if self._closed(place) else action
