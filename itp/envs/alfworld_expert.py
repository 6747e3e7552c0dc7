"""The ALFWorld teacher: solves a mission from observations alone, by systematic search.

It knows the mission, what the observations said, and two static tables of common sense (which kind of
object lies in which kind of receptacle, and what can be opened), so whatever it does can be learned
from the text that it has seen.  Each choice is a simple function of that text:

* look for the object in the receptacles that haven't been seen, in the order of the first
  observation's listing: plausible open ones, plausible closed ones, those of the mission's own
  receptacle type, and only then implausible ones; open what is closed in front of you first;
* take what was found, nearest first; heat, cool or clean it; bring it to the first receptacle of the
  mission's type, or to the one that already holds the other of two objects;
* put down what isn't wanted on the nearest open place.

Anyone may act in between: :meth:`Expert.observe` takes every action and its answer, and
:meth:`Expert.act` answers for the situation as it then is.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping

NOTHING_HAPPENS = "Nothing happens."
TOOLS = {
    "pick_heat_then_place_in_recep": ("heat", "microwave"),
    "pick_cool_then_place_in_recep": ("cool", "fridge"),
    "pick_clean_then_place_in_recep": ("clean", "sinkbasin"),
}
UNDOES = {"heat": "cool", "cool": "heat"}
LAMPS = ("desklamp", "floorlamp")
LAMP_STANDS = ("desk", "sidetable", "dresser", "shelf", "coffeetable", "diningtable", "tvstand")

_NAME = r"[a-z]+ \d+"
_CONTENTS = re.compile(rf"(?:On|In) the ({_NAME}), you see ([^.]*)\.|The ({_NAME}) is open\. In it, you see ([^.]*)\.")
_TAKE = re.compile(rf"take ({_NAME}) from ({_NAME})")
_MOVE = re.compile(rf"(?:move|put) ({_NAME}) (?:to|in/on|in|on) ({_NAME})")
_TRANSFORM = re.compile(rf"(heat|cool|clean) ({_NAME}) with {_NAME}")


@functools.cache
def _common_sense() -> tuple[dict[str, frozenset[str]], frozenset[str]]:
    """Object types by receptacle type, and the receptacle types that open; in the games' lower case."""
    from alfworld.gen import constants

    valid = constants.VAL_RECEPTACLE_OBJECTS
    holds = {place.lower(): frozenset(map(str.lower, objects)) for place, objects in valid.items()}
    stands = {r: holds.get(r, frozenset()) | set(LAMPS) for r in LAMP_STANDS}
    return {**holds, **stands}, frozenset(r.lower() for r in constants.OPENABLE_CLASS_LIST)


def kind(name: str) -> str:
    """The type in a name: ``countertop 2`` is a ``countertop``."""
    return name.rsplit(" ", 1)[0]


class Expert:
    """The teacher of one episode.  ``task_params`` are ``pddl_params`` of the game's traj_data.json.

    ``first_observation`` is what the episode started with: it lists the room's receptacles.
    """

    def __init__(self, task_params: Mapping[str, object], task_type: str, first_observation: str):
        self.target, self.goal_kind, self.lamp_kind = (
            str(task_params[key]).lower() for key in ("object_target", "parent_target", "toggle_target")
        )
        self.task_type = task_type
        self.verb, self.tool = TOOLS.get(task_type, ("", ""))
        listing = first_observation.split("you see", 1)[1].split("Your task is to", 1)[0]
        self.listing = re.findall(_NAME, listing)
        self._order = {name: index for index, name in enumerate(self.listing)}
        self._holds, self._opens = _common_sense()
        self.at = ""
        self.hand = ""
        self.contents: dict[str, list[str]] = {}
        self._open: set[str] = set()
        self._transformed: set[str] = set()
        self._lit: set[str] = set()
        self._refused: set[str] = set()

    # What was seen

    def observe(self, action: str, observation: str) -> None:
        """Take in what ``action``, anyone's, was answered with."""
        if observation.strip() == NOTHING_HAPPENS:
            if action == self.act():
                # It should have worked by all that is known, so this engine will never take it.
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
        elif match := _TAKE.fullmatch(action.strip()):
            self.hand = match[1]
            if match[1] in self.contents.get(match[2], ()):
                self.contents[match[2]].remove(match[1])
        elif match := _MOVE.fullmatch(action.strip()):
            self.hand = ""
            self.contents.setdefault(match[2], []).append(match[1])
        elif match := _TRANSFORM.fullmatch(action.strip()):
            self._transform(match[1], match[2])
        for on, on_it, inside, in_it in _CONTENTS.findall(observation):
            self.contents[on or inside] = re.findall(_NAME, on_it or in_it)
            if inside:
                self._open.add(inside)

    def _transform(self, verb: str, name: str) -> None:
        if verb == self.verb:
            self._transformed.add(name)
        elif UNDOES.get(verb) == self.verb:
            self._transformed.discard(name)

    # What is true of it

    @property
    def finished(self) -> bool:
        """The mission is accomplished, by all that was observed."""
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
        """Sorts places: the one in front first, then in the order of the listing."""
        return place != self.at, self._order[place]

    def _goal(self) -> str:
        """The receptacle to bring things to: where one already lies, else the nearest."""
        goals = [place for place in self.listing if kind(place) == self.goal_kind]
        return min(goals, key=lambda place: (-self._delivered(place), *self._near(place)), default="")

    # What to do

    def act(self) -> str:
        """The next action; ``look`` where nothing is left to do."""
        if self.finished:
            return "look"
        return next((action for action in self._wishes() if action not in self._refused), "look")

    def thought(self) -> str:
        """Why it does next what :meth:`act` says, in one line: what it looks for or has, what it has ruled out."""
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
        """Where ``what`` is, or where it isn't and where to look next."""
        step = self.act()
        place = next((p for p in self.listing if step.endswith(f" {p}")), self.at)
        found = [name for name in self.contents.get(place, ()) if kind(name) == what]
        if found:
            return f"There is {found[0]} at {place}."
        ruled_out = f"There is none at {self.at}. " if self.at in self.contents else ""
        return f"{ruled_out}Next is {place}."

    def _wishes(self) -> Iterator[str]:
        """Actions in order of preference: the later ones are for engines that refuse the first."""
        if not self.hand:
            yield from self._fetch()
        elif kind(self.hand) != self.target:
            yield from self._put_down()
        elif self.task_type == "look_at_obj_in_light":
            yield from self._use_lamp()
        elif not self._ready(self.hand):
            for place in sorted((p for p in self.listing if kind(p) == self.tool), key=self._near):
                yield f"{self.verb} {self.hand} with {place}" if place == self.at else f"go to {place}"
        else:
            yield self._reach(self._goal(), f"move {self.hand} to {self._goal()}")
            yield from self._put_down()

    def _fetch(self) -> Iterator[str]:
        keep = self._goal() if self.task_type == "pick_two_obj_and_place" else ""
        found = [
            (not self._ready(name), *self._near(place), place, name)
            for place, names in self.contents.items() if place in self._order and place != keep
            for name in names if kind(name) == self.target
        ]
        for *_, place, name in sorted(found):
            if f"take {name} from {place}" not in self._refused:
                yield self._reach(place, f"take {name} from {place}")
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
            yield f"use {name}" if place == self.at else f"go to {place}"
        yield from self._search(self.lamp_kind)

    def _put_down(self) -> Iterator[str]:
        places = [place for place in self.listing if self._plausible(kind(self.hand), place)]
        for place in sorted(places, key=lambda place: (self._closed(place), *self._near(place))):
            if f"move {self.hand} to {place}" not in self._refused:
                yield self._reach(place, f"move {self.hand} to {place}")

    def _reach(self, place: str, action: str) -> str:
        """``action``, or what has to be done before it can be done at ``place``."""
        if place != self.at:
            return f"go to {place}"
        return f"open {place}" if self._closed(place) else action
