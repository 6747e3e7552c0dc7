"""Files that appear whole, the cache folder, and JSON and JSONL read with an error that names the line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from itp.errors import UserError


def cache_folder(kind: str) -> Path | None:
    """Where files of one kind are kept between runs: ``$ITP_CACHE/kind`` (``~/.cache/itp`` without it).

    None where ``ITP_CACHE=off``: nothing is kept.
    """
    root = os.environ.get("ITP_CACHE") or "~/.cache/itp"
    return None if root == "off" else Path(root).expanduser() / kind


def write_atomic(path: str | Path, text: str) -> None:
    """Write a file that is either whole or absent: beside it, fsync, rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


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
