"""ALFWorld's phrasing, written once: the commands that the engine takes and the sentences that it says.

Two wordings exist for putting something somewhere.  The games of alfworld 0.4 and later say ``move X to Y``; older
games and published recordings say ``put X in/on Y``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

NAME = r"[a-z]+ \d+"
"""The name of an object or a receptacle, such as ``mug 2``."""

GREETING = "-= Welcome to TextWorld, ALFRED! =-"
"""The line before the first observation."""
OPENING = "You are in the middle of a room."
"""The beginning of the first observation."""
TASK = "Your task is to: "
"""The words between the first observation and the goal."""
NOTHING_HAPPENS = "Nothing happens."
"""The engine's answer to a command that it can't carry out."""

FIXED_PHRASES = (
    f"{OPENING} Looking quickly around you, you see", "You arrive at", "You pick up the",
    "You move the", "You open the", "You close the", "You heat the", "You cool the", "You clean the",
    "You turn on the", "from the", "to the", "using the", "On the", "In it, you see", ", you see", "is closed",
    "is open", NOTHING_HAPPENS.removesuffix("."), "There's nothing special about", "This is a", "You are facing the",
    "Next to it", "You are carrying:", "go to",
)
"""Word sequences that the engine always says in this form."""


def kind(name: str) -> str:
    """The type in a name: ``countertop 2`` is a ``countertop``."""
    return name.rsplit(" ", 1)[0]


# --- commands

TAKE = re.compile(rf"take ({NAME}) from ({NAME})")
MOVE_OR_PUT = re.compile(rf"(?:move|put) ({NAME}) (?:to|in/on|in|on) ({NAME})")
TRANSFORM = re.compile(rf"(heat|cool|clean) ({NAME}) with {NAME}")

MOVE = re.compile(r"move (?P<object>.+) to (?P<place>.+)")
"""The newer wording, whatever stands for the names."""
PUT = re.compile(r"put (?P<object>.+?) (?:in/on|into|onto|in|on) (?P<place>.+)")
"""The older wording, with the prepositions that published recordings use."""


def go_to(place: str) -> str:
    return f"go to {place}"


def take(thing: str, place: str) -> str:
    return f"take {thing} from {place}"


def move(thing: str, place: str) -> str:
    return f"move {thing} to {place}"


def put(thing: str, place: str, preposition: str = "in/on") -> str:
    """The older wording of :func:`move`."""
    return f"put {thing} {preposition} {place}"


def transform(verb: str, thing: str, tool: str) -> str:
    """``verb``: heat, cool or clean."""
    return f"{verb} {thing} with {tool}"


def put_as_move(action: str) -> str:
    """``action`` in the newer wording, if it is a ``put``; every other action stays as it is."""
    match = PUT.fullmatch(action)
    return move(match["object"], match["place"]) if match else action


# --- sentences that the engine says

def _sentence(form: str) -> re.Pattern[str]:
    """A pattern with a group for each NAME in ``form``."""
    return re.compile(form.replace("NAME", f"({NAME})"))


ARRIVED = _sentence(r"You (?:arrive at|are facing) (?:the )?NAME\.")
IS_CLOSED = _sentence(r"The NAME is closed\.|You close the NAME\.")
IS_OPEN = _sentence(r"The NAME is open\.|You open the NAME\.")
PICKED_UP = _sentence(r"You pick up the NAME from the .*\.")
MOVED = _sentence(r"You (?:move|put) the NAME (?:to|in/on|in|on) the NAME\.")
HEATED = _sentence(r"You heat the NAME using the .*\.")
COOLED = _sentence(r"You cool the NAME using the .*\.")
CLEANED = _sentence(r"You clean the NAME using the .*\.")
TURNED_ON = _sentence(r"You turn on the NAME\.")
HOLDS_NOTHING = _sentence(r"You are not carrying anything\.")
CONDITION = _sentence(r"This is a ([a-z ]+) NAME\.")
"""The answer to examining an object: ``This is a cool and clean mug 1.``"""
ABOUT_PLACE = _sentence(r"(?:On|In) the NAME, you see .*|(?:The )?NAME is open\.")
"""A sentence after which "it" is the place that this sentence names."""

SEES = ", you see "
"""The words between a place and the list of what is there."""
CARRIES = "You are carrying:"
"""The words before the list of what the agent holds."""
LISTED = _sentence(r"\ba NAME")
"""One entry of a list."""

_CONTENTS = _sentence(r"(?:On|In) the NAME, you see ([^.]*)\.|The NAME is open\. In it, you see ([^.]*)\.")
_GO_TO = _sentence("go to NAME")
_AT_LOCATION = re.compile(r"You arrive at (?:the )?loc \d+\.\s*")
_YOU_PUT = re.compile(r"You put the (?P<object>.+?) (?:in/on|in|on) the (?P<place>.+?)\.")


class Contents(NamedTuple):
    """What an observation shows in or on a place.  ``opened``: the place can be closed, and it is open."""

    place: str
    things: list[str]
    opened: bool


def contents(observation: str) -> list[Contents]:
    """The contents of every place that ``observation`` shows, in its order."""
    return [Contents(on or inside, re.findall(NAME, on_it or in_it), bool(inside))
            for on, on_it, inside, in_it in _CONTENTS.findall(observation)]


def receptacles(first_observation: str) -> list[str]:
    """The receptacles that the first observation of a game lists, in its order; none where it lists none."""
    listing = first_observation.partition("you see")[2].partition(TASK)[0]
    return re.findall(NAME, listing)


def listed(things: Iterable[str]) -> str:
    """Things as the engine lists them: by type, and those of a type by falling numbers."""
    ordered = sorted(things, key=lambda name: (kind(name), -int(name.rsplit(" ", 1)[1])))
    *others, last = [f"a {name}" for name in ordered] or ["nothing"]
    return ", ".join([*others, f"and {last}" if others else last])


def picked_up(thing: str, place: str) -> str:
    """The answer to :func:`take`."""
    return f"You pick up the {thing} from the {place}."


def moved(thing: str, place: str) -> str:
    """The answer to :func:`move`."""
    return f"You move the {thing} to the {place}."


def arrived(place: str) -> str:
    """The first sentence of the answer to :func:`go_to`."""
    return f"You arrive at {place}."


def examined(place: str, things: Iterable[str]) -> str:
    """The answer to ``examine``, for a place that can't be closed."""
    return f"On the {place}{SEES}{listed(things)}."


def arrived_at_closed(place: str) -> str:
    """The answer to :func:`go_to` for a place that is closed."""
    return f"{arrived(place)} The {place} is closed."


def closed(place: str) -> str:
    """The answer to ``close``."""
    return f"You close the {place}."


def arrival(place: str) -> str:
    """The answer to :func:`go_to`, up to the list of what is on ``place``; for a place that can't be closed."""
    return f"{arrived(place)} On the {place}{SEES}"


def inside(place: str, things: Iterable[str]) -> str:
    """What is seen in a place that is open, and can be closed."""
    return f"The {place} is open. In it{SEES}{listed(things)}."


def opened(place: str, things: Iterable[str]) -> str:
    """The answer to ``open``."""
    return f"You open the {place}. {inside(place, things)}"


def sight(place: str, is_open: bool | None, things: Iterable[str]) -> str:
    """The answer to :func:`go_to`.  ``is_open``: None for a place that can't be closed."""
    if is_open is None:
        return f"{arrival(place)}{listed(things)}."
    return f"{arrived(place)} {inside(place, things)}" if is_open else arrived_at_closed(place)


def transformed(verb: str, thing: str, tool: str) -> str:
    """The answer to :func:`transform`."""
    return f"You {verb} the {thing} using the {tool}."


def turned_on(lamp: str) -> str:
    """The answer to ``use``."""
    return f"You turn on the {lamp}."


def with_arrival(action: str, observation: str) -> str:
    """``observation`` with the sentence of arrival, where it answers :func:`go_to` without one.

    Published recordings lack the sentence, or have older ALFWorld's, which names a location: ``You arrive at loc 3.``
    """
    going = _GO_TO.fullmatch(action)
    if going is None:
        return observation
    place, seen = going[1], _AT_LOCATION.sub("", observation)
    shows = (f"On the {place}{SEES}", f"The {place} is closed.", f"The {place} is open.")
    return f"{arrived(place)} {seen}" if seen.startswith(shows) else observation


def said_put_as_move(observation: str) -> str:
    """``observation`` with the newer wording in every sentence that begins with ``You put``."""
    return _YOU_PUT.sub(lambda match: moved(match["object"], match["place"]), observation)
