"""An output folder that belongs to one run: its settings, versions and fingerprints; resume or refuse."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from itp.config import by_own_names, flag_fields, flags_that
from itp.distributed import is_first_process
from itp.errors import UserError
from itp.files import append_row, check_output_folder, read_object, write_json, writing

log = logging.getLogger(__name__)


def versions() -> dict[str, str]:
    """The versions that a result depends on, and the git revision of this code where it has one."""
    found = {"python": platform.python_version()}
    for package in ("itp", "torch", "transformers", "peft", "deepspeed", "alfworld", "textworld", "scienceworld",
                    "openai"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if shutil.which("git") is None:
        return found
    revision = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True, text=True, check=False,
    )
    if revision.returncode == 0:
        found["revision"] = revision.stdout.strip()
    return found


RECORD = "config.json"
"""In the output folder of a program: its settings and versions."""


def recorded(folder: str | Path) -> dict[str, Any]:
    """What ``config.json`` in a run's folder holds.  Raises UserError where that isn't the record of a run."""
    return read_object(Path(folder) / RECORD, {"config": dict}, "it isn't the record of a run; choose another output "
                       "path, or delete it where all in its folder is of one configuration")


def open_run_dir(out_dir: str | Path, settings: Any, *, facts: Mapping[str, Any] | None = None, override: bool = False,
                 may_grow: tuple[str, ...] = (), redo: Callable[[], None] | None = None) -> Path:
    """Make ``out_dir`` this run's: write ``config.json`` there, or check that it is the same run's.

    A folder that holds results of another configuration is refused, because the two would mix.  Settings that don't
    affect the result (:class:`itp.config.Flag`) may differ.  ``facts``: what else the result depends on, such as
    fingerprints of models.  ``may_grow``: numbers that the run may go on with more of; the record then has the larger
    one.  ``redo`` is called before that, to remove what the smaller number has changed.  ``override`` replaces the
    record; what else the folder holds is the caller's to remove.  Returns the path.
    """
    out_dir = Path(out_dir)
    check_output_folder(out_dir)
    record = out_dir / RECORD
    # Of settings that aren't flags nothing is recorded: the program sets them itself.
    flags = {field.name: getattr(settings, field.name) for field in flag_fields(type(settings))}
    wanted = json.loads(json.dumps(flags | dict(facts or {}), default=str))
    if record.exists() and not override:
        written = recorded(out_dir)
        before = {field.name: about.before for field in flag_fields(type(settings))
                  if (about := field.metadata["flag"]).before is not None}
        there = before | by_own_names(written["config"], type(settings))
        grown = {k: wanted[k] for k in may_grow if k in there and _grew(there[k], wanted[k])}
        compared = wanted.keys() - flags_that(type(settings), lambda about: not about.affects_result) - grown.keys()
        differing = [name for name in sorted(compared) if not _same(there.get(name), wanted[name])]
        if differing:
            said = ", ".join(f"{k}: {there.get(k)!r} there, {wanted.get(k)!r} now" for k in differing)
            raise UserError(f"{out_dir} holds results of another configuration ({said}); "
                            "choose another output path, or --override to start it anew")
        if grown:
            if redo is not None:  # before the record: after a kill in between, it is called again
                redo()
            write_json(record, written | {"config": there | grown})
        return out_dir
    with writing(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
    write_json(record, {"config": wanted, "versions": versions()})
    return out_dir


@contextlib.contextmanager
def alone_in(folder: str | Path) -> Iterator[None]:
    """Within this block no other program works in ``folder``, which is made.  Raises UserError where one does.

    The lock is the process's own, so a kill leaves none behind.  Of processes that learn together the first one has it.
    """
    if not is_first_process():
        yield
        return
    with writing(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
    place = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another program works there; wait for its end, or choose another output "
                            "path") from error
        except OSError:  # a file system without locks
            log.debug("%s can't be locked", folder)
        yield
    finally:
        os.close(place)


def _grew(recorded: int, wanted: int) -> bool:
    """0 is no limit."""
    return recorded != 0 and (wanted == 0 or wanted > recorded)


def _same(recorded: Any, wanted: Any) -> bool:
    """A setting that an older record doesn't know was switched off then: 0, false, empty."""
    return recorded == wanted or recorded is None and not wanted


TIMING = "timing.jsonl"
"""In the output folder of a program: a line with its ``seconds`` for every time that it worked there."""


@contextlib.contextmanager
def timed(folder: str | Path) -> Iterator[None]:
    """Put on record in ``folder`` how long the block took, also where it was interrupted (a kill leaves nothing)."""
    start = time.monotonic()
    try:
        yield
    finally:
        append_row(Path(folder) / TIMING, {"seconds": round(time.monotonic() - start, 3)})
