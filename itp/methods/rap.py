"""RAP: Monte Carlo tree search in the world model (Hao et al., 2023, "Reasoning with Language Model is Planning with
World Model"), with the flags of the authors' release of ITP.

A rollout descends by UCT (``rap_uct_w``) to an unvisited edge.  It continues greedily (the policy's most likely
actions) to ``rap_depth_limit``.  Each edge on the path gets the mean reward from that edge on.  After all rollouts the
root's most visited action is executed.  r(s,a) = w_logp x mean log-probability of the action's tokens + w_eval x
P(yes) + w_goal x share of the task's words that the action names.

Departures from the release: the actions of an imagined state are the policy's own proposals there, not the root's
admissible ones; each real step has a fresh tree, or, with ``rap_keep_tree``, the subtree of what was done, if the
environment answered as imagined.  The reward looks at state and action only, so that the world model is asked for
the states that a rollout enters, no others.  Rewards, proposals and predictions are computed once a tree
(:mod:`itp.methods.tree`); with one action to choose from nothing is searched.
"""

from __future__ import annotations

import asyncio
import re

from itp.agent.policy import Choice
from itp.methods.base import Decision, PolicyMethod, View
from itp.methods.tree import Node, Path, Tree, backup
from itp.text.prompts import proposal_text

FUNCTION_WORDS = {"the", "and", "some", "two", "with", "under", "put", "find", "them", "your", "task", "that", "then"}


class Rap(PolicyMethod):
    name = "rap"

    async def act(self, view: View) -> Decision:
        tree = await self.search(view)
        return tree.decision(remember=self.settings.rap_keep_tree)

    async def search(self, view: View) -> Tree:
        """The tree after all rollouts from s_t."""
        settings = self.settings
        tree = Tree(self.root(view), self.policy, self.world_model, settings.rap_d_actions, self.reward)
        choices = await tree.widen(tree.root, view.observation.admissible)
        if len(choices) == 1:
            return tree
        if settings.rap_num_rollouts >= len(choices):
            # The first rollouts try each of them once, whatever comes: their model calls may share batches.
            await asyncio.gather(*(self.prefetch(tree, choice) for choice in choices))
        for _ in range(settings.rap_num_rollouts):
            await self.rollout(tree)
        return tree

    def root(self, view: View) -> Node:
        kept = view.past[-1].memory if self.settings.rap_keep_tree and view.past else None
        if kept is None or kept.state != view.state:
            return Node(view.state, view.seed)
        kept.choices, kept.complete = [], False  # now it is known what is admissible
        return kept

    async def rollout(self, tree: Tree) -> None:
        depth = self.settings.rap_depth_limit
        path = await tree.select(depth, self.settings.rap_uct_w)
        rewards = [edge.reward for _, edge in await tree.simulate(path, depth)]
        backup(path, [sum(rewards[i:]) / len(rewards[i:]) for i in range(len(path))])

    async def prefetch(self, tree: Tree, choice: Choice) -> None:
        """Make the model calls of a rollout that starts with ``choice``."""
        depth = self.settings.rap_depth_limit
        first: Path = [(tree.root, await tree.follow(tree.root, choice, look=depth > 1))]
        await tree.simulate(first, depth)

    async def reward(self, node: Node, choice: Choice) -> float:
        """r(s,a)."""
        settings = self.settings
        p_yes = await self.policy.judge(node.state, proposal_text(choice.action))
        return (settings.rap_rw_action_logp * choice.mean_logprob + settings.rap_rw_self_eval * p_yes
                + settings.rap_rw_goal_overlap * goal_overlap(node.state.task, choice.action))


def goal_overlap(task: str, action: str) -> float:
    """The share of the task's words (but function words) that ``action`` names."""
    wanted = set(re.findall("[a-z]{3,}", task.lower())) - FUNCTION_WORDS
    return len(wanted & set(re.findall("[a-z]{3,}", action.lower()))) / len(wanted) if wanted else 0.0
