"""MPC: propose, simulate, score, take the best (after WebDreamer, Gu et al., 2024, and SimuRA, Deng et al., 2025).

``candidates`` actions of the policy are each followed into the world model for ``max_k`` steps (the policy imagines
the later actions), the policy as critic gives P(yes) that this brings the task closer, and the action with the highest
is executed; of equals the one proposed first.  Departures: the score is a probability instead of the mean of several
sampled verdicts; no second model shortens the list of proposals.
"""

from __future__ import annotations

import asyncio

from foresight_eval.methods.settings import MethodSettings
from itp.imagination import imagine
from itp.policy.agent import Policy
from itp.policy.method import Decision, View, decide
from itp.runtime import derive_seed
from itp.world_model import WorldModel


class Mpc:
    name = "mpc"

    def __init__(self, policy: Policy, world_model: WorldModel, settings: MethodSettings) -> None:
        self.policy, self.world_model, self.settings = policy, world_model, settings
        self.want_admissible = policy.selection != "generate"

    async def act(self, view: View) -> Decision:
        choices = await self.policy.candidates(view.state, view.observation.admissible, self.settings.candidates,
                                               view.seed)
        if len(choices) == 1:
            return decide(choices[0])
        trajectories = await asyncio.gather(*(
            imagine(self.policy, self.world_model, view.state, self.settings.max_k,
                    derive_seed(view.seed, choice.action), first=choice.action) for choice in choices))
        values = await asyncio.gather(*(self.policy.helps(view.state, t.text()) for t in trajectories))
        best = max(range(len(choices)), key=values.__getitem__)
        return decide(choices[best], k=len(trajectories[best].steps), imagined=trajectories[best],
                      considered=tuple((c.action, v, 1) for c, v in zip(choices, values, strict=True)))
