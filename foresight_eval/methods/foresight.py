"""Imagine-then-plan: choose K, imagine K steps, (reflect,) act.

ITP-I (eq. 4) with ``k_policy`` "prompt": the policy is asked for a horizon, imagines that far
(:mod:`itp.imagination`, eq. 2), reflects on what it saw, and acts with all of it in its prompt (eq. 3).
ITP-R with "head": K_t is the most likely of the K-head's P_θ(K|s_t), or drawn from it with ``k_sample``.
"fixed" and "random" are the paper's ablations; random draws K uniformly from min_k..max_k.

Departures: a horizon that can't be read counts as 0 and is kept in the record; a tuned policy isn't
asked to reflect (it was trained to act on the imagined trajectory itself).
"""

from __future__ import annotations

import random

from foresight_eval.methods.settings import MethodSettings
from itp.imagination import imagine
from itp.lm.base import Control
from itp.policy.agent import Policy
from itp.policy.method import Decision, View
from itp.runtime import derive_seed
from itp.world_model import WorldModel


class Foresight:
    name = "foresight"

    def __init__(self, policy: Policy, world_model: WorldModel, settings: MethodSettings) -> None:
        self.policy, self.world_model, self.settings = policy, world_model, settings
        self.want_admissible = policy.selection != "generate"

    async def act(self, view: View) -> Decision:
        state = view.state
        k, k_raw, reading = await self.choose_k(view)
        imagined = await imagine(self.policy, self.world_model, state, k, view.seed)
        foresight = imagined.text(self.settings.foresight_format)
        reflection = ""
        if self.settings.reflect and k:
            reflection = await self.policy.reflect(state, foresight, derive_seed(view.seed, "reflect"))
        notes = f"\nReflection: {reflection}" if reflection else ""
        choice = await self.policy.act(state, view.observation.admissible, derive_seed(view.seed, "act"),
                                       foresight=foresight, notes=notes)
        return Decision(choice.action, k, imagined, k_raw, reading.k_logprobs if reading else (),
                        reading.value if reading else None, reflection, choice.thought, choice.raw, choice.parsed,
                        choice.logprob)

    async def choose_k(self, view: View) -> tuple[int, str, Control | None]:
        """K_t, the reply that it was read from, and what the heads read."""
        settings, seed = self.settings, derive_seed(view.seed, "k")
        if settings.k_policy == "fixed":
            return settings.fixed_k, "", None
        if settings.k_policy == "random":
            return random.Random(seed).randint(settings.min_k, settings.max_k), "", None
        if settings.k_policy == "head":
            reading = await self.policy.read_control(view.state)
            k = reading.choose_k(settings.max_k, seed if settings.k_sample else None)
            return max(k, settings.min_k), "", reading
        k, raw = await self.policy.horizon(view.state, settings.max_k, seed)
        return max(k or 0, settings.min_k), raw, None
