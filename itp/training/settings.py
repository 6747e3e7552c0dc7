"""The settings of supervised fine-tuning, and what is refused before anything slow starts."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from typing import TYPE_CHECKING

from itp.chat_template import template_of
from itp.config import Topic, flag
from itp.errors import UserError
from itp.model_card import ModelCard
from itp.pretrained import check_model_path
from itp.text.prompt_format import PLAIN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRACKERS = ("none", "tensorboard", "wandb", "trackio")
ATTENTION = ("eager", "sdpa", "flash_attention_2")


@dataclass
class UpdateFlags:
    """Which weights are trained, and in which precision: for supervised fine-tuning and for RL."""

    lora_r: int = flag(8, at_least=0, help="rank of LoRA; 0 trains every weight")
    lora_alpha: int = flag(16, help="LoRA's scale is lora_alpha / lora_r")
    lora_dropout: float = flag(0.05, at_least=0, below=1, help="dropout in front of LoRA, in training only")
    fp16: bool = flag(False, help="train in float16 with loss scaling (needs a GPU, else float32)")
    bf16: bool = flag(False, help="train in bfloat16 (needs a GPU, else float32)")


@dataclass
class FinetuneSettings(UpdateFlags):
    """Supervised fine-tuning: the model, and how it learns."""

    model_path: str = flag(help="model to start from: a folder, or a name on the Hugging Face hub",
                           affects_result=False, holds="path")
    out_dir: str = flag(help="folder for checkpoints, adapter, metrics; the same command again resumes in it",
                        affects_result=False, holds="path")
    epochs: float = flag(3.0, above=0, help="passes over the training rows")
    batch_size: int = flag(1, at_least=1, help="examples per device and forward pass")
    grad_accum: int = flag(16, at_least=1, help="forward passes per optimizer step")
    lr: float = flag(2e-5, above=0, help="peak learning rate")
    optimizer: str = flag("adamw", choices=("adamw", "muon"),
                          help="muon: for the matrices of the layers, adamw for the rest; learns faster from nothing")
    wd: float = flag(0.0, at_least=0, help="weight decay")
    adam_beta2: float = flag(0.999, help="AdamW's second beta; .95 suits short runs from scratch")
    warmup_ratio: float = flag(0.03, at_least=0, below=1, help="share of the steps over which the learning rate rises")
    lr_scheduler_type: str = flag("cosine", choices=("constant", "cosine"), help="learning rate after the warm-up")
    max_grad_norm: float = flag(1.0, at_least=0, help="gradients are clipped to this norm")
    max_seq_len: int = flag(1536, at_least=1,
                            help="tokens per example; longer ones lose context on the left, never the target")
    gradient_checkpointing: bool = flag(False, help="recompute activations: less memory, a third more time")
    attn_implementation: str = flag("sdpa", choices=ATTENTION,
                                    help="how attention is computed, which changes time and memory; flash_attention_2 "
                                         "needs CUDA, the package flash_attn, and bf16 or fp16; it packs no chat "
                                         "turns",
                                    affects_result=False)
    weights: ClassVar[Topic] = Topic("Weights that are trained, and what becomes of them")
    lora_targets: str = flag("all-linear", help="modules with LoRA: all-linear, or names separated by commas")
    frozen: str = flag("", help="with --lora_r 0: modules that stay as they are, separated by commas (embed_tokens)")
    q_lora: bool = flag(False, help="keep the frozen base model in 4 bits, NF4 (needs bitsandbytes)")
    merge: bool = flag(True, help="also write the complete model to merged_dir", affects_result=False)
    merged_dir: str = flag("", help="where; empty: OUT_DIR/merged_full", affects_result=False, holds="path")
    prompt_form: str = flag("auto", choices=("auto", "plain", "chat"),
                            help="prompt format: plain text, or the tokenizer's chat template; auto: the format of the "
                                 "starting model, else plain")
    progress: ClassVar[Topic] = Topic("Launchers, checkpoints, held-out rows and logs")
    deepspeed: str = flag("", help="DeepSpeed configuration; start the program with the deepspeed launcher")
    save_every_steps: int = flag(0, at_least=0, help="optimizer steps between checkpoints; 0: one after every epoch",
                                 affects_result=False)
    save_total_limit: int = flag(3, at_least=1, help="how many checkpoints are kept", affects_result=False)
    logging_steps: int = flag(10, at_least=1, help="optimizer steps between progress lines", affects_result=False)
    eval_share: float = flag(0.05, at_least=0, below=1,
                             help="share of the examples that is held out, whole episodes where known")
    eval_every_epoch: bool = flag(True, help="held-out loss after every epoch, not only at the end",
                                  affects_result=False)
    report_to: str = flag("none", choices=TRACKERS, help="where metrics go besides the log", affects_result=False)
    push_to_hub: str = flag("", help="upload the complete model to this repository (user/name) of the hub, private",
                            affects_result=False)
    seed: int = flag(42, help="seed of the split, the order, LoRA's start and dropout")

    @property
    def merged_path(self) -> Path:
        return Path(self.merged_dir) if self.merged_dir else Path(self.out_dir) / "merged_full"


@dataclass
class PackingFlags:
    """How many examples of an episode share a training sequence (:mod:`itp.training.packing`)."""

    steps_per_sequence: int = flag(1, at_least=0,
                                   help="steps of one episode in a sequence, which share their common beginning; "
                                        "0: as many as fit into max_packed_len", before=1)
    max_packed_len: int = flag(0, at_least=0, help="tokens of a sequence of several steps (0: max_seq_len)")


def trained_card(settings: FinetuneSettings, tokenizer: PreTrainedTokenizerBase) -> ModelCard:
    """The card of this run's model: the template around its prompts, and the budget that they are cut to."""
    before = ModelCard.read(settings.model_path)
    if settings.prompt_form == "auto":
        template = before.template if before else PLAIN
    else:
        template = template_of(tokenizer) if settings.prompt_form == "chat" else PLAIN
    return ModelCard(template=template, max_seq_len=settings.max_seq_len, warning=before.warning if before else "")


def check_settings(settings: FinetuneSettings) -> None:
    """Raises UserError for settings that can't be carried out, before anything slow is started."""
    check_model_path(settings.model_path)
    check_options(settings)


def check_options(settings: FinetuneSettings) -> None:
    """The same for all but the model, which may have to be made first."""
    check_precision(settings)
    if settings.attn_implementation == "flash_attention_2":
        _check_flash_attention(settings)
    if settings.deepspeed and not Path(settings.deepspeed).is_file():
        raise UserError(f"--deepspeed {settings.deepspeed}: no such file")
    if settings.optimizer == "muon" and settings.deepspeed:
        raise UserError("--optimizer muon isn't for DeepSpeed, whose configuration has its own; drop one of them")
    if settings.frozen and settings.lora_r:
        raise UserError("--frozen is for training every weight (--lora_r 0); LoRA trains none of the base model's")
    if settings.q_lora and not settings.lora_r:
        raise UserError("--q_lora trains an adapter, which --lora_r 0 excludes; set --lora_r")
    if settings.q_lora and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--q_lora needs bitsandbytes, which isn't installed; pip install bitsandbytes, or Q_LORA=false")
    check_tracker(settings.report_to)
    if settings.push_to_hub and not settings.merge and settings.lora_r:
        raise UserError("--push_to_hub uploads the merged model, which --merge false leaves out; drop one of them")


def check_precision(settings: UpdateFlags) -> None:
    """Raises UserError for two precisions."""
    if settings.fp16 and settings.bf16:
        raise UserError("--fp16 and --bf16 exclude each other; give one")


def check_tracker(name: str) -> None:
    """Raises UserError for one of TRACKERS that isn't installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(f"--report_to {name}: it isn't installed; pip install {name}")


def _check_flash_attention(settings: FinetuneSettings) -> None:
    wanted, instead = "--attn_implementation flash_attention_2", "or take sdpa"
    if not (settings.bf16 or settings.fp16):
        raise UserError(f"{wanted} computes in half precision only; add --bf16, {instead}")
    if importlib.util.find_spec("flash_attn") is None:
        raise UserError(f"{wanted} needs the package flash_attn, which isn't installed; pip install flash-attn "
                        f"--no-build-isolation, {instead}")
    import torch

    if not torch.cuda.is_available():
        raise UserError(f"{wanted} needs a CUDA device and there is none; {instead.removeprefix('or ')}")
