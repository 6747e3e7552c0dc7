"""Checkpoints of supervised fine-tuning: which of them are whole, and which one to go on from."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

from itp.distributed import is_first_process
from itp.errors import UserError
from itp.files import read_object
from itp.training.examples import TrainingRow

log = logging.getLogger(__name__)
DELETE = "delete this checkpoint, and the run goes on from the one before"


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
        sizes = read_object(marker, {"sizes": dict}, DELETE)["sizes"] if marker.is_file() else {"complete.json": -1}
        if all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items()):
            found.append((int(step), folder))
    return [folder for _, folder in sorted(found)]


def row_lengths(rows: Sequence[TrainingRow]) -> str:
    """Tells the rows of one run from those of another: the order of an epoch follows from their lengths."""
    return hashlib.sha256(repr([len(row["input_ids"]) for row in rows]).encode()).hexdigest()[:16]


def resume_from(out_dir: str, world_size: int, rows: str) -> Path | None:
    """The checkpoint to go on from; None where there is none.

    Raises UserError where it was written by another number of processes, or for other ``rows`` (:func:`row_lengths`).
    """
    checkpoints = whole_checkpoints(out_dir)
    if not checkpoints:
        return None
    written = read_object(checkpoints[-1] / "complete.json", {"world_size": int}, DELETE)
    if written.get("rows") != rows:
        raise UserError(f"{checkpoints[-1]} was written by a version of this program that made other rows of the same "
                        "data, so its epoch can't go on; finish it with that version, or choose another out_dir")
    then = written["world_size"]
    if then != world_size:
        raise UserError(f"{checkpoints[-1]} was written by {then} processes and this run has {world_size}; "
                        f"start it with {then}, or with another out_dir")
    if is_first_process():
        newest = max(Path(out_dir).glob("checkpoint-*"), key=lambda folder: folder.stat().st_mtime)
        skipped = "" if newest == checkpoints[-1] else f" ({newest.name} was not written to its end)"
        log.info("resuming from %s%s", checkpoints[-1], skipped)
    return checkpoints[-1]
