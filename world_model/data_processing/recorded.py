r"""Published dialogues -> recorded episodes: the task, what was seen first, and (action, observation) pairs.

Three formats are the same conversation under different names::

    {"id": ..., "conversations": [{"from": "human" | "gpt", "value": ...}, ...]}            ETO
    {"item_id": ..., "conversations": [{"from": ..., "value": ..., "loss": bool}, ...]}     AgentGym
    {"messages": [{"role": "system" | "user" | "assistant", "content": ...}, ...]}          chat

An opening that only instructs (answered by ``OK``) is left out, and so are example episodes before the
task, as turns or inside the opening, and text that isn't the environment's
(:mod:`world_model.data_processing.foreign_text`).  What an agent thought isn't kept: the state text of this project
(:mod:`itp.text.state`) holds actions and observations.  A row that can't be read raises ``Unreadable``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from itp.text.alfworld_phrases import OPENING, TASK, put_as_move, said_put_as_move, with_arrival
from itp.text.parsing import labeled_action
from itp.text.state import State
from itp.text.turns import NotADialogue, Turn, is_text
from itp.text.turns import read_turns as turns_of
from world_model.data_processing.foreign_text import RepeatedTask, observation_in, without_label, without_tail

_SCIENCE_TASK = "Your task is to "
FIRST_OBSERVATION = re.compile(r"This (?:room|outside location) is called")
"""The beginning of ScienceWorld's first observation; a test compares with the simulator."""
_ACKNOWLEDGED = re.compile(r"\s*ok\b", re.IGNORECASE)
_ONLY_OK = re.compile(r"ok(?:ay)?[.!]?", re.IGNORECASE)
NOT_ENVIRONMENT = "turns with text that isn't the environment's (cut off)"
REPEATED_TASK = "turns that say the task again (cut off)"
ARRIVALS = "arrivals put into alfworld's words"


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


def read_turns(row: Any) -> list[Turn]:
    """The turns of a row of any of the formats.  Raises Unreadable."""
    try:
        turns = turns_of(row)
    except NotADialogue as error:
        raise Unreadable(str(error)) from error
    return [turn._replace(text=turn.text.replace("\r\n", "\n").strip()) for turn in turns]


def episode_id(row: dict[str, Any], number: int) -> str:
    """The row's own id, or its number."""
    for name in ("id", "item_id"):
        if isinstance(row.get(name), (str, int)) and is_text(str(row[name])):
            return str(row[name])
    return f"row-{number}"


def recorded(turns: Sequence[Turn], env: str, put_to_move: bool = False) -> Recorded:
    """The episode of a dialogue.  Raises Unreadable."""
    notes: Counter[str] = Counter()
    turns = _joined(turns)
    start = _start(turns, env)
    notes["opening turns left out"] += start
    task, first, cut = _opening(turns[start].text, env)
    notes[NOT_ENVIRONMENT] += cut
    repeated = RepeatedTask(TASK + task if env == "alfworld" else task, first if env == "alfworld" else "")
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
        observation = _observation(answer, action, repeated, notes)
        if env == "alfworld" and put_to_move:
            arrived = with_arrival(action, observation)
            notes[ARRIVALS] += arrived != observation
            observation = said_put_as_move(arrived)
        steps.append((action, observation))
    if not steps:
        raise Unreadable("no action that was answered" if final else "no action at all")
    if all(_ONLY_OK.fullmatch(observation) for _, observation in steps):
        raise Unreadable("no answer but OK")
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
    """Index of the human turn that poses the task: the last that poses one, since examples come before.

    Where later turns say the same task again, it is the first of them.
    """
    # Doing ScienceWorld's `task` shows the task again, and is a step like any other.
    posing = [i for i in range(0, len(turns), 2) if _posed(turns[i].text, env) is not None
              and not (i and _is_task_command(_action(turns[i - 1].text), env))]
    if not posing:
        raise Unreadable("no human turn that poses a task")
    opening = OPENING if env == "alfworld" else FIRST_OBSERVATION.pattern
    start = posing[-1]
    for earlier in reversed(posing[:-1]):
        # With an opening of its own, and turns without a task before it, it is another episode with the same task.
        another = start - earlier > 2 and re.search(opening, turns[start].text)
        if another or not _same_task(_posed(turns[earlier].text, env) or "", _posed(turns[start].text, env) or ""):
            break
        start = earlier
    return start


def _same_task(task: str, again: str) -> bool:
    """Whether both say one task; other words, or a quotation mark, may be behind it on the line."""
    short, long = sorted((task, again), key=len)
    rest = long[len(short):]
    return long.startswith(short) and (not rest or rest[0] in ".\"'”" or short.endswith(".") and rest[0] == " ")


def _is_task_command(action: str | None, env: str) -> bool:
    return env == "scienceworld" and (action or "").lower() == "task"


def _posed(text: str, env: str) -> str | None:
    """The last task that a turn poses; None where it poses none."""
    label = TASK if env == "alfworld" else _SCIENCE_TASK
    if label not in text:
        return None
    task = re.split(r"\n|\bObservation:", text[text.rfind(label) + len(label):])[0]
    if env == "alfworld":  # one sentence
        return re.split(r"\.\s", without_tail(task))[0].removesuffix(".")
    # As the environment gives it, without double spaces.
    return _SCIENCE_TASK + " ".join(without_tail(FIRST_OBSERVATION.split(task)[0]).split())


def _opening(text: str, env: str) -> tuple[str, str, bool]:
    """(task, first observation, whether there was more) of the turn that poses the task.

    Examples inside the turn come before the last task.
    """
    task = _posed(text, env) or ""
    if env == "alfworld":
        posed = text.rfind(TASK)
        begin = text.rfind(OPENING, 0, posed)
        if begin < 0:
            raise Unreadable("no first observation before the task")
        around, behind = text[begin:posed].strip(), text[posed + len(TASK):]
        first = without_tail(around)
        more = first != around or behind.strip().removesuffix(".") != task
    else:
        behind = text[text.rfind(_SCIENCE_TASK):]
        seen = FIRST_OBSERVATION.search(behind)
        before, around = (behind[:seen.start()], behind[seen.start():].strip()) if seen else (behind, "")
        first = without_tail(around)
        before = " ".join(before.split()).removesuffix("Observation:").strip()
        more = first != around or before != task
    if task in ("", _SCIENCE_TASK):
        raise Unreadable("an empty task")
    return task, first, more


def _action(said: str) -> str | None:
    """The action of an agent's turn: what follows its first ``Action:``; None where there is none."""
    labeled = labeled_action(said, anywhere=True)
    return (without_tail(labeled) or None) if labeled else None


def _is_thought(said: str, answer: str) -> bool:
    """A turn of thought, which the environment answers with OK."""
    return bool(_ACKNOWLEDGED.match(without_label(answer))) and len(answer) < 20 and bool(said)


def _observation(answer: str, action: str, repeated: RepeatedTask, notes: Counter[str]) -> str:
    text, again = (answer, False) if action.lower() == "task" else repeated.removed(answer)
    seen, more = observation_in(text)
    notes[REPEATED_TASK] += again
    notes[NOT_ENVIRONMENT] += more
    if not seen:
        raise Unreadable("an empty observation")
    return seen
