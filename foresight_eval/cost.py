"""What an evaluation cost: calls, tokens and waiting for each model, latency of a decision, throughput, memory.

Latency is that of one decision, from observation to action, while ``concurrency`` episodes share the models;
for that of an agent alone, evaluate with ``--concurrency 1``.  Throughput and memory are those of the sessions on
record in ``timing.jsonl``, one line for every time that the program ran (a killed one leaves none).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foresight_eval.statistics import percentile
from itp.devices import peak_memory
from itp.errors import UserError
from itp.files import append_row, checked_object, read_appended
from itp.run_dir import TIMING

COUNTS = ("calls", "prompt_tokens", "completion_tokens")
MEASURED = ("cached_tokens", "seconds")
MEND = "mend or remove the line"


def summarize_cost(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The ``cost`` of ``summary.json``: calls and tokens.  They don't depend on the machine.

    By model, an episode and a step on average; tokens together are those asked for, cached ones included.
    """
    cost = _means(records, COUNTS)
    cost["tokens_per_episode"] = sum(
        role["prompt_tokens_per_episode"] + role["completion_tokens_per_episode"] for role in cost.values())
    return cost


def measured_cost(folder: Path, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """``cost.json``: the same with the time and memory measured on this machine.

    Seconds by model are those that episodes waited for that model.
    """
    cost = summarize_cost(records)
    for role, means in _means(records, MEASURED).items():
        cost[role] |= means
    seconds = [step["info"]["seconds"] for record in records for step in record["foresight_steps"]]
    cost["decision_seconds"] = {f"p{q}": percentile(seconds, q) for q in (50, 95, 99)}
    sessions = _sessions(folder / TIMING)
    # Processes that shared the games ran side by side, each with a line of its own.
    hours = sum(session["seconds"] / session["processes"] for session in sessions) / 3600
    cost["episodes_per_hour"] = sum(session["episodes"] for session in sessions) / hours if hours else None
    devices = {device for session in sessions for device in session["peak_memory_bytes"]}
    cost["peak_memory_bytes"] = {
        device: max(session["peak_memory_bytes"].get(device, 0) for session in sessions) for device in sorted(devices)}
    return cost


def _sessions(path: Path) -> list[dict[str, Any]]:
    """The sessions on record.  Raises UserError for a line that isn't one."""
    fields = {"seconds": (int, float), "processes": int, "episodes": int, "peak_memory_bytes": dict}
    sessions = read_appended(path, fields)
    for number, session in enumerate(sessions, start=1):
        memory = session["peak_memory_bytes"]
        where = f"{path}: session {number}: peak_memory_bytes"
        checked_object(memory, where, dict.fromkeys(memory, (int, float)), MEND)
        if session["processes"] < 1:
            raise UserError(f"{path}: session {number}: processes is {session['processes']}; {MEND}")
    return sessions


def _means(records: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """Means an episode and a step, by model."""
    metas = [record["meta"] for record in records]
    steps = sum(meta["steps"] for meta in metas)
    means: dict[str, Any] = {}
    for role in sorted({role for meta in metas for role in meta["usage"]}):
        total = {name: sum(meta["usage"].get(role, {}).get(name, 0) for meta in metas) for name in names}
        means[role] = {f"{name}_per_episode": total[name] / len(metas) for name in names}
        means[role] |= {f"{name}_per_step": total[name] / steps if steps else 0.0 for name in names}
    return means


def record_session(folder: Path, *, episodes: int, steps: int, seconds: float, processes: int) -> None:
    """Add this process's figures to ``timing.jsonl``."""
    session = {"episodes": episodes, "steps": steps, "seconds": round(seconds, 3), "processes": processes,
               "peak_memory_bytes": peak_memory()}
    append_row(folder / TIMING, session)
