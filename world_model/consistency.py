"""Consistency of a world model: do plans that work inside it work in the real environment?

From the real first observation of a game the policy acts in the world model.  It stops when the mission is accomplished
according to the world model's observations (:attr:`itp.envs.alfworld.expert.Expert.finished`), or after ``max_steps``.
The same actions are then replayed in the real environment.  The ratio of the two success rates is 1 if the world
model's successes are real ones.  A ratio far from 1 means that plans made in the world model don't carry over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from itp.agent.policy import Policy
from itp.agent.world_model import WorldModel
from itp.envs.alfworld.env import AlfworldEnv
from itp.envs.alfworld.expert import Expert
from itp.envs.alfworld.games import task_params
from itp.envs.pool import EnvPool
from itp.games import Game
from itp.lm.scheduler import BatchBarrier
from itp.methods.base import Decision, View
from itp.rollout import LeftOut, run_episodes
from itp.seeding import derive_seed

IDLE = "look"
"""What is done when the plan is over and the real episode isn't."""


class Dreamer:
    """Plays a whole episode in the world model at its first step, and then what it played there."""

    name, want_admissible = "dreamer", False

    def __init__(self, policy: Policy, world_model: WorldModel, max_steps: int) -> None:
        self.policy, self.world_model, self.max_steps = policy, world_model, max_steps
        self.plans: dict[str, tuple[list[str], bool]] = {}
        """game -> (actions, was the mission accomplished)."""

    async def act(self, view: View) -> Decision:
        if view.step == 0:
            self.plans[view.game.game_id] = await self.dream(view)
        plan, _ = self.plans[view.game.game_id]
        return Decision(plan[view.step] if view.step < len(plan) else IDLE)

    async def dream(self, view: View) -> tuple[list[str], bool]:
        state, plan = view.state, []
        goal_checker = Expert(task_params(view.game), view.game.task_type, state.first)
        while not goal_checker.finished and len(plan) < self.max_steps:
            choice = await self.policy.act(state, None, derive_seed(view.seed, "dream", len(plan)))
            observation, = await self.world_model.step([state], [choice.action])
            goal_checker.observe(choice.action, observation)
            state = state.after(choice.action, observation)
            plan.append(choice.action)
        return plan, goal_checker.finished


async def consistency(policy: Policy, world_model: WorldModel, games: Sequence[Game], *, max_steps: int, seed: int,
                      barrier: BatchBarrier | None = None) -> dict[str, Any]:
    """How many of the games were solved inside the world model (dreamed), by the replayed plans, by both; the ratio.

    The ratio is replayed / dreamed, None where nothing was solved in the world model.  ``left_out``: why some of the
    games couldn't be played, where there are such games; they aren't counted.
    """
    dreamer = Dreamer(policy, world_model, max_steps)
    replayed, left_out = set(), LeftOut()
    async with EnvPool(AlfworldEnv, 1) as pool:
        async for episode in run_episodes(pool, dreamer, games, max_steps=max_steps, seed=seed, concurrency=16,
                                          barrier=barrier):
            if left_out.takes(episode) and episode.fault:
                dreamer.plans.pop(episode.game.game_id, None)
            elif episode.success:
                replayed.add(episode.game.game_id)
    dreamed = {game for game, (_, accomplished) in dreamer.plans.items() if accomplished}
    return {"games": len(games) - len(left_out.broken), "dreamed": len(dreamed), "replayed": len(replayed),
            "both": len(dreamed & replayed), "ratio": len(replayed) / len(dreamed) if dreamed else None,
            **({"left_out": left_out.broken} if left_out.broken else {})}
