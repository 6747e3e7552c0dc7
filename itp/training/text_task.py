"""What a fine-tuning run learns: text, of which a part is supervised (a :class:`itp.training.task.Task`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from itp.agent.policy_with_heads import additive_mask, causal_lm_of, logits_only_at
from itp.model_card import ModelCard
from itp.pretrained import loading, remote_code
from itp.training import token_tree
from itp.training.examples import IGNORED, Encoding, Example, TrainingRow, encode
from itp.training.models import load_base, load_plain_base, lora_config, merge_adapter, save_whole
from itp.training.packing import pack
from itp.training.settings import FinetuneSettings, PackingFlags, trained_card
from itp.training.task import TrainedModule
from itp.training.token_tree import TokenTree

if TYPE_CHECKING:
    from itp.agent.policy_with_heads import PolicyWithHeads


class TextTask:
    """Text, of which a part is supervised.  Stage 2 of ITP-R is a subclass."""

    auto: Any = AutoModelForCausalLM
    """The class of transformers that loads the model."""

    def __init__(self, settings: FinetuneSettings, examples: Sequence[Example]) -> None:
        self.settings, self.examples = settings, examples

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> Encoding:
        settings = self.settings
        encoding = encode(self.examples, tokenizer, settings.max_seq_len)
        if not isinstance(settings, PackingFlags) or settings.steps_per_sequence == 1:
            return encoding
        return pack(encoding, settings.steps_per_sequence, settings.max_packed_len or settings.max_seq_len,
                    branches=self._may_branch())

    def _may_branch(self) -> bool:
        """Whether the model computes a branching row as a row for each example.

        Flash attention knows no mask of ancestors, and such a mask takes the place of a sliding window's.
        """
        if self.settings.attn_implementation == "flash_attention_2":
            return False
        path = self.settings.model_path
        with loading(path, "not a causal language model"):
            config = AutoConfig.from_pretrained(path, **remote_code())
        window = vars(config.get_text_config()).get("sliding_window")
        return not window or self.settings.max_seq_len <= window

    def load(self, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> torch.nn.Module:
        model = load_base(self.settings, dtype, self.auto)
        if not self.settings.lora_r:
            return model
        return peft.get_peft_model(model, lora_config(self.settings, model, self.settings.lora_targets))

    def collator(self, pad_id: int, multiple: int = 1) -> Collator:
        return Collator(pad_id, multiple)

    def items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Supervised tokens."""
        return torch.tensor(len(batch["target_ids"]))

    def forward(self, model: torch.nn.Module, batch: dict[str, torch.Tensor],
                items: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """``sums``: of the negative log-likelihood, and of what it is a mean over."""
        targets = batch["target_ids"]
        with logits_only_at(model, batch["target_pos"]):
            logits = model(input_ids=batch["input_ids"], use_cache=False, **_seen(model, batch)).logits[0]  # (M, V)
        nll = functional.cross_entropy(logits.float(), targets, reduction="sum")
        return {"loss": nll / (len(targets) if items is None else items),
                "sums": torch.stack([nll.detach(), nll.new_tensor(len(targets))])}

    def eval_metrics(self, sums: list[float]) -> dict[str, float]:
        """The mean over all supervised tokens, whatever the batches."""
        return {"loss": sums[0] / sums[1]}

    def write_checkpoint(self, model: torch.nn.Module, folder: Path, state: dict[str, torch.Tensor] | None) -> bool:
        return False

    def read_checkpoint(self, model: torch.nn.Module, folder: Path) -> bool:
        return False

    def save_adapter(self, trained: TrainedModule) -> None:
        trained.save_model(self.settings.out_dir)

    def save_complete(self, trained: TrainedModule, dtype: torch.dtype) -> None:
        options = {} if (state := trained.gathered_state()) is None else {"state_dict": state}
        if trained.args.should_save:
            save_whole(trained.model if options else trained.model.to(dtype), self.beside(trained.tokenizer),
                       self.settings.merged_path, self.card(trained.tokenizer), **options)

    def save_merged(self, tokenizer: PreTrainedTokenizerBase) -> None:
        save_whole(self.merged(tokenizer), self.beside(tokenizer), self.settings.merged_path, self.card(tokenizer))

    def beside(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """What is saved beside the weights: the tokenizer, or a processor that has it."""
        return tokenizer

    def card(self, tokenizer: PreTrainedTokenizerBase) -> ModelCard:
        """How the trained model is to be prompted."""
        return trained_card(self.settings, tokenizer)

    def merged(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | PolicyWithHeads:
        return merge_adapter(load_plain_base(self.settings, self.auto), self.settings.out_dir)

    def trained(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | PolicyWithHeads:
        """The model that was trained, as it was saved."""
        if self.settings.merged_path.is_dir():
            return self.auto.from_pretrained(self.settings.merged_path, **remote_code())
        return self.merged(tokenizer)

    def measure(self, tokenizer: PreTrainedTokenizerBase, eval_rows: list[TrainingRow],
                device: torch.device) -> dict[str, Any]:
        return {}


def _seen(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
    """Which tokens each token sees, where it isn't all on its left."""
    if "attention_mask" not in batch:
        return {}
    mask = additive_mask(batch["attention_mask"], causal_lm_of(model).dtype)
    return {"attention_mask": mask, "position_ids": batch["position_ids"]}


class Collator:
    """Rows of different length to one batch, padded on the right; counts tokens and padding.

    Rows have ``labels``, or they are packed (:mod:`itp.training.packing`).  Without a branching row there is no
    attention mask: a causal LM sees nothing on the right, and without a mask its attention is a fused one.  What is
    supervised comes as ``target_pos`` (M, 2), the rows and columns that predict it, and ``target_ids`` (M,), so that
    where the pad token is also the stop token, the stop token stays supervised.
    """

    def __init__(self, pad_id: int, multiple: int = 1):
        self.pad_id, self.multiple = pad_id, multiple
        self.tokens = self.slots = 0

    def __call__(self, rows: list[TrainingRow]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        width = -(-longest // self.multiple) * self.multiple
        batch = self._inputs(rows, width)
        targets = torch.tensor([(i, node, token) for i, row in enumerate(rows) for node, token in _targets(row)])
        self.tokens += sum(len(row["input_ids"]) for row in rows)
        self.slots += len(rows) * width
        return {**batch, "target_pos": targets[:, :2], "target_ids": targets[:, 2]}

    def _inputs(self, rows: list[TrainingRow], width: int) -> dict[str, torch.Tensor]:
        if any("tree" in row for row in rows):
            trees = [row.get("tree") or TokenTree.of(row["input_ids"]) for row in rows]
            ids, mask, positions = token_tree.batch(trees, self.pad_id, width=width)
            return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        ids = torch.full((len(rows), width), self.pad_id)
        for i, row in enumerate(rows):
            ids[i, :len(row["input_ids"])] = torch.tensor(row["input_ids"])
        return {"input_ids": ids}


def _targets(row: TrainingRow) -> Iterable[tuple[int, int]]:
    """Pairs of a token's place and the id that is to follow it."""
    if "targets" in row:
        return row["targets"]
    return ((i - 1, label) for i, label in enumerate(row["labels"]) if i and label != IGNORED)
