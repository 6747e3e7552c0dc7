"""Kinds of ALFWorld transitions: what the state determines, what nobody can know, and what must be remembered.

=============  ==========================================================================================
deterministic  take, move, heat, cool, clean, use, close, slice, and arriving at something that is closed
revisit        contents that the history has shown before: go to, open, examine
first_visit    contents seen for the first time: unknowable, a guess from common sense at best
inspect        look, inventory, examining an object
invalid        the engine's "Nothing happens."
=============  ==========================================================================================

A revisit is *unchanged* if the place shows exactly the list that it showed the last time; else *changed*.
"""

from __future__ import annotations

from itp.text.alfworld_phrases import NOTHING_HAPPENS, contents
from itp.text.state import State

KINDS = ("deterministic", "revisit", "revisit_unchanged", "revisit_changed", "first_visit", "inspect", "invalid")
"""What :func:`kinds_of` tells apart."""
_VISITS = ("go", "open", "examine")
_INSPECTIONS = ("look", "inventory", "help", "examine")


def kind_of(state: State, action: str, next_state: str) -> str:
    """The kind of a transition, of those in the table above."""
    return kinds_of(state, action, next_state)[0]


def kinds_of(state: State, action: str, next_state: str) -> tuple[str, ...]:
    """The kind of a transition, and of a revisit also whether it is changed."""
    if next_state == NOTHING_HAPPENS:
        return ("invalid",)
    verb = action.split(" ", 1)[0]
    shown = contents(next_state)
    if verb not in _VISITS or not shown:
        return ("inspect",) if verb in _INSPECTIONS else ("deterministic",)
    seen = {before.place: before.things for _, observation in state.history for before in contents(observation)}
    if shown[0].place not in seen:
        return ("first_visit",)
    return "revisit", "revisit_unchanged" if seen[shown[0].place] == shown[0].things else "revisit_changed"
