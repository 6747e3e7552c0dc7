"""World-model fidelity: kinds of transitions and the figures, on hand-made cases."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from itp.text.state import State
from itp.transitions import Transition
from world_model.fidelity import kind_of, measure, token_f1

START = State("put a mug in shelf", "You are in the middle of a room. Looking quickly around you, you see a desk 1.")
DESK = "You arrive at desk 1. On the desk 1, you see a mug 1."
SAW_DESK = START.after("go to desk 1", DESK)
SAW_DRAWER = START.after("open drawer 2", "You open the drawer 2. The drawer 2 is open. In it, you see a pen 1.")


@pytest.mark.parametrize("state, action, seen, kind", [
    (START, "go to desk 1", DESK, "first_visit"),
    (SAW_DESK, "go to desk 1", "You arrive at desk 1. On the desk 1, you see nothing.", "revisit"),
    (SAW_DESK, "go to desk 10", "You arrive at desk 10. On the desk 10, you see nothing.", "first_visit"),
    (SAW_DESK, "examine desk 1", "On the desk 1, you see a mug 1.", "revisit"),
    (START, "go to drawer 2", "You arrive at drawer 2. The drawer 2 is closed.", "deterministic"),
    (START, "open drawer 2", "You open the drawer 2. The drawer 2 is open. In it, you see nothing.", "first_visit"),
    (SAW_DRAWER, "go to drawer 2", "You arrive at drawer 2. The drawer 2 is open. In it, you see a pen 1.", "revisit"),
    (SAW_DESK, "take mug 1 from desk 1", "You pick up the mug 1 from the desk 1.", "deterministic"),
    (SAW_DESK, "use desklamp 1", "You turn on the desklamp 1.", "deterministic"),
    (SAW_DESK, "look", "You are facing the desk 1. Next to it, you see nothing.", "inspect"),
    (START, "inventory", "You are not carrying anything.", "inspect"),
    (SAW_DESK, "examine mug 1", "There's nothing special about mug 1.", "inspect"),
    (SAW_DESK, "go to moon 1", "Nothing happens.", "invalid"),
    (SAW_DESK, "examine moon 1", "Nothing happens.", "invalid"),
])
def test_kind_of(state: State, action: str, seen: str, kind: str) -> None:
    assert kind_of(state, action, seen) == kind


def test_token_f1() -> None:
    assert token_f1("a mug 1", "a mug 1.") == 1.0
    # 3 words in common of 4 and 5: precision 3/4, recall 3/5.
    assert token_f1("you see mug 1", "you see a mug 2") == pytest.approx(2 * 0.75 * 0.6 / (0.75 + 0.6))
    assert token_f1("mug mug mug", "mug") == pytest.approx(0.5)
    assert token_f1("apple", "mug") == 0.0
    assert token_f1("", "mug") == 0.0


class Oracle:
    """A world model that knows everything but ``wrong``'s answers."""

    def __init__(self, rows: Sequence[Transition], wrong: dict[str, str]) -> None:
        self.answers = {(t.state, t.action): wrong.get(t.action, t.next_state) for t in rows}

    async def step(self, states: Sequence[State], actions: Sequence[str]) -> list[str]:
        return [self.answers[state.render(), action] for state, action in zip(states, actions, strict=True)]


def test_measure_counts_by_kind() -> None:
    played = [(START, "go to desk 1", DESK), (SAW_DESK, "go to desk 1", DESK), (SAW_DESK, "look", "You see."),
              (SAW_DESK, "examine desk 1", "On the desk 1, you see a mug 1."), (START, "fly", "Nothing happens.")]
    rows = [Transition("e", 0, state.render(), action, seen) for state, action, seen in played]
    perfect = asyncio.run(measure(Oracle(rows, {}), rows))
    assert perfect["all"] == {"exact_match": 1.0, "token_f1": 1.0, "n": 5}
    assert {kind: row["n"] for kind, row in perfect.items()} == {
        "revisit": 2, "first_visit": 1, "inspect": 1, "invalid": 1, "all": 5}

    figures = asyncio.run(measure(Oracle(rows, {"examine desk 1": "On the desk 1, you see nothing"}), rows))
    # 6 of 7 and 9 words in common (On the desk 1 you see | nothing / a mug 1).
    f1 = 2 * 6 / (7 + 9)
    assert figures["revisit"] == pytest.approx({"exact_match": 0.5, "token_f1": (1 + f1) / 2, "n": 2})
    assert figures["all"] == pytest.approx({"exact_match": 0.8, "token_f1": (4 + f1) / 5, "n": 5})
    assert figures["first_visit"]["exact_match"] == 1.0
