"""What a fine-tuning run learns, as the Trainer sees it: rows, a module, batches, losses, folders.

:mod:`itp.training.text_task` learns text; :mod:`itp.training.itp_r.warm_up_task` learns stage 2 of ITP-R.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from itp.training.examples import Encoding, TrainingRow
from itp.training.settings import FinetuneSettings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from itp.agent.policy_with_heads import PolicyWithHeads


class TrainedModule(Protocol):
    """What a task is given to save: :class:`itp.training.trainer.FineTuner` after its last step."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    args: TrainingArguments

    def gathered_state(self) -> dict[str, torch.Tensor] | None:
        """Under ZeRO-3 all weights, which no process holds; every process takes part.  Else None."""

    def save_model(self, folder: str) -> None:
        """Write the model, or its adapter."""


class Task(Protocol):
    """It makes rows of the data, a module of the model, batches of the rows, and the losses of the batches."""

    settings: FinetuneSettings

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> Encoding:
        """All rows, in tokens."""

    def load(self, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> torch.nn.Module:
        """The module to train: with LoRA a frozen base in ``dtype`` and float32 adapters, else float32."""

    def collator(self, pad_id: int, multiple: int = 1) -> Any:
        """Makes a batch of rows, of a width that is a multiple of ``multiple``; counts ``tokens`` and ``slots``."""

    def items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the losses of a batch are means over."""

    def forward(self, model: torch.nn.Module, batch: dict[str, torch.Tensor],
                items: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """``loss``, and ``sums`` (S,): those of all evaluation batches make :meth:`eval_metrics`.

        ``model``: the module of :meth:`load`, in whatever wrapping.  ``items``: what the loss is divided by, those
        of all batches of an optimizer step on all processes; None: those of this batch.
        """

    def eval_metrics(self, sums: list[float]) -> dict[str, float]:
        """Metrics of the evaluation split, ``loss`` among them."""

    def write_checkpoint(self, model: torch.nn.Module, folder: Path, state: dict[str, torch.Tensor] | None) -> bool:
        """Write the weights to go on with.  False: the Trainer does it, and reads them."""

    def read_checkpoint(self, model: torch.nn.Module, folder: Path) -> bool:
        """Read what :meth:`write_checkpoint` wrote."""

    def save_adapter(self, trained: TrainedModule) -> None:
        """Save LoRA's adapter in ``out_dir``."""

    def save_complete(self, trained: TrainedModule, dtype: torch.dtype) -> None:
        """Save all weights in ``dtype`` as a model folder (full fine-tuning)."""

    def save_merged(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Save base and adapter, as they lie in ``out_dir``, as a model folder of plain weights."""

    def measure(self, tokenizer: PreTrainedTokenizerBase, eval_rows: list[TrainingRow],
                device: torch.device) -> dict[str, Any]:
        """More metrics of the trained model, in the first process."""

    def merged(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | PolicyWithHeads:
        """Base and adapter, as they lie in ``out_dir``, as plain weights."""
