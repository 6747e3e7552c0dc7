"""A deterministic toy LM: every answer is a hash of its prompt (and seed, where it is drawn).  No torch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from itp.lm.base import GenParams, Generation, HeadOutputs, TokenLogprobs, asking
from itp.seeding import derive_seed
from itp.text import prompts
from itp.text.prompt_format import PromptFormat

ACTIONS = [f"{verb} {thing} {n}" for verb in ("take", "clean") for thing in ("plate", "mug") for n in range(1, 6)]


def control_prompt(state: str, form: PromptFormat) -> str:
    """The prompt up to ``<CTRL>``, where the heads read."""
    return prompts.control_prompt(prompts.policy_prompt(state, form=form), form)


def unit(*parts: object) -> float:
    """A number in [0, 1) that the parts determine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big") / 2 ** 48


class ToyLM:
    """Plays policy and world model of a world where anything may follow from anything.

    ``asked`` holds every request: (prompt, seed where it was drawn).
    """

    name, tokenizer, context_length = "toy", None, None

    def __init__(self, role: str) -> None:
        self.role = role
        self.asked: list[tuple[str, int]] = []

    async def generate(self, prompts: Sequence[str], params: GenParams) -> list[Generation]:
        seeds = [0 if params.temperature == 0 else derive_seed(params.seed, i) if i else params.seed
                 for i in range(len(prompts))]
        self.asked += zip(prompts, seeds, strict=True)
        with asking(self.role) as answers:
            answers += [self.answer(prompt, seed, params) for prompt, seed in zip(prompts, seeds, strict=True)]
        return answers

    async def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[TokenLogprobs]:
        self.asked += [(prompt, 0) for prompt, _ in pairs]
        with asking(self.role) as answers:
            answers += [TokenLogprobs((-4 * unit(prompt, target.strip()),), 9) for prompt, target in pairs]
        return answers

    async def read_heads(self, prompts: Sequence[str]) -> list[HeadOutputs]:
        self.asked += [(prompt, 0) for prompt in prompts]
        with asking(self.role) as answers:
            answers += [HeadOutputs((0.0,), unit(prompt), 9) for prompt in prompts]
        return answers

    async def close(self) -> None:
        pass

    def answer(self, prompt: str, seed: int, params: GenParams) -> Generation:
        if prompt.endswith("Helps:"):
            yes = p_yes(prompt)
            text = params.choices[0 if yes >= 0.5 else 1]
            return Generation(text, 9, 1, 0, "stop", math.log(yes if text == prompts.YES else 1 - yes))
        if prompt.endswith("Observation:"):
            return Generation(f" you see {int(1000 * unit(prompt, seed))}", 9, 4, 0, "stop", -1.0)
        words = [choice.strip() for choice in params.choices] or ACTIONS
        action = words[int(len(words) * unit(prompt, seed))]
        text = {"Thought:": f" why not\nAction: {action}"}.get(prompt.rpartition("\n")[2], f" {action}")
        return Generation(text + "\n" * bool(params.choices), 9, 4, 0, "stop", -4 * unit(prompt, action))


def p_yes(prompt: str) -> float:
    return 0.02 + 0.96 * unit(prompt)
