r"""The one fine-tuning core: LoRA or full training of a causal LM on text of which a part is supervised.

The world model (eq. 1 of the paper, loss on s' only) and the base policy π_θ0 (loss on its actions)
are this program with different examples.  A program hands :func:`finetune` its settings and a list of
:class:`Example` (:mod:`itp.training.examples`); this module trains (:mod:`itp.training.trainer`), saves, merges,
and writes ``metrics.json`` last: a folder that has one is finished.  Training on more than text, such as the heads
of stage 2, is another task for the same run (:func:`train`).

``out_dir`` then holds ``config.json`` (the claim of :func:`itp.run_dir.open_run_dir`), ``checkpoint-N/``,
``trainer_state.json``, the tokenizer, with LoRA ``adapter_config.json`` and ``adapter_model.safetensors``,
and in ``merged_full`` a plain model folder.  The same command again goes on from the newest checkpoint
that is whole.

torch is imported inside functions, so that a command line answers ``--help`` and refuses unusable
input at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from itp.devices import peak_memory
from itp.distributed import is_first_process
from itp.errors import UserError
from itp.files import check_output_folder, read_object, write_json, writing
from itp.pretrained import load_tokenizer, model_fingerprint
from itp.run_dir import alone_in, open_run_dir
from itp.training import hub
from itp.training.checkpoints import resume_from, row_lengths, whole_checkpoints
from itp.training.examples import Encoding, Example, report_counts, split_off_eval
from itp.training.settings import FinetuneSettings
from itp.training.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
METRICS = "metrics.json"
"""Written last: a folder that has it is finished."""

# ---------------------------------------------------------------- before torch: is it this run's folder, and finished?


def open_run(settings: FinetuneSettings, data_paths: Sequence[str | Path], *, own_base: bool = False,
             pictures: Iterable[str] = ()) -> bool:
    """Make ``out_dir`` this run's, or check that it is.  True: the run is finished (and on the hub, if asked).

    The data, and the files of the ``pictures`` that they name, count by their content, so that an edited file isn't
    taken for the same run; so does the base model, unless the run makes it itself (``own_base``).  Raises UserError for
    the folder of another run, and for a picture that can't be read.
    """
    for folder in (settings.out_dir, settings.merged_path):
        check_output_folder(folder)
    _refuse_foreign_files(settings)
    if is_first_process():
        nothing_yet = not _is_finished(settings) and not whole_checkpoints(settings.out_dir)
        with alone_in(settings.out_dir):  # the record there may be that of a run that has no checkpoint yet
            facts = _facts(settings, data_paths, own_base) | {"pictures_sha256": _digest_of_pictures(pictures)}
            open_run_dir(settings.out_dir, settings, facts=facts, override=nothing_yet)
    if not _is_finished(settings) or settings.merge and not settings.merged_path.exists():
        return False
    if is_first_process():
        log.info("already done: %s has metrics.json; choose another out_dir to train anew", settings.out_dir)
        _push_if_asked(settings)
    return True


def _refuse_foreign_files(settings: FinetuneSettings) -> None:
    """Raises UserError where ``merged_path`` holds something that this run didn't write."""
    new = not (Path(settings.out_dir) / "config.json").exists()
    if new and settings.merged_path.is_dir() and any(settings.merged_path.iterdir()):
        raise UserError(f"{settings.merged_path} holds files that aren't this run's; choose another --merged_dir")


def _facts(settings: FinetuneSettings, data_paths: Sequence[str | Path], own_base: bool) -> dict[str, Any]:
    """What the result depends on besides the settings.  Paths may be written differently the next time."""
    digest = hashlib.sha256(b"".join(hashlib.sha256(Path(path).read_bytes()).digest() for path in data_paths))
    facts: dict[str, Any] = {"data_sha256": digest.hexdigest()}
    if not own_base:
        facts["model"] = model_fingerprint(settings.model_path)
    if settings.deepspeed:
        facts["deepspeed"] = read_object(settings.deepspeed)
    return facts


def _digest_of_pictures(files: Iterable[str]) -> str:
    """Tells the contents of ``files`` apart; empty where there are none, as in runs that knew no pictures."""
    digest, files = hashlib.sha256(), list(dict.fromkeys(files))
    for file in files:
        try:
            digest.update(hashlib.sha256(Path(file).read_bytes()).digest())
        except OSError as error:
            raise UserError(f"image {file}: can't be read ({error.strerror}); mend the row that names it") from error
    return digest.hexdigest() if files else ""


def _is_finished(settings: FinetuneSettings) -> bool:
    return (Path(settings.out_dir) / METRICS).exists()


def _push_if_asked(settings: FinetuneSettings) -> None:
    """Upload the complete model, once, and put that on record."""
    file = Path(settings.out_dir) / METRICS
    metrics = read_object(file)
    if settings.push_to_hub and settings.push_to_hub != metrics.get("pushed_to"):
        hub.push(settings.merged_path, settings.push_to_hub)
        write_json(file, metrics | {"pushed_to": settings.push_to_hub})


# ---------------------------------------------------------------- the run


def finetune(settings: FinetuneSettings, examples: Sequence[Example]) -> dict[str, Any] | None:
    """:func:`train` on text."""
    from itp.training.text_task import TextTask

    return train(settings, TextTask(settings, examples))


def train(settings: FinetuneSettings, task: Task) -> dict[str, Any] | None:
    """Train, save, evaluate; the metrics that stand in ``metrics.json``, or None in all but the first process.

    Raises UserError where nothing can be trained on, or when the loss is no longer finite.
    """
    with alone_in(settings.out_dir):
        return _train(settings, task)


def _train(settings: FinetuneSettings, task: Task) -> dict[str, Any] | None:
    from transformers import set_seed

    from itp.training.models import choose_dtype
    from itp.training.trainer import FineTuner, quiet, training_arguments

    quiet()
    dtype = choose_dtype(settings)
    tokenizer = load_tokenizer(settings.model_path)
    encoding = _encode(settings, task, tokenizer)
    training, held_out = split_off_eval(encoding.groups, settings.eval_share, settings.seed)
    train_rows, eval_rows = [encoding.rows[i] for i in training], [encoding.rows[i] for i in held_out]

    args = training_arguments(settings, dtype, len(train_rows), len(eval_rows))  # before the model: ZeRO-3 looks there
    set_seed(settings.seed)
    trainer = FineTuner(task, task.load(tokenizer, dtype), args, tokenizer, train_rows, eval_rows)
    metrics = trainer.run(resume_from(settings.out_dir, args.world_size, row_lengths(train_rows)))
    metrics["peak_memory_bytes"] = peak_memory()
    first, device = args.process_index == 0, args.device
    with writing(settings.out_dir):
        if settings.lora_r:
            task.save_adapter(trainer)
        else:
            task.save_complete(trainer, dtype)
        if first:
            trainer.state.save_to_json(str(Path(settings.out_dir) / "trainer_state.json"))
            tokenizer.save_pretrained(settings.out_dir)
    trainer.release()
    if not first:
        return None
    if settings.lora_r and settings.merge:
        # Merged from the files: under ZeRO-3 no process holds whole weights.
        shutil.rmtree(settings.merged_path, ignore_errors=True)
        task.save_merged(tokenizer)
    if eval_rows:
        metrics |= task.measure(tokenizer, eval_rows, device)
    metrics |= {"train_rows": len(train_rows), "held_out_rows": len(eval_rows), "encoding": encoding.counts,
                "tokens_per_row": statistics.fmean(len(row["input_ids"]) for row in encoding.rows),
                "dtype": str(dtype).removeprefix("torch."), "world_size": args.world_size}
    return _finish(settings, metrics)


def _encode(settings: FinetuneSettings, task: Task, tokenizer: PreTrainedTokenizerBase) -> Encoding:
    """The task's rows.  Raises UserError where there is none."""
    encoding = task.encode(tokenizer)
    if is_first_process():
        report_counts(encoding.counts, settings.max_seq_len)
    if not encoding.rows:
        raise UserError(f"nothing to train on: none of {encoding.counts['examples']} examples fits --max_seq_len "
                        f"{settings.max_seq_len} with a supervised token; raise it or mend the data")
    return encoding


def _finish(settings: FinetuneSettings, metrics: dict[str, Any]) -> dict[str, Any]:
    """README, ``metrics.json``, which means finished, and the upload, if asked for; returns the metrics."""
    if settings.merged_path.is_dir():
        hub.write_readme(settings.merged_path, settings, metrics)
    write_json(Path(settings.out_dir) / METRICS, metrics)
    if settings.merged_path.is_dir():
        _push_if_asked(settings)
    log.info("metrics: %s", json.dumps(metrics))
    return read_object(Path(settings.out_dir) / METRICS)
