"""Reports from result files: a pure function of result folders.

    python -m foresight_eval.report DIR [DIR ...]                     # a table of them in the terminal
    python -m foresight_eval.report DIR [DIR ...] --out_dir report    # and report/index.html, tables, figures

Where results of a policy with K fixed at 0 and at K_max are among them, its other results get their
normalized budget (column NB).  The report compares every result with --baseline on the games that both
played.  --out_dir gets index.html (one page of everything with every trajectory, for a browser, without
server or network), report.md, report.tex, one CSV a table, and figures/*.svg and *.pdf.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foresight_eval.report import tables
from foresight_eval.results import Result, read_config, read_results
from foresight_eval.same_games import check_same_games
from foresight_eval.summary import write_summary
from itp.config import complete, flag, from_args, make_parser
from itp.errors import UserError
from itp.files import check_output_folder, read_object, write_atomic
from itp.program import say_next

FIDELITY_FILE = "--fidelity takes files of world_model.fidelity --out_json; delete one that is cut, and measure again"


@dataclass
class ReportSettings:
    out_dir: str = flag("", help="folder for the page, the tables and the figures")
    baseline: str = flag("", help="name of the result that the others are compared with; default: the first")
    fidelity: str = flag("", help="figures of world models to show too: files of world_model.fidelity --out_json, "
                                  "comma-separated")
    allow_mixed: bool = flag(False, help="compare results of different panels or games, too: on the games of both")


def overview(results: Sequence[Result]) -> str:
    """One row a result folder; for ScienceWorld then a row for each task; SR@k where games were played repeatedly.

    Panels are named below.
    """
    shown = [tables.overview(results)]
    if tables.graded(results):
        shown += [tables.success(results), tables.scores(results)]
    if tables.tried_again(results):
        shown.append(tables.success_within(results))
    return "\n\n".join([*map(tables.terminal, shown), *panels(results)])


def panels(results: Sequence[Result]) -> list[str]:
    """A line for each panel that was played."""
    played = dict.fromkeys(result.panel for result in results if result.panel)
    of = {panel: ", ".join(result.name for result in results if result.panel == panel) for panel in played}
    return [f"panel {panel}" + f": {names}" * (len(played) > 1) for panel, names in of.items()]


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
    write_atomic(out / "index.html", page.render(results, all_tables, figures, baseline))


def main() -> None:
    parser = make_parser(ReportSettings, prog="python -m foresight_eval.report", description=__doc__,
                         positional="DIR [DIR ...] ")
    parser.add_argument("folders", nargs="+", metavar="DIR", type=Path, help="result folders")
    complete(parser)
    args = parser.parse_args()
    settings = from_args(ReportSettings, args)
    fidelity = read_fidelity(settings)
    if settings.out_dir:
        check_output_folder(settings.out_dir)
    for folder in args.folders:  # before anything is written: models and games have a config.json, too
        read_config(folder)
    for folder in args.folders:
        write_summary(folder)
    results = read_results(args.folders)
    check_same_games(results, allow_mixed=settings.allow_mixed)
    print(overview(results))
    baseline = find_baseline(results, settings.baseline)
    if len(results) > 1:
        compared = [tables.comparison(results, baseline)]
        if tables.tried_again(results):
            compared.append(tables.comparison_within(results, baseline))
        for table in compared:
            print(f"\n{table.title}\n{tables.terminal(table)}")
    if settings.out_dir:
        write_report(results, baseline, fidelity, Path(settings.out_dir))
        print(f"\nreport: {Path(settings.out_dir) / 'index.html'}")
    else:
        say_next("the same command with --out_dir DIR writes a page with every game, decision and imagined step")


def read_fidelity(settings: ReportSettings) -> list[dict[str, Any]]:
    """The files that ``--fidelity`` names.  Raises UserError where one holds no figures of world models."""
    if settings.fidelity and not settings.out_dir:
        raise UserError(f"--fidelity {settings.fidelity}: its figures are drawn in the report; give --out_dir, too")
    return [_figures_of(Path(path)) for path in settings.fidelity.split(",") if path]


def _figures_of(path: Path) -> dict[str, Any]:
    found = read_object(path, {"models": dict}, FIDELITY_FILE)
    if not found["models"] or not all(map(_has_figures, found["models"].values())):
        raise UserError(f"{path}: no figures of world models; {FIDELITY_FILE}")
    return found


def _has_figures(model: Any) -> bool:
    """Whether these are the figures of a world model: by depth, for each actor, with their intervals."""
    if not isinstance(model, dict) or not isinstance(model.get("by_depth"), dict):
        return False
    rows = [(depth, row) for by in model["by_depth"].values() for depth, row in
            (by.items() if isinstance(by, dict) else [("", by)])]
    return all(depth.isdecimal() and isinstance(row, dict) and isinstance(row.get("fact_f1"), (int, float))
               and isinstance(row.get("fact_f1_interval"), list) and len(row["fact_f1_interval"]) == 2
               and all(isinstance(end, (int, float)) for end in row["fact_f1_interval"]) for depth, row in rows)


def find_baseline(results: Sequence[Result], name: str) -> Result:
    """The result called ``name``, or the first."""
    if not name:
        return results[0]
    for result in results:
        if result.name == name:
            return result
    raise UserError(f"--baseline {name!r}: give one of {', '.join(result.name for result in results)}")
