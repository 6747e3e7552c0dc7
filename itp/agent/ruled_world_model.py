"""A world model that rules correct: what a rule knows isn't left to the language model (:mod:`itp.text.rules`)."""

from __future__ import annotations

from collections.abc import Sequence

from itp.agent.world_model import Dynamics
from itp.text.belief import Belief
from itp.text.rules import Rule, predicted
from itp.text.state import State


class RuledWorldModel:
    """``world_model``, but for what ``rules`` answer (a :class:`itp.agent.world_model.Dynamics`)."""

    def __init__(self, world_model: Dynamics, rules: Sequence[Rule]) -> None:
        self.world_model, self.rules = world_model, rules

    async def step(self, states: Sequence[State], actions: Sequence[str]) -> list[str]:
        """The observations after ``actions`` in ``states`` (same length)."""
        said = [self.known(state, action) for state, action in zip(states, actions, strict=True)]
        unknown = [i for i, answer in enumerate(said) if answer is None]
        if unknown:
            asked = await self.world_model.step([states[i] for i in unknown], [actions[i] for i in unknown])
            for i, answer in zip(unknown, asked, strict=True):
                said[i] = answer
        return said

    async def sample(self, state: State, action: str, n: int, seed: int, temperature: float = 1.0) -> list[str]:
        """``n`` observations after ``action`` in ``state``: the same one, where a rule knows it."""
        answer = self.known(state, action)
        return [answer] * n if answer is not None else await self.world_model.sample(state, action, n, seed,
                                                                                     temperature)

    def known(self, state: State, action: str) -> str | None:
        """The answer that a rule knows."""
        found = predicted(self.rules, Belief.of(state), action) if self.rules else None
        return found[1] if found else None
