"""The symbolic state: hand-made episodes, and the real engine's own facts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from itp.envs.alfworld.env import AlfworldEnv
from itp.envs.alfworld.games import list_games
from itp.text.alfworld_phrases import contents
from itp.text.belief import Belief, Place, changes
from itp.text.facts import facts
from itp.text.state import State

START = State("put a hot mug in shelf.", "You are in the middle of a room. Looking quickly around you, you see a "
                                         "cabinet 1, a microwave 1, and a shelf 1.")


def belief_after(*steps: tuple[str, str]) -> Belief:
    state = START
    for action, observation in steps:
        state = state.after(action, observation)
    return Belief.of(state)


def test_nothing_is_known_at_first() -> None:
    belief = Belief.of(START)
    assert belief == Belief(places={name: Place() for name in ("cabinet 1", "microwave 1", "shelf 1")})


def test_what_is_taken_heated_and_put_down() -> None:
    belief = belief_after(
        ("go to cabinet 1", "You arrive at cabinet 1. The cabinet 1 is closed."),
        ("open cabinet 1", "You open the cabinet 1. The cabinet 1 is open. In it, you see a mug 2, and a mug 1."),
        ("take mug 1 from cabinet 1", "You pick up the mug 1 from the cabinet 1."),
        ("heat mug 1 with microwave 1", "Nothing happens."),
        ("close cabinet 1", "You close the cabinet 1."),
        ("go to microwave 1", "You arrive at microwave 1. The microwave 1 is closed."),
        ("heat mug 1 with microwave 1", "You heat the mug 1 using the microwave 1."))
    assert belief.location == "microwave 1" and belief.inventory == {"mug 1"}
    assert belief.places == {"cabinet 1": Place(True, False, frozenset({"mug 2"})), "microwave 1": Place(False, False),
                             "shelf 1": Place()}
    assert belief.conditions == {"mug 1": {"hot"}}
    after = belief.after("cool mug 1 with fridge 1", "You cool the mug 1 using the fridge 1.")
    assert after.conditions == {"mug 1": {"cool"}}
    assert changes(belief, after) == {("+", ("cool", "mug 1")), ("-", ("hot", "mug 1"))}


@pytest.mark.parametrize("number", range(6))
def test_what_a_random_walk_has_seen_is_what_the_engine_shows_again(games_root: Path, number: int) -> None:
    """Whatever was done in between, a place that was seen shows exactly the objects that the belief has there."""
    game = list_games("train", str(games_root))[number]
    env, draw = AlfworldEnv(want_admissible=True), random.Random(number)
    start = env.reset(game)
    belief, admissible, compared = Belief.of(State(start.task, start.text)), start.admissible, 0
    for _ in range(250):
        # A walk that goes about in a few places, and acts on what lies there.
        near = [a for a in admissible if not a.startswith(("help", "go to", "examine"))]
        action = draw.choice(near if draw.random() < 0.5 else admissible)
        answer = env.step(action).obs
        for place, things, _ in contents(answer.text):
            if belief.places.get(place, Place()).visited:
                compared += 1
                assert belief.places[place].objects == set(things), (action, answer.text)
        if action == "inventory":
            held = {fact[1] for fact in facts(answer.text) if fact[0] == "held"} - {"nothing"}
            assert belief.inventory == held
        belief, admissible = belief.after(action, answer.text), answer.admissible
        assert all(place.visited or not place.objects for place in belief.places.values())
    env.close()
    assert compared > 20
