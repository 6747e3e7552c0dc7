"""The policy LM π_θ as an agent uses it: propose, choose a horizon, reflect, judge, act.

Everything is a coroutine on one state, written as if for one episode; the LM batches.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from itp.agent.prompt_budget import RESERVE, PromptBudget
from itp.errors import UserError
from itp.lm.base import LM, GenParams, Generation, HeadOutputs, Trace
from itp.seeding import derive_seed
from itp.text import prompts
from itp.text.parsing import (
    clean_action, parse_action, parse_help, parse_horizon, parse_line, parse_thought, without_thinking,
)
from itp.text.prompt_format import TUNED, PromptFormat
from itp.text.state import State

SELECTIONS = ("generate", "constrained", "score")
"""How an action is chosen: written freely; decoded under a trie of the admissible actions (exact
probabilities, never another one); or the admissible action with the highest log-probability."""

NEXT_ROUND = ("\nObservation:", "\nTask:")
"""What a model writes that goes on with the environment's part."""

ANSWER_TOKENS = 2
"""Of yes or no with its line break."""

VALUE_TOKENS = 1
"""What a prompt leaves free behind the place where a value is read."""

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
    prompt: str = ""
    """What it answers; empty where it isn't one prompt's answer."""

    @property
    def mean_logprob(self) -> float:
        """Nats a token."""
        return self.logprob / self.tokens


@dataclass(frozen=True)
class Policy:
    """π_θ on an LM.  Made by :func:`itp.models.load_policy`.

    ``form``: how it is prompted; ``budget``: how many tokens a prompt may have.  ``foresight_format``: what of an
    imagined trajectory it reads.  ``history_keep_steps``: steps of history in the prompt (0: all of them);
    with ``history`` False an instruct prompt holds the current observation only.
    ``temperature`` and ``top_p`` hold for executed and imagined actions; 0 is greedy.
    """

    lm: LM
    form: PromptFormat = TUNED
    budget: PromptBudget = PromptBudget()
    foresight_format: str = "full"
    history_keep_steps: int = 0
    history: bool = True
    selection: str = "generate"
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
    critic: Policy | None = None
    """Whose value head judges states and actions; None: its own."""

    async def act(self, state: State, admissible: Sequence[str] | None, seed: int, *, foresight: str = "",
                  notes: str = "", trace: bool = False) -> Choice:
        """a_t ~ π_θ(·|s_t, τ̂_t), by ``selection``.  ``admissible`` isn't looked at when generating.

        ``trace``: with how the action was sampled (not when scoring).
        """
        if self.selection != "score":
            choice, = await self.sample(state, admissible, 1, seed, foresight=foresight, notes=notes, trace=trace)
            return choice
        scored = await self._score(state, admissible, foresight=foresight, notes=notes)
        return max(scored, key=lambda choice: choice.logprob)

    async def _score(self, state: State, admissible: Sequence[str] | None, *, foresight: str = "",
                     notes: str = "") -> list[Choice]:
        """Every admissible action with its log-probability among all texts, in their order."""
        targets = self._targets(state, admissible)
        prompt = self.action_prompt(state, self.budget.longest(targets), foresight=foresight, notes=notes)
        scores = await self.lm.loglikelihood([(prompt, target) for target in targets])
        return [Choice(action, action, logprob=score.total, prompt=prompt)
                for action, score in zip(targets.values(), scores, strict=True)]

    async def weighed(self, state: State, admissible: Sequence[str] | None, n: int, seed: int, *,
                      notes: str = "") -> list[Choice]:
        """The actions that come into question, with their log-probabilities, all as answers to one prompt.

        Every admissible action; of a policy that writes freely up to ``n`` :meth:`candidates`.
        """
        if self.selection == "generate" or not admissible:
            admissible = [choice.action for choice in await self.candidates(state, admissible, n, seed)]
        return await self._score(state, admissible, notes=notes)

    async def sample(self, state: State, admissible: Sequence[str] | None, n: int, seed: int, *,
                     temperature: float | None = None, imagined: bool = False, foresight: str = "", notes: str = "",
                     trace: bool = False) -> list[Choice]:
        """``n`` independent samples from π_θ(·|s_t, τ̂_t), at the policy's own ``temperature`` where none is given.

        Decodes freely if ``selection`` is generate or the state is ``imagined``, because the admissible actions of an
        imagined state are unknown.  Otherwise samples from the admissible actions.
        """
        tokens = self.imagined_action_tokens if imagined else self.action_tokens
        if imagined or self.selection == "generate":
            prompt = self.action_prompt(state, tokens, foresight=foresight, notes=notes)
            return [self._written(reply, prompt) for reply in await self._write(
                prompt, tokens, seed, self._ends, n=n, temperature=temperature, trace=trace)]
        targets = self._targets(state, admissible)
        prompt = self.action_prompt(state, self.budget.longest(targets), foresight=foresight, notes=notes)
        temperature = self.temperature if temperature is None else temperature
        params = GenParams(temperature=temperature, seed=seed, choices=tuple(targets), trace=trace)
        replies = await self.lm.generate([prompt] * n, params)
        return [Choice(targets[reply.text], reply.text, logprob=reply.logprob, trace=reply.trace,
                       tokens=reply.completion_tokens, prompt=prompt) for reply in replies]

    async def candidates(self, state: State, admissible: Sequence[str] | None, n: int, seed: int, *,
                         imagined: bool = False) -> list[Choice]:
        """Up to ``n`` different actions: the likeliest one, then samples (at temperature 1 if the policy is greedy)."""
        greedy, sampled = await asyncio.gather(
            self.sample(state, admissible, 1, seed, temperature=0.0, imagined=imagined),
            self.sample(state, admissible, n - 1, derive_seed(seed, "candidates"), imagined=imagined,
                        temperature=self.temperature or 1.0))
        return distinct([*greedy, *sampled])

    async def think_and_act(self, state: State, seed: int, *, notes: str = "") -> Choice:
        """A thought and an action in one reply (Chain-of-Thought, ReAct), written freely."""
        prompt = self.prompt(state, "Thought", self.text_tokens, notes=notes)
        reply, = await self._write(prompt, self.text_tokens, seed, stop=NEXT_ROUND)
        raw = reply.text if self.form.template.thinks else "Thought:" + reply.text
        return _planned(reply.text, raw)

    async def plan(self, state: State, seed: int, *, notes: str = "") -> tuple[Choice, bool]:
        """A thought, an action, and whether more actions are to be tried in imagination; one reply, written freely."""
        prompt = self.prompt(state, "Plan", self.text_tokens, notes=notes)
        reply, = await self._write(prompt, self.text_tokens, seed, stop=NEXT_ROUND)
        raw = reply.text if self.form.template.thinks else "Thought:" + reply.text
        return _planned(reply.text, raw), parse_help(raw)

    async def choose(self, state: State, actions: Sequence[str], seed: int, *, notes: str = "") -> Choice:
        """One of ``actions``.  Where a server's reply names none of them, it is the first."""
        if not self.score_answers:
            return await replace(self, selection="constrained").act(state, actions, seed, notes=notes)
        prompt = self.prompt(state, "Choice", self.action_tokens, notes=notes)
        reply, = await self._write(prompt, self.action_tokens, seed, self._ends)
        choice = self._written(reply, prompt)
        return choice if choice.action in actions else replace(choice, action=actions[0], parsed=False)

    async def propose(self, state: State, seed: int) -> str:
        """An imagined action â ~ π_θ(·|ŝ), decoded freely: nobody knows what an imagined state admits."""
        tokens = self.imagined_action_tokens
        prompt = self.action_prompt(state, tokens)
        reply, = await self._write(prompt, tokens, seed, self._ends)
        return self._written(reply, prompt).action

    async def horizon(self, state: State, max_k: int, seed: int) -> tuple[int | None, str]:
        """ITP-I's K_t by prompt and the raw reply; None where the reply holds no number."""
        prompt = self.prompt(state, "Horizon", self.decision_tokens, max_k=max_k)
        reply, = await self._write(prompt, self.decision_tokens, seed, self._ends)
        return parse_horizon(reply.text, max_k), reply.text

    async def read_heads(self, state: State) -> HeadOutputs:
        """log P_θ(K|s_t) and V_θ(s_t) of a policy with heads."""
        prompt = self.heads_prompt(state)
        outputs, = await self.lm.read_heads([prompt])
        return replace(outputs, prompt=prompt)

    async def value(self, state: State, action: str = "") -> float:
        """What the critic's value head says of ``action`` in ``state``, or of the state: Q or a reward.

        What it means is what the critic was trained on (:mod:`itp.training.critic`).
        """
        critic = self.critic or self

        def render(shown: State) -> str:
            return prompts.value_prompt(shown.render(), critic.form, action)

        outputs, = await critic.lm.read_heads([critic.budget.prompt(critic._shown(state), render, VALUE_TOKENS)])
        return outputs.value

    async def close(self) -> None:
        """Let go of the LM, and of the critic's."""
        await self.lm.close()
        if self.critic:
            await self.critic.close()

    async def reflect(self, state: State, foresight: str, seed: int, label: str = "Reflection") -> str:
        """Reflect(τ̂_t) of eq. 4: one line on what the imagined future means.  Label ``Belief``: a neutral summary."""
        prompt = self.prompt(state, label, self.text_tokens, foresight=foresight)
        reply, = await self._write(prompt, self.text_tokens, seed, (prompts.END,))
        return parse_line(reply.text, label)

    async def look_back(self, state: State, seed: int) -> str:
        """One line on a failed episode that ended in ``state``, from its whole history, as far as that fits."""
        def render(shown: State) -> str:
            return prompts.look_back_prompt(shown.render(), self.form)

        prompt = self._budgeted(state, render, self.text_tokens)
        reply, = await self._write(prompt, self.text_tokens, seed, (prompts.END,))
        return parse_line(reply.text, "Reflection")

    async def judge(self, state: State, hypothetical: str) -> float:
        """P(yes) that ``hypothetical`` brings the task closer; P(yes) + P(no) = 1.

        The probability is that of an answer right after the prompt, so the model can't think first.  ``hypothetical``:
        steps that weren't executed, as :func:`itp.text.prompts.foresight_text` or ``proposal_text`` writes them.
        """
        prompt = self.prompt(state, "Helps", ANSWER_TOKENS, foresight=hypothetical)
        if self.score_answers:
            yes, no = await self.lm.loglikelihood([(prompt, prompts.YES), (prompt, prompts.NO)])
            return 0.5 + 0.5 * math.tanh((yes.total - no.total) / 2)  # the logistic function, without its overflow
        params = GenParams(choices=(prompts.YES, prompts.NO))
        answer, = await self.lm.generate([prompt], params)
        p = math.exp(answer.logprob)
        return p if answer.text == prompts.YES else 1 - p

    async def log_odds(self, prompt: str, action: str, other: str) -> float:
        """log π_θ(``action``) − log π_θ(``other``) as answers to ``prompt``, in nats: sums over their tokens.

        The probabilities are those among all texts, also where actions are chosen among the admissible ones.
        """
        one, two = await self.lm.loglikelihood([(prompt, prompts.action_target(text)) for text in (action, other)])
        return one.total - two.total

    def action_prompt(self, state: State, new_tokens: int = 0, *, foresight: str = "", notes: str = "") -> str:
        """The prompt for an action of ``new_tokens`` tokens at most (0: an executed one)."""
        if not new_tokens:
            free = self.selection == "generate"
            new_tokens = self.action_tokens if free else RESERVE["action"][self.form.env]
        return self.prompt(state, "Action", new_tokens, foresight=foresight, notes=notes)

    def heads_prompt(self, state: State) -> str:
        """The prompt up to the control token, cut as the prompt of an action without an imagined trajectory is."""
        return prompts.control_prompt(self.action_prompt(state), self.form)

    def prompt(self, state: State, label: str, new_tokens: int, **parts: Any) -> str:
        """:func:`itp.text.prompts.policy_prompt` on what the policy is shown of ``state``, within the budget.

        ``new_tokens``: of the answer at most; ``parts``: foresight, notes, max_k.
        """
        def render(shown: State) -> str:
            return prompts.policy_prompt(shown.render(), label, self.form, **parts)

        return self._budgeted(self._shown(state), render, new_tokens)

    def _budgeted(self, state: State, render: Callable[[State], str], new_tokens: int) -> str:
        if self.form.template.thinks:
            new_tokens += self.thinking_tokens
        return self.budget.prompt(state, render, new_tokens)

    def _shown(self, state: State) -> State:
        if self.form.style == "instruct" and not self.history:
            return State(state.task, state.observation)
        return state.last(self.history_keep_steps)

    def _targets(self, state: State, admissible: Sequence[str] | None) -> dict[str, str]:
        """What may be written after ``Action:``, and the admissible action that it means."""
        if not admissible:
            raise UserError(f"--action_selection {self.selection}: the environment lists no admissible action "
                            f"after {state.observation!r}; use --action_selection generate")
        return {prompts.action_target(a): a for a in admissible}

    def _written(self, reply: Generation, prompt: str) -> Choice:
        action = clean_action(reply.text) if self.form.style == "tuned" else parse_action(reply.text)
        return Choice(action or clean_action(reply.text), reply.text, parsed=bool(action), logprob=reply.logprob,
                      trace=reply.trace, tokens=reply.completion_tokens, prompt=prompt)

    @property
    def _ends(self) -> tuple[str, ...]:
        """What ends an action or a horizon.  A chat model may begin with an empty line or with the label alone."""
        trained = self.form.style == "tuned" or self.form.control_token
        return (prompts.END,) if trained else NEXT_ROUND

    async def _write(self, prompt: str, max_new_tokens: int, seed: int, stop: tuple[str, ...], *, n: int = 1,
                     temperature: float | None = None, trace: bool = False) -> list[Generation]:
        """``n`` replies, at the policy's own ``temperature`` where none is given.

        What a model thought before a reply isn't part of its text, and no stop string ends thinking.
        """
        temperature = self.temperature if temperature is None else temperature
        if not self.form.template.thinks:
            params = GenParams(max_new_tokens, temperature, self.top_p, stop, seed, trace=trace)
            return await self.lm.generate([prompt] * n, params)
        params = GenParams(self.thinking_tokens + max_new_tokens, temperature, self.top_p, seed=seed)
        return [_answer(reply, stop) for reply in await self.lm.generate([prompt] * n, params)]


def _planned(reply: str, raw: str) -> Choice:
    """The action of a reply that may begin with a thought; its last line, where it names none."""
    action = parse_action(raw)
    return Choice(action or clean_action(reply.strip().split("\n")[-1]), raw, parse_thought(raw), bool(action))


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
