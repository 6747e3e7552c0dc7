"""Tables from result files: a pure function of a result folder.

``python -m foresight_eval.report DIR [DIR ...]`` prints them side by side.  Where results of a policy with K
fixed at 0 and at K_max are among them, its other results get their normalised budget (column NB).
"""

from __future__ import annotations

import csv
import io
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from foresight_eval.cost import summarize_cost
from foresight_eval.results import read_episodes
from itp.games import ALFWORLD_TASK_TYPES
from itp.runtime import UserError, read_json, run_main, write_atomic, write_json

BUCKETS = ("Pick", "Look", "Clean", "Heat", "Cool", "Pick2")


def bucket(task_type: str) -> str:
    """The column that a task type is counted in: ALFWorld's by the paper's names, ScienceWorld's tasks as they are."""
    if task_type not in ALFWORLD_TASK_TYPES:
        return task_type
    if task_type.startswith("pick_two_obj"):
        return "Pick2"
    for part, name in (("clean", "Clean"), ("heat", "Heat"), ("cool", "Cool")):
        if part in task_type:
            return name
    return "Look" if task_type.startswith("look") else "Pick"


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % Wilson score interval of a success rate."""
    if n == 0:
        return 0.0, 1.0
    p, zz = successes / n, z * z
    centre = (p + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def buckets_of(metas: list[dict[str, Any]]) -> list[str]:
    """The columns of a result folder: ALFWorld's, or the tasks of ScienceWorld that were played."""
    found = {bucket(meta["task_type"]) for meta in metas}
    return list(BUCKETS) if found <= set(BUCKETS) else sorted(found)


def mean_interval(values: list[float], z: float = 1.959964) -> tuple[float, float]:
    """A 95 % interval of a mean score in [0, 100], by the normal approximation."""
    n, mean = len(values), sum(values) / len(values)
    half = z * math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, n - 1) / n)
    return max(0.0, mean - half), min(100.0, mean + half)


def _scores(metas: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean final score, its interval, and the mean of the best score on the way."""
    scores = [meta["score"] for meta in metas]
    return {"n": len(metas), "score": _mean(scores), "interval": mean_interval(scores),
            "best_score": _mean([meta["best_score"] for meta in metas])}


def summarize(folder: Path) -> dict[str, Any]:
    """``summary.json`` of a result folder: success by task type with intervals, k, invalid actions, cost."""
    records = read_episodes(folder)
    metas = [record["meta"] for record in records.values()]
    counts = Counter(bucket(meta["task_type"]) for meta in metas)
    successes = Counter(bucket(meta["task_type"]) for meta in metas if meta["success"])
    n, won, columns = len(metas), sum(successes.values()), buckets_of(metas)
    scored = [meta for meta in metas if "best_score" in meta]
    steps = [step for record in records.values() for step in record["foresight_steps"]]
    return {
        "buckets": columns,
        "counts": {b: counts[b] for b in columns},
        "success": {b: successes[b] for b in columns},
        "rates": {b: successes[b] / counts[b] if counts[b] else None for b in columns},
        "intervals": {b: wilson(successes[b], counts[b]) for b in columns if counts[b]},
        "scores": {b: _scores([m for m in scored if bucket(m["task_type"]) == b])
                   for b in columns if scored and counts[b]},
        "overall_score": _scores(scored) if scored else None,
        "endings": dict(sorted(Counter(meta["terminate_reason"] for meta in metas).items())),
        "overall": {"n": n, "success": won, "rate": won / n if n else None, "interval": wilson(won, n)},
        "steps_per_episode": _mean([meta["steps"] for meta in metas]),
        "invalid_action_rate": _mean([step["invalid"] for step in steps]),
        "unparsed_actions": sum(meta["unparsed_actions"] for meta in metas),
        "mean_k": _mean([step["k"] for step in steps]),
        "k_histogram": {str(k): c for k, c in sorted(Counter(step["k"] for step in steps).items())},
        "cost": summarize_cost(folder, list(records.values())),
        "restarts": sum(meta["restarts"] for meta in metas),
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def write_summary(folder: Path) -> dict[str, Any]:
    """Write ``summary.json``, ``summary.csv`` and ``log.txt`` of a result folder, and return the first."""
    summary = summarize(folder)
    write_json(folder / "summary.json", summary)
    rates = [summary["rates"][b] for b in summary["buckets"]] + [summary["overall"]["rate"]]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([*summary["buckets"], "All"])
    writer.writerow(["" if rate is None else f"{100 * rate:.2f}" for rate in rates])
    if summary["scores"]:  # a second row: the mean scores
        scores = [summary["scores"][b]["score"] for b in summary["buckets"]] + [summary["overall_score"]["score"]]
        writer.writerow([f"{score:.2f}" for score in scores])
    write_atomic(folder / "summary.csv", table.getvalue())
    write_atomic(folder / "log.txt", "".join(log_line(i, r["meta"]) + "\n" for i, r in read_episodes(folder).items()))
    return summary


def log_line(index: int, meta: dict[str, Any]) -> str:
    return (f"[TaskResult] id={index} success={meta['success']} steps={meta['steps']} "
            f"terminate_reason={meta['terminate_reason']} reward={meta['reward']:g}")


def normalised_budget(tokens: float, at_zero: float, at_max: float) -> float | None:
    """NB = (T̄ − T̄(0)) / (T̄(K_max) − T̄(0)), with T̄ the mean tokens an episode of policy and world model together.

    T̄(k) is that of the same policy with K fixed at k.  None where imagining costs nothing.
    """
    return (tokens - at_zero) / (at_max - at_zero) if at_max > at_zero else None


SAME_GAMES = ("policy_fingerprint", "split", "max_steps", "action_selection", "tasks", "variations", "pairs",
              "simplification", "max_steps_override", "env_step_limit")
"""Settings by which two results are those of the same policy on the same games; not every program has all."""


def budgets(folders: list[Path]) -> list[float | None]:
    """The normalised budget of each result folder; None where the two results that it needs aren't among them.

    A result is measured against those of the same policy on the same games.
    """
    if len(folders) == 1:
        return [None]
    tokens = [read_json(folder / "summary.json")["cost"]["tokens_per_episode"] for folder in folders]
    configs = [read_json(folder / "config.json")["config"] for folder in folders]
    same = [tuple(config.get(name) for name in SAME_GAMES) for config in configs]
    ends: dict[tuple, dict[int, float]] = {}
    for key, config, spent in zip(same, configs, tokens, strict=True):
        fixed = 0 if config["method"] == "sft" or config["disable_wm"] else config["fixed_k"]
        if fixed >= 0:
            ends.setdefault(key, {})[fixed] = spent
    return [normalised_budget(spent, ends[key][0], ends[key][max(ends[key])])
            if len(ends.get(key, {})) > 1 and 0 in ends[key] else None
            for key, spent in zip(same, tokens, strict=True)]


def table(folders: list[Path]) -> str:
    """Success in percent by task type, one row a result folder; for ScienceWorld then a row for each task."""
    summaries = [read_json(folder / "summary.json") for folder in folders]
    scored = any(summary["scores"] for summary in summaries)
    columns = [] if scored else list(BUCKETS)
    rows = [["", *columns, "All", "95 %", *(["score", "95 %"] if scored else []), "n", "invalid", "mean k",
             "calls/step", "tokens/ep", "NB", "p50 s"]]
    for folder, summary, budget in zip(folders, summaries, budgets(folders), strict=True):
        overall = summary["overall"]
        low, high = overall["interval"]
        rows.append([
            folder.name,
            *(_percent(summary["rates"][b]) for b in columns),
            _percent(overall["rate"]),
            f"{100 * low:.0f}-{100 * high:.0f}",
            *(_score(summary["overall_score"]) if scored else []),
            str(overall["n"]),
            _percent(summary["invalid_action_rate"]),
            f"{summary['mean_k']:.2f}",
            f"{_calls_per_step(summary['cost']):.1f}",
            f"{summary['cost']['tokens_per_episode']:.0f}",
            "-" if budget is None else f"{budget:.2f}",
            f"{summary['cost']['decision_seconds']['p50']:.2f}",
        ])
    return _aligned(rows) + ("\n\n" + task_table(folders, summaries) if scored else "")


def task_table(folders: list[Path], summaries: list[dict[str, Any]]) -> str:
    """ScienceWorld by task: success in percent and mean score of each result folder."""
    tasks = sorted({task for summary in summaries for task in summary["scores"]})
    rows = [["", *(cell for folder in folders for cell in (folder.name, "score", "n"))]]
    for task in tasks:
        row = [task]
        for summary in summaries:
            score = summary["scores"].get(task)
            row += [_percent(summary["rates"][task]), f"{score['score']:.1f}", str(score["n"])] if score else ["-"] * 3
        rows.append(row)
    return _aligned(rows)


def _score(scores: dict[str, Any] | None) -> list[str]:
    """Mean score and interval as cells."""
    return [f"{scores['score']:.1f}", "{:.0f}-{:.0f}".format(*scores["interval"])] if scores else ["-", "-"]


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(row) for row in cells)


def _calls_per_step(cost: dict[str, Any]) -> float:
    """Of both models together."""
    return sum(cost[role]["calls_per_step"] for role in ("policy", "world_model") if role in cost)


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.1f}"


def main() -> None:
    folders = [Path(arg) for arg in sys.argv[1:]]
    if not folders or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return
    for folder in folders:
        if not (folder / "config.json").exists():
            raise UserError(f"{folder}: not a result folder (no config.json)")
        write_summary(folder)
    print(table(folders))


if __name__ == "__main__":
    run_main(main)
