"""SFT: the policy acts, nothing is imagined (K = 0; the SFT rows of the paper's Table 1)."""

from __future__ import annotations

from itp.methods.base import Decision, PolicyMethod, View, decide
from itp.seeding import derive_seed


class Sft(PolicyMethod):
    """a_t ~ π_θ(·|s_t)."""

    name = "sft"

    async def act(self, view: View) -> Decision:
        choice = await self.policy.act(view.state, view.observation.admissible, derive_seed(view.seed, "act"))
        return decide(choice)
