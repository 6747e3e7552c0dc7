"""The symbolic state: hand-made episodes, and the real engine's own facts."""

from __future__ import annotations

import copy
import json
import random
import sys
from pathlib import Path

import pytest

from itp.envs.alfworld.env import AlfworldEnv
from itp.envs.alfworld.games import list_games
from itp.errors import UserError
from itp.text.alfworld_phrases import contents
from itp.text.belief import Belief, Place, changes
from itp.text.facts import facts
from itp.text.state import State

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import check_belief  # noqa: E402
from chaos_mutations import VALUES  # noqa: E402

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


PUBLISHED = {
    "agent_location": "microwave 1", "inventory": "mug 1(clean)(hot)", "world_state": {
        "cabinet 1": {"visited": True, "open": False, "objects": ["desklamp 1(on)", "mug 2"]},
        "microwave 1": {"visited": False, "open": False, "objects": []},
        "shelf 1": {"visited": False, "open": "N/A", "objects": []}}}


def test_the_published_form_by_hand() -> None:
    """What the published system writes of this state, and what it begins with."""
    belief = Belief("microwave 1", frozenset({"mug 1"}), {
        "cabinet 1": Place(True, False, frozenset({"mug 2", "desklamp 1"})), "microwave 1": Place(False, False),
        "shelf 1": Place()}, {"mug 1": frozenset({"hot", "clean"}), "desklamp 1": frozenset({"lit"})})
    assert belief.to_json() == PUBLISHED and Belief.from_json(PUBLISHED) == belief
    assert Belief.parse(f"The new state:\n```json\n{json.dumps(PUBLISHED, indent=1)}\n```") == belief
    unvisited = {"visited": False, "open": "N/A", "objects": []}
    start = Belief.of(START).to_json()
    assert start == {"agent_location": "middle of the room", "inventory": None, "world_state": dict.fromkeys(
        ("cabinet 1", "microwave 1", "shelf 1"), unvisited)}
    assert Belief.from_json(start) == Belief.of(START)
    assert Belief.from_json(start | {"inventory": "nothing"}) == Belief.from_json(start | {"inventory": ""})
    none = Belief.from_json({"agent_location": "shelf 1", "inventory": ["pen 1", "pen 2"],
                             "world_state": {"shelf 1": {"visited": True, "open": "N/A", "objects": None}}})
    assert none.inventory == {"pen 1", "pen 2"} and none.places == {"shelf 1": Place(True)}


@pytest.mark.parametrize(("change", "says"), [
    (lambda s: s.pop("inventory"), "field 'inventory' is missing"),
    (lambda s: s.update(agent_location="the kitchen"), "agent_location: 'the kitchen' isn't a receptacle"),
    (lambda s: s.update(inventory="mug 1(boiling)"), "inventory: 'mug 1(boiling)' isn't an object"),
    (lambda s: s["world_state"]["shelf 1"].update(open="maybe"), "shelf 1: open is 'maybe'"),
    (lambda s: s["world_state"]["shelf 1"].update(visited=1), "field 'visited' is of the wrong type"),
    (lambda s: s["world_state"]["shelf 1"].update(objects=["mug"]), "shelf 1: objects: 'mug' isn't an object"),
    (lambda s: s["world_state"].update({"__import__('os')": {}}), "isn't a receptacle"),
])
def test_a_malformed_state_is_one_line_that_says_where(change, says: str) -> None:
    state = copy.deepcopy(PUBLISHED)
    change(state)
    with pytest.raises(UserError) as error:
        Belief.from_json(state, "request 3")
    assert str(error.value).startswith("request 3: ") and says in str(error.value) and "\n" not in str(error.value)


def test_a_thousand_mutated_states_are_read_or_refused_in_one_line() -> None:
    draw, read = random.Random(0), 0
    for _ in range(1000):
        text = json.dumps(PUBLISHED)
        if draw.random() < 0.5:
            state = copy.deepcopy(PUBLISHED)
            inside = draw.choice([state, state["world_state"], state["world_state"]["cabinet 1"]])
            inside[draw.choice([*inside, "x 1"])] = draw.choice(VALUES)
            text = json.dumps(state)
        else:
            at = draw.randrange(len(text))
            foreign = draw.choice(["", "{", "}", '"', "(", "9", "\x00", "NaN"])
            text = text[:at] + foreign + text[at + draw.randint(0, 9):]
        try:
            belief = Belief.parse(text)
        except UserError as error:
            assert str(error).startswith("state: ") and len(str(error).splitlines()) == 1
        else:
            read += 1
            assert Belief.from_json(belief.to_json()) == belief
    assert 100 < read < 900


def test_the_belief_is_what_the_engine_itself_knows(games_root: Path) -> None:
    """scripts/check_belief.py on a few games; it plays more by hand."""
    compared = check_belief.check(list_games("train", str(games_root))[:4], 30, 1)
    assert compared["steps"] == 240 and min(compared[what] for what in (
        "objects", "open or closed", "held", "invalid", "places unseen")) > 10 and compared["conditions"] > 0


def test_the_check_finds_what_is_wrong(games_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Belief, "_moved", lambda self, action, said: self)
    with pytest.raises(UserError, match="holds set"):
        check_belief.check(list_games("train", str(games_root))[:4], 30, 1)
