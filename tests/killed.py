"""Real processes, killed in the middle of their work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from itp.config import flag_fields

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command_of(program: list[str], settings: Any) -> list[str]:
    """The command line of a program (``-m`` and what follows) with these settings."""
    return [sys.executable, "-m", *program, *(f"--{f.name}={getattr(settings, f.name)}" for f in flag_fields(settings))]


def kill(command: list[str], when: Callable[[], bool], log: Path) -> None:
    """Start ``command`` and send it SIGKILL as soon as ``when()``, before it ends."""
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=log.parent, stdout=file, stderr=file, env=ENVIRONMENT)
    deadline = time.monotonic() + 400  # a loaded machine takes minutes to import torch
    while not when():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()


def finish(command: list[str], log: Path) -> None:
    """The same command again, to its end."""
    done = subprocess.run(command, cwd=log.parent, capture_output=True, text=True, env=ENVIRONMENT, timeout=600,
                          check=False)
    assert done.returncode == 0, done.stderr
