"""ARMAP: best-of-n over whole trajectories, by a learned reward model (2502.12130).

Where there is no plan, the policy imagines ``candidates`` trajectories of up to ``armap_depth`` steps in the world
model, at its temperature (1 where it is greedy; the first is greedy).  A trajectory is worth the highest reward of its
beginnings, because nobody says where an imagined task is accomplished.  The best beginning of all is the plan: its
actions are executed as long as the environment answers as imagined.  Then a new plan is made.  The first action of a
trajectory is chosen as ``--action_selection`` says.  The later ones are written freely, and where actions are chosen
among the admissible ones, a plan ends before one that isn't.

The reward model (``--critic_model``) is a value head at the end of a trajectory's text, trained on pairs of own
trajectories of the same task, a solved one against a failed one, with the loss of Bradley and Terry
(``python -m itp.training.critic --learn reward``).

Hyper-parameters: ``candidates`` (n of best-of-n), ``armap_depth``.

Departures: the paper plays the n trajectories in the environment; so does this with ``--wm_backend engine``, and with a
learned world model they are imagined.  Its pairs are synthesized by language models, which name a task for a random
trajectory and a wrong trajectory beside it; here the engine knows what was solved.  Of its planners only best-of-n is
here.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from itp.agent.imagination import ImaginedTrajectory, imagine
from itp.agent.policy import Policy
from itp.methods.base import Decision, PolicyMethod, View
from itp.seeding import derive_seed


class Armap(PolicyMethod):
    name = "armap"

    async def act(self, view: View) -> Decision:
        plan, considered = self._goes_on(view), ()
        if plan is None:
            plan, considered = await self._best_of(view)
        action = plan.steps[0][0]
        return Decision(action, raw=action, k=len(plan.steps), imagined=plan, considered=considered, memory=plan)

    def _goes_on(self, view: View) -> ImaginedTrajectory | None:
        """The rest of the plan, where its first action was answered as imagined and the next one may be executed."""
        before = view.past[-1].memory if view.past else None
        if before is None or len(before.steps) < 2 or before.steps[0] != view.state.history[-1]:
            return None
        if self.want_admissible and before.steps[1][0] not in (view.observation.admissible or ()):
            return None  # it was imagined freely
        return ImaginedTrajectory(view.state, before.steps[1:])

    async def _best_of(self, view: View) -> tuple[ImaginedTrajectory, tuple[tuple[str, float, int], ...]]:
        """The trajectory with the highest reward, and (first action, reward, 1) of each."""
        warm = replace(self.policy, temperature=self.policy.temperature or 1.0)
        trajectories = await asyncio.gather(*(
            self._imagined(self.policy if i == 0 else warm, view, derive_seed(view.seed, "trajectory", i))
            for i in range(self.settings.candidates)))
        judged = await asyncio.gather(*(self._judged(trajectory) for trajectory in trajectories))
        rewards = [reward for reward, _ in judged]
        best = max(range(len(rewards)), key=rewards.__getitem__)
        return judged[best][1], tuple((t.steps[0][0], reward, 1)
                                      for t, reward in zip(trajectories, rewards, strict=True))

    async def _imagined(self, policy: Policy, view: View, seed: int) -> ImaginedTrajectory:
        """A trajectory of ``policy``, whose first action is chosen as one that is executed."""
        first, = await policy.sample(view.state, view.observation.admissible, 1, derive_seed(seed, "act"))
        return await imagine(policy, self.world_model, view.state, self.settings.armap_depth, seed,
                             first=first.action)

    async def _judged(self, trajectory: ImaginedTrajectory) -> tuple[float, ImaginedTrajectory]:
        """The highest reward of a beginning of ``trajectory``, and that beginning."""
        begins = [ImaginedTrajectory(trajectory.start, trajectory.steps[:n + 1]) for n in range(len(trajectory.steps))]
        rewards = await asyncio.gather(*(self.policy.value(begin.end) for begin in begins))
        best = max(range(len(rewards)), key=rewards.__getitem__)
        return rewards[best], begins[best]
