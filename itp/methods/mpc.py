"""MPC: propose, simulate, score, take the best (after WebDreamer, Gu et al., 2024, and SimuRA, Deng et al., 2025).

``candidates`` actions of the policy are each followed into the world model for ``max_k`` steps (the policy imagines
the later actions), the policy as critic gives P(yes) that this brings the task closer, and the action with the highest
is executed; of equals the one proposed first.  Departures: the score is a probability instead of the mean of several
sampled verdicts; no second model shortens the list of proposals.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from itp.agent.imagination import imagine
from itp.agent.policy import Choice
from itp.methods.base import Decision, PolicyMethod, View, decide
from itp.seeding import derive_seed


class Mpc(PolicyMethod):
    name = "mpc"

    async def act(self, view: View) -> Decision:
        choices = await self.policy.candidates(view.state, view.observation.admissible, self.settings.candidates,
                                               view.seed)
        if len(choices) == 1:
            return decide(choices[0])
        return await self.best(view, choices)

    async def best(self, view: View, choices: Sequence[Choice]) -> Decision:
        """The one of ``choices`` whose imagined future the policy likes best."""
        trajectories = await asyncio.gather(*(
            imagine(self.policy, self.world_model, view.state, self.settings.max_k,
                    derive_seed(view.seed, choice.action), first=choice.action) for choice in choices))
        values = await asyncio.gather(*(self.policy.judge(view.state, t.text()) for t in trajectories))
        best = max(range(len(choices)), key=values.__getitem__)
        return decide(choices[best], k=len(trajectories[best].steps), imagined=trajectories[best],
                      considered=tuple((c.action, v, 1) for c, v in zip(choices, values, strict=True)))
