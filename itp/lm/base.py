"""The contract of a language model: generate, loglikelihood and read_heads take lists and return lists, in order.

All calls are coroutines, and many episodes may await them at once.  The implementation batches them.  No answer depends
on the rest of its batch: a sampled completion depends on the prompt, the parameters and their ``seed`` alone.
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

    ``stop``: decoding ends where one of these strings appears, and the text doesn't include it.
    ``choices``: the completion must be one of these strings.  The model walks their token trie, so the
    probabilities over ``choices`` are exact and sum to one at ``temperature`` 1.
    ``trace``: the answer also tells how each of its tokens was sampled.
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
    """How a completion was sampled: enough to compute its probability again, with other weights.

    ``allowed[i]``: the ids among which token i was sampled, which the trie of choices or the nucleus left.  None stands
    for the whole vocabulary, and a single id for a forced token (probability 1).  ``logprob``: log-probability (nats)
    of ``token_ids`` under the sampling distribution, which is softmax(logits / ``temperature``) over ``allowed``.
    """

    token_ids: tuple[int, ...]
    allowed: tuple[tuple[int, ...] | None, ...]
    temperature: float
    logprob: float


@dataclass(frozen=True)
class Generation:
    """One completion.

    ``logprob``: log-probability (nats) of the completion under the model's distribution (over ``choices``, where they
    are given), before temperature and top_p; None where a backend doesn't report it.
    ``cached_tokens``: the number of ``prompt_tokens`` that weren't computed again.
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
    """Log-probabilities (nats) of a completion's tokens given a context, and the cost."""

    logprobs: tuple[float, ...]
    prompt_tokens: int
    cached_tokens: int = 0

    @property
    def total(self) -> float:
        """The log-probability of the whole completion, in nats."""
        return sum(self.logprobs)


@dataclass(frozen=True)
class HeadOutputs:
    """The heads' outputs at the control token: log P_θ(K|s) for K = 0..K_max, V_θ(s), and the cost."""

    k_logprobs: tuple[float, ...]
    value: float
    prompt_tokens: int
    cached_tokens: int = 0
    prompt: str = ""
    """The prompt at whose end they were read, where the reader reports it."""

    def choose_k(self, max_k: int, seed: int | None) -> int:
        """K_t among 0..``max_k``: sampled with ``seed``, or the most likely K where ``seed`` is None."""
        allowed = self.k_logprobs[:max_k + 1]
        if seed is None:
            return max(range(len(allowed)), key=allowed.__getitem__)
        return random.Random(seed).choices(range(len(allowed)), [math.exp(p) for p in allowed])[0]


@dataclass
class Usage:
    """The use of one model: calls (one per prompt) and tokens.  Adds up with ``+=``.

    ``cut``: completions that ended at their limit of tokens.  ``shortened``: prompts that lost old steps because they
    were beyond their budget (:mod:`itp.agent.prompt_budget`).  ``seconds``: the time spent waiting for answers;
    requests that wait at the same time count once.
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
        """Prompt and generated tokens together, with cached tokens."""
        return self.prompt_tokens + self.completion_tokens

    @classmethod
    def of(cls, answers: Sequence[Generation | TokenLogprobs | HeadOutputs]) -> Usage:
        """The cost of these answers, one call each."""
        return cls(
            calls=len(answers),
            prompt_tokens=sum(a.prompt_tokens for a in answers),
            completion_tokens=sum(a.completion_tokens for a in answers if isinstance(a, Generation)),
            cached_tokens=sum(a.cached_tokens for a in answers),
            cut=sum(a.finish_reason == "length" for a in answers if isinstance(a, Generation)),
        )


@dataclass(eq=False)  # each meter is a key of its own
class _Meter:
    usage: dict[str, Usage] = field(default_factory=dict)
    waiting: dict[str, tuple[int, float]] = field(default_factory=dict)
    """By role: the number of requests that wait, and the time since which at least one waits."""


_meter: ContextVar[_Meter] = ContextVar("meter")


@contextmanager
def metered() -> Iterator[dict[str, Usage]]:
    """Count the use of each model (role -> Usage) by this task and by the tasks that it starts.

    When a meter inside another meter ends, its counts are added to the outer meter.
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
    """The owner of the current task's requests: the meter of its step, else the task itself."""
    return _meter.get(None) or asyncio.current_task()


@contextmanager
def asking(role: str) -> Iterator[list[Generation | TokenLogprobs | HeadOutputs]]:
    """Put this around every request to an LM: the current task's meter, if any, counts the answers in the list."""
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
    """A language model that episodes share.  ``role`` is its use: policy or world_model.

    ``tokenizer``: its tokenizer; None where only a server has it.  ``context_length``: the most tokens of prompt and
    completion together; None where the limit is unknown or doesn't exist.
    """

    name: str
    role: str
    tokenizer: Any
    context_length: int | None

    async def generate(self, prompts: Sequence[str], params: GenParams) -> list[Generation]:
        """Complete every prompt.

        With ``temperature`` > 0, each prompt of a call has a seed of its own, derived from ``params.seed`` and the
        prompt's index.  Raises UserError where ``params.choices`` isn't supported.
        """

    async def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[TokenLogprobs]:
        """log p(completion | context) for every (context, completion), token by token.

        The token ids of context and completion are concatenated; the joined text is never tokenized.  Raises UserError
        where a backend can't score.
        """

    async def read_heads(self, prompts: Sequence[str]) -> list[HeadOutputs]:
        """The heads' outputs at the end of every prompt.  Raises UserError for a model without heads."""

    async def close(self) -> None:
        """Release the model or the connection."""
