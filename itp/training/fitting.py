"""Prompts within a budget of tokens: history is dropped, oldest first, until prompt and completion fit.

Task, first observation, the current observation, the control token and the imagined trajectory always
stay.  :class:`Fitting` stands where :func:`itp.imagination.imagine` wants a policy and a world model.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from itp.lm.local import LocalLM
from itp.policy.agent import Policy
from itp.runtime import UserError
from itp.text import prompts
from itp.text.state import State
from itp.world_model import WorldModel


@dataclass(frozen=True)
class Fitting:
    """π_θ and M_φ, both local, on states cut to ``max_seq_len`` tokens of prompt and completion."""

    policy: Policy
    world_model: WorldModel | None
    max_seq_len: int

    async def propose(self, state: State, seed: int) -> str:
        """â ~ π_θ(·|ŝ)."""
        return await self.policy.propose(self._for_action(state, self.policy.imagined_action_tokens), seed)

    async def step(self, states: Sequence[State], actions: Sequence[str]) -> list[str]:
        """ŝ' ~ M_φ(·|ŝ, â)."""
        model, cuts = self.world_model, []
        fits = self._within(model.lm, model.params.max_new_tokens)
        for state, action in zip(states, actions, strict=True):
            cuts.append(cut(state, lambda s, a=action: prompts.world_model_prompt(
                s.last(model.keep_steps).render(), a, style=model.style, env=model.env), fits))
        return await model.step(cuts, actions)

    def for_acting(self, state: State, foresight: str = "") -> State:
        """``state`` with which ``foresight`` and then an action fits."""
        return self._for_action(state, self.policy.action_tokens, foresight)

    def for_scoring(self, state: State, futures: Sequence[str], target: str) -> State:
        """``state`` with which every one of ``futures`` (foresight texts) and then ``target`` fits."""
        encode = self.policy.lm.encode
        longest = max(futures, key=lambda text: len(encode(text)))
        return self._for_action(state, len(encode(target)), longest)

    def _for_action(self, state: State, tokens: int, foresight: str = "") -> State:
        """``state`` with which ``tokens`` tokens of an action fit behind the prompt."""
        fits = self._within(self.policy.lm, tokens)
        return cut(state, lambda s: self.policy.prompt(s, "Action", foresight=foresight), fits)

    def _within(self, lm: LocalLM, completion: int) -> Callable[[str], bool]:
        room = self.max_seq_len - completion - len(lm.encode.start)
        # A token is a byte at least, so that most prompts of a small world needn't be tokenised to know.
        return lambda text: len(text.encode()) <= room or len(lm.encode(text)) <= room


def cut(state: State, prompt: Callable[[State], str], fits: Callable[[str], bool]) -> State:
    """``state`` with as many of its last steps as let ``prompt(state)`` fit.  UserError where one is too many."""
    if fits(prompt(state)):
        return state
    kept = steps_that_fit(state, prompt, fits)
    if kept == 0:
        raise UserError("the prompt doesn't fit even without the steps before; raise --max_seq_len")
    return state.last(kept)


def steps_that_fit(state: State, prompt: Callable[[State], str], fits: Callable[[str], bool]) -> int:
    """How many of the last steps of ``state`` let ``prompt(state)`` fit; 0 where one is too many."""
    # Fewer steps are a shorter prompt, so the number is found by bisection: True sorts behind False.
    return bisect_right(range(1, len(state.history) + 1), False, key=lambda n: not fits(prompt(state.last(n))))
