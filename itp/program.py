"""What every command line program does: logging, one line for a user's mistake, exit status, progress."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from itp.errors import UserError
from itp.files import refusal

if TYPE_CHECKING:
    from tqdm import tqdm


def _keep_freed_memory() -> None:
    """Ask glibc to use freed blocks again instead of returning them to the system.

    Otherwise glibc maps the pages of each large tensor (a megabyte), and they are zeroed, at every use.  On a CPU
    that took more time than the arithmetic of a small model.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


CHATTY = ("httpx", "httpx2", "httpcore", "httpcore2", "openai", "matplotlib", "fontTools")
"""Loggers of libraries that write a line for every request or font.  The openai package calls by httpx2 since 3."""
_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)
_SHORTEST_SECRET = 8
"""A shorter value is a placeholder (``EMPTY``) that ordinary text may hold."""
_USER_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")


def without_secrets(text: str) -> str:
    """``text`` without the keys and tokens of environment variables, and without passwords in URLs.

    Libraries and servers quote what they were sent.
    """
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value.strip()) >= _SHORTEST_SECRET:
            text = text.replace(value.strip(), "***")
    return _USER_IN_URL.sub("***@", text)


class _WithoutSecrets(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


def run_main(main: Callable[[], None]) -> None:
    """Run a program: a UserError, or what the disk refuses, is one line on stderr and exit status 2; Ctrl-C is 130."""
    # Threads that wait leave the cores to those that have work: models and environments share them.  torch
    # reads it when it is imported, which no program has done yet.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _keep_freed_memory()
    handler = logging.StreamHandler()
    handler.setFormatter(_WithoutSecrets("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        main()
    except UserError as error:
        print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a file that no one thought of, such as the standard output on a full disk
        if not refusal(error):
            raise
        print(f"error: {error.filename or 'output'}: {refusal(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; start the same command again to go on", file=sys.stderr)
        sys.exit(130)


def progress_bar(total: int, unit: str) -> tqdm:
    """A tqdm bar; in a log file it says a line every half minute."""
    from tqdm import tqdm

    return tqdm(total=total, unit=unit, **({} if sys.stderr.isatty() else {"mininterval": 30, "maxinterval": 30}))


def show_success(bar: tqdm, won: int, played: int) -> None:
    """Show beside the bar how many of the finished episodes, or games, were a success."""
    if played:
        bar.set_postfix_str(f"{won} of {played} won, {won / played:.0%}", refresh=False)


def say_next(command: str) -> None:
    """The last line of a program: the command that takes what it has written.  CAPITALS stand for what is to choose.

    ``ITP_NEXT=off`` keeps it away, as in scripts that start one program after the other.
    """
    if os.environ.get("ITP_NEXT") != "off":
        print(f"next: {command}", flush=True)
