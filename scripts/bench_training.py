"""The part wm_training of ``bench.py``: the same transitions padded to a cutoff, as the trainer pads rows, and packed.

The yardstick is what many scripts do: every row padded to the cutoff, an attention mask, logits everywhere, the
model's own loss.  All train a fresh LoRA adapter with AdamW from the same start.  The first two take the same steps, so
that their losses must agree; the packed rows hold the transitions of an episode each, so that only the loss before the
first step can be compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass
class TrainingPass:
    how: str
    seconds: float
    transitions: int
    tokens: int
    """Real ones, without padding."""
    padding_share: float
    at_start: float
    """The mean loss of all targets before the first step."""
    losses: list[float]

    @property
    def rate(self) -> float:
        """Transitions per second."""
        return self.transitions / self.seconds

    def describe(self, first: TrainingPass) -> str:
        same_steps = len(self.losses) == len(first.losses)
        apart = max(abs(a - b) for a, b in zip(self.losses, first.losses, strict=False)) if same_steps else None
        steps = "" if apart is None else f", at most {apart:.1e} apart in a step"
        return (f"wm_training {self.how:>21}: {self.rate:8.1f} transitions/s ({self.rate / first.rate:.1f} x), "
                f"{self.tokens} tokens, padding {self.padding_share:.0%}, loss at the start {self.at_start:.5f}{steps}")


def world_model_training(settings) -> list[TrainingPass]:
    """The yardstick, then ours row by row, both in steps of ``batch_size`` rows of similar length, then packed."""
    import torch

    from itp.pretrained import load_tokenizer
    from itp.training.examples import IGNORED, encode
    from itp.training.packing import pack
    from itp.training.text_task import Collator, TextTask
    from itp.training.trainer import SimilarLengths
    from itp.transitions import read_transitions
    from world_model.base_tuning.examples import WorldModelSettings, examples_for, sample

    own = WorldModelSettings(model_path=settings.wm_model, data_path="", out_dir="", lora_dropout=0.0,
                             max_seq_len=settings.cutoff, max_rows=settings.train_rows, seed=settings.seed)
    tokenizer = load_tokenizer(own.model_path)
    transitions = sample(own, read_transitions(settings.expert_jsonl))
    rows = encode(examples_for(own, tokenizer, transitions), tokenizer, own.max_seq_len)
    task, pad = TextTask(own, []), tokenizer.pad_token_id or 0
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.dtype]

    def padded(lists: Sequence[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([[*ids, *[fill] * (settings.cutoff - len(ids))] for ids in lists], device=settings.device)

    def to_the_cutoff(model, batch) -> tuple[torch.Tensor, int]:
        ids = padded([row["input_ids"] for row in batch], pad)
        out = model(input_ids=ids, attention_mask=padded([[1] * len(row["input_ids"]) for row in batch], 0),
                    labels=padded([row["labels"] for row in batch], IGNORED), use_cache=False)
        return out.loss, ids.numel()

    def collated(batch) -> dict[str, torch.Tensor]:
        return {name: tensor.to(settings.device) for name, tensor in Collator(pad)(batch).items()}

    def as_the_trainer(model, batch) -> tuple[torch.Tensor, int]:
        made = collated(batch)
        return task.forward(model, made)["loss"], made["input_ids"].numel()

    @torch.no_grad()
    def loss_of_all(model, steps) -> float:
        nll, targets = torch.stack([task.forward(model, collated(step))["sums"] for step in steps]).sum(0).tolist()
        return nll / targets

    def run(how: str, rows, loss_of: Callable) -> TrainingPass:
        lengths = [len(row["input_ids"]) for row in rows]
        order = list(SimilarLengths(lengths, settings.batch_size, settings.seed, lambda: 0))
        steps = [[rows[i] for i in order[s:s + settings.batch_size]] for s in range(0, len(order), settings.batch_size)]
        torch.manual_seed(settings.seed)
        model = task.load(tokenizer, dtype).to(settings.device).train()
        at_start = loss_of_all(model, steps)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        losses, slots, start = [], 0, time.monotonic()
        for batch in steps:
            loss, width = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            slots += width
        seconds, tokens = time.monotonic() - start, sum(lengths)
        return TrainingPass(how, seconds, len(transitions), tokens, 1 - tokens / slots, at_start, losses)

    packed = pack(rows, 0, own.max_seq_len)
    return [run("padded to the cutoff", rows.rows, to_the_cutoff), run("a row each", rows.rows, as_the_trainer),
            run("an episode a sequence", packed.rows, as_the_trainer)]
