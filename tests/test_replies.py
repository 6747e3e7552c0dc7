"""Replies as chat models write them: the command in them is executed, and a reply without one is counted as such."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest

from itp.agent.policy import Policy
from itp.agent.world_model import WorldModel
from itp.lm.base import GenParams, Generation
from itp.text.parsing import labeled_action, parse_action, parse_help, parse_horizon, parse_line, parse_thought
from itp.text.prompt_format import TUNED, PromptFormat, PromptTemplate
from itp.text.state import State
from world_model.data_processing.recorded import Turn, recorded

GO = "go to drawer 1"
LABELED = [
    f"ACTION: {GO}", f"action: {GO}", f"Action:{GO}", f"Action : {GO}", f"Action\uff1a{GO}", f"**Action:** {GO}",
    f"**Action**: {GO}", f"**Action: {GO}**", f"*Action:* *{GO}*", f"`Action: {GO}`", f"> Action: {GO}",
    f"- Action: {GO}", f"* Action: {GO}", f"- **Action**: {GO}", f"1. Action: {GO}", f"### Action\n{GO}",
    f"Action:\n{GO}", f"Action:\n\n  {GO}\n", f"Action: `{GO}`", f"Action: ```{GO}```", f"Action:\n```\n{GO}\n```",
    f"```text\nAction: {GO}\n```", f"<action>{GO}</action>", f"<Action>\n{GO}\n</Action>", f"<action>{GO}",
    f"Action: <action>{GO}</action>", f"<action>Action: {GO}</action>", f"Action: [{GO}]", f"Action: > {GO}",
    f"Action: \"{GO}\".", f"Action: '{GO}.'", f"Action: \u201c{GO}\u201d", f"Action: {GO}.", f"Action: I will {GO}.",
    f"Action: {GO}. This lets me see.", f"Action 1: {GO}", f"Next action: {GO}", f"My next action: {GO}",
    f"Final action: {GO}", f"Command: {GO}", f"{{\"action\": \"{GO}\"}}",
    f"{{\"thought\": \"I need it\", \"action\": \"{GO}\"}}", f"Assistant: Action: {GO}",
    f"Thought: I need a mug. Action: {GO}", f"Thought: I need a mug Action: {GO}", f"I need a mug. Action: {GO}",
    f"**Thought:** a\n\n**Action:** `{GO}`", f"Thought: I could say Action: look but no.\nAction: {GO}",
    f"<think>Action: eat</think>\nAction: {GO}", f"<thinking>Action: eat</thinking>\nAction: {GO}",
    f"Here is the next command: {GO}",
    # Rounds that the model imagines.
    f"Action: {GO}\nObservation: x\nThought: y\nAction: look", f"Action: {GO} Observation: x Action: look",
    f"Thought: a\nAction: {GO}\nHuman: b\nThought: c\nAction: look", f"Action: {GO}\nAction: look",
    f"Thought: a Action: {GO} Observation: b Thought: c Action: look",
    f"Thought 1: a\nAction 1: {GO}\nObservation 1: b\nAction 2: look", f"Action:\n{GO}\nObservation: b\nAction:\nlook",
    f"Thought: a Action: {GO}\nObservation: b\nThought: c\nAction: look",
]
BARE = [
    GO, f" {GO}\n", f"{GO}.", f"\n\"{GO}\".\n", f"'{GO}'", f"`{GO}`", f"**{GO}**", f"> {GO}", f"- {GO}",
    f"```\n{GO}\n```",
    f"```text\n{GO}\n```", f" I will {GO}.", f"I'll {GO}", f"I should {GO}.", f"I'm going to {GO}", f"Let's {GO}!",
    f"The next command is \"{GO}\".", f"The next action is to {GO}.", f"I will use `{GO}`.", f"Assistant: {GO}",
    f"<answer>{GO}</answer>",
    f"Sure! Here's the next command:\n\n`{GO}`", f"{GO}\n\nThis will help me to find the mug.",
    f"To find it I check the drawers.\n\n{GO}", f"1. {GO}\n2. open drawer 1", f"<think>eat</think>{GO}",
    f"{GO}\nHuman: You see\nThought: x\nAction: look", f" {GO}\nThought: x\nAction: look",
    f" {GO}\nObservation: x\nAction: look", f"{GO}\n**Observation:** x",
]
NONE = ["", "\n", "Action:", "Action: **", "Action:\nObservation: nothing", "Action: \nHuman: hi", "```\n```", "***",
        "Thought: I need to find a", "<think>Action: look", "<action></action>", "I think\nthat I should be careful",
        "Observation: You see a mug 1."]
COMMANDS = ["look", "inventory", "examine desk 1", "use desklamp 1", "wait1", "0", "12", "mug 1", "take stock",
            "pour cup containing red, blue in jug 2", "connect battery anode to wire 1 terminal 1",
            "move egg (in incubator), 2 to pot", "focus on plant (in pot 3)", "clean soapbar 4 with sinkbasin 1"]
INSTRUCT, CHAT = PromptFormat("instruct"), PromptFormat("instruct", template=PromptTemplate("<u>", "<a>"))
STATE = State("t", "o")


class Replies:
    """An LM that says the same to everything, up to the first stop string."""

    def __init__(self, text: str) -> None:
        self.text = text

    async def generate(self, prompts: Sequence[str], params: GenParams) -> list[Generation]:
        text = min((self.text.split(stop)[0] for stop in params.stop), key=len)
        return [Generation(text, 1, 1, 0, "stop") for _ in prompts]


@pytest.mark.parametrize("reply", LABELED + BARE)
def test_command_in_a_reply(reply: str) -> None:
    assert parse_action(reply) == GO


@pytest.mark.parametrize("reply", NONE)
def test_reply_without_a_command(reply: str) -> None:
    assert parse_action(reply) is None and labeled_action(reply) is None


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("form", ["{}", " {}\n", "Action: {}", "Action: {}.",
                                  "Thought: I see 2, and more.\nAction: {}\n",
                                  "Thought: I see. Action: {}", "**Action:** `{}`", "<action>{}</action>"])
def test_commands_stay_as_they_are(command: str, form: str) -> None:
    assert parse_action(form.format(command)) == command


@pytest.mark.parametrize("form", [INSTRUCT, CHAT], ids=["plain", "chat"])
@pytest.mark.parametrize("reply", LABELED + BARE)
def test_policy_executes_and_imagines_the_command_of_a_reply(reply: str, form: PromptFormat) -> None:
    policy = Policy(Replies(reply), form)
    choice = asyncio.run(policy.act(STATE, None, 0))
    assert (choice.action, choice.parsed) == (GO, True)
    assert asyncio.run(policy.propose(STATE, 0)) == GO


@pytest.mark.parametrize("form", [INSTRUCT, CHAT], ids=["plain", "chat"])
@pytest.mark.parametrize("reply", [*NONE, "Thought:"])
def test_policy_says_where_it_found_no_command(reply: str, form: PromptFormat) -> None:
    policy = Policy(Replies(reply), form)
    assert not asyncio.run(policy.act(STATE, None, 0)).parsed
    assert not asyncio.run(policy.think_and_act(STATE, 0)).parsed


@pytest.mark.parametrize("style", ["tuned", "instruct"])
@pytest.mark.parametrize("reply", [
    f" I need it.\nAction: {GO}\n", f" I need it. Action: {GO}", f"Thought: I need it.\n**Action:** {GO}",
    f" I need it.\nAction: {GO}\nHuman: x\nThought: y\nAction: look", f" I need it.\nNext action:\n{GO}"])
def test_thought_and_the_action_that_follows_it(reply: str, style: str) -> None:
    choice = asyncio.run(Policy(Replies(reply), PromptFormat(style)).think_and_act(STATE, 0))
    assert (choice.action, choice.parsed, choice.thought) == (GO, True, "I need it.")


@pytest.mark.parametrize("reply", [f" {GO}\nObservation: x", f" {GO}\n", f" {GO}"])
def test_reply_of_a_trained_model_is_its_first_line(reply: str) -> None:
    for command in (GO, *COMMANDS, "I will look", "Action: look"):
        choice = asyncio.run(Policy(Replies(reply.replace(GO, command)), TUNED).act(STATE, None, 0))
        assert (choice.action, choice.parsed) == (command, True)
    assert not asyncio.run(Policy(Replies("\n"), TUNED).act(STATE, None, 0)).parsed


def test_thought_of_a_reply() -> None:
    assert parse_thought("**Thought:** a b\n**Action:** look") == "a b"
    assert parse_thought("Thought: a b. Action: look") == "a b."
    assert parse_thought("Thought:Thought: a\nAction: look\nThought: b\nAction: c") == "a"
    assert parse_thought("look") == ""


@pytest.mark.parametrize("reply, k", [
    ("2", 2), (" 2\n", 2), ("**2**", 2), ("`2`.", 2), ("Horizon: 2", 2), ("**Horizon:** 2", 2), ("Horizon:\n2", 2),
    ("HORIZON = 2", 2), ("two", 2), ("I would look two steps ahead.", 2), ("2-3 steps", 2), ("2 steps", 2),
    ("Plate 1 is in cabinet 3, so 2 steps.", 2), ("Cabinet 4 is closed. Horizon: 2", 2), ("\n\n2", 2), ("> 2", 2),
    ("<think>4 steps?</think>2", 2), ("```\n2\n```", 2), ("0", 0), ("9", 5), ("-1", None), ("none", None), ("", None),
    ("<think>4", None)])
def test_horizon_of_a_reply(reply: str, k: int | None) -> None:
    assert parse_horizon(reply, 5) == k
    assert asyncio.run(Policy(Replies(reply), CHAT).horizon(STATE, 5, 0)) == (k, reply)


@pytest.mark.parametrize("reply", [" it fails.\nMore", "Reflection: it fails.", "**Reflection:** it fails."])
def test_reflection_of_a_reply(reply: str) -> None:
    assert asyncio.run(Policy(Replies(reply), CHAT).reflect(STATE, "", 0)) == "it fails."


@pytest.mark.parametrize("reply", [" You see.", "Observation: You see.", "**Observation:** You see."])
def test_observation_of_a_reply(reply: str) -> None:
    assert asyncio.run(WorldModel(Replies(reply), CHAT).step([STATE], ["look"])) == ["You see."]


@pytest.mark.parametrize("said", [*LABELED, f"so I do Action: {GO}"])
def test_recorded_dialogues_are_read_by_the_same_rules(said: str) -> None:
    opening = ("-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room. Looking quickly around you, "
               "you see a drawer 1.\n\nYour task is to: look.")
    turns = [Turn("human", opening), Turn("gpt", said), Turn("human", "Observation: The drawer 1 is closed.")]
    assert recorded(turns, "alfworld").steps == ((GO, "The drawer 1 is closed."),)


@pytest.mark.parametrize("reply, action", [
    ('{"thought":"x","action":"go to drawer 1"}', GO),
    ('```json\n{"thought": "x", "action":"go to drawer 1"}\n```', GO),
    ("{'action': 'go to drawer 1'}", GO),
    ("Action: `go to drawer 1`: it is near", GO),
    ("Action: **go to drawer 1** because it is near", GO),
    ("Action: <go to drawer 1>", GO),
    ("go to drawer 1<|im_end|>", GO),
    ("👉 Action: go to drawer 1", GO),
    ("Action = go to drawer 1", GO),
    ("Action - go to drawer 1", GO),
    ("Selected action: go to drawer 1", GO),
    ("Action to take: go to drawer 1", GO),
    ("I need a mug first. I will go to drawer 1.", GO),
    ("<reflection>look</reflection>go to drawer 1", GO),
    ("I think so.\n" + "-" * 40 + "\ngo to drawer 1", GO),
    ("<action>" * 1100 + "go to drawer 1", GO),
])
def test_more_of_what_chat_models_write(reply: str, action: str) -> None:
    assert parse_action(reply) == action


@pytest.mark.parametrize("unit", [
    " ", "\t", "\n", "-", "#", "*", "'", "\"", "\"'", "“", "> ", "1. ", "`", "_", "[", "(", "{", "<", "<action>",
    "<think>", "Action", "Action:", "Action:\n", "Thought: ", "**Action", "\"a", "the next ", "my action ", "1",
    "I will ", ". ", "\"action\":", "k ", "Observation:", "```", "👉"])
def test_no_reply_takes_long_to_read(unit: str) -> None:
    """A model that repeats itself writes thousands of the same tokens."""
    reply = unit * (8000 // len(unit))
    for text in (reply, "I think so.\n" + reply + "\nlook", "Action:" + reply + "x", reply + "look"):
        begin = time.process_time()
        parse_action(text), parse_thought(text), parse_horizon(text, 5), parse_line(text, "Reflection")
        labeled_action(text, anywhere=True)
        assert time.process_time() - begin < 1


def test_a_horizon_of_thousands_of_digits_is_the_longest() -> None:
    assert parse_horizon("9" * 5000, 8) == 8


@pytest.mark.parametrize(("reply", "wanted"), [
    ("Thought: x\nAction: look\nHelp: yes", True), ("Action: look\n**Help:** `Yes`.", True), ("Help : true", True),
    ("Action: look\nHelp: no", False), ("Action: look", False), ("", False), ("help: maybe yes", False),
    ("I need help: yes I do", False), ("<think>Help: yes</think>Action: look\nHelp: no", False),
    ("Action: look\nHelp: no\n" * 500, False)])
def test_whether_help_is_wanted(reply: str, wanted: bool) -> None:
    assert parse_help(reply) is wanted
