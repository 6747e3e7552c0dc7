"""The symbolic state of a ScienceWorld episode, as far as its texts tell it: the room, what was seen, what is held.

ScienceWorld's objects have properties, parts and contents that no text lists completely.  So this is less than
:mod:`itp.text.belief` knows of ALFWorld: for each room the things that ``look around`` listed the last time, whether
its doors are open, and the inventory.  What was moved since a list was read is known only as far as the answer said it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from itp.text.state import State

_ROOM = re.compile(r"This (?:room|outside location) is called the ([a-z ]+)\.")
_WENT = re.compile(r"You (?:move|teleport) to the ([a-z ]+)\.")
_MOVED = re.compile(r"You move the (.+) to the (.+?)\.")
_DOOR = re.compile(r"\tA door to the ([a-z ]+) \(that is (open|closed)\)")
_ITEM = re.compile(r"^\t(?:an? |the )?(?:substance called )?([^.,(\n]+)", re.MULTILINE)
_HELD = "In your inventory, you see:"


@dataclass(frozen=True)
class RoomsSeen:
    """``room``: where the agent is, empty where no text said so.  ``things``, ``doors``: by room, as last listed.

    ``inventory``: names of what is held.  A door is True where it is open.
    """

    room: str = ""
    things: Mapping[str, frozenset[str]] = field(default_factory=dict)
    doors: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    inventory: frozenset[str] = frozenset()

    @classmethod
    def of(cls, state: State) -> RoomsSeen:
        """What is known after all of ``state``'s steps."""
        seen = cls().after(state.first)
        for _, observation in state.history:
            seen = seen.after(observation)
        return seen

    def after(self, observation: str) -> RoomsSeen:
        """What is known after one more observation."""
        if observation.startswith(_HELD):
            return replace(self, inventory=_names(observation.removeprefix(_HELD)))
        if here := _ROOM.match(observation):
            listing, _, rest = observation.partition("You also see:")
            doors = {name: word == "open" for name, word in _DOOR.findall(rest)}
            return replace(self, room=here[1], things={**self.things, here[1]: _names(listing) - {"agent"}},
                           doors={**self.doors, here[1]: doors})
        if went := _WENT.fullmatch(observation):
            return replace(self, room=went[1])
        return self._moved(*moved.groups()) if (moved := _MOVED.fullmatch(observation)) else self

    def _moved(self, thing: str, to: str) -> RoomsSeen:
        """After ``thing`` was moved: the texts call a red apple an apple, too."""
        if to == "inventory":
            here = self.things.get(self.room, frozenset())
            named = _called(thing, here)
            return replace(self, things={**self.things, self.room: here - named},
                           inventory=self.inventory | (named or {thing}))
        named = _called(thing, self.inventory)
        there = {to: self.things[to] | (named or {thing})} if to in self.things else {}
        return replace(self, things={**self.things, **there}, inventory=self.inventory - named)


def _names(listing: str) -> frozenset[str]:
    return frozenset(name.strip() for name in _ITEM.findall(listing))


def _called(thing: str, names: frozenset[str]) -> frozenset[str]:
    """The one of ``names`` that ``thing`` means; none where several may be meant."""
    found = frozenset(name for name in names if name == thing or name.endswith(f" {thing}"))
    return found if len(found) == 1 else found & {thing}
