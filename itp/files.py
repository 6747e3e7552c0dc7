"""Files that appear whole, what the disk refuses, the cache folder, and JSON and JSONL with errors that name the line."""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from itp.errors import UserError


log = logging.getLogger(__name__)

# ---------------------------------------------------------------- what the disk refuses

_ELSEWHERE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
"""Refusals of this place; the others are of a disk that is full or fails."""
_REFUSED = (*_ELSEWHERE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_TORCH = ("inline_container.cc", "iostream error")
"""What torch says where it can't write; it doesn't say why."""


def refusal(error: BaseException) -> str:
    """What the operating system refused, in its words; empty for any other error.

    Libraries have errors of their own for it: torch a RuntimeError, safetensors a SafetensorError.
    """
    if isinstance(error, UserError):
        return ""
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno in _REFUSED else ""
    said = str(error)
    if any(words in said for words in _TORCH):
        return "the disk took no more"
    return next((os.strerror(number) for number in _REFUSED if os.strerror(number) in said), "")


class writing:
    """Put this around what writes the file or folder ``place``: UserError where the operating system refuses it.

    ``unfinished``: a folder that holds a part of it then, which is removed, because it takes space.
    """

    def __init__(self, place: str | Path, unfinished: Path | None = None) -> None:
        self.place, self.unfinished = place, unfinished

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        why = "" if error is None else refusal(error)
        if not why:
            return
        if self.unfinished is not None:
            shutil.rmtree(self.unfinished, ignore_errors=True)
        elsewhere = why in map(os.strerror, _ELSEWHERE)
        raise UserError(f"{self.place}: can't be written ({why}); " + (
            "choose another output path" if elsewhere else "free some space, and start the same command again"
        )) from error


def why_unwritable(folder: str | Path) -> str:
    """Why no file can be made in ``folder``, which may not be there yet; empty where one can."""
    place = Path(folder).absolute()
    while not os.path.exists(place):
        place = place.parent
    if not place.is_dir():
        return f"{place} is a file"
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        return f"{place}: {error.strerror}"
    return ""


def check_output_folder(folder: str | Path) -> None:
    """Raises UserError where ``folder`` can't be written: before the work whose result is to go there."""
    if why := why_unwritable(folder):
        raise UserError(f"{folder}: can't be written ({why}); choose another output path")


def check_output_file(path: str | Path) -> None:
    """The same for a file."""
    if Path(path).is_dir():
        raise UserError(f"{path}: is a folder, and a file is to be written; choose another output path")
    check_output_folder(Path(path).parent)


# ---------------------------------------------------------------- files that appear whole


def write_atomic(path: str | Path, text: str) -> None:
    """Write a file that is either whole or absent: beside it, fsync, rename.  Raises UserError where that fails."""
    with writing(path):
        _write_atomic(Path(path), text)


def _write_atomic(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)  # half of a file takes space, too
        raise


def append_row(path: str | Path, row: Any) -> None:
    """Add a line to a JSONL file, whole or not at all."""
    append_line(path, json.dumps(row))


def append_line(path: str | Path, line: str) -> None:
    """Add a line to a file, whole or not at all: what a full disk or a kill cut off is removed first."""
    with writing(path), open(path, "a+b") as file:
        _drop_cut_line(file)
        whole = file.seek(0, os.SEEK_END)
        try:
            file.write(line.encode() + b"\n")
            file.flush()
        except OSError:
            os.truncate(path, whole)
            raise


# ---------------------------------------------------------------- the cache


def cache_folder(kind: str) -> Path | None:
    """Where files of one kind are kept between runs: ``$ITP_CACHE/kind`` (``~/.cache/itp`` without it).

    None where ``ITP_CACHE=off`` or where there is no home folder: nothing is kept.
    """
    root = os.environ.get("ITP_CACHE") or "~/.cache/itp"
    try:
        return None if root == "off" else Path(root).expanduser() / kind
    except RuntimeError:  # no home folder
        return None


def read_cached(file: Path | None) -> str | None:
    """What is kept in a file of the cache; None where that can't be read."""
    try:
        return None if file is None else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def keep(file: Path | None, text: str) -> None:
    """Keep a text in a file of the cache.  Where that can't be written, it warns once and goes on."""
    try:
        if file is not None:
            _write_atomic(file, text)
    except OSError as error:
        _warn_of_cache(os.environ.get("ITP_CACHE") or "~/.cache/itp", error.strerror)


@functools.cache
def _warn_of_cache(root: str, why: str) -> None:
    log.warning("%s can't be written (%s), so nothing is kept for later runs; set ITP_CACHE to a folder that can, or to "
                "off", root, why)


# ---------------------------------------------------------------- JSON


def write_json(path: str | Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error


def short_names(paths: Sequence[str | Path]) -> list[str]:
    """Names for some folders: as many last parts of their paths as tell them apart."""
    whole = [Path(path).resolve() for path in paths]
    depth = next((n for n in range(1, max(len(path.parts) for path in whole))
                  if len({path.parts[-n:] for path in whole}) == len(set(whole))), 1)
    return ["/".join(path.parts[-depth:]) for path in whole]


def read_rows(path: str | Path, skipped: list[str] | None = None) -> Iterator[tuple[str, Any]]:
    """(where, value) for each element of a JSON list or each line of a JSONL file.

    Given a list ``skipped``, a line that isn't JSON goes in there instead of ending it all.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); is it the right file, whole and "
                        "uncompressed?") from error
    if text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg}); is the file whole?") from error
        except (ValueError, RecursionError) as error:  # a number or a nesting beyond what Python takes
            raise UserError(f"{path}: not usable JSON ({error})") from error
        yield from ((f"{path}: row {i}", value) for i, value in enumerate(values))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:  # JSONDecodeError, or a number or nesting too large
                said = error.msg if isinstance(error, json.JSONDecodeError) else error
                message = f"{path}:{number}: not JSON ({said}); mend or remove the line"
                if skipped is None:
                    raise UserError(message) from error
                skipped.append(message)
                continue
            yield f"{path}:{number}", value


def read_appended(path: str | Path) -> list[Any]:
    """The rows of a JSONL file that grows by a line at a time; none where there is no file.

    A last line that a kill cut off is removed from the file, so that the next one starts on a line of its own.
    """
    path = Path(path)
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[:content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    return [row for _, row in read_rows(path)]


def _drop_cut_line(file: BinaryIO) -> None:
    """Remove the end of a file after its last line break."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
