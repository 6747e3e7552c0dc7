"""The expert's knowledge in words: what it says is true of the record, and is to the letter what methods ask for."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import pytest

from itp.agent.policy import Policy
from itp.games import Game
from itp.text.dialogues import Dialogue, judge_dialogue, reflection_dialogue, thought_dialogue
from itp.text.prompts import foresight_text, policy_prompt, proposal_text
from itp.text.segments import dialogue_segments
from itp.text.state import State, parse
from itp.transitions import Transition
from tests.toy import ToyLM
from world_model.data_processing.reasoning import expert_thoughts, reasoning_dialogues

PLAYED = [  # (executed, what the expert would do, answer, what the expert thinks)
    ("go to desk 1", "go to desk 1", "You arrive at desk 1. On the desk 1, you see a pen 2.",
     "I look for a mug. Next is desk 1."),
    ("look", "go to sidetable 1", "You are facing the desk 1. Next to it, you see nothing.",
     "I look for a mug. There is none at desk 1. Next is sidetable 1."),
    ("go to sidetable 1", "go to sidetable 1", "You arrive at sidetable 1. On the sidetable 1, you see a mug 1.",
     "I look for a mug. There is none at desk 1. Next is sidetable 1."),
    ("take mug 1 from sidetable 1", "take mug 1 from sidetable 1", "You pick up the mug 1 from the sidetable 1.",
     "I look for a mug. There is mug 1 at sidetable 1."),
    ("go to sinkbasin 1", "go to sinkbasin 1", "You arrive at sinkbasin 1. On the sinkbasin 1, you see nothing.",
     "I have mug 1 and must clean it with a sinkbasin."),
    ("clean mug 1 with sinkbasin 1", "clean mug 1 with sinkbasin 1", "You clean the mug 1 using the sinkbasin 1.",
     "I have mug 1 and must clean it with a sinkbasin."),
    ("go to shelf 1", "go to shelf 1", "You arrive at shelf 1. On the shelf 1, you see nothing.",
     "I have mug 1 and bring it to shelf 1."),
    ("move mug 1 to shelf 1", "move mug 1 to shelf 1", "You move the mug 1 to the shelf 1.",
     "I have mug 1 and bring it to shelf 1."),
]


@pytest.fixture
def game(tmp_path: Path) -> Game:
    params = {"object_target": "Mug", "parent_target": "Shelf", "toggle_target": ""}
    (tmp_path / "traj_data.json").write_text(json.dumps({"pddl_params": params}))
    return Game("alfworld", "train", "g", str(tmp_path / "game.tw-pddl"), "pick_clean_then_place_in_recep")


def episode() -> list[Transition]:
    state, rows = State("put a clean mug in shelf", "You are in the middle of a room. Looking quickly around you, "
                        "you see a desk 1, a shelf 1, a sidetable 1, and a sinkbasin 1."), []
    for i, (action, expert, answer, _) in enumerate(PLAYED):
        rows.append(Transition("g#0", i, state.render(), action, answer, expert))
        state = state.after(action, answer)
    return rows


def joined(dialogue: Dialogue) -> str:
    return "".join(text for text, _ in dialogue_segments(dialogue["conversations"]))


def learned(dialogue: Dialogue) -> list[str]:
    return [text for text, learn in dialogue_segments(dialogue["conversations"]) if learn]


def test_the_expert_says_what_it_knows(game: Game) -> None:
    assert expert_thoughts(game, episode()) == [thought for *_, thought in PLAYED]


@pytest.mark.parametrize("step", [0, 1, 5])
def test_dialogues_are_what_the_policy_is_asked(step: int) -> None:
    rows, lm = episode(), ToyLM("policy")
    policy, state, expert = Policy(lm), parse(rows[step].state), rows[step].expert_action
    tried = foresight_text([(t.action, t.next_state) for t in rows[step:step + 2]])

    asyncio.run(policy.think_and_act(state, 1))
    asyncio.run(policy.reflect(state, tried, 1))
    asyncio.run(policy.act(state, None, 1, foresight=tried, notes="\nReflection: so be it."))
    asyncio.run(policy.judge(state, proposal_text("look")))
    thinking, reflecting, acting, judging = (prompt for prompt, _ in lm.asked)

    dialogue = thought_dialogue(rows, step, "so be it.")
    assert joined(dialogue) == f"{thinking} so be it.\nAction: {expert}\n"
    assert learned(dialogue) == [f" so be it.\nAction: {expert}\n"]
    dialogue = reflection_dialogue(rows, step, tried, "so be it.")
    assert joined(dialogue) == f"{acting} {expert}\n" and acting.startswith(reflecting)
    assert learned(dialogue) == [" so be it.\n", f" {expert}\n"]
    dialogue = judge_dialogue(rows, step, proposal_text("look"), False)
    assert joined(dialogue) == f"{judging} no\n" and learned(dialogue) == [" no\n"]


def test_what_helps_is_what_the_expert_does(game: Game) -> None:
    rows, verdicts = episode(), []
    for seed in range(60):
        talks = reasoning_dialogues(game, rows, random.Random(seed), max_k=3)
        assert [talk["id"].split("/")[1].split("-")[0] for talk in talks] == ["thought", "reflection", "helps", "helps"]
        for talk in talks[1:]:
            step = int(talk["id"].rpartition("-")[2])
            tried = joined(talk).removeprefix(policy_prompt(rows[step].state).removesuffix("\nAction:"))
            actions = [line.removeprefix("If: ") for line in tried.split("\n") if line.startswith("If: ")]
            told = joined(talk).split("Helps: " if "helps" in talk["id"] else "Reflection: ")[1]
            helps = actions == [t.expert_action for t in rows[step:step + len(actions)]]
            assert told.startswith(("yes", "It helps.") if helps else ("no", "It is no help."))
            verdicts.append(helps)
    assert 0.3 < sum(verdicts) / len(verdicts) < 0.8
