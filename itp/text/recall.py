"""What an ALFWorld episode's own steps determine of the contents of a place, in the engine's words.

Contents that were seen stay as they were, except for what the agent itself took or put there.  So the answer to a
second visit needs no prediction, as it follows from the belief (:mod:`itp.text.belief`).  A first visit doesn't follow
from anything, and other actions are left to the world model.
"""

from __future__ import annotations

from itp.text.alfworld_phrases import examined, inside, opened, sight
from itp.text.belief import Belief
from itp.text.state import State

_GO = "go to "


def recalled(state: State, action: str) -> str | None:
    """The engine's answer to going to, opening or examining a place whose contents are known; None for all else."""
    belief = Belief.of(state)
    if action.startswith(_GO):
        name = action[len(_GO):]
        place = belief.places.get(name)
        known = place is not None and name != belief.location and (place.visited or place.open is False)
        return sight(name, place.open, place.objects) if known else None
    verb, _, name = action.partition(" ")
    place = belief.places.get(name)
    if place is None or not place.visited or belief.location != name:
        return None
    if verb == "open" and place.open is False:
        return opened(name, place.objects)
    if verb == "examine" and place.open is not False:
        return inside(name, place.objects) if place.open else examined(name, place.objects)
    return None
