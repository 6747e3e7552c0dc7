"""Reports from result files: a pure function of result folders.

    python -m foresight_eval.report DIR [DIR ...]                     # a table of them in the terminal
    python -m foresight_eval.report DIR [DIR ...] --out_dir report    # and report/index.html, tables, figures

Where results of a policy with K fixed at 0 and at K_max are among them, its other results get their
normalized budget (column NB).  The report compares every result with --baseline on the games that both
played.  --out_dir gets index.html (one page of everything with every trajectory, for a browser, without
server or network), report.md, report.tex, one CSV a table, and figures/*.svg and *.pdf.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foresight_eval.report import tables
from foresight_eval.results import Result, read_results
from foresight_eval.summary import write_summary
from itp.config import add_flags, flag, from_args
from itp.errors import UserError
from itp.files import read_object, write_atomic

FIDELITY_FILE = "--fidelity takes files of world_model.fidelity --out_json"


@dataclass
class ReportSettings:
    out_dir: str = flag("", help="folder for the page, the tables and the figures")
    baseline: str = flag("", help="name of the result that the others are compared with; default: the first")
    fidelity: str = flag("", help="figures of world models to show too: files of world_model.fidelity --out_json, "
                                  "comma-separated")


def overview(results: Sequence[Result]) -> str:
    """One row a result folder; for ScienceWorld then a row for each task."""
    shown = [tables.overview(results)]
    if tables.graded(results):
        shown += [tables.success(results), tables.scores(results)]
    return "\n\n".join(map(tables.terminal, shown))


def write_report(results: Sequence[Result], baseline: Result, fidelity: Sequence[dict[str, Any]], out: Path) -> None:
    """Write the page, the tables and the figures of some results into ``out``."""
    from foresight_eval.report import page, plots

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
    add_flags(parser, ReportSettings)
    args = parser.parse_args()
    settings = from_args(ReportSettings, args)
    for folder in args.folders:
        config = folder / "config.json"  # before anything is written: models and games have one, too
        recorded = read_object(config).get("config") if config.exists() else None
        if not isinstance(recorded, dict) or "method" not in recorded:
            raise UserError(f"{folder}: not a result folder (no config.json of an evaluation); give what --out_dir "
                            "named")
        write_summary(folder)
    results = read_results(args.folders)
    print(overview(results))
    baseline = find_baseline(results, settings.baseline)
    if len(results) > 1:
        compared = tables.comparison(results, baseline)
        print(f"\n{compared.title}\n{tables.terminal(compared)}")
    if settings.out_dir:
        fidelity = [read_object(path, {"models": dict}, FIDELITY_FILE) for path in settings.fidelity.split(",") if path]
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
