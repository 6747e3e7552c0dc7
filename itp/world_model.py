"""The textual world model M_φ: one step of p_φ(s'|s, a) by a language model.

It is asked with the very text that it was trained on (:func:`itp.text.prompts.world_model_prompt`) and
answers with the next observation; the next state follows from it (:meth:`itp.text.state.State.after`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from itp.lm.base import LM, Generation, GenParams
from itp.text import prompts
from itp.text.actions import without_thinking
from itp.text.state import State, dedent

log = logging.getLogger(__name__)


class WorldModel:
    """``style`` is the prompt's (tuned or instruct), ``turns`` a chat's, both from :func:`itp.lm.chat.asked_as`;
    ``keep_steps`` the history it is shown (0: all).  ``limit``: the flag that sets ``max_new_tokens``.
    """

    def __init__(self, lm: LM, *, env: str = "alfworld", style: str = "tuned", turns: prompts.Turns = prompts.PLAIN,
                 max_new_tokens: int = 192, keep_steps: int = 0, limit: str = "--wm_max_new_tokens") -> None:
        self.lm, self.env = lm, env
        self.style, self.turns = style, turns
        self.keep_steps, self.limit = keep_steps, limit
        self.warned = False
        # A model that wasn't taught to stop goes on with the next action.
        self.params = GenParams(max_new_tokens=max_new_tokens, stop=("\nAction:", "\nTask:"))

    async def step(self, states: Sequence[State], actions: Sequence[str]) -> list[str]:
        """The predicted observations after ``actions`` in ``states`` (same length)."""
        asked = [self.prompt(state, action) for state, action in zip(states, actions, strict=True)]
        return self._observations(await self.lm.generate(asked, self.params))

    async def sample(self, state: State, action: str, n: int, seed: int, temperature: float = 1.0) -> list[str]:
        """``n`` observations drawn from p_φ(·|s, a) at ``temperature``."""
        params = replace(self.params, temperature=temperature, seed=seed)
        return self._observations(await self.lm.generate([self.prompt(state, action)] * n, params))

    def prompt(self, state: State, action: str) -> str:
        """What it is asked with: :func:`itp.text.prompts.world_model_prompt` on what it is shown of ``state``."""
        shown = state.last(self.keep_steps).render()
        return prompts.world_model_prompt(shown, action, style=self.style, env=self.env, turns=self.turns)

    def _observations(self, replies: Sequence[Generation]) -> list[str]:
        if not self.warned and any(reply.finish_reason == "length" for reply in replies):
            self.warned = True
            log.warning("a predicted observation is cut at %d tokens, and more may be: raise %s",
                        self.params.max_new_tokens, self.limit)
        return [dedent(without_thinking(reply.text)).strip() for reply in replies]
