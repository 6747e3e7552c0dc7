r"""Published dialogues -> recorded episodes: the task, what was seen first, and (action, observation) pairs.

Three formats are the same conversation under different names::

    {"id": ..., "conversations": [{"from": "human" | "gpt", "value": ...}, ...]}            ETO
    {"item_id": ..., "conversations": [{"from": ..., "value": ..., "loss": bool}, ...]}     AgentGym
    {"messages": [{"role": "system" | "user" | "assistant", "content": ...}, ...]}          chat

An opening that only instructs (answered by ``OK``) is left out, and so are example episodes before the
task, as turns or inside the opening.  What an agent thought isn't kept: the state text of this project
(:mod:`itp.text.state`) holds actions and observations.  A row that can't be read raises ``Unreadable``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from itp.envs.alfworld.env import split_intro
from itp.errors import UserError
from itp.text.alfworld_phrases import GREETING, OPENING, TASK, put_as_move, said_put_as_move
from itp.text.parsing import labeled_action
from itp.text.state import State

SPEAKERS = {"human": "human", "user": "human", "system": "system", "gpt": "gpt", "assistant": "gpt"}
_SCIENCE_TASK = "Your task is to "
_ACKNOWLEDGED = re.compile(r"\s*ok\b", re.IGNORECASE)


class Unreadable(ValueError):
    """Why a dialogue can't be converted; a short phrase, the same for all of its kind."""


@dataclass(frozen=True)
class Recorded:
    """An episode.  ``final``: the last action, where the record ends before it was answered.

    ``learned[t]``: whether action t (``final`` last) is to be imitated.  ``notes`` counts what was left out.
    """

    task: str
    first: str
    steps: tuple[tuple[str, str], ...]
    final: str
    learned: tuple[bool, ...]
    notes: Counter[str]

    def states(self) -> list[State]:
        """s_0 ... s_T, the last after all steps."""
        states = [State(self.task, self.first)]
        for action, observation in self.steps:
            states.append(states[-1].after(action, observation))
        return states


@dataclass(frozen=True)
class Turn:
    who: str
    text: str
    learned: bool = True


def read_turns(row: Any) -> list[Turn]:
    """The turns of a row of any of the formats."""
    if not isinstance(row, dict):
        raise Unreadable("not a row of named fields")
    name = next((name for name in ("conversations", "messages") if name in row), None)
    if name is None:
        raise Unreadable("neither 'conversations' nor 'messages'")
    who, what = ("from", "value") if name == "conversations" else ("role", "content")
    if not isinstance(row[name], list):
        raise Unreadable(f"{name!r} isn't a list")
    turns = []
    for turn in row[name]:
        if not isinstance(turn, dict) or not isinstance(turn.get(what), str):
            raise Unreadable(f"a turn without a text {what!r}")
        if not isinstance(turn.get(who), str) or turn[who] not in SPEAKERS:
            raise Unreadable(f"a turn whose {who!r} isn't one of {', '.join(SPEAKERS)}")
        if not _is_text(turn[what]):
            raise Unreadable("a turn that isn't valid Unicode text")
        learned = turn.get("loss") is not False and turn.get("weight", 1) != 0
        turns.append(Turn(SPEAKERS[turn[who]], turn[what].replace("\r\n", "\n").strip(), learned))
    return turns


def episode_id(row: dict[str, Any], number: int) -> str:
    """The row's own id, or its number."""
    for name in ("id", "item_id"):
        if isinstance(row.get(name), (str, int)) and _is_text(str(row[name])):
            return str(row[name])
    return f"row-{number}"


def recorded(turns: Sequence[Turn], env: str, put_to_move: bool = False) -> Recorded:
    """The episode of a dialogue.  Raises Unreadable."""
    notes: Counter[str] = Counter()
    turns = _joined(turns)
    start = _start(turns, env)
    notes["opening turns left out"] += start
    task, first = _opening(turns[start].text, env)
    steps: list[tuple[str, str]] = []
    learned: list[bool] = []
    final = ""
    rest = turns[start + 1:]
    for i in range(0, len(rest), 2):
        said, answer = rest[i], rest[i + 1].text if i + 1 < len(rest) else None
        action = _action(said.text)
        if action is None and answer is not None and _is_thought(said.text, answer):
            notes["turns of thought alone left out"] += 1
            continue
        if action is None:
            raise Unreadable("a turn of the agent without an action")
        notes["thoughts left out"] += "thought:" in said.text.lower()
        if env == "alfworld" and put_to_move:
            action = put_as_move(action)
        learned.append(said.learned)
        if answer is None:
            final = action
            notes["last actions without an answer (imitated, no transition)"] += 1
            break
        observation = _observation(answer, env)
        if env == "alfworld" and put_to_move:
            observation = said_put_as_move(observation)
        steps.append((action, observation))
    if not learned:
        raise Unreadable("no action at all")
    return Recorded(task, first, tuple(steps), final, tuple(learned), +notes)


def env_of(turns: Sequence[Turn]) -> str:
    """Which environment a dialogue is about, by what it says."""
    text = "\n".join(turn.text for turn in turns if turn.who != "gpt")
    if TASK in text and OPENING in text:
        return "alfworld"
    if _SCIENCE_TASK in text:
        return "scienceworld"
    raise Unreadable("no task of ALFWorld or ScienceWorld in it")


def _joined(turns: Sequence[Turn]) -> list[Turn]:
    """Human and gpt turns in turn, human first; a system turn is the beginning of what follows it."""
    joined: list[Turn] = []
    for number, turn in enumerate(turns):
        if turn.who == "system" and number:
            raise Unreadable("a system turn in the middle")
        who = "human" if turn.who == "system" else turn.who
        if joined and joined[-1].who == who:
            if number != 1 or turns[0].who != "system":
                raise Unreadable(f"two turns of {who} in a row")
            joined[-1] = Turn(who, f"{joined[-1].text}\n{turn.text}")
        else:
            joined.append(Turn(who, turn.text, turn.learned))
    if not joined or joined[0].who != "human":
        raise Unreadable("no human turn at the beginning")
    return joined


def _start(turns: Sequence[Turn], env: str) -> int:
    """Index of the human turn that poses the task: the last that poses one, since examples come before."""
    start = None
    for i in range(0, len(turns), 2):
        if env == "alfworld" and TASK in turns[i].text:
            start = i
        if env == "scienceworld" and _SCIENCE_TASK in turns[i].text:
            # Doing `task` shows the task again, and is a step like any other.
            if i == 0 or (_action(turns[i - 1].text) or "").lower() != "task":
                start = i
    if start is None:
        raise Unreadable("no human turn that poses a task")
    return start


def _opening(text: str, env: str) -> tuple[str, str]:
    """(task, first observation) of the turn that poses the task; examples inside it come before the last task."""
    text = _without_choices(text, env)
    if env == "alfworld":
        begin = text.rfind(OPENING, 0, text.rfind(TASK))
        if begin < 0:
            raise Unreadable("no first observation before the task")
        try:
            first, task = split_intro(GREETING + text[begin:], "")
        except UserError as error:
            raise Unreadable("no task in the opening") from error
        task = task.split("\n")[0].strip().removesuffix(".")
    else:
        posed = text[text.rfind(_SCIENCE_TASK):]
        task, _, first = (part.strip() for part in posed.partition("\n"))
        task = " ".join(task.split())  # as the environment gives it
        first = _without_label(first)
    if not task:
        raise Unreadable("an empty task")
    return task, first


def _action(said: str) -> str | None:
    """The action of an agent's turn: what follows its ``Action:``; None where there is none."""
    return labeled_action(said, anywhere=True)


def _is_thought(said: str, answer: str) -> bool:
    """A turn of thought, which the environment answers with OK."""
    return bool(_ACKNOWLEDGED.match(_without_label(answer))) and len(answer) < 20 and bool(said)


def _observation(answer: str, env: str) -> str:
    text = _without_label(_without_choices(answer, env))
    if not text:
        raise Unreadable("an empty observation")
    return text


def _without_label(text: str) -> str:
    return text.strip().removeprefix("Observation:").strip()


def _without_choices(text: str, env: str) -> str:
    """AgentGym lists the admissible commands behind an ALFWorld observation; they aren't part of a state."""
    return text.split("\nAVAILABLE ACTIONS:")[0].strip() if env == "alfworld" else text


def _is_text(value: str) -> bool:
    """JSON can hold halves of characters, which no file can."""
    return not any("\ud800" <= c <= "\udfff" for c in value)
