"""Drills for a small base LM from nothing: is what the task is about in front of me?

That the thing in a list must be the one in the task is a circuit of its own: attention from one word to the same word
far above.  Whole episodes don't form it in minutes: a policy learned from them takes something wherever it sees many
things, whatever its task (the probability of ``take`` with and without the thing in sight is the same).  Some ten
thousand short decisions do, quite suddenly, and episodes keep it.  A drill is a task and a sight, each in the engine's
own words from the transcripts, of one room; learned is what an expert does there: take the thing, else go on.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from itp.text.prompts import action_target, policy_prompt
from itp.text.state import OBSERVATION
from itp.training.examples import Example
from itp.transitions import Transition

_SIGHT = re.compile(r"You arrive at (\w+ \d+)\. On the \1, you see (a \w+ \d+.*)\.")
_THING = re.compile(r"\ba ((\w+) \d+)")


def drills(episodes: Sequence[Sequence[Transition]], count: int, seed: int) -> Iterator[Example]:
    """``count`` drills from the tasks and sights of ALFWorld episodes; in half of them the thing is in sight."""
    draw = random.Random(f"drills {seed}")
    where = _rooms_by_kind(episodes)
    tasks = []
    for line in dict.fromkeys(episode[0].state.partition("\n")[0] for episode in episodes):
        # A task names its object first: "put a hot apple in fridge", "look at book under the desklamp".
        kind = next((word for word in line.split() if word in where), None)
        if kind is not None:
            tasks.append((line, kind))
    for number in range(count if tasks else 0):
        task, kind = draw.choice(tasks)
        shown, others = draw.choice(where[kind])
        sight = draw.choice(others if others and draw.random() < 0.5 else shown)
        place, things = _SIGHT.fullmatch(sight).groups()
        thing = next((name for name, its_kind in _THING.findall(things) if its_kind == kind), None)
        right = action_target(f"take {thing} from {place}") if thing else " go to"
        yield Example([(policy_prompt(f"{task}\n{OBSERVATION}{sight}"), False), (right, True)],
                      eos=False, keep_first=True, group=f"drill {number}")


def _rooms_by_kind(episodes: Sequence[Sequence[Transition]]) -> dict[str, list[tuple[list[str], list[str]]]]:
    """For each kind of thing and each room that has it: the sights of the room with it, and those without."""
    rooms: dict[str, dict[str, set[str]]] = defaultdict(dict)  # by its first sentences: sights, and the kinds in each
    for episode in episodes:
        sights = rooms[episode[0].state.partition("\n")[2].partition("\n")[0]]
        for transition in episode:
            if match := _SIGHT.fullmatch(transition.next_state):
                sights[transition.next_state] = {kind for _, kind in _THING.findall(match[2])}
    where = defaultdict(list)
    for sights in rooms.values():
        for kind in sorted(set().union(*sights.values())):
            where[kind].append(([s for s, kinds in sights.items() if kind in kinds],
                                [s for s, kinds in sights.items() if kind not in kinds]))
    return where
