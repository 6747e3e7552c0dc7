"""The policy LM π_θ as an agent uses it: propose, choose a horizon, reflect, judge, act.

Everything is a coroutine on one state, written as if for one episode; the LM batches.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from itp.lm.base import LM, Control, Generation, GenParams, Trace
from itp.runtime import UserError, derive_seed
from itp.text import prompts
from itp.text.actions import clean_action, parse_action, parse_horizon, parse_thought, without_thinking
from itp.text.state import State

SELECTIONS = ("generate", "constrained", "score")
"""How an action is chosen: written freely; decoded under a trie of the admissible actions (exact
probabilities, never invalid); or the admissible action with the highest log-probability."""


IMAGINED_ACTION_TOKENS = {"alfworld": 12, "scienceworld": 48}
"""Tokens of an imagined action at most.  ScienceWorld's longest name two things and where they are."""


@dataclass(frozen=True)
class Choice:
    """An action and where it comes from.  ``parsed`` is False where the reply held no action.

    ``logprob`` (nats) is that of the whole reply of ``tokens`` tokens, among the admissible ones where it was
    chosen from these.
    """

    action: str
    raw: str
    thought: str = ""
    parsed: bool = True
    logprob: float | None = None
    trace: Trace | None = None
    tokens: int = 0

    @property
    def mean_logprob(self) -> float:
        """Nats a token."""
        return self.logprob / self.tokens


@dataclass(frozen=True)
class Policy:
    """π_θ on an LM.

    ``style``: the prompt's, tuned or instruct; ``turns``: of a chat, if it is asked as one (both from
    :func:`itp.lm.chat.asked_as`).  ``keep_steps``: history in the prompt (0: all of it);
    with ``history`` False an instruct prompt holds the current observation only.
    ``temperature`` and ``top_p`` hold for executed and imagined actions; 0 is greedy.
    ``control``: it has heads, and its prompts the control token at which they read.
    """

    lm: LM
    env: str = "alfworld"
    style: str = "tuned"
    turns: prompts.Turns = prompts.PLAIN
    selection: str = "generate"
    keep_steps: int = 0
    history: bool = True
    control: bool = False
    temperature: float = 0.0
    top_p: float = 1.0
    action_tokens: int = 16
    imagined_action_tokens: int = 12
    decision_tokens: int = 16
    text_tokens: int = 256
    """For thoughts and reflections."""
    thinking_tokens: int = 1024
    """For what a model that thinks writes before its answer."""
    score_answers: bool = False
    """Yes and no are scored one by one, by an LM that can't choose among given strings (a server)."""

    async def act(self, state: State, admissible: Sequence[str] | None, seed: int, *, foresight: str = "",
                  notes: str = "", trace: bool = False) -> Choice:
        """a_t ~ π_θ(·|s_t, τ̂_t), by ``selection``.  ``admissible`` isn't looked at when generating.

        ``trace``: with how the action was drawn (not when scoring).
        """
        if self.selection != "score":
            choice, = await self.draw(state, admissible, 1, seed, foresight=foresight, notes=notes, trace=trace)
            return choice
        prompt = self.prompt(state, "Action", foresight=foresight, notes=notes)
        targets = self._targets(state, admissible)
        scores = [s.total for s in await self.lm.loglikelihood([(prompt, target) for target in targets])]
        best = max(range(len(scores)), key=scores.__getitem__)
        action = list(targets.values())[best]
        return Choice(action, action, logprob=scores[best])

    async def draw(self, state: State, admissible: Sequence[str] | None, n: int, seed: int, *,
                   temperature: float | None = None, imagined: bool = False, foresight: str = "", notes: str = "",
                   trace: bool = False) -> list[Choice]:
        """``n`` independent draws from π_θ(·|s_t, τ̂_t), at the policy's own ``temperature`` where none is given.

        Free where it writes freely or where ``state`` is imagined, since nobody knows what that admits; else
        from the admissible actions.
        """
        prompt = self.prompt(state, "Action", foresight=foresight, notes=notes)
        if imagined or self.selection == "generate":
            tokens = self.imagined_action_tokens if imagined else self.action_tokens
            return [self._written(reply) for reply in await self._write(
                prompt, tokens, seed, (prompts.END,), n=n, temperature=temperature, trace=trace)]
        targets = self._targets(state, admissible)
        temperature = self.temperature if temperature is None else temperature
        params = GenParams(temperature=temperature, seed=seed, choices=tuple(targets), trace=trace)
        return [Choice(targets[chosen.text], chosen.text, logprob=chosen.logprob, trace=chosen.trace,
                       tokens=chosen.completion_tokens) for chosen in await self.lm.generate([prompt] * n, params)]

    async def candidates(self, state: State, admissible: Sequence[str] | None, n: int, seed: int, *,
                         imagined: bool = False) -> list[Choice]:
        """Up to ``n`` different actions: the most likely one, then draws (at temperature 1 if the policy is greedy)."""
        greedy, drawn = await asyncio.gather(
            self.draw(state, admissible, 1, seed, temperature=0.0, imagined=imagined),
            self.draw(state, admissible, n - 1, derive_seed(seed, "candidates"), imagined=imagined,
                      temperature=self.temperature or 1.0))
        return distinct([*greedy, *drawn])

    async def think_and_act(self, state: State, seed: int, *, notes: str = "") -> Choice:
        """A thought and an action in one reply (Chain-of-Thought, ReAct), written freely."""
        prompt = self.prompt(state, "Thought", notes=notes)
        reply, = await self._write(prompt, self.text_tokens, seed, stop=("\nObservation:", "\nTask:"))
        raw = reply.text if self.turns.thinks else "Thought:" + reply.text
        action = parse_action(raw)
        return Choice(action or clean_action(reply.text.split("\n")[-1]), raw, parse_thought(raw), action is not None)

    async def propose(self, state: State, seed: int) -> str:
        """An imagined action â ~ π_θ(·|ŝ), decoded freely: nobody knows what an imagined state admits."""
        line = await self._line(self.prompt(state, "Action"), self.imagined_action_tokens, seed)
        return clean_action(line) if self.style == "tuned" else parse_action(line) or clean_action(line)

    async def horizon(self, state: State, max_k: int, seed: int) -> tuple[int | None, str]:
        """ITP-I's K_t by prompt and the raw reply; None where the reply holds no number."""
        raw = await self._line(self.prompt(state, "Horizon", max_k=max_k), self.decision_tokens, seed)
        return parse_horizon(raw, max_k), raw

    async def read_control(self, state: State) -> Control:
        """log P_θ(K|s_t) and V_θ(s_t) of a policy with heads."""
        text = prompts.control_prompt(self._shown(state).render(), style=self.style, env=self.env, turns=self.turns)
        reading, = await self.lm.control([text])
        return reading

    async def reflect(self, state: State, foresight: str, seed: int) -> str:
        """Reflect(τ̂_t) of eq. 4: one line on what the imagined future means."""
        prompt = self.prompt(state, "Reflection", foresight=foresight)
        return (await self._line(prompt, self.text_tokens, seed)).strip().removeprefix("Reflection:").strip()

    async def helps(self, state: State, tried: str) -> float:
        """P(yes) that what was tried in the mind brings the task closer; P(yes) + P(no) = 1.

        It is read where the answer begins, so the model can't think first.  ``tried`` is
        :func:`itp.text.prompts.foresight_text`'s or ``proposal_text``'s.
        """
        if self.score_answers:
            prompt = self.prompt(state, "Helps", foresight=tried)
            yes, no = await self.lm.loglikelihood([(prompt, prompts.YES), (prompt, prompts.NO)])
            return 0.5 + 0.5 * math.tanh((yes.total - no.total) / 2)  # the logistic function, without its overflow
        params = GenParams(choices=(prompts.YES, prompts.NO))
        answer, = await self.lm.generate([self.prompt(state, "Helps", foresight=tried)], params)
        p = math.exp(answer.logprob)
        return p if answer.text == prompts.YES else 1 - p

    def prompt(self, state: State, label: str, **parts) -> str:
        """What the policy is asked with: :func:`itp.text.prompts.policy_prompt` on what it is shown of ``state``."""
        return prompts.policy_prompt(self._shown(state).render(), label, style=self.style, env=self.env,
                                     control=self.control, turns=self.turns, **parts)

    def _shown(self, state: State) -> State:
        if self.style == "instruct" and not self.history:
            return State(state.task, state.observation)
        return state.last(self.keep_steps)

    def _targets(self, state: State, admissible: Sequence[str] | None) -> dict[str, str]:
        """What may be written after ``Action:``, and the admissible action that it means."""
        if not admissible:
            raise UserError(f"--action_selection {self.selection}: the environment lists no admissible action "
                            f"after {state.observation!r}; use --action_selection generate")
        return {prompts.action_target(a): a for a in admissible}

    def _written(self, reply: Generation) -> Choice:
        action = clean_action(reply.text) if self.style == "tuned" else parse_action(reply.text)
        return Choice(action or clean_action(reply.text), reply.text, parsed=bool(action), logprob=reply.logprob,
                      trace=reply.trace, tokens=reply.completion_tokens)

    async def _line(self, prompt: str, max_new_tokens: int, seed: int) -> str:
        reply, = await self._write(prompt, max_new_tokens, seed, (prompts.END,))
        return reply.text

    async def _write(self, prompt: str, max_new_tokens: int, seed: int, stop: tuple[str, ...], *, n: int = 1,
                     temperature: float | None = None, trace: bool = False) -> list[Generation]:
        """``n`` replies, at the policy's own ``temperature`` where none is given.

        What a model thought before a reply isn't part of its text, and no stop string ends thinking.
        """
        temperature = self.temperature if temperature is None else temperature
        if not self.turns.thinks:
            params = GenParams(max_new_tokens, temperature, self.top_p, stop, seed, trace=trace)
            return await self.lm.generate([prompt] * n, params)
        params = GenParams(self.thinking_tokens + max_new_tokens, temperature, self.top_p, seed=seed)
        return [_answer(reply, stop) for reply in await self.lm.generate([prompt] * n, params)]


def _answer(reply: Generation, stop: tuple[str, ...]) -> Generation:
    """A reply without what was thought before it, and without what comes after its first stop string."""
    text = without_thinking(reply.text).strip()
    ends = [at for s in stop if (at := text.find(s)) >= 0]
    return replace(reply, text=text[:min(ends, default=len(text))])


def distinct(choices: Sequence[Choice]) -> list[Choice]:
    """The first choice of each action; empty replies only where there is nothing else."""
    first = {choice.action: choice for choice in reversed(choices)}
    order = dict.fromkeys(choice.action for choice in choices)
    return [first[action] for action in order if action or len(order) == 1]
