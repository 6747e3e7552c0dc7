"""One model, two modes: what it is asked, and what becomes of its answers."""

from __future__ import annotations

import asyncio
import json

import pytest

from itp.agent.state_model import StateModel
from itp.agent.world_model import WorldModel
from itp.errors import UserError
from itp.lm.base import GenParams, Generation
from itp.text.belief import Belief
from itp.text.conditions import Conditions, FailedAction
from itp.text.state import State, parse
from itp.transitions import Transition
from world_model.base_tuning.examples import to_examples
from world_model.data_processing.metaicl import Counter, scenes_of, to_rows

FIRST = "You are in the middle of a room. Looking quickly around you, you see a cabinet 1, and a desk 2."
SAID = "You arrive at desk 2. On the desk 2, you see a mug 1."
STATE = State("put some mug on desk", FIRST)
BELIEF = Belief.of(STATE)
AFTER = BELIEF.after("go to desk 2", SAID)


class Scripted:
    """An LM that gives the next of its texts, and notes prompts and parameters."""

    name, role, tokenizer, context_length = "scripted", "world_model", None, None

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked = list(texts), []

    async def generate(self, prompts: list[str], params: GenParams) -> list[Generation]:
        self.asked += [(prompt, params) for prompt in prompts]
        return [Generation(self.texts.pop(0), 1, 1, 0, "stop") for _ in prompts]


def test_both_modes_are_asked_as_they_were_trained() -> None:
    """The prompts are those of the training rows of the same transition."""
    t = Transition("e", 0, STATE.render(), "go to desk 2", SAID)
    rows = list(to_rows(scenes_of([(t, parse(t.state))]), 0, Counter()))
    trained = [example.segments[0][0] for example in to_examples(rows)]
    lm = Scripted(*[f" {json.dumps(AFTER.to_json())}"] * 2)
    model = StateModel(WorldModel(lm))
    assert asyncio.run(model.perceive(BELIEF, "go to desk 2", SAID, True)) == AFTER
    lists = json.loads(rows[1].state.split("\n")[1].partition(": ")[2])
    given = Conditions({place: tuple(things) for place, things in lists.items()})
    assert asyncio.run(model.predict(BELIEF, "go to desk 2", given, 1, 7)) == [AFTER]
    assert [prompt for prompt, _ in lm.asked] == trained
    assert [(params.temperature, params.max_new_tokens) for _, params in lm.asked] == [(0.0, 2048), (1.0, 2048)]


def test_a_reply_that_is_no_state_predicts_no_change_and_perceives_nothing() -> None:
    failed = Conditions({}, (FailedAction("open desk 2", "desk 2", None, {}),))
    model = StateModel(WorldModel(Scripted("I don't know", json.dumps(AFTER.to_json()), '{"agent_location": 1}',
                                           "eval()")))
    assert asyncio.run(model.predict(BELIEF, "go to desk 2", failed, 3, 0)) == [BELIEF, AFTER, BELIEF]
    with pytest.raises(UserError, match="state after 'look': no JSON object in 'eval"):
        asyncio.run(model.perceive(BELIEF, "look", "", True))
