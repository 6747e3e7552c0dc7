"""MCTS with the policy as prior and critic (after LATS: Zhou et al., 2023), the paper's other tree search.

Like RAP (its budget flags are the same), but no edge has a reward and nothing is simulated: the value of a rollout is
the critic's P(yes) that the imagined way from the real state to the leaf brings the task closer.  Departures from
LATS: dynamics are the world model's, not the real environment's, which can't be taken back; no reflections, no
self-consistency (:mod:`itp.methods.lats` has both).
"""

from __future__ import annotations

import asyncio
import math

from itp.agent.policy import Choice
from itp.methods.base import Decision, PolicyMethod, View
from itp.methods.tree import Node, Path, Tree, backup
from itp.text.prompts import foresight_text


class Mcts(PolicyMethod):
    name = "mcts"

    async def act(self, view: View) -> Decision:
        return (await self.search(view)).decision()

    async def search(self, view: View) -> Tree:
        """The tree after all rollouts from s_t."""
        settings = self.settings
        tree = Tree(Node(view.state, view.seed), self.policy, self.world_model, settings.rap_d_actions, not_yet)
        choices = await tree.widen(tree.root, view.observation.admissible)
        if len(choices) == 1:
            return tree
        if settings.rap_num_rollouts >= len(choices):
            # The first rollouts try each of them once, whatever comes: their model calls may share batches.
            edges = await asyncio.gather(*(tree.follow(tree.root, choice) for choice in choices))
            await asyncio.gather(*(self.value(tree, [(tree.root, edge)]) for edge in edges))
        for _ in range(settings.rap_num_rollouts):
            path = await tree.select(settings.rap_depth_limit, settings.rap_uct_w)
            backup(path, [await self.value(tree, path)] * len(path))
        return tree

    async def value(self, tree: Tree, path: Path) -> float:
        """The critic's P(yes) of the way to the leaf, kept as the last edge's reward."""
        node, leaf = path[-1]
        await tree.follow(node, leaf.choice)
        if math.isnan(leaf.reward):
            steps = [(edge.choice.action, edge.node.state.observation) for _, edge in path]
            leaf.reward = await self.policy.judge(tree.root.state, foresight_text(steps) + tree.notes)
        return leaf.reward


async def not_yet(node: Node, choice: Choice) -> float:
    """An edge is judged by where it leads."""
    return math.nan
