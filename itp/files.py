"""Files that appear whole, what the disk refuses, the cache folder, and text, JSON, JSONL and YAML read with an error
that names the line.

Every reader here takes UTF-8 with or without a byte order mark, which editors on Windows write.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from itp.errors import UserError

Fields = Mapping[str, type | tuple[type, ...]]
"""The fields that an object needs, with the types of their values."""


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
    log.warning("%s can't be written (%s), so nothing is kept for later runs; set ITP_CACHE to a folder that can, or "
                "to off", root, why)


# ---------------------------------------------------------------- JSON


def write_json(path: str | Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_text(path: str | Path, advice: str = "is it the right file, whole and uncompressed?") -> str:
    """A text file.  Raises UserError, which ends with ``advice``, where it is missing or isn't UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); {advice}") from error
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); give a file that can") from error


def content_digest(path: str | Path) -> str:
    """The SHA-256 of a text file.  Raises UserError where it is missing or isn't UTF-8."""
    return hashlib.sha256(read_text(path).encode()).hexdigest()


def read_json(path: str | Path, advice: str = "is the file whole?") -> Any:
    """Any JSON.  Raises UserError, which names the line and ends with ``advice``."""
    return _parsed(read_text(path, advice), path, advice)


def read_object(path: str | Path, needs: Fields | None = None,
                advice: str = "is it the right file, and whole?") -> dict[str, Any]:
    """A JSON object that has the fields ``needs``, as name -> type.  Raises UserError, which ends with ``advice``."""
    return checked_object(read_json(path, advice), str(path), needs or {}, advice)


def checked_object(value: Any, where: str, needs: Fields, advice: str) -> dict[str, Any]:
    """``value`` if it is an object with the fields ``needs``.  Raises UserError, which begins with ``where``."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: a JSON {_KINDS.get(type(value), 'value')} where an object is needed; {advice}")
    for name, kind in needs.items():
        if name not in value:
            raise UserError(f"{where}: field {name!r} is missing; {advice}")
        if not isinstance(value[name], kind) or isinstance(value[name], bool) and kind is not bool:
            raise UserError(f"{where}: field {name!r} is of the wrong type ({_short(value[name])}); {advice}")
    return value


def read_yaml(path: str | Path, where: str = "") -> Any:
    """Any YAML.  Raises UserError, which begins with ``where`` or the path."""
    import yaml

    text = read_text(path)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that there is not
        raise UserError(f"{where or path}: not YAML ({' '.join(str(error).split())})") from error


_KINDS = {list: "list", str: "string", bool: "truth value", int: "number", float: "number", type(None): "null"}


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 40 else f"{said[:40]}..."


def _loads(text: str) -> Any:
    """JSON.  Raises ValueError also for a string with half of a surrogate pair, which no file and no model can take."""
    value = json.loads(text)
    if "\\ud" in text.lower():  # only an escape can bring one
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _parsed(text: str, path: str | Path, advice: str) -> Any:
    try:
        return _loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg}); {advice}") from error
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond what Python takes
        raise UserError(f"{path}: not usable JSON ({error}); {advice}") from error


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
    text = read_text(path)
    if text.lstrip().startswith("["):
        yield from ((f"{path}: row {i}", value) for i, value in enumerate(_parsed(text, path, "is the file whole?")))
        return
    if _is_one_object(text):
        raise UserError(f"{path}: one JSON object over several lines; give a list of rows, or JSONL with a row a line")
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removeprefix("\ufeff")  # files that were joined have a byte order mark in the middle
        if line.strip():
            try:
                value = _loads(line)
            except (ValueError, RecursionError) as error:  # JSONDecodeError, or a number or nesting too large
                said = error.msg if isinstance(error, json.JSONDecodeError) else error
                message = f"{path}:{number}: not JSON ({said}); mend or remove the line"
                if skipped is None:
                    raise UserError(message) from error
                skipped.append(message)
                continue
            yield f"{path}:{number}", value


def _is_one_object(text: str) -> bool:
    """Whether a text that begins like an object's first line of several is one object as a whole."""
    if not re.match(r"\s*\{[^\S\n]*\n", text):
        return False
    try:
        return isinstance(_loads(text), dict)
    except (ValueError, RecursionError):
        return False


def read_records(path: str | Path, needs: Fields | None = None) -> list[dict[str, Any]]:
    """The rows of a file that a program of this project wrote, each with the fields ``needs``.  Raises UserError."""
    return [checked_object(row, where, needs or {}, "mend or remove the line") for where, row in read_rows(path)]


def read_appended(path: str | Path, needs: Fields | None = None) -> list[dict[str, Any]]:
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
    return read_records(path, needs)


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
