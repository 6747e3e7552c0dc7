"""Imagine-then-plan: choose K, imagine K steps, (reflect,) act.  Evaluation and stage 3 act with this class.

ITP-R, with a K-head: K_t is the most likely of P_θ(K|s_t), or sampled from it with ``k_sample``; the policy imagines
K_t steps (:mod:`itp.agent.imagination`, eq. 2) and acts with all of them in its prompt (eq. 3).
ITP-I, without one (eq. 4): the policy is prompted for a horizon, imagines that far, reflects on what it saw, and acts.
K fixed and K random, uniformly from min_k..max_k, are the paper's ablations.

Departures: a horizon that can't be read counts as 0 and is kept in the record.  Only an untrained policy reflects: one
that was trained acts on the imagined trajectory itself, as its training showed it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from itp.agent.imagination import imagine
from itp.lm.base import HeadOutputs
from itp.methods.base import Decision, PolicyMethod, View, decide
from itp.seeding import derive_seed
from itp.text.prompts import reflection_text


@dataclass(frozen=True)
class Horizon:
    """K_t and where it comes from.

    ``reply``: the reply that K was parsed from, if the policy was prompted.
    ``heads``: the heads' outputs, if they were read.
    """

    k: int
    reply: str = ""
    heads: HeadOutputs | None = None


class ImagineThenPlan(PolicyMethod):
    name = "foresight"

    @property
    def reflects(self) -> bool:
        return self.policy.form.style == "instruct" and not self.policy.form.control_token

    async def act(self, view: View) -> Decision:
        horizon = await self.choose_horizon(view)
        imagined = await imagine(self.policy, self.world_model, view.state, horizon.k, view.seed)
        foresight = imagined.text(self.policy.foresight_format)
        reflection = ""
        if self.reflects and horizon.k:
            reflection = await self.policy.reflect(view.state, foresight, derive_seed(view.seed, "reflect"))
        choice = await self.policy.act(
            view.state, view.observation.admissible, derive_seed(view.seed, "act"), foresight=foresight,
            notes=reflection_text(reflection) if reflection else "", trace=self.settings.record_sampling)
        heads = horizon.heads
        return decide(choice, k=horizon.k, imagined=imagined, k_raw=horizon.reply, reflection=reflection,
                      k_logprobs=heads.k_logprobs if heads else (), value=heads.value if heads else None,
                      heads_prompt=heads.prompt if heads else "")

    async def choose_horizon(self, view: View) -> Horizon:
        """How many steps to imagine in the state of ``view``."""
        settings, seed = self.settings, derive_seed(view.seed, "k")
        how = settings.how_k_is_chosen(self.policy.form.control_token)
        heads = None
        if how == "head" or settings.value_of_state:
            heads = await self.policy.read_heads(view.state)
        if how == "fixed":
            return Horizon(settings.fixed_k, heads=heads)
        if how == "random":
            return Horizon(random.Random(seed).randint(settings.min_k, settings.max_k), heads=heads)
        if how == "head":
            k = heads.choose_k(settings.max_k, seed if settings.k_sample else None)
            return Horizon(max(k, settings.min_k), heads=heads)
        k, reply = await self.policy.horizon(view.state, settings.max_k, seed)
        return Horizon(max(k or 0, settings.min_k), reply, heads)
