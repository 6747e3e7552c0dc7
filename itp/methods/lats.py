"""LATS (Zhou et al., 2023; 2310.04406): tree search with a critic, self-consistency and reflections on what failed.

A rollout descends by UCT (``rap_uct_w``) to an edge that was never visited, and goes on with the policy's most likely
actions to ``rap_depth_limit``.  The value of the leaf is V = λ P(yes) + (1 − λ) SC.  P(yes) is the critic's that the
imagined way brings the task closer; SC, self-consistency, is the share of the proposals in the leaf's state that were
its action; λ is ``lats_lm_weight``.  All edges on the path get V.  Where the critic says no (P(yes) < 0.5) the policy
writes a reflection on that way.  Proposals and verdicts made after that read it, ``MEMORY`` reflections at most; the
authors' code has the same limit of 3.  With ``--trials``, a failed episode leaves a reflection, too, as in
:mod:`itp.methods.reflexion`, and the latest ones are read.  The root's most visited action is executed.

Departures: the dynamics are the world model's, not the environment's, which can't be taken back here; nobody knows
whether an imagined game is won, so the critic's verdict stands for the reward of an end, and no rollout ends early; a
simulation takes the most likely action instead of the best valued of n; what the models answered in a node isn't asked
again when a reflection comes.  :mod:`itp.methods.mcts` is the same without simulation, SC and reflections.
"""

from __future__ import annotations

from itp.methods.base import View
from itp.methods.mcts import Mcts, not_yet
from itp.methods.reflexion import MEMORY, Reflexion, notes
from itp.methods.tree import Node, Tree, backup
from itp.seeding import derive_seed
from itp.text.prompts import foresight_text


class Lats(Mcts, Reflexion):
    name = "lats"

    async def search(self, view: View) -> Tree:
        """The tree after all rollouts from s_t."""
        settings, said = self.settings, [trial.note for trial in view.earlier if trial.note]
        tree = Tree(Node(view.state, view.seed), self.policy, self.world_model, settings.rap_d_actions, not_yet)
        tree.notes = notes(said)
        choices = await tree.widen(tree.root, view.observation.admissible)
        if len(choices) == 1:
            return tree
        reflections = 0
        for i in range(settings.rap_num_rollouts):
            path = await tree.select(settings.rap_depth_limit, settings.rap_uct_w)
            way = await tree.simulate(path, settings.rap_depth_limit)
            p_yes = await self.value(tree, way)
            node, leaf = path[-1]
            v = settings.lats_lm_weight * p_yes + (1 - settings.lats_lm_weight) * node.shares[leaf.choice.action]
            backup(path, [v] * len(path))
            if p_yes < 0.5 and reflections < MEMORY:
                steps = [(edge.choice.action, edge.node.state.observation) for _, edge in way]
                said.append(await self.policy.reflect(view.state, foresight_text(steps),
                                                      derive_seed(view.seed, "reflect", i)))
                reflections, tree.notes = reflections + 1, notes(said)
        return tree
