"""World-model training as a task of the fine-tuning core: packed rows, and the exact match of held-out transitions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from itp.lm.base import GenParams
from itp.lm.engine import Engine, Request
from itp.model_card import ModelCard
from itp.training.examples import Example, TrainingRow
from itp.training.packing import examples_of
from itp.training.text_task import TextTask
from world_model.base_tuning.examples import WorldModelSettings


class WorldModelTask(TextTask):
    """Transitions, and the exact match of those that are held out."""

    settings: WorldModelSettings

    def __init__(self, settings: WorldModelSettings, examples: Sequence[Example],
                 predicts: str = "observation") -> None:
        super().__init__(settings, examples)
        self.predicts = predicts

    def card(self, tokenizer: PreTrainedTokenizerBase) -> ModelCard:
        return replace(super().card(tokenizer), predicts=self.predicts)

    def measure(self, tokenizer: PreTrainedTokenizerBase, eval_rows: list[TrainingRow],
                device: torch.device) -> dict[str, Any]:
        held_out = [example for row in eval_rows for example in examples_of(row)]
        wanted = min(self.settings.eval_rows, len(held_out))
        if not wanted:
            return {}
        model = self.trained(tokenizer).to(device).eval()
        return exact_match(model, tokenizer, random.Random(self.settings.seed).sample(held_out, wanted))


def exact_match(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
                examples: Sequence[tuple[list[int], list[int]]]) -> dict[str, Any]:
    """How many targets the model completes exactly, decoding greedily to its stop token.

    ``examples``: the ids of each prompt and of its target.
    """
    engine = Engine(model, tokenizer)
    # One token more than the target, so that a longer prediction can't pass for it.
    answers = engine.generate([Request(prompt, GenParams(max_new_tokens=len(target) + 1), 0, [])
                               for prompt, target in examples])
    right = sum(answer.text == engine.encode.decode(target) and answer.finish_reason == "stop"
                for answer, (_, target) in zip(answers, examples, strict=True))
    return {"exact_match": round(right / len(examples), 4), "exact_match_rows": len(examples)}
