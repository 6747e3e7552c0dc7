"""What an ALFWorld task needs, by its own words, and how far a symbolic state has come.

Only the words of the task sentence are read (``put a hot mug in shelf``), and two static tables of ALFWorld's types.
The hidden state of a game isn't looked at.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from itp.envs.alfworld.expert import LAMPS, TOOLS
from itp.envs.alfworld.vocabulary import place_types, task_object
from itp.text.alfworld_phrases import kind
from itp.text.belief import Belief, Place

_CONDITIONS = {**dict.fromkeys(("hot", "heat", "heated", "warm"), "hot"),
               **dict.fromkeys(("cool", "cold", "cooled", "chilled"), "cool"),
               **dict.fromkeys(("clean", "cleaned", "rinsed", "washed"), "clean")}
_PLAIN = ("a", "an", "the", "some", "one", "two", "at")
"""Words before an object that ask nothing of it."""
_VERBS = {"hot": "heat", "cool": "cool", "clean": "clean"}
_TOOLS = {condition: dict(TOOLS.values())[verb] for condition, verb in _VERBS.items()}
DELIVERED = 10
"""Progress of an object that is where the task wants it."""


@dataclass(frozen=True)
class Needs:
    """``number`` objects of type ``target``, in ``condition`` (empty: any), in a receptacle of type ``place``.

    With ``lamp``: one object, held beside a lamp of that type that is on.
    """

    target: str
    place: str = ""
    lamp: str = ""
    condition: str = ""
    number: int = 1

    @classmethod
    def of(cls, task: str) -> Needs | None:
        """What ``task`` names; None where it names no object, or no place for it, or asks for what isn't known here."""
        words = re.findall(r"[a-z]+", task.lower())
        target = task_object(" ".join(words))
        at = words.index(target) if target else 0
        if at and words[at - 1] not in (*_PLAIN, *_CONDITIONS, *_VERBS.values(), "examine"):
            return None  # a sliced apple, say
        behind = words[at + 1:] if target else []
        lamp = next((word for word in behind if word in LAMPS), "")
        place = "" if lamp else next((word for word in reversed(behind) if word in place_types()), "")
        if not lamp and not place:
            return None
        condition = next((_CONDITIONS[word] for word in words if word in _CONDITIONS), "")
        return cls(target, place, lamp, condition, 2 if "two" in words else 1)

    def progress(self, belief: Belief) -> int:
        """How far ``belief`` has come.  Each object that is delivered counts DELIVERED, the next one its stage.

        Two objects are delivered where they are in the same receptacle.

        Stages of the next object: 0 not seen, 1 seen elsewhere, 2 seen at the agent's place, 4 held, 5 held at the tool
        that brings its condition about, 6 held in its condition, 7 held at its place, which isn't closed.  For a lamp:
        5 the lamp was seen, 6 held at the lamp's place, DELIVERED beside the lamp that is on.  Another object in the
        agent's hand is one stage less, because it must be put down first.
        """
        if self.lamp:
            return self._in_light(belief)
        goal, delivered = self._delivered(belief)
        if len(delivered) >= self.number:
            return DELIVERED * self.number
        stage = self._fetched(belief, delivered)
        for thing in belief.inventory:
            if kind(thing) == self.target and self._ready(belief, thing):
                at_goal = belief.location == goal if delivered else kind(belief.location) == self.place
                here = belief.places.get(belief.location, Place())  # a predicted place may not be in the room
                stage = 7 if at_goal and here.open is not False else 6
            elif kind(thing) == self.target:
                stage = 5 if kind(belief.location) == _TOOLS[self.condition] else 4
        return DELIVERED * len(delivered) + stage

    def _delivered(self, belief: Belief) -> tuple[str, frozenset[str]]:
        """The receptacle with the most delivered objects, and these: two objects must be in the same one."""
        there = {name: frozenset(thing for thing in place.objects
                                 if kind(thing) == self.target and self._ready(belief, thing))
                 for name, place in belief.places.items() if kind(name) == self.place}
        return max(there.items(), key=lambda item: len(item[1]), default=("", frozenset()))

    def _ready(self, belief: Belief, thing: str) -> bool:
        return not self.condition or self.condition in belief.conditions.get(thing, ())

    def _fetched(self, belief: Belief, delivered: frozenset[str]) -> int:
        """The stage of an object that isn't held."""
        seen = [name for name, place in belief.places.items()
                if any(kind(thing) == self.target and thing not in delivered for thing in place.objects)]
        here = any(name == belief.location and belief.places[name].open is not False for name in seen)
        return (2 if here else 1 if seen else 0) - bool(belief.inventory)

    def _in_light(self, belief: Belief) -> int:
        if not any(kind(thing) == self.target for thing in belief.inventory):
            return self._fetched(belief, frozenset())
        lamps = [(name, thing) for name, place in belief.places.items() for thing in place.objects
                 if kind(thing) == self.lamp]
        here = [thing for name, thing in lamps if name == belief.location]
        if any("lit" in belief.conditions.get(thing, ()) for thing in here):
            return DELIVERED
        return 6 if here else 5 if lamps else 4
