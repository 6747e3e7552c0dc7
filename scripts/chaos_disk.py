"""What the disk refuses, and two programs at once in one folder.

full        a disk of half the size that the undisturbed run took.  The program ends in one line; with more space the
            same command goes on to the undisturbed result.
read-only   a folder that can't be written: one line.
together    the same command twice at once in one folder.  One of the two may be refused in a line; in the end the
            result is the undisturbed one.

The first two mount a small tmpfs, which needs root on Linux; where that fails they are skipped.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chaos_runs import BY_NAME, LONGEST, Program, differences, prepare

FULL = ("collect", "policy", "world_model", "label", "sft", "rl_k", "evaluate")
READ_ONLY = ("collect", "policy", "world_model", "label", "rl_k", "evaluate")
TOGETHER = ("collect", "policy", "label", "sft", "rl_k", "evaluate")
PLENTY = 512 * 2**20


def run_disk(out: Path) -> Iterator[dict[str, Any]]:
    """What each case gave, with its faults."""
    root, folder = out / "runs", out / "disk"
    prepare(root, FULL)
    cases = (("full", FULL, full), ("read-only", READ_ONLY, read_only), ("together", TOGETHER, together))
    for case, names, work in cases:
        for name in names:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            row = {"case": case, "program": name, "faults": []}
            try:
                row |= work(BY_NAME[name], root, folder, row["faults"])
            except subprocess.CalledProcessError as error:
                row["skipped"] = f"{' '.join(error.cmd[:1])} failed"
            yield row


def full(program: Program, root: Path, folder: Path, faults: list[str]) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in (root / program.name).rglob("*") if file.is_file()) // 2
    log = folder.with_suffix(".log")
    with _mounted(folder, size):
        _expect_refusal(program, root, folder, log, faults)
        subprocess.run(["mount", "-o", f"remount,size={PLENTY}", str(folder)], check=True, capture_output=True)
        _expect_result(program, root, folder, log, faults)
    return {"bytes": size}


def read_only(program: Program, root: Path, folder: Path, faults: list[str]) -> dict[str, Any]:
    with _mounted(folder, 2**20):
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True, capture_output=True)
        _expect_refusal(program, root, folder / "out", folder.with_suffix(".log"), faults)
    return {}


def together(program: Program, root: Path, folder: Path, faults: list[str]) -> dict[str, Any]:
    """Both at once; then, where one was refused, that command again, which finds the work done or goes on."""
    logs = [folder.with_name(f"disk-{n}.log") for n in (1, 2)]
    for log in logs:
        log.write_text("")
    both = [program.start(root, folder, log) for log in logs]
    statuses = [process.wait(LONGEST) for process in both]
    for status, log in zip(statuses, logs, strict=True):
        if status != 0 and _complaints(log.read_text(errors="replace")) != 1:
            faults.append(f"status {status}, and not one line: {_end(log)}")
        if "Traceback (most" in log.read_text(errors="replace"):
            faults.append(f"a traceback: {_end(log)}")
    if all(statuses):
        faults.append(f"both ended with statuses {statuses}")
    _expect_result(program, root, folder, folder.with_suffix(".log"), faults)
    return {"statuses": statuses}


def _expect_refusal(program: Program, root: Path, folder: Path, log: Path, faults: list[str]) -> None:
    log.write_text("")
    status, said = program.finish(root, folder, log), log.read_text(errors="replace")
    if status == 0:
        faults.append("status 0")
    if "Traceback (most" in said or _complaints(said) != 1:
        faults.append(f"not one line: {_end(log)}")


def _expect_result(program: Program, root: Path, folder: Path, log: Path, faults: list[str]) -> None:
    log.write_text("")
    if (status := program.finish(root, folder, log)) != 0:
        faults.append(f"status {status} of the same command again: {_end(log)}")
    else:
        faults += differences(program.content(folder), program.content(root / program.name))[:5]


def _complaints(said: str) -> int:
    return len(re.findall(r"^error: ", said, re.MULTILINE))


def _end(log: Path) -> str:
    return log.read_text(errors="replace").strip()[-300:]


@contextlib.contextmanager
def _mounted(folder: Path, size: int) -> Iterator[None]:
    """A file system of ``size`` bytes at ``folder``.  Raises CalledProcessError where that isn't permitted."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)
