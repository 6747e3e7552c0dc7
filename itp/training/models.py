"""Models for supervised fine-tuning: loading a base, LoRA, merging, saving a whole folder."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from transformers import (
    AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin,
)

from itp.distributed import is_first_process
from itp.errors import UserError
from itp.files import writing
from itp.model_card import ModelCard
from itp.pretrained import loading, remote_code
from itp.training.settings import FinetuneSettings, UpdateFlags

if TYPE_CHECKING:
    from itp.agent.policy_with_heads import PolicyWithHeads

log = logging.getLogger(__name__)


def choose_dtype(settings: UpdateFlags) -> torch.dtype:
    """What to compute in.  Half precision needs CUDA: float16 has no loss scaling elsewhere, and without its own
    instructions a CPU takes several times as long in bfloat16 as in float32.
    """
    name = "fp16" if settings.fp16 else "bf16" if settings.bf16 else ""
    if name and not torch.cuda.is_available():
        if is_first_process():
            log.warning("%s training needs a CUDA device and there is none: training in float32 instead", name)
        return torch.float32
    if name == "bf16" and not torch.cuda.is_bf16_supported():
        raise UserError("this GPU has no bfloat16; train with --fp16")
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "": torch.float32}[name]


def load_base(settings: FinetuneSettings, dtype: torch.dtype, auto: Any = AutoModelForCausalLM,
              **options: Any) -> PreTrainedModel:
    """The model to start from: the frozen base of LoRA in ``dtype``, what is trained whole in float32.

    ``auto``: the class of transformers that loads it.
    """
    options |= {"dtype": dtype if settings.lora_r else torch.float32,
                "attn_implementation": settings.attn_implementation}
    if settings.q_lora:
        options |= _four_bits(dtype, int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else "cpu")
    with loading(settings.model_path, "no model could be loaded"):
        model = auto.from_pretrained(settings.model_path, **options, **remote_code())
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.q_lora:
        model = peft.prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=settings.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False})
    if settings.frozen:
        _freeze(model, settings.frozen.split(","))
    return model


def _freeze(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Raises UserError for a module that ``model`` doesn't have."""
    for wanted in names:
        found = [module for name, module in model.named_modules() if name and name.rpartition(".")[2] == wanted]
        if not found:
            there = sorted({name.split(".")[-2] for name, _ in model.named_parameters()})
            raise UserError(f"--frozen {wanted!r}: the model has no such module; it has {', '.join(there)}")
        for module in found:
            module.requires_grad_(False)


def lora_config(settings: UpdateFlags, model: PreTrainedModel, targets: str = "all-linear") -> peft.LoraConfig:
    """LoRA in the modules ``targets`` of ``model``.  Raises UserError for one that it doesn't have."""
    if targets != "all-linear":
        there = {name.rpartition(".")[2] for name, module in model.named_modules()
                 if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()}
        if unknown := sorted({*targets.split(",")} - there):
            raise UserError(f"--lora_targets {','.join(unknown)}: {model.name_or_path} has no such linear layers; "
                            f"it has {', '.join(sorted(there))}")
    return peft.LoraConfig(
        r=settings.lora_r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout,
        target_modules=targets if targets == "all-linear" else targets.split(","), task_type="CAUSAL_LM")


def _four_bits(dtype: torch.dtype, device: int | str) -> dict[str, Any]:
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": four, "device_map": {"": device}}


def load_plain_base(settings: FinetuneSettings, auto: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """The weights that an adapter was trained on, on the CPU, to merge it with: of a 4-bit base what its 4 bits say.

    Merged with the original weights instead, the model would not be the one that was trained.
    """
    if not settings.q_lora:
        return auto.from_pretrained(settings.model_path, **remote_code())
    four = _four_bits(torch.float32, "cpu")
    return auto.from_pretrained(settings.model_path, **four, **remote_code()).dequantize()


def merge_adapter(model: PreTrainedModel, adapter: str) -> PreTrainedModel:
    return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)


def save_whole(model: PreTrainedModel | PolicyWithHeads, tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
               folder: Path, card: ModelCard, **options: Any) -> None:
    """Write a model folder with its tokenizer, or with the processor that has one, and its card.

    It appears whole: written beside its place, then renamed.
    """
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    with writing(folder, unfinished=beside):
        model.save_pretrained(beside, **options)
        tokenizer.save_pretrained(beside)
        card.write(beside)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(beside, folder)
