"""What a fine-tuning run learns: text, of which a part is supervised; stage 2 of ITP-R is a subclass.

:func:`itp.training.finetune.train` runs a task; the Trainer is :class:`itp.training.hf_trainer.FineTuner`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from itp.lm.chat import card_of
from itp.policy.policy_with_heads import logits_only_at
from itp.runtime import remote_code
from itp.training.examples import Encoding, Example, Row, encode
from itp.training.finetune import FinetuneSettings, trained_form
from itp.training.hf_trainer import (
    Collator, FineTuner, load_base, load_plain_base, lora_config, merge_adapter, save_whole,
)

if TYPE_CHECKING:
    from itp.policy.policy_with_heads import PolicyWithHeads


class TextTask:
    """What a run learns: here text, of which a part is supervised.  A subclass may learn something else.

    It makes rows of the data, a module of the model, batches of the rows, and the losses of the batches.
    """

    def __init__(self, settings: FinetuneSettings, examples: Sequence[Example],
                 measure: Callable[[PreTrainedModel, PreTrainedTokenizerBase, list[Row]], dict] | None = None) -> None:
        self.settings, self.examples, self._measure = settings, examples, measure

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> Encoding:
        return encode(self.examples, tokenizer, self.settings.max_seq_len)

    def load(self, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> torch.nn.Module:
        """The module to train: with LoRA a frozen base in ``dtype`` and float32 adapters, else float32."""
        model = load_base(self.settings, dtype)
        return peft.get_peft_model(model, lora_config(self.settings, model)) if self.settings.lora_r else model

    def collator(self, pad_id: int, multiple: int = 1) -> Collator:
        return Collator(pad_id, multiple)

    def items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the losses of a batch are means over: here supervised tokens."""
        return torch.tensor(len(batch["target_ids"]))

    def forward(self, model: torch.nn.Module, batch: dict[str, torch.Tensor],
                items: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """``loss``, and ``sums`` (S,): those of all held-out batches make :meth:`held_out`.

        ``model``: the module of :meth:`load`, in whatever wrapping.  ``items``: what the loss is divided by, those
        of all batches of an optimizer step on all processes; None: those of this batch.
        """
        targets = batch["target_ids"]
        with logits_only_at(model, batch["target_pos"]):
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits[0]  # (M, V)
        nll = functional.cross_entropy(logits.float(), targets, reduction="sum")
        return {"loss": nll / (len(targets) if items is None else items),
                "sums": torch.stack([nll.detach(), nll.new_tensor(len(targets))])}

    def held_out(self, sums: list[float]) -> dict[str, float]:
        """Held-out metrics, ``loss`` among them: the mean over all supervised tokens, whatever the batches."""
        return {"loss": sums[0] / sums[1]}

    def write_checkpoint(self, model: torch.nn.Module, folder: Path, state: dict[str, torch.Tensor] | None) -> bool:
        """Write the weights to go on with.  False: the Trainer does it, and reads them."""
        return False

    def read_checkpoint(self, model: torch.nn.Module, folder: Path) -> bool:
        """Read what :meth:`write_checkpoint` wrote."""
        return False

    def save_adapter(self, trainer: FineTuner) -> None:
        trainer.save_model(self.settings.out_dir)

    def save_complete(self, trainer: FineTuner, dtype: torch.dtype) -> None:
        """Save all weights in ``dtype`` as a plain model folder (full fine-tuning)."""
        options = {} if (state := trainer.gathered_state()) is None else {"state_dict": state}
        if trainer.args.should_save:
            save_whole(trainer.model if options else trainer.model.to(dtype), trainer.tokenizer,
                       self.settings.merged_path, card_of(trained_form(self.settings, trainer.tokenizer)), **options)

    def merged(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | PolicyWithHeads:
        """Base and adapter, as they lie in ``out_dir``, as plain weights."""
        return merge_adapter(load_plain_base(self.settings), self.settings.out_dir)

    def measure(self, tokenizer: PreTrainedTokenizerBase, held_rows: list[Row], device: torch.device) -> dict[str, Any]:
        """More metrics of the trained model, in the first process."""
        if self._measure is None:
            return {}
        merged = self.settings.merged_path
        model = (AutoModelForCausalLM.from_pretrained(merged, **remote_code()) if merged.is_dir()
                 else self.merged(tokenizer))
        return self._measure(model.to(device).eval(), tokenizer, held_rows)
