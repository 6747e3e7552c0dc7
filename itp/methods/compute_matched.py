"""More thinking without a world model: what imagination has to beat at equal cost (K = 0).

Self-Refine (Madaan et al., 2023): act, reflect on that action, act again with the reflection in the prompt, until the
action stays or ``rounds`` are spent.  Departure: feedback and refinement are on one action, not on a whole answer.

Multi-Attempt: ``candidates`` actions are sampled, and the most frequent one is executed (self-consistency, Wang et al.,
2023).  Ties go to the first sample.  Departure: the paper doesn't say what an attempt is; ours are attempts at a
decision, because a second attempt at an episode would see the environment twice.

K-candidates: ``candidates`` different actions, each judged by the policy, P(yes) that it helps; the best is executed.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from itp.methods.base import Decision, PolicyMethod, View, decide
from itp.seeding import derive_seed
from itp.text.prompts import proposal_text, reflection_text


class SelfRefine(PolicyMethod):
    name = "self_refine"

    async def act(self, view: View) -> Decision:
        state, admissible, reflection = view.state, view.observation.admissible, ""
        choice = await self.policy.act(state, admissible, derive_seed(view.seed, "act", 0))
        for i in range(1, self.settings.rounds + 1):
            tried, before = proposal_text(choice.action), choice.action
            reflection = await self.policy.reflect(state, tried, derive_seed(view.seed, "reflect", i))
            choice = await self.policy.act(state, admissible, derive_seed(view.seed, "act", i), foresight=tried,
                                           notes=reflection_text(reflection))
            if choice.action == before:
                break
        return decide(choice, reflection=reflection)


class MultiAttempt(PolicyMethod):
    name = "multi_attempt"

    async def act(self, view: View) -> Decision:
        choices = await self.policy.sample(view.state, view.observation.admissible, self.settings.candidates, view.seed,
                                           temperature=self.policy.temperature or 1.0)
        votes = Counter(choice.action for choice in choices)
        chosen = max(choices, key=lambda choice: votes[choice.action])
        return decide(chosen, considered=tuple((a, n / len(choices), n) for a, n in votes.items()))


class KCandidates(PolicyMethod):
    name = "k_candidates"

    async def act(self, view: View) -> Decision:
        choices = await self.policy.candidates(view.state, view.observation.admissible, self.settings.candidates,
                                               view.seed)
        if len(choices) == 1:
            return decide(choices[0])
        values = await asyncio.gather(*(self.policy.judge(view.state, proposal_text(c.action)) for c in choices))
        best = max(range(len(choices)), key=values.__getitem__)
        return decide(choices[best], considered=tuple((c.action, v, 1) for c, v in zip(choices, values, strict=True)))
