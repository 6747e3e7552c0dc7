"""Invented rooms answer as the engine does, and only what can be known is learned from them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from itp.envs.alfworld.env import AlfworldEnv
from itp.envs.alfworld.games import list_games
from itp.text import alfworld_phrases as phrases
from itp.text.alfworld_phrases import contents
from itp.text.state import State
from itp.training.from_scratch.invented_rooms import InventedRoom, invented_episodes, memory_exercises
from itp.transitions import Transition

START = State("put a mug in shelf.", "You are in the middle of a room. Looking quickly around you, you see a cabinet 1,"
                                     " a shelf 2, and a shelf 1.")


@pytest.mark.parametrize("number", range(3))
def test_an_invented_room_with_the_engines_contents_answers_as_the_engine(games_root: Path, number: int) -> None:
    env, draw = AlfworldEnv(want_admissible=True), random.Random(number)
    first = env.reset(list_games("train", str(games_root))[number])
    places = phrases.receptacles(first.text)
    room = InventedRoom(places, draw)
    room.contents, room.closed = {}, set()
    for place in places:  # what the engine has there
        seen = env.step(phrases.go_to(place)).obs.text
        if seen.endswith("is closed."):
            room.closed.add(place)
            seen = env.step(f"open {place}").obs.text
            env.step(f"close {place}")
        room.contents[place] = set(contents(seen)[0].things)
        assert (place in room.openable) == (place in room.closed or contents(seen)[0].opened)
    room.at = places[-1]
    for _ in range(80):
        here, options = room.at, {}
        other = draw.choice([place for place in places if place != here])
        options[phrases.go_to(other)] = lambda place=other: room.go(place)
        options["inventory"] = room.inventory
        if here in room.closed:
            options[f"open {here}"] = room.open
        else:
            if here in room.openable:
                options[f"close {here}"] = room.close
            if not room.hand and room.contents[here]:
                thing = draw.choice(sorted(room.contents[here]))
                options[phrases.take(thing, here)] = lambda thing=thing: room.take(thing)
            if room.hand:
                options[phrases.move(room.hand, here)] = room.move
        action = draw.choice(sorted(options))
        answer = env.step(action)
        if answer.invalid and action.startswith(("take", "move")):
            continue  # a lamp stays where it is, and a pot doesn't go into a garbage can
        assert options[action]() == answer.obs.text
    env.close()


def test_only_what_was_seen_before_is_learned() -> None:
    episode = [Transition("e", 0, START.render(), "go to shelf 1", "")]
    for example in memory_exercises([episode], 20, seed=1):
        state, places = START, set()
        steps = list(zip(example.segments[1::2], example.segments[2::2], strict=True))
        assert 6 <= len(steps) <= 24 and not example.segments[0][1] and not example.eos
        for (given, given_learned), (answer, learned) in steps:
            place = contents(answer)[0].place if contents(answer) else ""
            assert not given_learned and learned == (place in places or given.endswith("inventory\nObservation:"))
            places |= {place} - {""}
    assert state is START


def test_with_change_objects_move_and_the_answer_to_that_is_not_learned() -> None:
    moved = 0
    for episode in invented_episodes([START], 30, seed=2, change=0.6):
        moved += sum(t.action.startswith("move") for t in episode)
        assert [t.state for t in episode][1:] == [
            f"{t.state}\nAction: {t.action}\nObservation: {t.next_state}" for t in episode[:-1]]
    assert moved > 10
    row = Transition("e", 0, START.render(), "go to shelf 1", "")
    for example in memory_exercises([[row]], 30, 2, change=0.6):
        assert not any(learned and text.startswith((" You pick up", " You move")) for text, learned in example.segments)


def test_the_same_seed_gives_the_same_rooms() -> None:
    first, again, other = (list(invented_episodes([START], 3, seed, 0.5)) for seed in (1, 1, 2))
    assert first == again != other


def test_rooms_without_a_list_of_places_give_no_exercises() -> None:
    state = State("put a mug in shelf.", "You see nothing.").render()
    assert not list(memory_exercises([[Transition("e", 0, state, "look", "You see nothing.")]], 3, seed=1))
