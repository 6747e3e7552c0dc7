"""Step-level Q: of several candidates, the action with the highest learned Q (2409.09345; QLASS, 2502.02584).

The policy proposes ``candidates`` different actions, the likeliest one first.  A critic gives Q(s, a) of each, and the
highest is executed; of equals the one proposed first.  The critic (``--critic_model``) is a value head at the end of
the text of state and action.  ``python -m itp.training.explore`` collects trees of episodes with a Q for every
action in them, and ``python -m itp.training.critic --learn q`` trains it.

Hyper-parameters: ``candidates``; those of the trees and of the training belong to these programs.

Departures: Zhai et al. fit preferences between actions by step-level DPO, and Q is a ratio of two language models'
probabilities; here Q is learned by regression, as in QLASS.  QLASS grows its trees to a depth limit and perturbs the
task for more actions; here branches are played to their end, and actions are sampled at temperature 1.
"""

from __future__ import annotations

import asyncio

from itp.methods.base import Decision, PolicyMethod, View, decide


class StepQ(PolicyMethod):
    name = "step_q"

    async def act(self, view: View) -> Decision:
        choices = await self.policy.candidates(view.state, view.observation.admissible, self.settings.candidates,
                                               view.seed)
        if len(choices) == 1:
            return decide(choices[0])
        values = await asyncio.gather(*(self.policy.value(view.state, choice.action) for choice in choices))
        best = max(range(len(choices)), key=values.__getitem__)
        return decide(choices[best], value=values[best],
                      considered=tuple((c.action, v, 1) for c, v in zip(choices, values, strict=True)))
