"""The textual world model M_φ: one step of p_φ(s'|s, a) by a language model.

Its prompt is the very text that it was trained on (:func:`itp.text.prompts.world_model_prompt`), and it answers with
the next observation; the next state follows from that (:meth:`itp.text.state.State.after`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from itp.agent.prompt_budget import PromptBudget
from itp.config import flag
from itp.lm.base import LM, GenParams, Generation
from itp.text import prompts
from itp.text.parsing import without_label, without_thinking
from itp.text.prompt_format import TUNED, PromptFormat
from itp.text.recall import recalled
from itp.text.state import State, dedent

log = logging.getLogger(__name__)


class Dynamics(Protocol):
    """p(s'|s, a), as methods ask for it: a world model, or the game itself (:mod:`itp.agent.engine_world_model`)."""

    async def step(self, states: Sequence[State], actions: Sequence[str]) -> list[str]:
        """The observations after ``actions`` in ``states`` (same length)."""

    async def sample(self, state: State, action: str, n: int, seed: int, temperature: float = 1.0) -> list[str]:
        """``n`` observations after ``action`` in ``state``, sampled."""


@dataclass
class RecallFlag:
    """What the world model needn't predict."""

    wm_recall: bool = flag(False, help="ALFWorld: contents that the episode has shown already, as far as its own "
                                       "steps changed them, are taken from there; the world model predicts the rest")


class WorldModel:
    """M_φ on an LM.  Made by :func:`itp.models.load_world_model`.

    ``form``: how it is prompted; ``budget``: how many tokens a prompt may have; ``history_keep_steps``: steps of
    history that its prompt holds (0: all of them).  ``recall``: what the state's own steps determine of a place's
    contents is taken from there (:mod:`itp.text.recall`), and the LM isn't asked.  ``limit_flag``: the flag that sets
    ``max_new_tokens``, for a warning.
    """

    def __init__(self, lm: LM, form: PromptFormat = TUNED, budget: PromptBudget = PromptBudget(role="world_model"), *,
                 history_keep_steps: int = 0, max_new_tokens: int = 192, recall: bool = False,
                 limit_flag: str = "--wm_max_new_tokens") -> None:
        self.lm, self.form, self.budget = lm, form, budget
        self.history_keep_steps, self.recall, self.limit_flag = history_keep_steps, recall, limit_flag
        self._warned = False
        # A model that wasn't taught to stop goes on with the next action.
        self.params = GenParams(max_new_tokens=max_new_tokens, stop=("\nAction:", "\nTask:"))

    async def step(self, states: Sequence[State], actions: Sequence[str]) -> list[str]:
        """The predicted observations after ``actions`` in ``states`` (same length)."""
        steps = list(zip(states, actions, strict=True))
        known = [recalled(state, action) if self.recall else None for state, action in steps]
        asked = [self.prompt(state, action) for (state, action), answer in zip(steps, known) if answer is None]
        said = iter(self._observations(await self.lm.generate(asked, self.params)) if asked else ())
        return [next(said) if answer is None else answer for answer in known]

    async def sample(self, state: State, action: str, n: int, seed: int, temperature: float = 1.0) -> list[str]:
        """``n`` observations sampled from p_φ(·|s, a) at ``temperature``."""
        if self.recall and (answer := recalled(state, action)) is not None:
            return [answer] * n
        params = replace(self.params, temperature=temperature, seed=seed)
        return self._observations(await self.lm.generate([self.prompt(state, action)] * n, params))

    async def close(self) -> None:
        """Give its model back."""
        await self.lm.close()

    def prompt(self, state: State, action: str) -> str:
        """:func:`itp.text.prompts.world_model_prompt` on what the model is shown of ``state``, within the budget."""
        def render(shown: State) -> str:
            return prompts.world_model_prompt(shown.render(), action, self.form)

        return self.budget.prompt(state.last(self.history_keep_steps), render, self.params.max_new_tokens)

    def _observations(self, replies: Sequence[Generation]) -> list[str]:
        if not self._warned and any(reply.finish_reason == "length" for reply in replies):
            self._warned = True
            log.warning("a predicted observation is cut at %d tokens, and more may be: raise %s",
                        self.params.max_new_tokens, self.limit_flag)
        said = [without_thinking(reply.text) for reply in replies]
        if self.form.style == "instruct":  # a chat model may repeat the label
            said = [without_label(text, "Observation") for text in said]
        return [dedent(text).strip() for text in said]
