"""Is a file the record of a finished game?  A cut or foreign one is refused in a line that says which file to delete.

Only what older versions wrote, too, is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from itp.errors import UserError
from itp.files import read_object
from itp.text.state import parse

PLAY_AGAIN = "delete it, and the same command plays this game again"
NUMBER = (int, float)
META: dict[str, Any] = {
    "game_id": str, "split": str, "task_type": str, "success": bool, "score": NUMBER, "reward": NUMBER, "steps": int,
    "terminate_reason": str, "unparsed_actions": int, "restarts": int, "usage": dict}
STEP: dict[str, Any] = {
    "action": str, "obs_next": str, "k": int, "invalid": bool, "imagined_actions": list, "wm_raw_output": list,
    "thought": str, "reflection": str, "k_raw_output": str, "k_logprobs": list, "value": (*NUMBER, type(None)),
    "info": dict}
USAGE = {"calls": int, "prompt_tokens": int, "completion_tokens": int}
CONSIDERED = {"action": str, "value": NUMBER, "tries": int}
LATER: dict[str, Any] = {"golden_steps": (int, type(None)), "best_score": NUMBER}
"""Fields of ``meta`` that older results lack."""


def read_record(path: Path) -> dict[str, Any]:
    """The record of a finished game.  Raises UserError."""
    record = read_object(path, {"meta": dict, "conversations": list, "foresight_steps": list}, PLAY_AGAIN)
    if fault := _fault(record):
        raise UserError(f"{path}: not the record of a game ({fault}); {PLAY_AGAIN}")
    return record


def _fault(record: dict[str, Any]) -> str:
    """What is wrong with a record; empty where nothing is."""
    if fault := _wrong(record["meta"], META, "meta."):
        return fault
    meta, steps = record["meta"], record["foresight_steps"]
    there = {name: kind for name, kind in LATER.items() if name in meta}
    if fault := _wrong(meta, there, "meta.") or _wrong_usage(meta["usage"], "meta."):
        return fault
    for t, step in enumerate(steps):
        if fault := _wrong(step, STEP, "") or _wrong_step(step):
            return f"step {t}: {fault}"
    if meta["steps"] < len(steps):
        return f"{len(steps)} steps, and meta.steps is {meta['steps']}"
    return _unreadable_start(record["conversations"])


def _wrong_step(step: dict[str, Any]) -> str:
    """What is wrong inside the fields of a step; empty where nothing is."""
    imagined, seen = step["imagined_actions"], step["wm_raw_output"]
    if len(imagined) != len(seen) or not all(isinstance(text, str) for text in (*imagined, *seen)):
        return "no usable imagined_actions and wm_raw_output"
    if not all(isinstance(logprob, NUMBER) for logprob in step["k_logprobs"]):
        return "no usable k_logprobs"
    considered = step.get("considered", [])
    if not isinstance(considered, list):
        return "no usable considered"
    return _wrong(step["info"], {"seconds": NUMBER}, "info.") or _wrong_usage(step.get("usage", {}), "") or next(
        filter(None, (_wrong(one, CONSIDERED, "considered.") for one in considered)), "")


def _wrong_usage(usage: Any, where: str) -> str:
    """What is wrong in what was asked of each model."""
    if not isinstance(usage, dict):
        return f"no usable {where}usage"
    for role, spent in usage.items():
        if fault := _wrong(spent, USAGE | dict.fromkeys(spent if isinstance(spent, dict) else (), NUMBER),
                           f"{where}usage.{role}."):
            return fault
    return ""


def _wrong(value: Any, fields: Mapping[str, Any], where: str = "") -> str:
    """The first of ``fields`` that ``value`` hasn't in its type; empty where it has them all."""
    if not isinstance(value, dict):
        return f"{where or 'all of it '}isn't named fields"
    for name, kind in fields.items():
        if name not in value or not isinstance(value[name], kind) or isinstance(value[name], bool) and kind is not bool:
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
