r"""The one fine-tuning core: LoRA or full training of a causal LM on text of which a part is supervised.

The world model (eq. 1 of the paper, loss on s' only) and the base policy π_θ0 (loss on its actions)
are this program with different examples.  A program hands :func:`finetune` its settings and a list of
:class:`Example` (:mod:`itp.training.examples`); this module trains (:mod:`itp.training.hf_trainer`), saves, merges,
and writes ``metrics.json`` last: a folder that has one is finished.  What is learned beyond text is another task
for the same run (:func:`train`): stage 2 with its heads.

``out_dir`` then holds ``config.json`` (the claim of :func:`itp.runtime.claim_output`), ``checkpoint-N/``,
``trainer_state.json``, the tokenizer, with LoRA ``adapter_config.json`` and ``adapter_model.safetensors``,
and in ``merged_full`` a plain model folder.  The same command again goes on from the newest checkpoint
that is whole.

torch is imported inside functions, so that a command line answers ``--help`` and refuses unusable
input at once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itp.config import flag
from itp.lm.chat import card_of, trained_turns, turns_of
from itp.runtime import (
    UserError, check_model_path, claim_output, load_tokenizer, model_card, model_fingerprint, read_json, write_json,
)
from itp.text.prompts import PLAIN, Turns
from itp.training import hub
from itp.training.examples import Example, Row, hold_out, report_counts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from itp.training.text_task import TextTask

log = logging.getLogger("itp.finetune")
TRACKERS = ("none", "tensorboard", "wandb", "trackio")
ATTENTION = ("eager", "sdpa", "flash_attention_2")


@dataclass
class FinetuneSettings:
    model_path: str = flag(help="model to start from: a folder, or a name on the Hugging Face hub")
    out_dir: str = flag(help="folder for checkpoints, adapter, metrics; the same command again resumes in it")
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
    fp16: bool = flag(False, help="train in float16 with loss scaling (needs a GPU, else float32)")
    bf16: bool = flag(False, help="train in bfloat16 (needs a GPU, else float32)")
    gradient_checkpointing: bool = flag(False, help="recompute activations: less memory, a third more time")
    attn_implementation: str = flag("sdpa", choices=ATTENTION,
                                    help="how attention is computed, which changes time and memory only; "
                                         "flash_attention_2 needs CUDA, the package flash_attn, and bf16 or fp16")
    lora_r: int = flag(8, at_least=0, help="rank of LoRA; 0 trains every weight")
    lora_alpha: int = flag(16, help="LoRA's scale is lora_alpha / lora_r")
    lora_dropout: float = flag(0.05, at_least=0, below=1, help="dropout in front of LoRA")
    lora_targets: str = flag("all-linear", help="modules with LoRA: all-linear, or names separated by commas")
    frozen: str = flag("", help="with --lora_r 0: modules that stay as they are, separated by commas (embed_tokens)")
    q_lora: bool = flag(False, help="keep the frozen base model in 4 bits, NF4 (needs bitsandbytes)")
    merge: bool = flag(True, help="also write the complete model to merged_dir")
    merged_dir: str = flag("", help="where; empty: OUT_DIR/merged_full")
    prompt_form: str = flag("auto", choices=("auto", "plain", "chat"),
                            help="what is learned is asked for as plain text or in the turns of the tokenizer's chat "
                                 "template, now and at inference; auto: as the model was trained here, else plain")
    deepspeed: str = flag("", help="DeepSpeed configuration; start the program with the deepspeed launcher")
    save_every_steps: int = flag(0, at_least=0, help="optimizer steps between checkpoints; 0: one after every epoch")
    save_total_limit: int = flag(3, at_least=1, help="how many checkpoints are kept")
    logging_steps: int = flag(10, at_least=1, help="optimizer steps between progress lines")
    eval_share: float = flag(0.05, at_least=0, below=1,
                             help="share of the examples that is held out, whole episodes where known")
    eval_every_epoch: bool = flag(True, help="held-out loss after every epoch, not only at the end")
    report_to: str = flag("none", choices=TRACKERS, help="where metrics go besides the log")
    push_to_hub: str = flag("", help="upload the complete model to this repository (user/name) of the hub, private")
    seed: int = flag(42, help="seed of the split, the order, LoRA's start and dropout")

    @property
    def merged_path(self) -> Path:
        return Path(self.merged_dir) if self.merged_dir else Path(self.out_dir) / "merged_full"


def trained_form(settings: FinetuneSettings, tokenizer: PreTrainedTokenizerBase) -> Turns:
    """What stands around the prompts of this run; its models carry it with them."""
    if settings.prompt_form == "auto":
        return trained_turns(model_card(settings.model_path))
    return turns_of(tokenizer) if settings.prompt_form == "chat" else PLAIN


NOT_THE_RESULT = ("out_dir", "merge", "merged_dir", "save_every_steps", "save_total_limit", "logging_steps",
                  "eval_every_epoch", "report_to", "push_to_hub", "attn_implementation")
"""Settings that may change between a run and its resumption."""


# ---------------------------------------------------------------- before torch: claims and checks


def is_first_process() -> bool:
    """Whether this is the process that writes; launchers number processes by RANK."""
    return int(os.environ.get("RANK", 0)) == 0


def check_settings(settings: FinetuneSettings) -> None:
    """Raises UserError for settings that can't be carried out, before anything slow is started."""
    check_model_path(settings.model_path)
    check_options(settings)


def check_options(settings: FinetuneSettings) -> None:
    """The same for all but the model, which may have to be made first."""
    if settings.fp16 and settings.bf16:
        raise UserError("--fp16 and --bf16 exclude each other; give one")
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


def claim_run(settings: FinetuneSettings, data_paths: Sequence[str | Path], ignore: tuple[str, ...] = ()) -> bool:
    """Make ``out_dir`` this run's, or check that it is.  True: the run is already finished (and on the hub, if asked).

    The data count by their content, so that an edited file isn't taken for the same run; ``ignore``
    names the program's own settings that don't matter, such as the data's path.
    """
    unclaimed = not (Path(settings.out_dir) / "config.json").exists()
    if unclaimed and settings.merged_path.is_dir() and any(settings.merged_path.iterdir()):
        raise UserError(f"{settings.merged_path} holds files that aren't this run's; choose another --merged_dir")
    # Paths may be written differently the next time; what they lead to may not differ.
    digest = hashlib.sha256(b"".join(hashlib.sha256(Path(path).read_bytes()).digest() for path in data_paths))
    config = asdict(settings) | {"data_sha256": digest.hexdigest(), "model": model_fingerprint(settings.model_path)}
    if settings.deepspeed:
        config["deepspeed"] = read_json(settings.deepspeed)
    finished = (Path(settings.out_dir) / "metrics.json").exists()
    if is_first_process():
        nothing_yet = not finished and not whole_checkpoints(settings.out_dir)
        claim_output(settings.out_dir, config, override=nothing_yet,
                     ignore=(*NOT_THE_RESULT, "model_path", "out_dir", *ignore))
    if not finished:
        return False
    if settings.merge and not settings.merged_path.exists():
        return False
    if is_first_process():
        log.info("already done: %s has metrics.json; choose another out_dir to train anew", settings.out_dir)
        metrics = read_json(Path(settings.out_dir) / "metrics.json")
        if settings.push_to_hub and settings.push_to_hub != metrics.get("pushed_to"):
            _push(settings, metrics)
            write_json(Path(settings.out_dir) / "metrics.json", metrics)
    return True


def _push(settings: FinetuneSettings, metrics: dict[str, Any]) -> None:
    """Upload the complete model and put that on record in ``metrics``."""
    hub.push(settings.merged_path, settings.push_to_hub)
    metrics["pushed_to"] = settings.push_to_hub


def whole_checkpoints(out_dir: str | Path) -> list[Path]:
    """The checkpoints that were written to their end, oldest first.

    ``complete.json`` is written after everything else and holds each file's size; a folder without
    it (the process was killed while saving) or with a file that has shrunk isn't one to resume from.
    """
    found = []
    for folder in Path(out_dir).glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if not step.isdigit():
            continue
        marker = folder / "complete.json"
        sizes = read_json(marker)["sizes"] if marker.is_file() else {"complete.json": -1}
        if all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items()):
            found.append((int(step), folder))
    return [folder for _, folder in sorted(found)]


# ---------------------------------------------------------------- the run


def finetune(settings: FinetuneSettings, examples: Sequence[Example],
             measure: Callable[[PreTrainedModel, PreTrainedTokenizerBase, list[Row]], dict[str, Any]] | None = None,
             ) -> dict[str, Any] | None:
    """:func:`train` on text.

    ``measure(trained model, tokenizer, held-out rows)`` may add metrics; it runs in the first process.
    """
    from itp.training.text_task import TextTask

    return train(settings, TextTask(settings, examples, measure))


def train(settings: FinetuneSettings, task: TextTask) -> dict[str, Any] | None:
    """Train, save, evaluate; the metrics that stand in ``metrics.json``, or None in all but the first process.

    Raises UserError where nothing can be trained on, or when the loss is no longer finite.
    """
    from transformers import set_seed

    from itp.training import hf_trainer

    hf_trainer.quiet()
    dtype = hf_trainer.choose_dtype(settings)
    tokenizer = load_tokenizer(settings.model_path)
    encoding = task.encode(tokenizer)
    if is_first_process():
        report_counts(encoding.counts, settings.max_seq_len)
    if not encoding.rows:
        raise UserError(f"nothing to train on: none of {encoding.counts['examples']} examples fits --max_seq_len "
                        f"{settings.max_seq_len} with a supervised token; raise it or mend the data")
    training, held = hold_out(encoding.groups, settings.eval_share, settings.seed)
    train_rows, held_rows = [encoding.rows[i] for i in training], [encoding.rows[i] for i in held]

    args = hf_trainer.training_arguments(settings, dtype, len(train_rows))  # before the model: ZeRO-3 looks there
    set_seed(settings.seed)
    trainer = hf_trainer.FineTuner(task, task.load(tokenizer, dtype), args, tokenizer, train_rows, held_rows)
    metrics = trainer.run(_resume_from(settings.out_dir, args.world_size))
    if settings.lora_r:
        task.save_adapter(trainer)
    else:
        task.save_complete(trainer, dtype)
    first, device = args.process_index == 0, args.device
    if first:
        trainer.state.save_to_json(str(Path(settings.out_dir) / "trainer_state.json"))
        tokenizer.save_pretrained(settings.out_dir)
    trainer.release()
    if not first:
        return None
    if settings.lora_r and settings.merge:
        # Merged from the files: under ZeRO-3 no process holds whole weights.
        shutil.rmtree(settings.merged_path, ignore_errors=True)
        card = card_of(trained_form(settings, tokenizer))
        hf_trainer.save_whole(task.merged(tokenizer), tokenizer, settings.merged_path, card)
    if held_rows:
        metrics |= task.measure(tokenizer, held_rows, device)
    metrics |= {"train_rows": len(train_rows), "held_out_rows": len(held_rows), "encoding": encoding.counts,
                "tokens_per_row": statistics.fmean(len(row["input_ids"]) for row in encoding.rows),
                "dtype": str(dtype).removeprefix("torch."), "world_size": args.world_size}
    if settings.merged_path.is_dir():
        hub.write_readme(settings.merged_path, settings, metrics)
        if settings.push_to_hub:
            _push(settings, metrics)
    write_json(Path(settings.out_dir) / "metrics.json", metrics)
    log.info("metrics: %s", json.dumps(metrics))
    return metrics


def _resume_from(out_dir: str, world_size: int) -> Path | None:
    checkpoints = whole_checkpoints(out_dir)
    if not checkpoints:
        return None
    then = read_json(checkpoints[-1] / "complete.json")["world_size"]
    if then != world_size:
        raise UserError(f"{checkpoints[-1]} was written by {then} processes and this run has {world_size}; "
                        f"start it with {then}, or with another out_dir")
    if is_first_process():
        newest = max(Path(out_dir).glob("checkpoint-*"), key=lambda folder: folder.stat().st_mtime)
        skipped = "" if newest == checkpoints[-1] else f" ({newest.name} was not written to its end)"
        log.info("resuming from %s%s", checkpoints[-1], skipped)
    return checkpoints[-1]

