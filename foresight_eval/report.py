"""Reports from result files: a pure function of result folders.

    python -m foresight_eval.report DIR [DIR ...]                     # a table of them in the terminal
    python -m foresight_eval.report DIR [DIR ...] --out_dir report    # and report/index.html, tables, figures

Where results of a policy with K fixed at 0 and at K_max are among them, its other results get their
normalised budget (column NB).  The report compares every result with --baseline on the games that both
played.  --out_dir gets index.html (one page of everything with every trajectory, for a browser, without
server or network), report.md, report.tex, one CSV a table, and figures/*.svg and *.pdf.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foresight_eval import tables
from foresight_eval.cost import measured_cost, summarize_cost
from foresight_eval.results import BUCKETS, Result, bucket, read_episodes, read_results
from foresight_eval.statistics import mean, mean_interval, wilson
from itp.config import add_flags, flag, from_args
from itp.runtime import UserError, read_json, run_main, write_atomic, write_json


@dataclass
class Settings:
    out_dir: str = flag("", help="folder for the page, the tables and the figures")
    baseline: str = flag("", help="name of the result that the others are compared with; default: the first")
    fidelity: str = flag("", help="figures of world models to show too: files of world_model.fidelity --out_json, "
                                  "comma-separated")


def buckets_of(metas: list[dict[str, Any]]) -> list[str]:
    """The columns of a result folder: ALFWorld's, or the tasks of ScienceWorld that were played."""
    found = {bucket(meta["task_type"]) for meta in metas}
    return list(BUCKETS) if found <= set(BUCKETS) else sorted(found)


def _scores(metas: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean final score, its interval, and the mean of the best score on the way."""
    scores = [meta["score"] for meta in metas]
    return {"n": len(metas), "score": mean(scores), "interval": mean_interval(scores),
            "best_score": mean([meta["best_score"] for meta in metas])}


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
        "steps_per_episode": mean([meta["steps"] for meta in metas]),
        "invalid_action_rate": mean([step["invalid"] for step in steps]),
        "unparsed_actions": sum(meta["unparsed_actions"] for meta in metas),
        # Not in results of before it was counted.
        "cut_predictions": sum(meta["usage"].get("world_model", {}).get("cut", 0) for meta in metas),
        "mean_k": mean([step["k"] for step in steps]),
        "k_histogram": {str(k): c for k, c in sorted(Counter(step["k"] for step in steps).items())},
        "cost": summarize_cost(list(records.values())),
        "restarts": sum(meta["restarts"] for meta in metas),
    }


def write_summary(folder: Path) -> dict[str, Any]:
    """Write ``summary.json``, ``cost.json``, ``summary.csv`` and ``log.txt`` of a result folder; return the first."""
    summary = summarize(folder)
    write_json(folder / "summary.json", summary)
    write_json(folder / "cost.json", measured_cost(folder, list(read_episodes(folder).values())))
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


def table(folders: Sequence[Path]) -> str:
    """What the terminal shows of some result folders."""
    return overview(read_results(folders))


def overview(results: Sequence[Result]) -> str:
    """One row a result folder; for ScienceWorld then a row for each task."""
    shown = [tables.overview(results)]
    if tables.graded(results):
        shown += [tables.success(results), tables.scores(results)]
    return "\n\n".join(map(tables.terminal, shown))


def write_report(results: Sequence[Result], baseline: Result, fidelity: Sequence[dict[str, Any]], out: Path) -> None:
    """Write the page, the tables and the figures of some results into ``out``."""
    from foresight_eval import page, plots

    figures = plots.draw(results, fidelity)
    all_tables = tables.all_tables(results, baseline)
    for made in all_tables:
        write_atomic(out / f"{made.name}.csv", tables.to_csv(made))
    write_atomic(out / "report.md", "\n".join(map(tables.markdown, all_tables)))
    write_atomic(out / "report.tex", "\n".join(map(tables.latex, all_tables)))
    for figure in figures:
        figure.save(out / "figures")
    write_atomic(out / "index.html", page.render(results, all_tables, figures))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m foresight_eval.report", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="DIR", type=Path, help="result folders")
    add_flags(parser, Settings)
    args = parser.parse_args()
    settings = from_args(Settings, args)
    for folder in args.folders:
        config = folder / "config.json"  # before anything is written: models and games have one, too
        if not config.exists() or "method" not in read_json(config).get("config", {}):
            raise UserError(f"{folder}: not a result folder (no config.json of an evaluation); give what --output_path "
                            "named")
        write_summary(folder)
    results = read_results(args.folders)
    print(overview(results))
    baseline = find_baseline(results, settings.baseline)
    if len(results) > 1:
        compared = tables.comparison(results, baseline)
        print(f"\n{compared.title}\n{tables.terminal(compared)}")
    if settings.out_dir:
        fidelity = [read_json(path) for path in settings.fidelity.split(",") if path]
        write_report(results, baseline, fidelity, Path(settings.out_dir))
        print(f"\nreport: {Path(settings.out_dir) / 'index.html'}")


def find_baseline(results: Sequence[Result], name: str) -> Result:
    """The result called ``name``, or the first."""
    if not name:
        return results[0]
    for result in results:
        if result.name == name:
            return result
    raise UserError(f"--baseline {name!r}: give one of {', '.join(result.name for result in results)}")


if __name__ == "__main__":
    run_main(main)
