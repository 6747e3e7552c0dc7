"""Search over imagined trajectories, level by level: ToT and RAFA.

ToT: Tree of Thoughts, breadth first (Yao et al., 2023).  From each of ``beam`` trajectories the policy proposes
``candidates`` next actions, the world model predicts each, the policy as critic values every trajectory, and the
``beam`` best go on, for ``max_k`` steps.  Departures: a thought is an action, and its outcome is imagined, since a
wrong one can't be taken back; the critic's value is P(yes) instead of sampled votes.

RAFA: "reason for future, act for now" (Liu et al., 2023).  ``candidates`` plans, one for each action that the policy
(its elite) proposes now; at every further step of a plan the elite proposes ``candidates`` actions, the world model
(its model) predicts them, and the critic keeps the best.  The first action of the plan with the highest value is
executed and everything is planned anew from what is then seen.  Departures: the memory that the parts learn from is the
episode's own history in their prompts; plans have ``max_k`` steps.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from itp.agent.imagination import ImaginedTrajectory, extend
from itp.agent.policy import Choice
from itp.methods.base import Decision, PolicyMethod, View, decide
from itp.seeding import derive_seed


@dataclass(frozen=True)
class Plan:
    """An imagined trajectory, the choice that it starts with, and the critic's P(yes)."""

    choice: Choice
    trajectory: ImaginedTrajectory
    value: float = 0.0


class Tot(PolicyMethod):
    name = "tot"

    async def act(self, view: View) -> Decision:
        choices = await self.policy.candidates(view.state, view.observation.admissible, self.settings.candidates,
                                               view.seed)
        if len(choices) == 1:
            return decide(choices[0])
        start = ImaginedTrajectory(view.state)
        plans = await asyncio.gather(*(self.longer(Plan(choice, start), choice.action) for choice in choices))
        first = plans
        plans = await self.search(plans, view.seed)
        best = max(plans, key=lambda plan: plan.value)
        return decide(best.choice, k=len(best.trajectory.steps), imagined=best.trajectory,
                      considered=tuple((p.choice.action, p.value, 1) for p in first))

    async def search(self, plans: list[Plan], seed: int) -> list[Plan]:
        """Extend one-step plans to ``max_k`` steps.  Returns the remaining plans."""
        for _ in range(self.settings.max_k - 1):
            best = sorted(plans, key=lambda plan: -plan.value)[:self.settings.beam]
            grown = await asyncio.gather(*(self.grow(plan, seed) for plan in best))
            plans = [plan for group in grown for plan in group]
        return plans

    async def grow(self, plan: Plan, seed: int) -> list[Plan]:
        """The plan with each of the next actions that the policy proposes."""
        state = plan.trajectory.end
        actions = await self.policy.candidates(state, None, self.settings.candidates, derive_seed(seed, state.render()),
                                               imagined=True)
        return await asyncio.gather(*(self.longer(plan, choice.action) for choice in actions))

    async def longer(self, plan: Plan, action: str) -> Plan:
        """The plan with one step more, and what the critic says of it."""
        trajectory = await extend(self.world_model, plan.trajectory, action)
        return Plan(plan.choice, trajectory, await self.policy.judge(trajectory.start, trajectory.text()))


class Rafa(Tot):
    name = "rafa"

    async def search(self, plans: list[Plan], seed: int) -> list[Plan]:
        for _ in range(self.settings.max_k - 1):
            grown = await asyncio.gather(*(self.grow(plan, seed) for plan in plans))
            plans = [max(group, key=lambda plan: plan.value) for group in grown]
        return plans
