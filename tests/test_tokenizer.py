"""The base LM's tokenizer on text of the real engine: nothing is lost, names are one token."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from itp.envs.alfworld.env import AlfworldEnv
from itp.envs.alfworld.games import list_games
from itp.text.state import State
from itp.training.from_scratch.word_tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def states(games_root: Path) -> list[State]:
    """The last states of random play in all games of three splits."""
    env, draw, states = AlfworldEnv(want_admissible=True), random.Random(3), []
    for game in [g for split in ("train", "seen", "unseen") for g in list_games(split, games_root)]:
        seen = env.reset(game)
        state = State(seen.task, seen.text)
        for _ in range(60):
            # Half of the actions handle things, which a uniform choice rarely does; some aren't possible.
            handling = [a for a in seen.admissible if not a.startswith(("go to", "examine", "look", "help"))]
            pool = handling if handling and draw.random() < 0.5 else [a for a in seen.admissible if a != "help"]
            action = draw.choice(pool) if draw.random() < 0.95 else "take mug 9 from shelf 9"
            seen = env.step(action).obs
            state = state.after(action, seen.text)
        states.append(state)
    env.close()
    return states


@pytest.fixture(scope="module")
def tokenizer(states: list[State]):
    return build_tokenizer([state.render() for state in states])


def test_engine_text_survives_the_round_trip(states: list[State], tokenizer) -> None:
    texts = {text for state in states for pair in state.history for text in pair}
    texts |= {text for state in states for text in (state.task, state.first)}
    verbs = {text.split()[0] for state in states for text, _ in state.history}
    assert {"go", "take", "move", "open", "close", "examine", "inventory"} <= verbs and len(texts) > 200
    lost = {text: back for text in texts if (back := tokenizer.decode(tokenizer.encode(text).ids)) != text}
    assert not lost


def test_whole_states_survive_too(states: list[State], tokenizer) -> None:
    for state in states:
        text = state.render()
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_prompt_and_completion_meet_at_a_token_border(states: list[State], tokenizer) -> None:
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text).ids

    for state in states:
        text = state.render()
        labels = list(re.finditer(r"(?:Action|Observation):", text))
        for match in [*labels[:4], *labels[-4:]]:
            assert encode(text[:match.end()]) + encode(text[match.end():]) == encode(text)


def test_a_thing_with_its_number_is_one_token(tokenizer) -> None:
    def tokens(text: str) -> list[str]:
        return tokenizer.encode(text).tokens

    assert tokens("take mug 2 from cabinet 12") == ["take", "mug 2", "from", "cabinet 12"]
    # Numbers that no made game has: two tokens, but nothing unknown.
    assert tokens("take mug 12 from countertop 30") == ["take", "mug", "12", "from", "countertop", "30"]


def test_an_unknown_word_is_unknown_and_not_lost(tokenizer) -> None:
    assert tokenizer.encode("take zeppelin 1").tokens == ["take", "[UNK]", "1"]
