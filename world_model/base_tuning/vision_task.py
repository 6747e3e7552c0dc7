"""World-model training on rows with pictures: a vision-language model, prompted by its own processor.

A row's prompt is the chat message of :func:`itp.lm.vision.chat_prompt`, and its target follows the label.  A picture
stands for as many tokens as the processor says, so a row that is too long can't lose its beginning: it is left out.
Rows share no sequences.  The pictures are read when a batch is made.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerBase, ProcessorMixin

from itp.agent.policy_with_heads import logits_only_at
from itp.lm.base import GenParams
from itp.lm.tokenize import Encoder
from itp.lm.vision import VisionLM, chat_prompt, inputs_of, load_processor
from itp.model_card import ModelCard
from itp.text.prompt_format import PLAIN
from itp.training.examples import COUNTS, IGNORED, Encoding, Example, TrainingRow
from itp.training.text_task import Collator
from world_model.base_tuning.examples import WorldModelSettings
from world_model.base_tuning.task import WorldModelTask

_TEXT = ("input_ids", "attention_mask")
"""Inputs of the processor that a batch has anyway."""


class VisionTask(WorldModelTask):
    """``examples``: in the plain format, each a prompt and its target."""

    auto = AutoModelForImageTextToText

    def __init__(self, settings: WorldModelSettings, examples: Sequence[Example],
                 predicts: str = "observation") -> None:
        super().__init__(settings, examples, predicts)
        self.processor = load_processor(settings.model_path)

    def beside(self, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
        return self.processor

    def card(self, tokenizer: PreTrainedTokenizerBase) -> ModelCard:
        """The template is the processor's own."""
        return replace(super().card(tokenizer), template=PLAIN)

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> Encoding:
        encoder = Encoder(tokenizer)
        encoding = Encoding([], [], dict.fromkeys(COUNTS, 0))
        for example in self.examples:
            (prompt, _), (target, _) = example.segments
            chat = chat_prompt(self.processor, prompt, bool(example.image))
            given = inputs_of(self.processor, [chat], [example.image])["input_ids"][0].tolist()
            learned = [*encoder.continuation(target), tokenizer.eos_token_id]
            encoding.counts["examples"] += 1
            if len(given) + len(learned) > self.settings.max_seq_len:
                encoding.counts["too_long"] += 1
                continue
            encoding.rows.append({"input_ids": given + learned, "labels": [IGNORED] * len(given) + learned,
                                  "prompt": prompt, "chat": chat, "image": example.image, "target": target})
            encoding.groups.append(example.group)
        return encoding

    def collator(self, pad_id: int, multiple: int = 1) -> Collator:
        return VisionCollator(self.processor, pad_id, multiple)

    def forward(self, model: torch.nn.Module, batch: dict[str, torch.Tensor],
                items: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        given = {name: value for name, value in batch.items() if name not in ("target_pos", "target_ids")}
        targets = batch["target_ids"]
        with logits_only_at(model, batch["target_pos"]):
            logits = model(**given, use_cache=False).logits[0]  # (M, V)
        nll = functional.cross_entropy(logits.float(), targets, reduction="sum")
        return {"loss": nll / (len(targets) if items is None else items),
                "sums": torch.stack([nll.detach(), nll.new_tensor(len(targets))])}

    def measure(self, tokenizer: PreTrainedTokenizerBase, eval_rows: list[TrainingRow],
                device: torch.device) -> dict[str, Any]:
        wanted = min(self.settings.eval_rows, len(eval_rows))
        if not wanted:
            return {}
        rows = random.Random(self.settings.seed).sample(eval_rows, wanted)
        lm = VisionLM(self.trained(tokenizer).to(device).eval(), self.processor, "trained")
        right = sum(asyncio.run(_is_right(lm, row, tokenizer)) for row in rows)
        return {"exact_match": round(right / wanted, 4), "exact_match_rows": wanted}


async def _is_right(lm: VisionLM, row: TrainingRow, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the target is completed exactly, greedily, to the stop token."""
    target = [label for label in row["labels"] if label != IGNORED]
    answer, = await lm.generate([row["prompt"]], GenParams(max_new_tokens=len(target) + 1), [row["image"]])
    return answer.finish_reason == "stop" and answer.text == tokenizer.decode(target, skip_special_tokens=True)


class VisionCollator(Collator):
    """Adds what the processor makes of the pictures.  What it says of each token is padded as the tokens are."""

    def __init__(self, processor: ProcessorMixin, pad_id: int, multiple: int = 1) -> None:
        super().__init__(pad_id, multiple)
        self.processor = processor

    def __call__(self, rows: list[TrainingRow]) -> dict[str, torch.Tensor]:
        batch = super().__call__(rows)
        seen = [i for i, row in enumerate(rows) if row["image"]]
        if not seen:
            return batch
        made = inputs_of(self.processor, [rows[i]["chat"] for i in seen], [rows[i]["image"] for i in seen])
        for name, value in made.items():
            if name in _TEXT:
                continue
            if value.shape == made["input_ids"].shape:  # of each token, such as whether it is of a picture
                whole = torch.zeros(batch["input_ids"].shape, dtype=value.dtype)
                whole[seen, :value.shape[1]] = value
                value = whole
            batch[name] = value
        return batch
