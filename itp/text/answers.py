"""From a change of the symbolic state to what ALFWorld would say: for a world model that predicts states."""

from __future__ import annotations

from itp.text.alfworld_phrases import (
    MOVE_OR_PUT, NOTHING_HAPPENS, TAKE, TRANSFORM, arrived, closed, moved, opened, picked_up, sight, transformed,
    turned_on,
)
from itp.text.belief import Belief, Place

_BECOMES = {"heat": "hot", "cool": "cool", "clean": "clean"}


def answer(before: Belief, action: str, after: Belief) -> str:
    """The observation by which ``action`` leads from ``before`` to what ``after`` says of the places that it names.

    "Nothing happens." where that is as it was, so for ``look``, ``inventory`` and ``examine`` too.  Other changes,
    which the action can't make, are left out.
    """
    if match := TAKE.fullmatch(action):
        return picked_up(match[1], match[2]) if match[1] in after.inventory - before.inventory else NOTHING_HAPPENS
    if match := MOVE_OR_PUT.fullmatch(action):
        lies = match[1] in after.places.get(match[2], Place()).objects and match[1] in before.inventory
        return moved(match[1], match[2]) if lies else NOTHING_HAPPENS
    if match := TRANSFORM.fullmatch(action):
        is_so = _BECOMES[match[1]] in _conditions(after, match[2]) - _conditions(before, match[2])
        return transformed(match[1], match[2], action.rpartition(" with ")[2]) if is_so else NOTHING_HAPPENS
    verb, _, name = action.partition(" ")
    return _about(verb, name.removeprefix("to "), before, after)


def _about(verb: str, name: str, before: Belief, after: Belief) -> str:
    """The answer to an action that is about one place or lamp."""
    was, place = before.places.get(name, Place()), after.places.get(name, Place())
    if verb == "go" and after.location == name != before.location:
        known = place.visited or place.open is not None
        return sight(name, place.open, place.objects) if known else arrived(name)
    if verb == "open" and place.open and not was.open:
        return opened(name, place.objects)
    if verb == "close" and place.open is False and was.open:
        return closed(name)
    if verb == "use" and "lit" in _conditions(after, name) - _conditions(before, name):
        return turned_on(name)
    return NOTHING_HAPPENS


def _conditions(belief: Belief, name: str) -> frozenset[str]:
    return belief.conditions.get(name, frozenset())
