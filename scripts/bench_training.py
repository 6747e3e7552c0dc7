"""The part wm_training of ``bench.py``: the same steps on the same rows, padded to a cutoff and as the trainer pads.

The yardstick is what many scripts do: every row padded to the cutoff, an attention mask, logits everywhere, the
model's own loss.  Both train a fresh LoRA adapter with AdamW from the same start, so that the losses must agree.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass
class TrainingPass:
    how: str
    seconds: float
    tokens: int
    """Real ones, without padding."""
    padding_share: float
    losses: list[float]

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    def describe(self, first: TrainingPass) -> str:
        apart = max(abs(a - b) for a, b in zip(self.losses, first.losses, strict=True))
        return (f"wm_training {self.how:>21}: {self.rate:8.0f} tokens/s ({self.rate / first.rate:.1f} x), "
                f"padding {self.padding_share:.0%}, mean loss {statistics.fmean(self.losses):.4f} "
                f"(at most {apart:.1e} apart in a step)")


def world_model_training(settings) -> list[TrainingPass]:
    """First the yardstick, then ours, in steps of ``batch_size`` rows of similar length."""
    import torch

    from itp.pretrained import load_tokenizer
    from itp.training.examples import IGNORED, encode
    from itp.training.text_task import Collator, TextTask
    from itp.training.trainer import SimilarLengths
    from itp.transitions import read_transitions
    from world_model.base_tuning.finetune import WorldModelSettings, examples_for

    own = WorldModelSettings(model_path=settings.wm_model, data_path="", out_dir="", lora_dropout=0.0,
                             max_seq_len=settings.cutoff)
    tokenizer = load_tokenizer(own.model_path)
    transitions = read_transitions(settings.expert_jsonl)
    transitions = [transitions[i * len(transitions) // settings.train_rows] for i in range(settings.train_rows)]
    rows = encode(examples_for(own, tokenizer, transitions), tokenizer, own.max_seq_len).rows
    order = list(SimilarLengths([len(row["input_ids"]) for row in rows], settings.batch_size, settings.seed, lambda: 0))
    steps = [[rows[i] for i in order[s:s + settings.batch_size]] for s in range(0, len(order), settings.batch_size)]
    task, pad = TextTask(own, []), tokenizer.pad_token_id or 0
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.dtype]

    def padded(lists: Sequence[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([[*ids, *[fill] * (settings.cutoff - len(ids))] for ids in lists], device=settings.device)

    def to_the_cutoff(model, batch) -> tuple[torch.Tensor, int]:
        ids = padded([row["input_ids"] for row in batch], pad)
        out = model(input_ids=ids, attention_mask=padded([[1] * len(row["input_ids"]) for row in batch], 0),
                    labels=padded([row["labels"] for row in batch], IGNORED), use_cache=False)
        return out.loss, ids.numel()

    def as_the_trainer(model, batch) -> tuple[torch.Tensor, int]:
        made = {name: tensor.to(settings.device) for name, tensor in Collator(pad)(batch).items()}
        return task.forward(model, made)["loss"], made["input_ids"].numel()

    def run(how: str, loss_of: Callable) -> TrainingPass:
        torch.manual_seed(settings.seed)
        model = task.load(tokenizer, dtype).to(settings.device).train()
        loss_of(model, steps[0])  # warm
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        losses, slots, start = [], 0, time.monotonic()
        for batch in steps:
            loss, width = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            slots += width
        seconds = time.monotonic() - start
        tokens = sum(len(row["input_ids"]) for row in rows)
        return TrainingPass(how, seconds, tokens, 1 - tokens / slots, losses)

    return [run("padded to the cutoff", to_the_cutoff), run("by length", as_the_trainer)]
