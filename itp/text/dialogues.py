"""Dialogues for supervised fine-tuning of a policy, from recorded episodes.

Published trajectory sets use the same format, a list of
``{"id": ..., "conversations": [{"from": "human" | "gpt", "value": ...}, ...]}``.  A gpt turn with ``"weight": 0`` is
history and isn't learned (an exploratory action).  Its ``"correction"``, where the expert gave one, is learned in its
place: imitation on states that the learner reaches itself (DAgger; Ross et al., 2011).

Besides the dialogue of the whole episode, two short forms teach the prompts of imagine-then-plan.  Both come from the
record alone.  *Foresight* dialogues end with the true next steps in the form of an imagined trajectory, and with the
expert's action after it.  *Horizon* dialogues end with the number of coming steps whose outcome follows from the
record's past (see :func:`horizon`).

Three more forms teach the prompts of planning methods, in the expert's words.  *Thought* dialogues end with a thought
and the action that follows from it.  *Reflection* dialogues end with a judgment of something that was tried in the
mind, and with the expert's action.  *Helps* dialogues end with a yes or no: whether the expert does what was tried.

*Outcome* dialogues end with an action and the observation that followed it.  Only the observation is learned: what
actions lead to, which teaches no action.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from itp.text.prompts import NO, YES, foresight_text
from itp.text.state import ACTION, OBSERVATION, indent, is_value, parse, parse_value
from itp.text.turns import Turn
from itp.transitions import Transition

Dialogue = dict[str, Any]
_TRIED = re.compile(r"\n(?=If: |Then: )")
_EMPTY_END = re.compile(r"^(?:Observation|Then):\Z", re.MULTILINE)
_PART = re.compile(r"/(?:(?:foresight|outcome)-\d+-\d+|(?:horizon|thought|reflection|helps)-\d+)\Z")
_LAST_REPLY = re.compile(r"Thought: .*\nAction: .*|Horizon: \d+|Helps: (?:yes|no)")


def episode_dialogue(episode: Sequence[Transition]) -> Dialogue:
    """The whole episode.  Where another action than the expert's was executed, the expert's action is learned."""
    return {"id": episode[0].episode_id, "conversations": _turns(episode, len(episode))}


def foresight_dialogue(episode: Sequence[Transition], step: int, k: int) -> Dialogue:
    """The episode up to ``step``, its next ``k`` steps as if imagined, and the expert's action at ``step``.

    The steps before are context only, because the episode's own dialogue teaches them.
    """
    ahead = [(t.action, t.next_state) for t in episode[step:step + k]]
    return _dialogue(episode, step, f"foresight-{step}-{k}", [_action(episode, step)], tried=foresight_text(ahead))


def horizon_dialogue(episode: Sequence[Transition], step: int, max_k: int) -> Dialogue:
    """The episode up to ``step``, and the horizon there."""
    return _dialogue(episode, step, f"horizon-{step}", [f"Horizon: {horizon(episode, step, max_k)}"])


def thought_dialogue(episode: Sequence[Transition], step: int, thought: str) -> Dialogue:
    """The episode up to ``step``, the expert's thought there (one line), and the action that follows from it."""
    return _dialogue(episode, step, f"thought-{step}", [f"Thought: {thought}\n{_action(episode, step)}"])


def reflection_dialogue(episode: Sequence[Transition], step: int, tried: str, reflection: str) -> Dialogue:
    """The episode up to ``step``, something tried in the mind, one line about it, and the expert's action.

    ``tried`` is a text of :func:`itp.text.prompts.foresight_text` or ``proposal_text``.
    """
    said = [f"Reflection: {reflection}", _action(episode, step)]
    return _dialogue(episode, step, f"reflection-{step}", said, tried=tried)


def judge_dialogue(episode: Sequence[Transition], step: int, tried: str, helps: bool) -> Dialogue:
    """The episode up to ``step``, something tried in the mind, and the answer (yes or no) whether it helps."""
    return _dialogue(episode, step, f"helps-{step}", [f"Helps:{(YES if helps else NO).rstrip()}"], tried=tried)


def outcome_dialogue(episode: Sequence[Transition], step: int, number: int, action: str, outcome: str) -> Dialogue:
    """The episode up to ``step``, the ``number``-th ``action`` that was tried there, and the observation after it."""
    dialogue = _dialogue(episode, step, f"outcome-{step}-{number}", [ACTION + indent(action),
                                                                     OBSERVATION + indent(outcome)])
    dialogue["conversations"][-2]["weight"] = 0
    return dialogue


def episode_of(dialogue_id: str) -> str:
    """The id of the episode that a dialogue is of, whole or in part."""
    return _PART.sub("", dialogue_id)


def horizon(episode: Sequence[Transition], step: int, max_k: int) -> int:
    """The number of coming steps, at most ``max_k``, before a step that shows something for the first time.

    A model can imagine contents that were seen before, but not the contents of a drawer that nobody has opened.  So the
    horizon is 0 while the episode searches, and it grows when the episode knows its way.
    """
    seen = {t.next_state for t in episode[:step]}
    count = 0
    for t in episode[step:step + max_k]:
        if "you see" in t.next_state and t.next_state not in seen:
            break
        seen.add(t.next_state)
        count += 1
    return count


def as_written(turn: Turn) -> Turn:
    """A turn as the functions here write it, where an editor or another program has saved it again.

    Such programs write line breaks in their own way, add one at the end, or take the blank behind a last label.
    """
    text = turn.text
    if "\r" in text:
        text = text.replace("\r\n", "\n")
    if text.endswith("\n"):
        text = text.rstrip("\n")
    if text.endswith(":") and _EMPTY_END.search(text):
        text += " "
    return turn if text is turn.text else turn._replace(text=text)


def check_form(turns: Sequence[Turn]) -> None:
    """Raises ValueError, which says why, unless the turns are in the form that the functions above write.

    The prompts of evaluation are in this form.  A policy that learned from another one answers prompts that it has
    never seen.
    """
    if len(turns) < 2:
        raise ValueError("no reply to a state")
    replies = 2 if [turn.who for turn in turns[-2:]] == ["gpt", "gpt"] else turns[-1].who == "gpt"
    learned_from = len(turns) - replies - 1
    for i, turn in enumerate(turns):
        expected = "gpt" if i % 2 or i > learned_from else "human"
        if turn.who != expected:
            raise ValueError(f"turn {i} is of {turn.who} and not of {expected}")
        try:
            if turn.who == "human":
                _check_context(turn.text, first=i == 0, may_try=i == learned_from and replies > 0)
            elif i == learned_from + 1 and replies:
                _check_last_reply(turn, first_of_two=replies == 2)
            elif i == learned_from + 2 and turns[i - 1].text.startswith(ACTION):
                parse_value(turn.text, OBSERVATION)
            else:
                _check_action(turn)
        except ValueError as error:
            raise ValueError(f"turn {i}: {error}") from error


def _check_context(text: str, first: bool, may_try: bool) -> None:
    """A state or an observation, and what was tried in the mind."""
    if not first and is_value(text, OBSERVATION):  # almost all turns, so this is what a large file waits for
        return
    seen, *tried = _TRIED.split(text)
    if first:
        parse(seen)
    else:
        parse_value(seen, OBSERVATION)
    if tried and not may_try:
        raise ValueError(f"{tried[0][:60]!r} before another turn than the last reply")
    for part in tried:
        parse_value(part, part[:part.index(" ") + 1])


def _check_last_reply(turn: Turn, first_of_two: bool) -> None:
    if first_of_two and is_value(turn.text, ACTION):
        if turn.learned or turn.correction is not None:
            raise ValueError("an action to learn, with a reply behind it")
    elif first_of_two:
        parse_value(turn.text, "Reflection: ")
    elif not _LAST_REPLY.fullmatch(turn.text):
        _check_action(turn)


def _check_action(turn: Turn) -> None:
    if not is_value(turn.text, ACTION):
        parse_value(turn.text, ACTION)  # says why
    if turn.correction is not None and not parse_value(turn.correction, ACTION).strip():
        raise ValueError("an empty correction")
    if turn.learned and turn.correction is None and not turn.text[len(ACTION):].strip():
        raise ValueError("an empty action to learn")


def _action(episode: Sequence[Transition], step: int) -> str:
    return ACTION + indent(episode[step].expert_action)


def _dialogue(episode: Sequence[Transition], step: int, name: str, said: Sequence[str], tried: str = "") -> Dialogue:
    """The episode up to ``step`` and ``tried`` as context, and the turns ``said`` after it, which alone are learned."""
    turns = _unlearned(_turns(episode, step))
    turns[-1] = {"from": "human", "value": turns[-1]["value"] + tried}
    turns += [{"from": "gpt", "value": value} for value in said]
    return {"id": f"{episode[0].episode_id}/{name}", "conversations": turns}


def _turns(episode: Sequence[Transition], steps: int) -> list[dict[str, Any]]:
    """human, gpt, human, ... for the first ``steps`` steps, up to the observation after them."""
    turns: list[dict[str, Any]] = [{"from": "human", "value": episode[0].state}]
    for t in episode[:steps]:
        turn: dict[str, Any] = {"from": "gpt", "value": ACTION + indent(t.action)}
        if t.action != t.expert_action or not t.expert_action:
            turn["weight"] = 0
            if t.expert_action:
                turn["correction"] = ACTION + indent(t.expert_action)
        turns += [turn, {"from": "human", "value": OBSERVATION + indent(t.next_state)}]
    return turns


def _unlearned(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"from": "gpt", "value": turn["value"], "weight": 0} if turn["from"] == "gpt" else turn for turn in turns]
