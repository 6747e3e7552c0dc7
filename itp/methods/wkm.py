"""WKM: the policy's next action weighed with what followed in similar known states (Qiao et al., 2405.14205).

    P(a) = γ·P_agent(a) + (1 − γ)·P_know(a)   over the admissible actions;   the highest is executed

P_agent: the policy's probabilities among the admissible actions (of a policy that writes freely, its candidates).
P_know: the share of the ``wkm_neighbors`` most similar known states in which a was the next action; what stands for
several admissible actions is shared out equally, and what isn't admissible is left out.  Where nothing known is
admissible, P_agent decides.  The policy may read task knowledge as a reflection in its prompt
(``wkm_task_knowledge``).  ``python -m world_model.knowledge`` makes both of transitions (:mod:`itp.methods.knowledge`).

Hyper-parameters: ``wkm_gamma`` γ, ``wkm_neighbors`` N, ``wkm_base``.

Departures: the paper trains a language model to write both kinds of knowledge and retrieves with the state that it
writes; here the state is symbolic and computed (:mod:`itp.text.belief`), similarity counts common features instead of
comparing embeddings, and task knowledge is a summary by counted statistics, because small models can't write either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from itp.methods.base import Decision, PolicyMethod, View, decide
from itp.methods.knowledge import (
    Knowledge, action_with_roles, features_of, read_knowledge, task_with_roles, with_names,
)
from itp.text.belief import Belief
from itp.text.prompts import reflection_text
from itp.text.state import State


class Wkm(PolicyMethod):
    name = "wkm"

    async def act(self, view: View) -> Decision:
        settings = self.settings
        base = read_knowledge(settings.wkm_base) if settings.wkm_base else Knowledge()
        choices = await self.policy.weighed(view.state, view.observation.admissible, settings.candidates, view.seed,
                                            notes=self._notes(view.state, base))
        agent = shares({choice.action: math.exp(choice.logprob) for choice in choices})
        know = knowledge_shares(base, view.state, list(agent), settings.wkm_neighbors)
        p = mixture(agent, know, settings.wkm_gamma)
        best = max(range(len(choices)), key=lambda i: p[choices[i].action])
        return decide(choices[best], considered=tuple((action, value, 1) for action, value in p.items()))

    def _notes(self, state: State, base: Knowledge) -> str:
        told = base.tasks.get(task_with_roles(state.task), "") if self.settings.wkm_task_knowledge else ""
        return reflection_text(with_names(told, state.task)) if told else ""


def shares(weights: Mapping[str, float]) -> dict[str, float]:
    """``weights`` divided by their sum; empty where that is 0."""
    total = sum(weights.values())
    return {action: weight / total for action, weight in weights.items()} if total else {}


def knowledge_shares(base: Knowledge, state: State, actions: Sequence[str], neighbors: int) -> dict[str, float]:
    """P_know of ``actions``; empty where nothing that is known is among them."""
    belief = Belief.of(state)
    found = base.next_actions(features_of(state), neighbors) if base.entries else {}
    lifted = {action: action_with_roles(state, action, belief) for action in actions}
    same = list(lifted.values())
    return shares({action: found.get(one, 0) / same.count(one) for action, one in lifted.items()})


def mixture(agent: Mapping[str, float], know: Mapping[str, float], gamma: float) -> dict[str, float]:
    """γ·P_agent + (1 − γ)·P_know; P_agent where there is no P_know."""
    if not know:
        return dict(agent)
    return {action: gamma * p + (1 - gamma) * know.get(action, 0.0) for action, p in agent.items()}
