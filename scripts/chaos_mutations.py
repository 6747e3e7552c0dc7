"""Files as they get broken: bytes that are flipped, cut, doubled or foreign, and JSON or YAML with wrong values."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flipped": lambda data, draw: _flipped(data, draw),
    "cut": lambda data, draw: data[:draw.randrange(len(data))] if data else data,
    "cut out": lambda data, draw: _spliced(data, draw, b""),
    "doubled": lambda data, draw: _spliced(data, draw, None),
    "inserted": lambda data, draw: _inserted(data, draw, bytes(draw.randrange(256) for _ in range(draw.randint(1, 9)))),
    "not UTF-8": lambda data, draw: _inserted(data, draw, draw.choice((b"\xff", b"\xc3\x28", b"\xed\xa0\x80"))),
    "null bytes": lambda data, draw: _inserted(data, draw, bytes(draw.randint(1, 64))),
    "byte order mark": lambda data, draw: b"\xef\xbb\xbf" + data,
    "UTF-16": lambda data, draw: data.decode("utf-8", errors="replace").encode("utf-16"),
    "Windows lines": lambda data, draw: data.replace(b"\n", b"\r\n"),
    "empty": lambda data, draw: b"",
    "another file": lambda data, draw: draw.choice((b"null", b"[]", b"{}", b"0", b'"text"', b"<html></html>", b"\n\n")),
}
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 10 ** 9, -10 ** 9, 10 ** 30, 1.5, -0.5, 1e308, float("nan"), float("inf"), "", " ",
    "x", "\n", "1", "nan", "x" * 100_000, [], {}, [None], [[]], {"a": 1}, {"": None}, ["x", 1], "\ud800", "\u2028")
"""What a value is replaced by; the last but one is half of a surrogate pair, which UTF-8 can't hold."""


def mutated(path: Path, draw: random.Random) -> tuple[str, bytes]:
    """(what was done, the content of ``path`` after it).  Half of the changes to JSON and YAML are to their values."""
    data = path.read_bytes()
    if path.suffix != ".txt" and draw.random() < 0.5:
        return _of_header(data, draw) if path.suffix == ".safetensors" else _of_values(path, data, draw)
    kind = draw.choice(list(BYTES))
    return kind, BYTES[kind](data, draw)


def _flipped(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(min(len(data), draw.randint(1, 8))):
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _spliced(data: bytes, draw: random.Random, between: bytes | None) -> bytes:
    """``data`` with a part of it replaced by ``between``; None: by that part twice."""
    start, end = sorted((draw.randint(0, len(data)), draw.randint(0, len(data))))
    return data[:start] + (data[start:end] * 2 if between is None else between) + data[end:]


def _inserted(data: bytes, draw: random.Random, what: bytes) -> bytes:
    at = draw.randint(0, len(data))
    return data[:at] + what + data[at:]


# ---------------------------------------------------------------- values


def _of_values(path: Path, data: bytes, draw: random.Random) -> tuple[str, bytes]:
    text = data.decode("utf-8")
    if path.suffix in (".yaml", ".yml"):
        import yaml

        kind, value = changed(yaml.safe_load(text), draw)
        text = yaml.safe_dump(value, allow_unicode=True).replace(DEEP, "[" * 5000 + "]" * 5000)
        return kind, text.encode("utf-8", errors="surrogatepass")
    if path.suffix == ".jsonl":
        lines = text.splitlines()
        at = draw.randrange(len(lines))
        kind, value = changed(json.loads(lines[at]), draw)
        lines[at] = _json(value, None, draw)
        return kind, ("\n".join(lines) + "\n").encode("utf-8", errors="surrogatepass")
    kind, value = changed(json.loads(text), draw)
    return kind, _json(value, 2, draw).encode("utf-8", errors="surrogatepass")


def _json(value: Any, indent: int | None, draw: random.Random) -> str:
    text = json.dumps(value, indent=indent, ensure_ascii=draw.random() < 0.5)
    return text.replace(f'"{DEEP}"', "[" * 5000 + "]" * 5000)


DEEP = "a value in 5000 lists"


def changed(value: Any, draw: random.Random) -> tuple[str, Any]:
    """(what was done, ``value`` with one place in it changed)."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return "replaced", draw.choice(VALUES)
    holder, key = draw.choice(places)
    kind = draw.choice(("removed", "renamed", "replaced", "replaced", "replaced", "list or dict", "doubled", "deep"))
    if kind == "removed" or kind == "renamed" and isinstance(holder, list):
        del holder[key]
        return "removed", value
    if kind == "renamed":
        holder[draw.choice((key.upper(), f"{key}_", "", "x")) if isinstance(key, str) else "x"] = holder.pop(key)
    elif kind == "replaced":
        holder[key] = draw.choice(VALUES)
    elif kind == "list or dict":
        holder[key] = _other_kind(holder[key])
    elif kind == "doubled":
        holder[key] = [holder[key], holder[key]]
    else:
        holder[key] = DEEP
    return kind, value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(holder, key or index) of everything inside ``value``."""
    found: list[tuple[Any, Any]] = []
    rest = [value]
    while rest:
        holder = rest.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        found += [(holder, key) for key in keys]
        rest += [holder[key] for key in keys]
    return found


def _other_kind(value: Any) -> Any:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list):
        return {str(i): item for i, item in enumerate(value)}
    return {"value": value}


def _of_header(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """A safetensors file whose header, a JSON object behind its length, is changed; the length fits, or does not."""
    size = int.from_bytes(data[:8], "little")
    kind, header = changed(json.loads(data[8:8 + size]), draw)
    text = _json(header, None, draw).encode("utf-8", errors="surrogatepass")
    length = draw.choice((len(text), len(text), len(text), 0, 2 ** 63, len(text) + 1))
    return f"header {kind}", length.to_bytes(8, "little") + text + data[8 + size:]
