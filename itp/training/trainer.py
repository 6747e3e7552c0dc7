"""What fine-tuning adds to the Hugging Face Trainer.

Batches of similar length in an order that depends on (seed, epoch) alone, so that a resumed run goes
on exactly where it stopped; a held-out loss that is the mean over tokens (the Trainer's own is a mean of
batch means); a stop at the first non-finite loss, before anything non-finite is saved; checkpoints that
say when they are whole; and little work per step, because small models are trained here too.
"""

from __future__ import annotations

import logging
import math
import os
import random
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback

from itp.errors import UserError
from itp.files import write_json, writing
from itp.training.checkpoints import row_lengths, whole_checkpoints
from itp.training.examples import TrainingRow
from itp.training.from_scratch.muon import MuonAdamW
from itp.training.settings import FinetuneSettings
from itp.training.task import Task

log = logging.getLogger(__name__)


def quiet() -> None:
    """No progress bars in log files, and no advice about these libraries' next major versions."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate|torch)\.")
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed says at import what it couldn't find


def training_arguments(settings: FinetuneSettings, dtype: torch.dtype, rows: int, held_out: int) -> TrainingArguments:
    """The Trainer's settings for so many ``rows`` to train on and ``held_out`` ones, which may be none."""
    on_cpu = not torch.accelerator.is_available()
    if settings.deepspeed and on_cpu:
        import deepspeed

        # On a CPU it would first compile a shared-memory all-reduce: minutes, and a C++ compiler needed.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    args = TrainingArguments(
        output_dir=settings.out_dir,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.grad_accum,
        learning_rate=settings.lr,
        weight_decay=settings.wd,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(settings.lr_scheduler_type,
                                                                   settings.lr_scheduler_type),
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        deepspeed=settings.deepspeed or None,
        save_strategy="steps" if settings.save_every_steps else "epoch",
        save_steps=settings.save_every_steps or 500,
        eval_strategy="epoch" if settings.eval_every_epoch and held_out else "no",
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        disable_tqdm=not sys.stderr.isatty(),
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and "WORLD_SIZE" in os.environ else None,
        ddp_find_unused_parameters=False,
        report_to=settings.report_to,
        seed=settings.seed,
    )
    if args.device.type == "cuda":
        args._n_gpu = 1  # several GPUs are used by several processes, not by torch's DataParallel
    per_step = settings.batch_size * settings.grad_accum * args.world_size
    args.warmup_steps = math.ceil(settings.warmup_ratio * math.ceil(rows / per_step) * settings.epochs)
    return args


class SimilarLengths(Sampler[int]):
    """TrainingRow indices of an epoch, such that each optimizer step's rows have similar lengths.

    The steps come in random order.  Everything follows from (seed, epoch): no global generator, so
    a resumed epoch has the same order.
    """

    def __init__(self, lengths: list[int], rows_per_step: int, seed: int, epoch: Callable[[], int]):
        self.lengths, self.rows_per_step, self.seed, self.epoch = lengths, rows_per_step, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed} {self.epoch()}")
        order = list(range(len(self.lengths)))
        draw.shuffle(order)
        pool, size = 50 * self.rows_per_step, self.rows_per_step
        steps = []
        for start in range(0, len(order), pool):
            rows = sorted(order[start:start + pool], key=self.lengths.__getitem__, reverse=True)
            steps += [rows[i:i + size] for i in range(0, len(rows), size)]
        rest = [steps.pop()] if len(steps[-1]) < size else []
        draw.shuffle(steps)
        return iter([i for step in steps + rest for i in step])


class Guard(TrainerCallback):
    """Nothing non-finite is saved, whole checkpoints are marked, old ones removed, progress is said."""

    def __init__(self, accelerator: Accelerator, save_total_limit: int, rows: str, bar: bool):
        self.accelerator, self.save_total_limit, self.rows, self.bar = accelerator, save_total_limit, rows, bar
        self.skipped = 0

    def on_optimizer_step(self, args, state, control, **kwargs):
        # Loss scaling skips a step now and then until its scale fits; elsewhere, and without end, a
        # skipped step means that nothing is learned any more (DeepSpeed skips in every precision).
        self.skipped = self.skipped + 1 if self.accelerator.optimizer_step_was_skipped else 0
        if self.skipped > (50 if args.fp16 else 0):
            raise UserError(f"the gradients are not finite in step {state.global_step + 1}: the training diverged; "
                            "lower lr or use bf16 (the last whole checkpoint is kept)")

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step >= state.max_steps or control.should_save:
            control.should_log = True  # so that trainer_state.json has the loss of every step, also when resumed
        self._check(state, control, model)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        control.should_log |= control.should_save
        self._check(state, control, model)

    def _check(self, state, control, model) -> None:
        if control.should_save and not all(_finite(p) for p in model.parameters() if p.requires_grad):
            raise UserError(f"the weights are not finite after step {state.global_step}: the training diverged; "
                            "lower lr (the last whole checkpoint is kept)")

    def on_save(self, args, state, control, **kwargs):
        self.accelerator.wait_for_everyone()  # then the other processes' shards are written too
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        sizes = {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*"))
                 if file.is_file() and file.name != "complete.json"}
        write_json(folder / "complete.json", {"step": state.global_step, "world_size": args.world_size,
                                              "rows": self.rows, "sizes": sizes})
        for old in whole_checkpoints(args.output_dir)[:-self.save_total_limit]:
            shutil.rmtree(old)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar or not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            log.info("step %d/%d loss %.4f lr %.2e", state.global_step, state.max_steps, logs["loss"],
                     logs["learning_rate"])
        elif "eval_loss" in logs:
            said = "".join(f", {name.removeprefix('eval_')} {value:.4f}" for name, value in logs.items()
                           if name.startswith("eval_") and name != "eval_loss")
            log.info("step %d/%d held-out loss %.4f%s", state.global_step, state.max_steps, logs["eval_loss"], said)


def _finite(parameter: torch.nn.Parameter) -> bool:
    # Under ZeRO-3 a parameter is empty and this process's share of it is its ds_tensor.
    share = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
    return bool(torch.isfinite(share).all())


class FineTuner(Trainer):
    def __init__(self, task: Task, model: torch.nn.Module, args: TrainingArguments,
                 tokenizer: PreTrainedTokenizerBase, train_rows: list[TrainingRow], eval_rows: list[TrainingRow]):
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        super().__init__(model, args, task.collator(pad_id, 1 if args.use_cpu else 8), train_rows, eval_rows or None)
        self.task, self.tokenizer = task, tokenizer
        self.model_accepts_loss_kwargs = True  # the totals of an optimizer step, see compute_loss
        self._step_loss: torch.Tensor | float = 0.0
        self.eval_collator = task.collator(pad_id)
        self.remove_callback(PrinterCallback)
        self.add_callback(Guard(self.accelerator, task.settings.save_total_limit, row_lengths(train_rows),
                                bar=not args.disable_tqdm))

    def _get_train_sampler(self, train_dataset: list[TrainingRow] | None = None) -> Sampler[int]:
        rows = self.train_dataset if train_dataset is None else train_dataset
        rows_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return SimilarLengths([len(row["input_ids"]) for row in rows], rows_per_step, self.args.seed,
                              lambda: int(self.state.epoch or 0))

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.task.settings.optimizer == "muon":
            self.optimizer = MuonAdamW(self.model, lr=self.args.learning_rate, weight_decay=self.args.weight_decay,
                                       betas=(self.args.adam_beta1, self.args.adam_beta2))
        return super().create_optimizer(model)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        # The loss of an optimizer step is a mean over all its batches on all processes, not a mean of their means.
        items = sum(self.task.items(batch).to(device) for batch in batches)
        return batches, self.accelerator.reduce(items, "sum") if batches else None

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_loss = self._step_loss + loss
        if self.accelerator.sync_gradients:  # looking at it makes the host wait for a GPU: once a step is enough
            total, self._step_loss = self._step_loss.item(), 0.0
            if not math.isfinite(total):
                raise UserError(f"the loss is {total} in step {self.state.global_step + 1}: the training diverged; "
                                "lower lr or use bf16 (the last whole checkpoint is kept)")
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> torch.Tensor:
        # Divided by the items of all processes, while gradients become means over the processes.
        return self.task.forward(model, inputs, num_items_in_batch)["loss"] * self.accelerator.num_processes

    def floating_point_ops(self, inputs) -> int:
        return 0  # the Trainer's estimate walks all modules in each step

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """The task's held-out metrics, from sums over all rows, whatever the batches and processes."""
        rows: list[TrainingRow] = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True)
        size, world, rank = self.args.eval_batch_size, self.args.world_size, self.args.process_index
        batches = [rows[i:i + size] for i in range(0, len(rows), size)]
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        total: torch.Tensor | int = 0
        for start in range(0, len(batches), world):
            # Under ZeRO-3 all processes must run the same number of passes; the last may count nothing.
            mine = start + rank
            batch = self._prepare_inputs(self.eval_collator(batches[min(mine, len(batches) - 1)]))
            with torch.no_grad(), self.compute_loss_context_manager():
                sums = self.task.forward(model, batch)["sums"]
            total = total + sums.float() * (mine < len(batches))
        total = self.accelerator.reduce(total, "sum")
        model.train(was_training)
        found = self.task.eval_metrics(total.tolist())
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def run(self, resume_from: Path | None) -> dict[str, Any]:
        """Train to the end; the metrics of the run."""
        start = time.perf_counter()
        output = self.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        counts = torch.tensor([self.data_collator.tokens, self.data_collator.slots], device=self.args.device)
        tokens, slots = self.accelerator.reduce(counts, "sum").tolist()
        seconds = output.metrics["train_runtime"]
        metrics = {"steps": self.state.global_step, "epochs": self.state.epoch, "train_loss": self._mean_train_loss(),
                   "tokens_per_second": round(tokens / seconds, 1),
                   "padding_share": round(1 - tokens / slots, 4) if slots else 0.0,
                   "train_seconds": round(seconds, 2), "resumed": resume_from is not None}
        if self.eval_dataset:
            last = next((entry for entry in reversed(self.state.log_history) if "eval_loss" in entry), None)
            fresh = last if last and last["step"] == self.state.global_step else self.evaluate()
            metrics |= {name: value for name, value in fresh.items() if name.startswith("eval_")}
            metrics |= {"best_eval_loss": min(e["eval_loss"] for e in self.state.log_history if "eval_loss" in e)}
        return metrics | {"seconds": round(time.perf_counter() - start, 2)}

    def _mean_train_loss(self) -> float:
        """The mean over all steps, also those before a resumption: from the logged windows."""
        total, before = 0.0, 0
        for entry in self.state.log_history:
            if "loss" in entry:
                total += entry["loss"] * (entry["step"] - before)
                before = entry["step"]
        return total / max(before, 1)

    def gathered_state(self) -> dict[str, torch.Tensor] | None:
        """Under ZeRO-3 all weights, which no process holds; every process takes part.  Else None."""
        return self.accelerator.get_state_dict(self.model_wrapped) if is_deepspeed_zero3_enabled() else None

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        with writing(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"):
            super()._save_checkpoint(*args, **options)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if not self.args.should_save or not self.task.write_checkpoint(self.model, folder, state_dict):
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if not self.task.read_checkpoint(self.model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def release(self) -> None:
        """Let go of the model and of the other processes: what follows is the first process's alone."""
        self.accelerator.wait_for_everyone()
        self.accelerator.free_memory()
        self.model = self.model_wrapped = self.optimizer = self.lr_scheduler = None
        self.callback_handler.model = self.callback_handler.optimizer = self.callback_handler.lr_scheduler = None
        unset_hf_deepspeed_config()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
