"""How many tokens a prompt may have, and what is left out where it has more: the one owner of that decision.

The oldest steps of the history go first.  The task, the first and the current observation, the control token, the
imagined trajectory and the notes always stay.  Training cuts by the same rule as inference: the budget of a prompt
depends on ``max_seq_len``, which the model's card records, and not on how long its answer is.

A prompt that is beyond ``max_seq_len`` without its history, too, is used as it is while the model's own context holds
it; beyond the context the LM raises :class:`itp.errors.PromptTooLong`, which ends that episode and no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from itp.lm.base import count_shortened
from itp.text.state import State

RESERVE = {"action": {"alfworld": 16, "scienceworld": 48}, "observation": {"alfworld": 256, "scienceworld": 256}}
"""Tokens of ``max_seq_len`` that a prompt leaves for its answer, by answer and environment."""


def prompt_tokens(max_seq_len: int, answer: str, env: str) -> int:
    """The tokens of a prompt within ``max_seq_len``, if its answer is an ``action`` or an ``observation``."""
    return max_seq_len - min(RESERVE[answer][env], max_seq_len // 4)


@dataclass(frozen=True)
class PromptBudget:
    """``max_tokens``: of a prompt (0: no limit).  ``context``: of prompt and answer, what the model holds (0: unknown).

    ``count``: the tokens of a text, with what the tokenizer puts before it; None: unknown, and nothing is cut.
    ``role``: whose prompts they are, where the meter counts the shortened ones.
    """

    max_tokens: int = 0
    context: int = 0
    count: Callable[[str], int] | None = None
    role: str = "policy"

    def longest(self, answers: Iterable[str]) -> int:
        """The tokens of the longest of ``answers``; 0 where nothing is counted."""
        if self.count is None:
            return 0
        # Behind a colon, as in a prompt, and without what stands before it.
        return max(self.count(f":{answer}") for answer in answers) - self.count(":")

    def limit(self, new_tokens: int) -> int | None:
        """Tokens of a prompt with an answer of ``new_tokens`` at most; None: no limit."""
        limits = [self.max_tokens] if self.max_tokens else []
        if self.context:
            limits.append(max(1, self.context - new_tokens))
        return min(limits, default=None)

    def prompt(self, state: State, render: Callable[[State], str], new_tokens: int) -> str:
        """``render(state)``, with as many of the last steps of ``state`` as fit, but one at least.

        ``new_tokens``: of the answer at most.  A prompt that lost steps is counted by the current meter.
        """
        text, limit = render(state), self.limit(new_tokens)
        if limit is None or self.count is None or self._fits(text, limit) or len(state.history) < 2:
            return text
        count_shortened(self.role)
        return render(state.last(self._steps_that_fit(state, render, limit)))

    def _fits(self, text: str, limit: int) -> bool:
        # A token is a byte at least, but for one that begins the text and a space that some tokenizers put before it:
        # most prompts of a small world needn't be tokenized to know.
        return len(text.encode()) + 2 <= limit or self.count(text) <= limit

    def _steps_that_fit(self, state: State, render: Callable[[State], str], limit: int) -> int:
        """The largest number of last steps with which the prompt fits; 1 where even that is too many."""
        kept, too_many = 1, len(state.history)
        while too_many - kept > 1:
            middle = (kept + too_many) // 2
            if self._fits(render(state.last(middle)), limit):
                kept = middle
            else:
                too_many = middle
        return kept
