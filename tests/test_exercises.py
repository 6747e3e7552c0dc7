"""Drills: a task and a sight of one room in the engine's words, and what an expert does there."""

from __future__ import annotations

import re

import pytest

from itp.errors import UserError
from itp.training.from_scratch import base_lm
from itp.training.from_scratch.exercises import exercises
from itp.transitions import Transition, write_transitions

ROOM = "Task: {task}\nObservation: You are in the middle of a room. Looking quickly around you, you see a {places}."
SEE = "You arrive at {0}. On the {0}, you see {1}."


def episode(number: int, task: str, places: str, *sights: tuple[str, str]) -> list[Transition]:
    state = ROOM.format(task=task, places=places)
    return [Transition(f"e{number}", step, state, f"go to {place}", SEE.format(place, things))
            for step, (place, things) in enumerate(sights)]


KITCHEN = episode(1, "put a hot apple in fridge", "fridge 1, and a shelf 1", ("shelf 1", "a mug 2, and a apple 3"),
                  ("shelf 2", "a apple 1"), ("shelf 3", "a knife 1, a mug 1, and a pan 1"), ("fridge 1", "nothing"))
BATHROOM = episode(2, "look at soapbar under the desklamp", "toilet 1", ("toilet 1", "a cloth 1, and a soapbar 2"))
ODD = episode(3, "put a statue in safe", "sofa 1", ("sofa 1", "a pillow 1"))


def test_half_of_the_drills_show_the_things_of_their_tasks_and_all_are_right():
    made = list(exercises([KITCHEN, BATHROOM, ODD], 400, seed=1))
    assert len(made) == 400 and made == list(exercises([KITCHEN, BATHROOM, ODD], 400, seed=1))
    assert made != list(exercises([KITCHEN, BATHROOM, ODD], 400, seed=2))
    seen = set()
    for drill in made:
        (text, given), (right, learned) = drill.segments
        assert learned and not given and text.endswith("\nAction:")
        task, sight = text.split("\n")[:2]
        seen.add((task, sight, right))
        kind = "apple" if "apple" in task else "soapbar"
        shown = re.search(rf"a ({kind} \d)", sight)
        place = re.match(r"Observation: You arrive at (\w+ \d)\.", sight)[1]
        assert right == (f" take {shown[1]} from {place}\n" if shown else " go to")
    # The statue is nowhere, so its task makes no drill; the bathroom has no sight without the soap.
    assert {task for task, _, _ in seen} == {KITCHEN[0].state.split("\n")[0], BATHROOM[0].state.split("\n")[0]}
    kitchen = [d for d in made if "apple" in d.segments[0][0].split("\n")[0]]
    assert 0.4 < sum(d.segments[1][0] == " go to" for d in kitchen) / len(kitchen) < 0.6
    assert all("shelf" in d.segments[0][0] for d in kitchen)  # sights of a task's own kind of room


def test_answers_are_about_other_things_than_the_tasks():
    made = list(exercises([KITCHEN, BATHROOM], 400, seed=1, answers=0.5))
    answers = [drill for drill in made if drill.segments[0][0].endswith("\nObservation:")]
    assert 0.3 < len(answers) / len(made) < 0.5  # a sight of the task's thing alone has no other
    verbs = set()
    for drill in answers:
        (given, _), (answer, learned) = drill.segments
        action = re.compile(r"Action: (take|move) (\w+ \d) (?:from|to) (\w+ \d)\nObservation:$")
        verb, thing, place = action.search(given).groups()
        verbs.add(verb)
        assert learned and thing.split()[0] not in given.split("\n")[0] and re.search(rf"a {thing}\b", given)
        assert answer == {"take": f" You pick up the {thing} from the {place}.",
                          "move": f" You move the {thing} to the {place}."}[verb]
    assert verbs == {"take", "move"}


def test_drills_of_transcripts_without_sights_are_refused_in_a_line(tmp_path):
    write_transitions(tmp_path / "t.jsonl", episode(4, "boil water", "a stove", ("hall", "a door")))
    settings = base_lm.BaseLMSettings(transitions=str(tmp_path / "t.jsonl"), out_dir=str(tmp_path / "out"), drills=10)
    with pytest.raises(UserError, match="--drills, --copying: .*t.jsonl has no sights"):
        base_lm.prepared(settings, [episode(4, "boil water", "a stove", ("hall", "a door"))])


def test_transcripts_without_such_sights_make_no_drills():
    assert list(exercises([ODD[:0] or episode(4, "boil water", "a stove", ("hall", "a door"))], 5, seed=1)) == []
