"""The summary of one result folder: ``summary.json``, ``cost.json``, ``summary.csv`` and ``log.txt``."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foresight_eval.cost import measured_cost, summarize_cost
from foresight_eval.metrics import measure_all
from foresight_eval.results import BUCKETS, bucket, panel_of, read_trials
from foresight_eval.statistics import mean, mean_interval, wilson
from foresight_eval.trials import summarize_trials
from itp.files import write_atomic, write_json
from itp.run_dir import RECORD, recorded


def buckets_of(metas: list[dict[str, Any]]) -> list[str]:
    """The columns of a result folder: ALFWorld's, or the tasks of ScienceWorld that were played."""
    found = {bucket(meta["task_type"]) for meta in metas}
    return list(BUCKETS) if found <= set(BUCKETS) else sorted(found)


def _scores(metas: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean final score, its interval, and the mean of the best score on the way."""
    scores = [meta["score"] for meta in metas]
    return {"n": len(metas), "score": mean(scores), "interval": mean_interval(scores),
            "best_score": mean([meta["best_score"] for meta in metas])}


def _revisions(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the method chose a second time: the shares of decisions where that was another action, and was executed."""
    made = [step["revision"] for step in steps if "revision" in step]
    if not made:
        return {}
    return {"revisions": {"decisions": len(made), "other_action": mean([r["action"] != r["draft"] for r in made]),
                          "taken": mean([r["taken"] for r in made])}}


def summarize(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """``summary.json`` of some episodes: success by task type with intervals, metrics, cost."""
    metas = [record["meta"] for record in records]
    counts = Counter(bucket(meta["task_type"]) for meta in metas)
    successes = Counter(bucket(meta["task_type"]) for meta in metas if meta["success"])
    n, won, columns = len(metas), sum(successes.values()), buckets_of(metas)
    scored = [meta for meta in metas if "best_score" in meta]
    steps = [step for record in records for step in record["foresight_steps"]]
    measured = measure_all(records)
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
        "steps_per_episode": measured["steps_per_episode"]["value"],
        "invalid_action_rate": measured["invalid_action_rate"]["value"],
        "unparsed_actions": sum(meta["unparsed_actions"] for meta in metas),
        # Not in results of before it was counted.
        "cut_predictions": sum(meta["usage"].get("world_model", {}).get("cut", 0) for meta in metas),
        "shortened_prompts": sum(usage.get("shortened", 0) for meta in metas for usage in meta["usage"].values()),
        "mean_k": measured["mean_k"]["value"],
        "k_histogram": {str(k): c for k, c in sorted(Counter(step["k"] for step in steps).items())},
        **_revisions(steps),
        "metrics": measured,
        "cost": summarize_cost(records),
        "restarts": sum(meta["restarts"] for meta in metas),
    }


def write_summary(folder: Path) -> dict[str, Any]:
    """Write ``summary.json``, ``cost.json``, ``summary.csv`` and ``log.txt`` of a result folder; return the first.

    Its ``world_model`` says so where the game itself was the world model, and its ``panel`` names the panel of games;
    others have none.  Where games were played
    several times, its ``trials`` is of all trials (:mod:`foresight_eval.trials`), and everything else of the first.
    """
    trials = read_trials(folder)
    records = {index: each[0] for index, each in trials.items()}
    summary = summarize(list(records.values()))
    if (of_trials := summarize_trials(trials)) is not None:
        summary["trials"] = of_trials
    config = recorded(folder)["config"] if (folder / RECORD).is_file() else {}
    if world_model := config.get("world_model"):
        summary["world_model"] = world_model
    if panel := panel_of(config):
        summary["panel"] = panel
    write_json(folder / "summary.json", summary)
    write_json(folder / "cost.json", measured_cost(folder, list(records.values())))
    write_atomic(folder / "summary.csv", _csv(summary))
    write_atomic(folder / "log.txt", "".join(log_line(i, r["meta"]) + "\n" for i, each in trials.items() for r in each))
    return summary


def _csv(summary: dict[str, Any]) -> str:
    """Success in percent by task type and of all, then SR@k where games were played several times; the mean scores."""
    within = summary.get("trials", {}).get("success_within", {})
    rates = [summary["rates"][b] for b in summary["buckets"]] + [summary["overall"]["rate"]]
    rates += [figures["rate"] for figures in within.values()]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([*summary["buckets"], "All", *(f"SR@{k}" for k in within)])
    writer.writerow(["" if rate is None else f"{100 * rate:.2f}" for rate in rates])
    if summary["scores"]:  # a second row: the mean scores
        scores = [summary["scores"][b]["score"] for b in summary["buckets"]] + [summary["overall_score"]["score"]]
        writer.writerow([*(f"{score:.2f}" for score in scores), *[""] * len(within)])
    return table.getvalue()


def log_line(index: int, meta: dict[str, Any]) -> str:
    trial = f" trial={meta['trial']}" if meta.get("trial") else ""
    return (f"[TaskResult] id={index} success={meta['success']} steps={meta['steps']} "
            f"terminate_reason={meta['terminate_reason']} reward={meta['reward']:g}{trial}")
