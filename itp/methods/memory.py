"""What earlier trials of a game showed, as steps that a text world model or a policy reads before those of the episode.

A released text world model has learned from plain histories, where it copies what was seen.  So what is remembered of a
receptacle is written as the steps that would have shown it in this episode: going there, and where it can be closed,
opening it and closing it again.  It is what the first visit of the earliest trial showed, before anything was moved.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from itp.methods.base import EarlierTrial
from itp.text.alfworld_phrases import arrived_at_closed, closed, contents, go_to
from itp.text.conditions import AT_RANDOM
from itp.text.state import State

Steps = tuple[tuple[str, str], ...]


def remembered(earlier: Sequence[EarlierTrial]) -> dict[str, Steps]:
    """The steps that show each receptacle whose contents were seen, in the order in which they were seen."""
    memory: dict[str, Steps] = {}
    for trial in earlier:
        for action, observation in trial.state.history:
            for place, _, _ in contents(observation):
                if action == go_to(place):
                    memory.setdefault(place, ((action, observation),))
                elif action == f"open {place}":
                    memory.setdefault(place, ((go_to(place), arrived_at_closed(place)), (action, observation),
                                              (f"close {place}", closed(place))))
    return memory


def unseen(memory: Mapping[str, Steps], state: State) -> dict[str, Steps]:
    """The part of ``memory`` that ``state``'s own steps haven't shown."""
    seen = {place for _, observation in state.history for place, _, _ in contents(observation)}
    return {place: steps for place, steps in memory.items() if place not in seen}


def with_memory(state: State, memory: Mapping[str, Steps]) -> State:
    """``state`` with what is remembered before its own steps."""
    return replace(state, history=(*(step for steps in memory.values() for step in steps), *state.history))


def chosen(memory: Mapping[str, Steps], target: str, draw: random.Random) -> dict[str, Steps]:
    """What is given for a prediction about the receptacle ``target``: its own steps last, and AT_RANDOM others."""
    others = [place for place in memory if place != target]
    kept = set(draw.sample(others, min(AT_RANDOM, len(others))))
    return {place: memory[place] for place in [*(place for place in others if place in kept), target]
            if place in memory}
