"""Prompting baselines without imagination (K = 0): Chain-of-Thought and ReAct.

Both write a thought and then an action.  ReAct (Yao et al., 2023) keeps its own earlier thoughts in
the prompt, Chain-of-Thought (Wei et al., 2022) thinks afresh at every step.  The action is written
freely, whatever ``--action_selection`` says for other methods.  Departure: no in-context example
episodes; a tuned model needs none, and an instruct model gets the environment's instruction.
"""

from __future__ import annotations

from itp.methods.base import Decision, PolicyMethod, View, decide
from itp.seeding import derive_seed


class Cot(PolicyMethod):
    name, want_admissible = "cot", False

    async def act(self, view: View) -> Decision:
        choice = await self.policy.think_and_act(view.state, derive_seed(view.seed, "act"), notes=self._notes(view))
        return decide(choice)

    def _notes(self, view: View) -> str:
        return ""


class React(Cot):
    name = "react"

    def _notes(self, view: View) -> str:
        """The thoughts so far, oldest first, with the actions that they led to."""
        return "".join(f"\n(Before {d.action!r} you thought: {d.thought})" for d in view.past if d.thought)
