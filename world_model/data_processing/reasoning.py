"""Dialogues that teach a small LM the prompts of the planning methods: thoughts, reflections, yes and no.

The words come from the expert's knowledge (:meth:`itp.envs.alfworld.expert.Expert.thought`): what it looks for or has,
what it has ruled out, what comes next.  "It helps" means only that the expert would do it.  The dialogues show the
format with true content.  They are no record of reasoning.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from itp.envs.alfworld.expert import Expert
from itp.envs.alfworld.games import task_params
from itp.games import Game
from itp.text import dialogues
from itp.text.prompts import foresight_text, proposal_text
from itp.text.state import parse
from itp.transitions import Transition


def reasoning_dialogues(game: Game, episode: Sequence[Transition], draw: random.Random,
                        max_k: int) -> list[dialogues.Dialogue]:
    """A thought, a reflection and two answers to "does it help?", each about a step of the episode by ``draw``.

    What is tried in the mind is the record's next steps (up to ``max_k``), or the expert's action or another
    one of the episode without its outcome.
    """
    thoughts = expert_thoughts(game, episode)
    step = draw.randrange(len(episode))
    talks = [dialogues.thought_dialogue(episode, step, thoughts[step])]
    step = draw.randrange(len(episode))
    tried, helps = _something_tried(episode, step, draw, max_k)
    verdict = "It helps." if helps else "It is no help."
    talks.append(dialogues.reflection_dialogue(episode, step, tried, f"{verdict} {thoughts[step]}"))
    for _ in range(2):
        step = draw.randrange(len(episode))
        talks.append(dialogues.judge_dialogue(episode, step, *_something_tried(episode, step, draw, max_k)))
    return talks


def expert_thoughts(game: Game, episode: Sequence[Transition]) -> list[str]:
    """What the expert thinks before each step of an episode, whoever acted in it."""
    expert = Expert(task_params(game), game.task_type, parse(episode[0].state).first)
    thoughts = []
    for t in episode:
        thoughts.append(expert.thought())
        expert.observe(t.action, t.next_state)
    return thoughts


def _something_tried(episode: Sequence[Transition], step: int, draw: random.Random, max_k: int) -> tuple[str, bool]:
    """(what is tried at ``step``, as text; is it what the expert would do)."""
    if max_k and draw.random() < 0.5:
        ahead = episode[step:step + draw.randint(1, max_k)]
        return (foresight_text([(t.action, t.next_state) for t in ahead]),
                all(t.action == t.expert_action for t in ahead))
    expert = episode[step].expert_action
    others = sorted({t.action for t in episode} - {expert})
    if others and draw.random() < 0.5:
        return proposal_text(draw.choice(others)), False
    return proposal_text(expert), True
