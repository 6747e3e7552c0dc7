"""Gated revision: draft an action, imagine what it leads to, and change it only where the policy is sure.

1. a is the policy's action without imagination: the draft.
2. K steps are imagined (``fixed_k``; -1 means 1).  The first one is the draft, the policy imagines the others.
3. The policy chooses again, with what was imagined in its prompt: a'.
4. a' is executed if  log π_θ(a'|s, τ̂) − log π_θ(a|s, τ̂) > ``revise_margin``,  else a.  A margin of 0 means no gate.

The log-probabilities are sums over the tokens of an action, so the margin is the logarithm of how many times likelier
the policy takes the revision than the draft.

After CoMAP (arXiv 2606.02372), which trains a revision on branches of the real environment.  Departure: there a model
is trained to say whether to revise; here the probability of the action itself is the gate.  Labels of branches
(``label --label_by branch``) train that probability.  With a K-head that chooses K, this is ITP-R.
"""

from __future__ import annotations

from itp.agent.imagination import imagine
from itp.methods.base import Decision, PolicyMethod, Revision, View, decide
from itp.seeding import derive_seed


class Revise(PolicyMethod):
    name = "revise"

    async def act(self, view: View) -> Decision:
        k, admissible = self.settings.revise_k, view.observation.admissible
        draft = await self.policy.act(view.state, admissible, derive_seed(view.seed, "act"))
        imagined = await imagine(self.policy, self.world_model, view.state, k, view.seed, first=draft.action)
        again = await self.policy.act(view.state, admissible, derive_seed(view.seed, "revise"),
                                      foresight=imagined.text(self.policy.foresight_format))
        margin, taken = 0.0, False
        if again.action != draft.action:
            margin = await self.policy.log_odds(again.prompt, again.action, draft.action)
            taken = not self.settings.revise_margin or margin > self.settings.revise_margin
        return decide(again if taken else draft, k=k, imagined=imagined,
                      revision=Revision(draft.action, again.action, margin, taken))
