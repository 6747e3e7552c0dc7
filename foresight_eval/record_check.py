"""Is a file the record of a finished episode?  A cut or foreign one is refused in a line that says what to delete.

Only what older versions wrote, too, is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from itp.errors import UserError
from itp.files import Fields, checked_object, read_object
from itp.text.state import parse

PLAY_AGAIN = "delete it, and the same command plays this game again"
NUMBER = (int, float)
RECORD: Fields = {"meta": dict, "conversations": list, "foresight_steps": list}
META: Fields = {
    "game_id": str, "split": str, "task_type": str, "success": bool, "score": NUMBER, "reward": NUMBER, "steps": int,
    "terminate_reason": str, "unparsed_actions": int, "restarts": int, "usage": dict}
LATER: Fields = {"golden_steps": (int, type(None)), "best_score": NUMBER, "trial": int, "game_hash": str}
"""Fields of ``meta`` that older results, first trials, and those of the other environment, lack."""
LOOK_BACK: Fields = {"note": str, "usage": dict}
STEP: Fields = {
    "action": str, "obs_next": str, "k": int, "invalid": bool, "imagined_actions": list, "wm_raw_output": list,
    "thought": str, "reflection": str, "k_raw_output": str, "k_logprobs": list, "value": (*NUMBER, type(None)),
    "info": dict}
USAGE: Fields = {"calls": int, "prompt_tokens": int, "completion_tokens": int}
REVISION: Fields = {"draft": str, "action": str, "margin": NUMBER, "taken": bool}
CONSIDERED: Fields = {"action": str, "value": NUMBER, "tries": int}


def read_record(path: Path) -> dict[str, Any]:
    """The record of a finished episode.  Raises UserError."""
    record = read_object(path, RECORD, PLAY_AGAIN)
    meta, steps = record["meta"], record["foresight_steps"]
    there = {name: kind for name, kind in LATER.items() if name in meta}
    checked_object(meta, f"{path}: meta", {**META, **there}, PLAY_AGAIN)
    _check_usage(meta["usage"], f"{path}: meta.usage")
    for t, step in enumerate(steps):
        _check_step(step, f"{path}: step {t}")
    if meta["steps"] < len(steps):
        raise UserError(f"{path}: {len(steps)} steps, and meta.steps is {meta['steps']}; {PLAY_AGAIN}")
    _check_start(record["conversations"], path)
    if "look_back" in record:
        said = checked_object(record["look_back"], f"{path}: look_back", LOOK_BACK, PLAY_AGAIN)
        _check_usage(said["usage"], f"{path}: look_back.usage")
    return record


def _check_step(step: Any, where: str) -> None:
    """Raises UserError for what reports can't read."""
    checked_object(step, where, STEP, PLAY_AGAIN)
    checked_object(step["info"], f"{where}: info", {"seconds": NUMBER}, PLAY_AGAIN)
    imagined, seen = step["imagined_actions"], step["wm_raw_output"]
    if len(imagined) != len(seen) or not all(isinstance(text, str) for text in (*imagined, *seen)):
        raise UserError(f"{where}: no pairs of imagined_actions and wm_raw_output; {PLAY_AGAIN}")
    if not all(isinstance(logprob, NUMBER) for logprob in step["k_logprobs"]):
        raise UserError(f"{where}: k_logprobs aren't numbers; {PLAY_AGAIN}")
    _check_usage(step.get("usage", {}), f"{where}: usage")
    if "revision" in step:
        checked_object(step["revision"], f"{where}: revision", REVISION, PLAY_AGAIN)
    if not isinstance(step.get("considered", []), list):
        raise UserError(f"{where}: field 'considered' isn't a list; {PLAY_AGAIN}")
    for one in step.get("considered", []):
        checked_object(one, f"{where}: considered", CONSIDERED, PLAY_AGAIN)


def _check_usage(usage: Any, where: str) -> None:
    """Raises UserError where this isn't what was asked of each model."""
    for role, spent in checked_object(usage, where, {}, PLAY_AGAIN).items():
        checked_object(spent, f"{where}.{role}", USAGE, PLAY_AGAIN)
        checked_object(spent, f"{where}.{role}", dict.fromkeys(spent, NUMBER), PLAY_AGAIN)


def _check_start(turns: list[Any], path: Path) -> None:
    """Raises UserError where the first turn isn't a state."""
    for turn in turns[:1]:
        checked_object(turn, f"{path}: first turn", {"value": str}, PLAY_AGAIN)
        try:
            parse(turn["value"])
        except ValueError as error:
            raise UserError(f"{path}: first turn: not a state ({error}); {PLAY_AGAIN}") from error
