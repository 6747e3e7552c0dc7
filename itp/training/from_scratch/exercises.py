"""Exercises (drills) that teach a small LM to match the task's object with an object in sight.

Matching needs attention from a word to the same word far above.  Training on whole episodes doesn't form this
attention in minutes: such a policy takes something wherever it sees many things (the probability of ``take`` is the
same with and without the task's object in sight).  About 20,000 short exercises do, and episodes keep it.  An
exercise is a task and a sight of one room, both in the engine's own words from the transcripts.  Its target is what an
expert does there: take the object if it is in sight, else go on.

The engine's answer names the object of the action.  An expert's action is nearly always about the task's object, so a
world model trained on experts answers with that object whatever is taken.  A second kind of exercise is the answer to
an action on another object.  It comes second: trained together from the start, the first kind isn't learned.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence

from itp.text import alfworld_phrases as phrases
from itp.text.facts import facts
from itp.text.prompts import action_target, policy_prompt, world_model_prompt, world_model_target
from itp.text.state import OBSERVATION
from itp.training.examples import Example
from itp.transitions import Transition


def exercises(episodes: Sequence[Sequence[Transition]], count: int, seed: int,
              answers: float = 0.0) -> Iterator[Example]:
    """``count`` drills from the tasks and sights of ALFWorld episodes; in half of them the task's thing is in sight.

    ``answers``: the probability of the second kind, wherever another thing is in sight.
    """
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
        place, things = _seen(sight)
        right = [thing for thing in things if phrases.kind(thing) == kind]
        wrong = [thing for thing in things if phrases.kind(thing) != kind]
        state = f"{task}\n{OBSERVATION}{sight}"
        if wrong and answers and draw.random() < answers:
            given, learned = _answer(state, draw.choice(wrong), place, draw)
        else:
            action = action_target(phrases.take(right[0], place)) if right else " go to"
            given, learned = policy_prompt(state), action
        yield Example([(given, False), (learned, True)], eos=False, keep_first=True, group=f"drill {number}")


def _answer(state: str, thing: str, place: str, draw: random.Random) -> tuple[str, str]:
    """The world model's prompt and target where ``thing`` is taken, or was taken and is moved back."""
    taken = phrases.picked_up(thing, place)
    given = world_model_prompt(state, phrases.take(thing, place))
    if draw.random() < 0.5:
        return given, world_model_target(taken)
    given = world_model_prompt(f"{given}{world_model_target(taken)}", phrases.move(thing, place))
    return given, world_model_target(phrases.moved(thing, place))


def _rooms_by_kind(episodes: Sequence[Sequence[Transition]]) -> dict[str, list[tuple[list[str], list[str]]]]:
    """For each kind of thing and each room that has it: the sights of the room with it, and those without."""
    rooms: dict[str, dict[str, set[str]]] = defaultdict(dict)  # by its first sentences: sights, and the kinds in each
    for episode in episodes:
        sights = rooms[episode[0].state.partition("\n")[2].partition("\n")[0]]
        for transition in episode:
            if things := _seen(transition.next_state)[1]:
                sights[transition.next_state] = set(map(phrases.kind, things))
    where = defaultdict(list)
    for sights in rooms.values():
        for kind in sorted(set().union(*sights.values())):
            where[kind].append(([s for s, kinds in sights.items() if kind in kinds],
                                [s for s, kinds in sights.items() if kind not in kinds]))
    return where


def _seen(observation: str) -> tuple[str, list[str]]:
    """The place where one arrives and the things on it, in the engine's order; none where it isn't such a sight."""
    said = facts(observation)
    place = next((fact[1] for fact in said if fact[0] == "at"), "")
    if not observation.startswith(phrases.arrival(place)):
        return place, []
    things = [fact[1] for fact in said if fact[0] == "in"]
    return place, sorted(things, key=lambda thing: observation.index(f"a {thing}"))
