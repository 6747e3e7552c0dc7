"""Checkpoints of supervised fine-tuning: which of them are whole, and which one to go on from."""

from __future__ import annotations

import logging
from pathlib import Path

from itp.distributed import is_first_process
from itp.errors import UserError
from itp.files import read_json

log = logging.getLogger(__name__)


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


def resume_from(out_dir: str, world_size: int) -> Path | None:
    """The checkpoint to go on from; None where there is none.  UserError where other processes wrote it."""
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
