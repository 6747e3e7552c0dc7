"""The contract of a language model: generate, loglikelihood.  Lists in, lists out, in order.

Both calls are coroutines and may be awaited by many episodes at once; batching them is the
implementation's business, and no answer depends on what else is in its batch: a sampled completion
depends on the prompt, the parameters and their ``seed`` alone.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class GenParams:
    """How to decode.  ``temperature`` 0 is greedy.

    ``stop``: decoding ends where one of these strings appears; it is not part of the text.
    ``choices``: the completion must be one of these strings.  The model walks their token trie, so the
    probabilities over ``choices`` are exact and sum to one at ``temperature`` 1.
    ``trace``: the answer also says how each of its tokens was drawn.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    choices: tuple[str, ...] = ()
    trace: bool = False


@dataclass(frozen=True)
class Trace:
    """How a completion was drawn: enough to compute its probability again, with other weights.

    ``allowed[i]``: the ids that token i was drawn from (what the trie of choices or the nucleus left);
    None is the whole vocabulary, a single id a token that was forced (probability 1).  ``logprob``: log-probability
    (nats) of ``token_ids`` under softmax(logits / ``temperature``) over ``allowed``, from which they were drawn.
    """

    token_ids: tuple[int, ...]
    allowed: tuple[tuple[int, ...] | None, ...]
    temperature: float
    logprob: float


@dataclass(frozen=True)
class Generation:
    """One completion.

    ``logprob``: log-probability (nats) of the completion under the distribution that it was drawn
    from, before temperature and top_p; None where a backend doesn't report it.
    ``cached_tokens``: how many of ``prompt_tokens`` were not computed again.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    finish_reason: Literal["stop", "length"]
    logprob: float | None = None
    trace: Trace | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities (nats) of a completion's tokens given a context, and what it cost."""

    logprobs: tuple[float, ...]
    prompt_tokens: int
    cached_tokens: int = 0

    @property
    def total(self) -> float:
        return sum(self.logprobs)


@dataclass(frozen=True)
class HeadOutputs:
    """What a policy's heads read at the control token: log P_θ(K|s) for K = 0..K_max, V_θ(s), and the cost."""

    k_logprobs: tuple[float, ...]
    value: float
    prompt_tokens: int
    cached_tokens: int = 0
    prompt: str = ""
    """The prompt at whose end they were read, as far as the reader says so."""

    def choose_k(self, max_k: int, seed: int | None) -> int:
        """K_t among 0..``max_k``: drawn with ``seed``, or the most likely one where that is None."""
        allowed = self.k_logprobs[:max_k + 1]
        if seed is None:
            return max(range(len(allowed)), key=allowed.__getitem__)
        return random.Random(seed).choices(range(len(allowed)), [math.exp(p) for p in allowed])[0]


@dataclass
class Usage:
    """What one model was asked for: calls (one a prompt) and tokens.  Adds up with ``+=``.

    ``cut``: completions that ended at their limit of tokens.  ``shortened``: prompts that lost old steps because they
    were beyond their budget (:mod:`itp.agent.prompt_budget`).
    ``seconds``: how long its answers were waited for; requests made at the same time wait together.
    """

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    cut: int = 0
    shortened: int = 0
    seconds: float = field(default=0.0, compare=False)

    def __iadd__(self, other: Usage) -> Usage:
        for field_ in fields(self):
            setattr(self, field_.name, getattr(self, field_.name) + getattr(other, field_.name))
        return self

    @property
    def tokens(self) -> int:
        """Prompt and generated tokens together, cached ones included: what a method asks for."""
        return self.prompt_tokens + self.completion_tokens

    @classmethod
    def of(cls, answers: Sequence[Generation | TokenLogprobs | HeadOutputs]) -> Usage:
        return cls(
            calls=len(answers),
            prompt_tokens=sum(a.prompt_tokens for a in answers),
            completion_tokens=sum(a.completion_tokens for a in answers if isinstance(a, Generation)),
            cached_tokens=sum(a.cached_tokens for a in answers),
            cut=sum(a.finish_reason == "length" for a in answers if isinstance(a, Generation)),
        )


@dataclass(eq=False)  # a step is itself and no other
class _Meter:
    usage: dict[str, Usage] = field(default_factory=dict)
    waiting: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Requests under way by role, and since when there are any."""


_meter: ContextVar[_Meter] = ContextVar("meter")


@contextmanager
def metered() -> Iterator[dict[str, Usage]]:
    """Count what this task, and the tasks it starts, ask of each model: role -> Usage.

    What a meter inside another one has counted is added to the outer one when the inner one ends.
    """
    meter, outer = _Meter(), _meter.get(None)
    token = _meter.set(meter)
    try:
        yield meter.usage
    finally:
        _meter.reset(token)
        for role, spent in meter.usage.items() if outer is not None else ():
            outer.usage.setdefault(role, Usage())
            outer.usage[role] += spent


def count_shortened(role: str) -> None:
    """Charge a prompt of the model ``role`` that lost old steps to the current task's meter, if it has one."""
    if (meter := _meter.get(None)) is not None:
        meter.usage.setdefault(role, Usage()).shortened += 1


def requester() -> object:
    """For whom the current task makes requests: the step that it is metered with, else the task itself."""
    return _meter.get(None) or asyncio.current_task()


@contextmanager
def asking(role: str) -> Iterator[list[Generation | TokenLogprobs | HeadOutputs]]:
    """Around every request of an LM: what goes into the list is charged to the current task's meter, if it has one."""
    answers: list[Generation | TokenLogprobs | HeadOutputs] = []
    meter = _meter.get(None)
    if meter is None:
        yield answers
        return
    usage = meter.usage.setdefault(role, Usage())
    others, since = meter.waiting.get(role, (0, 0.0))
    meter.waiting[role] = (others + 1, since if others else time.monotonic())
    try:
        yield answers
    finally:
        others, since = meter.waiting[role]
        meter.waiting[role] = (others - 1, since)
        if others == 1:
            usage.seconds += time.monotonic() - since
        usage += Usage.of(answers)


class LM(Protocol):
    """A language model that episodes share.  ``role`` is what it is used as: policy or world_model.

    ``tokenizer``: its tokenizer; None where it is a server's own.  ``context_length``: tokens of prompt and completion
    that it holds; None where that is unknown or without limit.
    """

    name: str
    role: str
    tokenizer: Any
    context_length: int | None

    async def generate(self, prompts: Sequence[str], params: GenParams) -> list[Generation]:
        """Complete every prompt.

        Several prompts of one call with ``temperature`` > 0 draw from seeds derived from
        ``params.seed`` and their index.  Raises UserError where ``params.choices`` isn't supported.
        """

    async def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[TokenLogprobs]:
        """log p(completion | context) for every (context, completion), token by token.

        The token ids of context and completion are concatenated, never found by tokenising the
        joined text.  Raises UserError where a backend can't score.
        """

    async def read_heads(self, prompts: Sequence[str]) -> list[HeadOutputs]:
        """What the heads read at the end of every prompt.  Raises UserError where there are no heads."""

    async def close(self) -> None:
        """Release the model or the connection."""
