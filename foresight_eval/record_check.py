"""Is a file the record of a finished game?  A cut or foreign one is refused in a line that says which file to delete.

Only what older versions wrote, too, is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from itp.errors import UserError
from itp.files import read_json
from itp.text.state import parse

NUMBER = (int, float)
META: dict[str, Any] = {
    "game_id": str, "split": str, "task_type": str, "success": bool, "score": NUMBER, "reward": NUMBER, "steps": int,
    "terminate_reason": str, "unparsed_actions": int, "restarts": int, "usage": dict}
STEP: dict[str, Any] = {
    "action": str, "obs_next": str, "k": int, "invalid": bool, "imagined_actions": list, "wm_raw_output": list,
    "thought": str, "reflection": str, "k_raw_output": str, "k_logprobs": list, "value": (*NUMBER, type(None)),
    "info": dict}
USAGE = {"calls": int, "prompt_tokens": int, "completion_tokens": int}


def read_record(path: Path) -> dict[str, Any]:
    """The record of a finished game.  Raises UserError."""
    try:
        record = read_json(path)
    except (UserError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not the record of a game, or cut ({error}); {_what_now(path)}") from error
    if fault := _fault(record):
        raise UserError(f"{path}: not the record of a game ({fault}); {_what_now(path)}")
    return record


def _what_now(path: Path) -> str:
    return f"delete {path.name}, and the evaluation's command plays that game again"


def _fault(record: Any) -> str:
    """What is wrong with a record; empty where nothing is."""
    parts = {"meta": dict, "conversations": list, "foresight_steps": list}
    if fault := _wrong(record, parts) or _wrong(record["meta"], META, "meta."):
        return fault
    meta, steps = record["meta"], record["foresight_steps"]
    for role, spent in meta["usage"].items():
        if fault := _wrong(spent, USAGE, f"meta.usage.{role}."):
            return fault
    for t, step in enumerate(steps):
        if fault := _wrong(step, STEP, f"step {t}: ") or _wrong(step["info"], {"seconds": NUMBER}, f"step {t}: info."):
            return fault
        if not len(step["imagined_actions"]) == len(step["wm_raw_output"]):
            return f"step {t}: other numbers of imagined actions and observations"
    if meta["steps"] != len(steps):
        return f"{len(steps)} steps, and meta.steps is {meta['steps']}"
    return _unreadable_start(record["conversations"])


def _wrong(value: Any, fields: Mapping[str, Any], where: str = "") -> str:
    """The first of ``fields`` that ``value`` hasn't in its type; empty where it has them all."""
    if not isinstance(value, dict):
        return f"{where or 'all of it '}isn't named fields"
    for name, kind in fields.items():
        if not isinstance(value.get(name), kind) or isinstance(value.get(name), bool) and kind is not bool:
            return f"no usable {where}{name}"
    return ""


def _unreadable_start(turns: list[Any]) -> str:
    if not turns:
        return ""
    if not isinstance(turns[0], dict) or not isinstance(turns[0].get("value"), str):
        return "its first turn has no text"
    try:
        parse(turns[0]["value"])
    except ValueError as error:
        return f"its first turn isn't a state: {error}"
    return ""
