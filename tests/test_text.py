"""Text: states survive rendering, and what is trained is to the letter what is asked at inference."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
from collections.abc import Callable, Sequence

import pytest

from itp.agent.imagination import imagine
from itp.agent.policy import Policy
from itp.agent.world_model import WorldModel
from itp.errors import UserError
from itp.lm.base import GenParams, Generation
from itp.text.dialogues import (
    Dialogue,
    check_form,
    episode_dialogue,
    foresight_dialogue,
    horizon,
    horizon_dialogue,
    judge_dialogue,
    outcome_dialogue,
    reflection_dialogue,
    thought_dialogue,
)
from itp.text.parsing import clean_action, parse_action, parse_horizon, parse_thought
from itp.text.prompt_format import PromptFormat, PromptTemplate
from itp.text.prompts import (
    CTRL, foresight_text, policy_prompt, prompt_of_observation, proposal_text, world_model_prompt, world_model_target,
)
from itp.text.segments import dialogue_segments
from itp.text.state import State, parse
from itp.text.turns import Turn, read_turns
from itp.training.dialogue_files import read_dialogue_file
from itp.transitions import Transition

PIECES = ["a mug 1", "\n", "\n\n", " ", "  ", "   ", "Task: ", "Observation: ", "Action: ", "\nAction: look",
          "\nObservation:", "[3 earlier steps omitted]", "\n[1 earlier steps omitted]", "é", "\r", "\u2028", "\t", ":",
          "If: ", "\\n", ""]


def random_text(draw: random.Random) -> str:
    return "".join(draw.choices(PIECES, k=draw.randint(0, 6)))


def random_state(draw: random.Random) -> State:
    history = tuple((random_text(draw), random_text(draw)) for _ in range(draw.randint(0, 5)))
    return State(random_text(draw), random_text(draw), history, omitted=draw.choice([0, 0, 7]))


class ScriptedLM:
    """Answers as ``reply(prompt)`` says, up to the first stop string, and keeps what it was asked."""

    name, role = "scripted", "policy"

    def __init__(self, reply: Callable[[str], str]) -> None:
        self.reply = reply
        self.asked: list[str] = []

    async def generate(self, prompts: Sequence[str], params: GenParams) -> list[Generation]:
        self.asked += prompts
        return [Generation(min((self.reply(p).split(s)[0] for s in params.stop), key=len), 0, 0, 0, "stop")
                for p in prompts]


def episode() -> list[Transition]:
    """Five steps: one explored, one whose observation has several lines that look like labels, one revisit."""
    played = [
        ("go to desk 1", "go to desk 1", "You arrive at desk 1. On the desk 1, you see a mug 1."),
        ("look", "take mug 1 from desk 1", "You are facing the desk 1.\nAction: none\n  Next to it, you see nothing."),
        ("take mug 1 from desk 1", "take mug 1 from desk 1", "You pick up the mug 1 from the desk 1."),
        ("go to shelf 1", "go to shelf 1", "You arrive at shelf 1. On the shelf 1, you see nothing."),
        ("move mug 1 to shelf 1", "move mug 1 to shelf 1", "You move the mug 1 to the shelf 1."),
    ]
    state, rows = State("put a mug in shelf", "You are in the middle of a room."), []
    for t, (action, expert, seen) in enumerate(played):
        rows.append(Transition("game#0", t, state.render(), action, seen, expert))
        state = state.after(action, seen)
    return rows


def test_every_state_survives_rendering() -> None:
    draw = random.Random(5)
    for _ in range(3000):
        state = random_state(draw)
        assert parse(state.render()) == state


def test_a_state_only_grows_at_its_end() -> None:
    draw = random.Random(6)
    for _ in range(300):
        state = random_state(draw)
        action, seen = random_text(draw), random_text(draw)
        assert state.after(action, seen).render().startswith(state.render() + "\n")


def test_rendered_state() -> None:
    state = State("put a mug", "You see\na mug 1.").after("look", "Nothing.").after("wait", "Time passes.")
    assert state.render() == ("Task: put a mug\nObservation: You see\n  a mug 1.\nAction: look\nObservation: Nothing."
                              "\nAction: wait\nObservation: Time passes.")
    assert state.last(1).render() == ("Task: put a mug\nObservation: You see\n  a mug 1.\n[1 earlier steps omitted]\n"
                                      "Action: wait\nObservation: Time passes.")
    assert state.observation == "Time passes."


def test_last_keeps_the_newest_steps_and_counts_the_others() -> None:
    state = State("t", "o")
    for i in range(6):
        state = state.after(f"a{i}", f"o{i}")
    cut = state.last(4)
    assert ([a for a, _ in cut.history], cut.omitted) == (["a2", "a3", "a4", "a5"], 2)
    assert (cut.task, cut.first) == ("t", "o")
    assert cut.last(1).omitted == 5 and cut.last(1).history == (("a5", "o5"),)
    assert state.last(0) == state and state.last(6) == state and state.last(99) == state


@pytest.mark.parametrize("text, says", [
    ("Task: x", "at least"),
    ("Observation: x\nTask: y", "Task: "),
    ("Task: x\nObservation: y\nAction: z", "without an observation"),
    ("Task: x\nObservation: y\nAction: z\nAction: z", "Observation: "),
])
def test_text_that_is_no_state_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse(text)


def joined(dialogue: Dialogue) -> str:
    return "".join(text for text, _ in dialogue_segments(dialogue["conversations"]))


def test_one_dialogue_holds_the_prompt_of_every_step_for_policy_and_world_model() -> None:
    rows = episode()
    segments = dialogue_segments(episode_dialogue(rows)["conversations"])
    given = [i for i, (text, _) in enumerate(segments) if text == "Action:"]
    assert len(given) == len(rows)
    for t, label in zip(rows, given, strict=True):
        prefix = "".join(text for text, _ in segments[:label + 1])
        assert prefix == policy_prompt(t.state)
        better = True if t.action == t.expert_action else f" {t.expert_action}\n"
        assert segments[label + 1] == (f" {t.action}\n", better)
        seen = segments[label + 2][0]
        assert seen.startswith("Observation:")
        asked = prefix + segments[label + 1][0] + "Observation:"
        assert asked == world_model_prompt(t.state, t.action)
        assert seen == f"Observation:{world_model_target(t.next_state)}\n"


@pytest.mark.parametrize("template", [PromptTemplate(), PromptTemplate("<user>", "</user>\n<assistant>")])
def test_the_prompt_of_an_observation_is_the_beginning_of_the_next_prompts(template: PromptTemplate) -> None:
    policy, draw = Policy(ScriptedLM(str), PromptFormat(template=template, control_token=True)), random.Random(5)
    for _ in range(50):
        state, action, observation = random_state(draw), random_text(draw), random_text(draw)
        asked = prompt_of_observation(policy.heads_prompt(state), action)
        assert asked.endswith("\nObservation:")
        following = policy.heads_prompt(state.after(action, observation))
        assert asked + world_model_target(observation) + f"\n{CTRL}" == following


@pytest.mark.parametrize("step, k", [(0, 3), (2, 2), (4, 3)])
def test_foresight_dialogues_are_what_the_policy_is_asked_after_imagining(step: int, k: int) -> None:
    rows = episode()
    truth = {world_model_prompt(t.state, t.action): world_model_target(t.next_state) for t in rows}
    actions = {policy_prompt(t.state): f" {t.action}\nwritten too far" for t in rows}
    lm = ScriptedLM(lambda prompt: {**truth, **actions}.get(prompt, " done\n"))
    policy = Policy(lm)

    async def act() -> str:
        state = parse(rows[step].state)
        imagined = await imagine(policy, WorldModel(lm), state, min(k, len(rows) - step), seed=1)
        await policy.act(state, None, 1, foresight=imagined.text())
        return lm.asked[-1]

    asked = asyncio.run(act())
    dialogue = foresight_dialogue(rows, step, k)
    assert joined(dialogue) == asked + f" {rows[step].expert_action}\n"
    learned = [text for text, learn in dialogue_segments(dialogue["conversations"]) if learn]
    assert learned == [f" {rows[step].expert_action}\n"]


def test_horizon_dialogues_are_what_the_policy_is_asked() -> None:
    rows = episode()
    for step in range(len(rows)):
        lm = ScriptedLM(lambda prompt: " 2\n")
        assert asyncio.run(Policy(lm).horizon(parse(rows[step].state), 5, seed=0)) == (2, " 2")
        dialogue = horizon_dialogue(rows, step, 5)
        assert joined(dialogue) == f"{lm.asked[0]} {horizon(rows, step, 5)}\n"
        assert [learn for _, learn in dialogue_segments(dialogue["conversations"])].count(True) == 1


def test_dialogues_of_every_kind_are_in_the_form_that_training_asks_for() -> None:
    rows = episode()
    tried = foresight_text([(t.action, t.next_state) for t in rows[2:4]])
    whole = episode_dialogue(rows)
    unanswered = {"conversations": whole["conversations"][:-1]}
    lines = [dataclasses.replace(t, action="two\nlines", expert_action="two\nlines") for t in rows[:1]]
    for dialogue in (whole, unanswered, episode_dialogue(lines), foresight_dialogue(rows, 2, 2),
                     horizon_dialogue(rows, 3, 5), thought_dialogue(rows, 1, "A mug."),
                     judge_dialogue(rows, 2, tried, True), judge_dialogue(rows, 0, proposal_text("look"), False),
                     reflection_dialogue(rows, 2, foresight_text([("look", "x\ny")], "last_obs"), "It helps."),
                     outcome_dialogue(rows, 2, 0, "two\nlines", "x\ny"), outcome_dialogue(rows, 0, 1, "look", "")):
        check_form(read_turns(dialogue))


def test_an_outcome_teaches_no_action() -> None:
    turns = read_turns(outcome_dialogue(episode(), 2, 0, "look", "x"))
    for action in (turns[-2]._replace(learned=True), turns[-2]._replace(correction="Action: open")):
        with pytest.raises(ValueError, match="an action to learn, with a reply behind it"):
            check_form([*turns[:-2], action, turns[-1]])
    with pytest.raises(ValueError, match="expected 'Observation: '"):
        check_form([*turns[:-1], turns[-1]._replace(text="Action: open")])


@pytest.mark.parametrize("place, who, text, says", [
    (0, "human", "Your task is to: look.", "turn 0: a state"),
    (0, "human", "Task: x\nYou see nothing.", "turn 0: expected 'Observation: '"),
    (0, "system", "Task: x\nObservation: y", "turn 0 is of system"),
    (1, "gpt", "Thought: hm.\nAction: look", "turn 1: 'Action: look' after"),
    (1, "gpt", "look", "turn 1: expected 'Action: '"),
    (1, "gpt", "Action:\nlook", "turn 1"),
    (1, "human", "Action: look", "turn 1 is of human"),
    (2, "human", "You see nothing.", "turn 2: expected 'Observation: '"),
    (2, "human", "Observation: x\ny", "turn 2: 'y' after"),
    (2, "human", "Observation: x\nIf: look", "turn 2: 'If: look' before"),
    (9, "gpt", "Horizon: far", "turn 9: expected 'Action: '"),
])
def test_other_forms_are_refused(place: int, who: str, text: str, says: str) -> None:
    turns = read_turns({"conversations": episode_dialogue(episode())["conversations"][:-1]})
    check_form(turns)
    turns[place] = Turn(who, text)
    with pytest.raises(ValueError) as error:
        check_form(turns)
    assert str(error.value).startswith(says)


def test_horizon_ends_before_what_has_not_been_seen() -> None:
    rows = episode()
    # Steps 0, 1 and 3 show something for the first time; 2 and 4 show nothing.
    assert [horizon(rows, step, 5) for step in range(5)] == [0, 0, 1, 0, 1]
    seen_again = [*rows[:4], rows[0], rows[2]]
    assert horizon(seen_again, 4, 5) == 2
    assert horizon(seen_again, 4, 1) == 1


def test_world_model_gets_back_what_it_was_taught_whatever_the_observation_holds() -> None:
    draw = random.Random(7)
    for _ in range(500):
        state, seen = random_state(draw), random_text(draw).strip()
        lm = ScriptedLM(lambda prompt: world_model_target(seen))
        assert asyncio.run(WorldModel(lm).step([state], ["look"])) == [seen]
        assert lm.asked == [world_model_prompt(state.render(), "look")]


def test_policy_shows_the_newest_steps_only_where_told_to() -> None:
    lm = ScriptedLM(lambda prompt: " look\n")
    state = parse(episode()[4].state)
    asyncio.run(Policy(lm, history_keep_steps=2).act(state, None, 0))
    assert lm.asked == [policy_prompt(state.last(2).render())]
    assert "[2 earlier steps omitted]" in lm.asked[0]
    asyncio.run(Policy(lm, PromptFormat("instruct"), history=False).act(state, None, 0))
    assert "go to desk 1" not in lm.asked[1] and state.observation in lm.asked[1] and state.task in lm.asked[1]


def test_choosing_without_admissible_actions_is_a_users_error() -> None:
    with pytest.raises(UserError, match="--action_selection score"):
        asyncio.run(Policy(ScriptedLM(str), selection="score").act(State("t", "o"), (), 0))


@pytest.mark.parametrize("reply, action", [
    ("Action: go to desk 1", "go to desk 1"),
    ("Thought: I need it.\nAction: take mug 1 from desk 1\n", "take mug 1 from desk 1"),
    ("Action: look\nObservation: x\nAction:  move  mug 1 to shelf 1. ", "look"),
    ("  Action: `use desklamp 1`", "use desklamp 1"),
    ("\n \"inventory\".\n", "inventory"),
    ("I think\nthat I should look", None),
    ("Action:", None),
    ("", None),
    ("no Action: look here", "no Action: look here"),
])
def test_action_of_a_reply(reply: str, action: str | None) -> None:
    assert parse_action(reply) == action


def test_other_parts_of_a_reply() -> None:
    assert parse_thought("Thought: first\nsecond\nAction: look\n") == "first\nsecond"
    assert parse_thought("just words") == ""
    assert clean_action(" **go to  desk 1**. ") == "go to desk 1"
    assert [parse_horizon(r, 5) for r in (" 3", "about 12 steps", "0", "none", "k = 2, or 4")] == [3, 5, 0, None, 2]


@pytest.mark.parametrize("mark, learned", [({}, True), ({"weight": None}, False), ({"weight": -1}, False),
                                           ({"weight": 0.5}, True), ({"loss": None}, False), ({"loss": 1}, True)])
def test_which_turns_are_learned(mark: dict, learned: bool) -> None:
    turns = read_turns({"conversations": [{"from": "human", "value": "Task: t\nObservation: o"},
                                          {"from": "gpt", "value": "Action: look", **mark}]})
    assert turns[1].learned == learned


@pytest.mark.parametrize("first", ["Task: t\nObservation:", "Task: t\r\nObservation: o\r\n",
                                   "Task: t\nObservation: o\n"])
def test_dialogues_that_another_program_saved_again_are_read(tmp_path, first: str) -> None:
    row = {"conversations": [{"from": "human", "value": first},
                             {"from": "gpt", "value": "Action: look\n", "correction": ""}]}
    (tmp_path / "d.json").write_text(json.dumps([row]))
    (_, _, turns), = read_dialogue_file(str(tmp_path / "d.json"))
    assert turns[0].text in ("Task: t\nObservation: ", "Task: t\nObservation: o") and turns[1].text == "Action: look"


def test_a_damaged_row_of_an_own_file_is_not_sent_to_convert(tmp_path) -> None:
    whole = {"conversations": [{"from": "human", "value": "Task: t\nObservation: o"},
                               {"from": "gpt", "value": "Action: look"}]}
    damaged = {"conversations": [{"from": "human", "value": "o"}, {"from": "gpt", "value": "Action: look"}]}
    for rows, advice in (([damaged, whole, whole], "mend or remove it"), ([whole, damaged], "mend or remove it"),
                         ([damaged, damaged], "world_model.data_processing.convert")):
        (tmp_path / "d.json").write_text(json.dumps(rows))
        with pytest.raises(UserError, match=advice):
            list(read_dialogue_file(str(tmp_path / "d.json")))
