r"""Every prompt of the project, each written once.

A *tuned* model (trained by this project) gets the bare state and a label that names the answer::

    Task: put a clean plate in fridge.          \
    Observation: You are in the middle ...       | the state s_t, itp/text/state.py
    Action: go to countertop 1                   |
    Observation: On the countertop 1, you see .. /
    If: take plate 2 from countertop 1          \  the imagined trajectory, if any:
    Then: You pick up the plate 2 from the ..   /  K pairs of (â, ŝ)
    Action:                                     <- the policy goes on from here

A policy with heads reads K_t and V(s_t) at the line ``<CTRL>`` behind the state (:func:`control_prompt`).  Its other
prompts don't have this line.  So a policy acts as well with heads as without, and the state, which all of its prompts
begin with, is computed once.

An *instruct* model (not trained by this project) gets the same text behind an instruction.  Both kinds of models may
have prompts in turns of a chat (:mod:`itp.text.prompt_format`): then the text is the user's turn, and the model's turn
begins with the label.

White space matters here.  A label ends with its colon; the model's text starts with a space and ends with a line break
(the stop string).  So no token crosses the border between given and generated text, whatever the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from itp.text.prompt_format import PLAIN, TUNED, PromptFormat
from itp.text.state import ACTION, OBSERVATION, indent

CTRL = "<CTRL>"
"""The control token of policies with heads (:mod:`itp.agent.heads`)."""

END = "\n"
"""The end of every completion of one line: of an action, a thought, a horizon."""

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
    "Plan": "The If lines are actions that were tried in imagination, each with a belief: what would be seen, and how "
            "often. Think in one line, propose a command (one of them or another) on the line after it (Action: ...), "
            "and say on a third line whether more commands are to be tried before acting (Help: yes or no).",
    "Belief": "The If/Then lines are samples of what one command might lead to, with how often each came, and may be "
              "wrong. Summarize them in at most 150 words, in one line, with the frequencies; don't judge, and don't "
              "advise.",
    "Choice": "The If lines are actions that were tried in imagination, each with a belief: what would be seen, and "
              "how often. Choose one of these commands. Reply with the command only.",
    "Reflection": "The If/Then lines are an imagined future and may be wrong. In one line: does it bring the task "
                  "closer, and what is to be done instead if it doesn't?",
    "Comparison": "The If/Then lines are commands that were really tried here, one at a time, each with the game's "
                  "answer. The first one is right. In one line: why is it better here than the others? Use only what "
                  "is above.",
    "Looking back": "This attempt at the task has failed. In one line: what went wrong, and what is to be done "
                    "differently in the next attempt?",
    "World state": "You keep the state of the world for the player. Reply with the state after the last command as one "
                   'line of JSON: {{"agent_location": ..., "inventory": ..., "world_state": {{place: {{"visited": ..., '
                   '"open": ..., "objects": [...]}}}}}}. Start from the state before, where there is one, change what '
                   "the answer to the last command shows, and keep everything else.",
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
"""The part of an imagined trajectory that the policy reads: every step (eq. 3), or only the last imagined observation,
as in the authors' release."""


PERCEIVE, PREDICT = "[PER]", "[PRE]"
"""The marks that the prompts of the two modes of IMPLEMENT's world model begin with."""


def perception_state(belief: Mapping[str, Any], success: bool, observation: str) -> str:
    """What mode [PER] is given besides the action: the old symbolic state, and what was seen.

    This stands in the place of a state in :func:`world_model_prompt`, whose answer is the new symbolic state
    (:func:`belief_text`).  ``belief``: see :meth:`itp.text.belief.Belief.to_json`.
    """
    return (f"{PERCEIVE}\nState: {belief_text(belief)}\nSeen: {indent(observation)}\n"
            f"Success: {'yes' if success else 'no'}")


def prediction_state(belief: Mapping[str, Any], object_lists: Mapping[str, Sequence[str]],
                     failed_actions: Sequence[Sequence[Any]]) -> str:
    """What mode [PRE] is given besides the action: the old symbolic state and both kinds of conditions.

    It stands where :func:`perception_state` stands.  The conditions are in their published form
    (:mod:`itp.text.conditions`), the types of a list in the order of a state's objects.
    """
    lists = {place: sorted(types) for place, types in object_lists.items()}
    return (f"{PREDICT}\nSeen in earlier trials: {_json(lists)}\n"
            f"Failed in earlier trials: {_json(failed_actions)}\nState: {belief_text(belief)}")


def belief_text(belief: Mapping[str, Any]) -> str:
    """A symbolic state as JSON in one line: the form in which both modes are given it, and answer."""
    return _json(belief)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def foresight_text(steps: Sequence[tuple[str, str]], keep: str = "full") -> str:
    """An imagined trajectory τ̂ of (action, observation) pairs as text; empty for no steps.

    ``keep`` is one of FORESIGHT_FORMATS.
    """
    if keep == "last_obs" and steps:
        return f"\nThen: {indent(steps[-1][1])}"
    return "".join(f"{proposal_text(action)}\nThen: {indent(observation)}" for action, observation in steps)


def reflection_text(reflection: str) -> str:
    """A reflection as a line of a prompt's ``notes``."""
    return f"\nReflection: {indent(reflection)}"


def proposal_text(action: str) -> str:
    """A proposed action without an imagined outcome, as text."""
    return f"\nIf: {indent(action)}"


def look_back_prompt(state: str, form: PromptFormat = TUNED) -> str:
    """The policy's prompt for a reflection on a failed episode, which ended in ``state``."""
    return f"{_instructed(state, 'Looking back', form, 0)}{form.template.before_reply('Reflection')}"


def policy_prompt(state: str, label: str = "Action", form: PromptFormat = TUNED, *, foresight: str = "",
                  notes: str = "", max_k: int = 0) -> str:
    """The policy's prompt in ``state``, up to the colon of ``label`` (Action, Thought, Reflection, Horizon, Helps,
    Plan, Belief, Choice, World state, Comparison).

    ``foresight`` comes from :func:`foresight_text`.  ``notes`` are complete lines such as ``"\\nReflection: ..."``
    between it and the label.  ``max_k``: the largest answer to ``Horizon``.
    """
    return f"{_instructed(state, label, form, max_k)}{foresight}{notes}{form.template.before_reply(label)}"


def control_prompt(action_prompt: str, form: PromptFormat = TUNED) -> str:
    """The prompt at whose end the heads are read, in the state of ``action_prompt``.

    ``action_prompt``: :func:`policy_prompt` for an action, without an imagined trajectory.
    """
    return f"{action_prompt.removesuffix(form.template.before_reply('Action'))}\n{CTRL}"


def value_prompt(state: str, form: PromptFormat = TUNED, action: str = "") -> str:
    """The prompt at whose end a critic's value is read: of ``action`` in ``state``, or of the state itself."""
    prompt = control_prompt(policy_prompt(state, form=form), form)
    return f"{prompt.removesuffix(CTRL)}{ACTION}{indent(action)}\n{CTRL}" if action else prompt


def prompt_of_observation(heads_prompt: str, action: str) -> str:
    """The beginning of the prompts of the state after ``action``, up to the colon in front of its observation.

    ``heads_prompt``: :func:`control_prompt` in the state in which ``action`` was executed.  Behind it comes
    :func:`world_model_target`.  In chat turns both are in the user's turn, where the policy reads them.
    """
    state = heads_prompt.removesuffix(f"\n{CTRL}")
    return f"{state}\n{ACTION}{indent(action)}\n{OBSERVATION.rstrip()}"


def _instructed(state: str, label: str, form: PromptFormat, max_k: int) -> str:
    if form.style == "tuned":
        return f"{form.template.head}{state}"
    # The head of a chat template holds the instruction.
    head = f"{INSTRUCTION[form.env]}\n" if form.template == PLAIN else form.template.head
    return f"{head}{_ASK[label].format(max_k=max_k)}\n\n{state}"


def action_target(action: str) -> str:
    """The text that follows ``Action:`` in training."""
    return f" {indent(action)}{END}"


def world_model_prompt(state: str, action: str, form: PromptFormat = TUNED) -> str:
    """The world model's prompt for p_φ(s'|s, a), the same in training and inference."""
    plain_instruct = form.style == "instruct" and form.template == PLAIN
    head = f"{WORLD_INSTRUCTION[form.env]}\n\n" if plain_instruct else form.template.head
    return f"{head}{state}\nAction: {indent(action)}{form.template.before_reply('Observation')}"


def world_model_target(next_state: str) -> str:
    """The text that follows ``Observation:`` in training; the end-of-sequence token comes after it."""
    return f" {indent(next_state)}"
