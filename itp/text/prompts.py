r"""Every prompt of the project, once.

A *tuned* model (trained by this project) sees the bare state and a label that says what to write::

    Task: put a clean plate in fridge.          \
    Observation: You are in the middle ...       | the state s_t, itp/text/state.py
    Action: go to countertop 1                   |
    Observation: On the countertop 1, you see .. /
    If: take plate 2 from countertop 1          \  the imagined trajectory, if any:
    Then: You pick up the plate 2 from the ..   /  K pairs of (â, ŝ)
    Action:                                     <- the policy goes on from here

A policy with heads has the line ``<CTRL>`` between state and imagined trajectory.  K_t and V(s_t) are
read there, so the text up to it is the same whether the policy decides how far to look or acts.

An *instruct* model (not trained by us) gets the same text behind an instruction.  Either may be asked in
turns of a chat (:mod:`itp.lm.chat`): the text is then what the user says, and the label is where the
model's own turn begins.

Whitespace is code here: a label ends with its colon, what the model writes starts with a space and
ends with a line break (the stop string), so that tokens never straddle the border between what is
given and what is generated, whatever the tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from itp.text.state import indent

CTRL = "<CTRL>"
"""The control token of policies with heads (:mod:`itp.policy.heads`)."""

END = "\n"
"""What ends an action, a thought, a horizon: every one-line completion."""


@dataclass(frozen=True)
class Turns:
    """What stands around a prompt's text: ``head`` before it, ``tail`` between it and the label.

    ``thinks``: the model thinks before it answers, so no label is put into its mouth.
    """

    head: str = ""
    tail: str = "\n"
    thinks: bool = False

    def ask(self, label: str) -> str:
        return self.tail if self.thinks else f"{self.tail}{label}:"


PLAIN = Turns()
"""Plain text: the label on the next line."""

INSTRUCTION = {
    "alfworld": (
        "You act in a household to complete a task, one text command at a time. Commands: go to X, open X, "
        "close X, take X from Y, move X to Y, use X, heat X with Y, cool X with Y, clean X with Y, examine X, "
        "inventory, look. Objects and places have a name and a number, such as apple 1. "
        "If a command can't be carried out, the answer is: Nothing happens."
    ),
    "scienceworld": (
        "You do science experiments in a house with a workshop, a greenhouse and a foundry, one text command at a "
        "time. Commands: go to X, teleport to X, look around, look at X, look in X, open X, close X, pick up X, "
        "put down X, move X to Y, pour X into Y, dunk X into Y, mix X, focus on X, use X on Y, activate X, "
        "deactivate X, connect X to Y, disconnect X, read X, eat X, flush X, inventory, wait, wait1. Focus only on "
        "what the task asks for: a wrong focus fails it."
    ),
}

YES, NO = " yes\n", " no\n"
"""The two answers to ``Helps:``."""

_ASK = {
    "Action": "Reply with the next command only.",
    "Thought": "Think in one line (Thought: ...), then give the next command on the line after it (Action: ...).",
    "Reflection": "The If/Then lines are an imagined future and may be wrong. In one line: does it bring the task "
                  "closer, and what is to be done instead if it doesn't?",
    "Helps": "The If/Then lines are what might be done next, with what would then be seen. Does it bring the task "
             "closer? Reply with yes or no only.",
    "Horizon": "How many steps ahead should be imagined before acting? 0 where the next command is obvious, more "
               "where its consequences matter. Reply with one number from 0 to {max_k}.",
}

_WORLD = (
    "You are the simulator of a {kind} text game. Given the game so far and the player's next command, reply "
    "with the game's answer to that command, in the game's own words, and nothing else."
)
WORLD_INSTRUCTION = {"alfworld": _WORLD.format(kind="household"),
                     "scienceworld": _WORLD.format(kind="science laboratory")}


FORESIGHT_FORMATS = ("full", "last_obs")
"""What of an imagined trajectory the policy reads: every step (eq. 3), or the last imagined observation only, as in
the authors' release."""


def foresight_text(steps: Sequence[tuple[str, str]], keep: str = "full") -> str:
    """An imagined trajectory τ̂ of (action, observation) pairs as text; empty for no steps.

    ``keep`` is one of FORESIGHT_FORMATS.
    """
    if keep == "last_obs" and steps:
        return f"\nThen: {indent(steps[-1][1])}"
    return "".join(f"{proposal_text(action)}\nThen: {indent(observation)}" for action, observation in steps)


def proposal_text(action: str) -> str:
    """An action that might be taken and whose outcome isn't imagined."""
    return f"\nIf: {indent(action)}"


def policy_prompt(state: str, label: str = "Action", *, foresight: str = "", notes: str = "", control: bool = False,
                  style: str = "tuned", env: str = "alfworld", max_k: int = 0, turns: Turns = PLAIN) -> str:
    """The policy's prompt in ``state``, up to the colon of ``label`` (Action, Thought, Reflection, Horizon, Helps).

    ``foresight`` is :func:`foresight_text`'s; ``notes`` are finished lines such as
    ``"\\nReflection: ..."`` that come between it and the label.  ``control``: for a policy with heads.
    """
    mark = f"\n{CTRL}" if control else ""
    return f"{_instructed(state, label, style, env, max_k, turns)}{mark}{foresight}{notes}{turns.ask(label)}"


def control_prompt(state: str, *, style: str = "tuned", env: str = "alfworld", turns: Turns = PLAIN) -> str:
    """Up to ``<CTRL>``, where K_t and V(s_t) are read: the beginning of ``policy_prompt(..., control=True)``."""
    return f"{_instructed(state, 'Action', style, env, 0, turns)}\n{CTRL}"


def _instructed(state: str, label: str, style: str, env: str, max_k: int, turns: Turns) -> str:
    if style == "tuned":
        return f"{turns.head}{state}"
    head = f"{INSTRUCTION[env]}\n" if turns == PLAIN else turns.head  # a chat's head holds the instruction
    return f"{head}{_ASK[label].format(max_k=max_k)}\n\n{state}"


def action_target(action: str) -> str:
    """What follows ``Action:`` in training."""
    return f" {indent(action)}{END}"


def world_model_prompt(state: str, action: str, *, style: str = "tuned", env: str = "alfworld",
                       turns: Turns = PLAIN) -> str:
    """The world model's prompt for p_φ(s'|s, a), the same in training and inference."""
    head = f"{WORLD_INSTRUCTION[env]}\n\n" if style == "instruct" and turns == PLAIN else turns.head
    return f"{head}{state}\nAction: {indent(action)}{turns.ask('Observation')}"


def world_model_target(next_state: str) -> str:
    """What follows ``Observation:`` in training (and then the end-of-sequence token)."""
    return f" {indent(next_state)}"


_LABEL = re.compile(r"(Action|Thought|Reflection|Horizon|Helps):")


Segment = tuple[str, bool | str]
"""Text of a training sequence, and whether it is learned; a string is what is to be learned in its place."""


def dialogue_segments(conversations: Sequence[dict]) -> list[Segment]:
    """The segments of a dialogue of human and gpt turns, one after the other.

    A gpt turn starts with a label (``Action: ...``), which is given and not learned: just what
    :func:`policy_prompt` ends with.  A turn with ``weight`` 0 is context only, and its ``correction`` is learned in its
    place.  Joined, the segments are the text of a state that grows, so one sequence teaches all prompts of an episode.
    """
    segments: list[Segment] = []
    for turn in conversations:
        if turn["from"] == "gpt":
            label, text = _labelled(turn["value"])
            learned: bool | str = turn.get("weight", 1) != 0
            if "correction" in turn:
                learned = _labelled(turn["correction"])[1]
            segments += [(label, False)] * bool(label) + [(text, learned)]
        else:
            segments.append((turn["value"] + END, False))
    return segments


def _labelled(value: str) -> tuple[str, str]:
    """A gpt turn as its label, which may be empty, and what follows."""
    label = _LABEL.match(value)
    cut = label.end() if label else 0
    return value[:cut], value[cut:] + END


def dialogue_examples(conversations: Sequence[dict], turns: Turns = PLAIN) -> list[list[Segment]]:
    """Training sequences of a dialogue, each a list of segments.

    Plain text: one for all of it.  In turns of a chat the label stands behind the user's turn, so every learned
    gpt turn has a sequence of its own: the text so far as one question, as inference asks it.
    """
    segments = dialogue_segments(conversations)
    if turns == PLAIN:
        return [segments]
    examples: list[list[Segment]] = []
    before = ""
    for i, (text, learned) in enumerate(segments):
        if learned:
            label = segments[i - 1][0] if i and _LABEL.fullmatch(segments[i - 1][0]) else ""
            asked = before.removesuffix(label).removesuffix(END)
            target = learned if isinstance(learned, str) else text
            examples.append([(f"{turns.head}{asked}{turns.tail}{label}", False), (target, True)])
        before += text
    return examples
