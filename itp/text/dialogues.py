"""Dialogues for supervised fine-tuning of a policy, from recorded episodes.

The format is the one that published trajectory sets use, a list of
``{"id": ..., "conversations": [{"from": "human" | "gpt", "value": ...}, ...]}``; a gpt turn with
``"weight": 0`` is history and not learned from (an exploratory action).  Its ``"correction"``, where the expert
was asked, is what it should have said: imitation on states that the learner reaches itself (DAgger; Ross et al., 2011).

Besides the episode itself two short forms teach what imagine-then-plan asks for.  They come from the
record alone and are what they are: *foresight* dialogues end with the true next steps written as an
imagined trajectory and the expert's action after it; *horizon* dialogues end with the number of coming
steps whose outcome the record's past determines (see :func:`horizon`).

Three more teach what planning methods ask for, with words that a teacher gives: *thought* dialogues end with a
thought and the action that follows from it; *reflection* dialogues with what is to be made of something tried in
the mind, and the expert's action; *helps* dialogues with whether that something is what the expert does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from itp.text.prompts import NO, YES, foresight_text
from itp.text.state import OBSERVATION, indent
from itp.transitions import Transition

Dialogue = dict[str, Any]


def episode_dialogue(episode: Sequence[Transition]) -> Dialogue:
    """The whole episode.  Where something else than the expert's action was executed, the expert's is learned."""
    return {"id": episode[0].episode_id, "conversations": _turns(episode, len(episode))}


def foresight_dialogue(episode: Sequence[Transition], step: int, k: int) -> Dialogue:
    """The episode up to ``step``, its next ``k`` steps as if imagined, and the expert's action at ``step``.

    What came before is context only: the episode's own dialogue teaches it.
    """
    ahead = [(t.action, t.next_state) for t in episode[step:step + k]]
    return _dialogue(episode, step, f"foresight-{step}-{k}", [_action(episode, step)], tried=foresight_text(ahead))


def horizon_dialogue(episode: Sequence[Transition], step: int, max_k: int) -> Dialogue:
    """The episode up to ``step`` and how far it is worth looking from there."""
    return _dialogue(episode, step, f"horizon-{step}", [f"Horizon: {horizon(episode, step, max_k)}"])


def thought_dialogue(episode: Sequence[Transition], step: int, thought: str) -> Dialogue:
    """The episode up to ``step``, what the teacher thinks there (one line), and the action that follows from it."""
    return _dialogue(episode, step, f"thought-{step}", [f"Thought: {thought}\n{_action(episode, step)}"])


def reflection_dialogue(episode: Sequence[Transition], step: int, tried: str, reflection: str) -> Dialogue:
    """The episode up to ``step``, something tried in the mind, one line on it, and the expert's action.

    ``tried`` is text of :func:`itp.text.prompts.foresight_text` or ``proposal_text``.
    """
    said = [f"Reflection: {reflection}", _action(episode, step)]
    return _dialogue(episode, step, f"reflection-{step}", said, tried=tried)


def judge_dialogue(episode: Sequence[Transition], step: int, tried: str, helps: bool) -> Dialogue:
    """The same with the question whether it helps, answered yes or no."""
    return _dialogue(episode, step, f"helps-{step}", [f"Helps:{(YES if helps else NO).rstrip()}"], tried=tried)


def horizon(episode: Sequence[Transition], step: int, max_k: int) -> int:
    """How many of the coming steps (at most ``max_k``) don't show something for the first time.

    Looking at what has been seen before can be imagined; what is in a drawer that nobody has opened
    can't.  So the horizon is 0 while the episode searches and grows when it knows what it does.
    """
    seen = {t.next_state for t in episode[:step]}
    count = 0
    for t in episode[step:step + max_k]:
        if "you see" in t.next_state and t.next_state not in seen:
            break
        seen.add(t.next_state)
        count += 1
    return count


def _action(episode: Sequence[Transition], step: int) -> str:
    return f"Action: {episode[step].expert_action}"


def _dialogue(episode: Sequence[Transition], step: int, name: str, said: Sequence[str], tried: str = "") -> Dialogue:
    """The episode up to ``step`` as context, ``tried`` in the mind, and what is said then: only that is learned."""
    turns = _unlearned(_turns(episode, step))
    turns[-1] = {"from": "human", "value": turns[-1]["value"] + tried}
    turns += [{"from": "gpt", "value": value} for value in said]
    return {"id": f"{episode[0].episode_id}/{name}", "conversations": turns}


def _turns(episode: Sequence[Transition], steps: int) -> list[dict[str, Any]]:
    """human, gpt, human, ... for the first ``steps`` steps, ending with what the agent then sees."""
    turns: list[dict[str, Any]] = [{"from": "human", "value": episode[0].state}]
    for t in episode[:steps]:
        turn: dict[str, Any] = {"from": "gpt", "value": f"Action: {t.action}"}
        if t.action != t.expert_action:
            turn["weight"] = 0
            if t.expert_action:
                turn["correction"] = f"Action: {t.expert_action}"
        turns += [turn, {"from": "human", "value": OBSERVATION + indent(t.next_state)}]
    return turns


def _unlearned(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"from": "gpt", "value": turn["value"], "weight": 0} if turn["from"] == "gpt" else turn for turn in turns]
