"""The paper's experiments by command: runs all parts of one, and prints its figures beside the paper's.

    python scripts/experiment.py configs/experiments/lookahead.yaml
    python scripts/experiment.py configs/experiments/lookahead.yaml --max_games 12 --max_k 3 --dry_run
    python scripts/experiment.py configs/experiments/lookahead.yaml --help         its parameters

Models, games and sizes are parameters; their defaults are what scripts/quickstart.sh leaves in runs/quickstart.  Each
run is a process of its own, in a folder of its own: the same command goes on where it was.  A run that fails is named
at the end, and the others go on.  --dry_run prints the commands, which may also be started by hand, elsewhere or by
torchrun: what is finished is taken.  The result: result.md, result.json and figures/ in --out.
scripts/experiment_file.py says what such a file may hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import logging
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment_file import (
    TABLES, Experiment, Found, Run, Settings, Shown, chosen, fill, names_of, out_folder, plan, read_experiment,
)
from foresight_eval import tables
from foresight_eval.results import Result, read_results
from foresight_eval.settings import EvalSettings
from itp.config import add_flags, from_args
from itp.runtime import UserError, check_model_path, read_json, run_main, versions, write_atomic, write_json
from itp.transitions import read_rows
from world_model.fidelity import Settings as FidelitySettings

log = logging.getLogger("itp.experiment")
SHIPPED = Path(__file__).resolve().parents[1] / "configs/experiments"


def main() -> None:
    experiment, settings = parse(sys.argv[1:])
    all_runs = plan(experiment, settings)
    runs = chosen(all_runs, experiment, settings.only)
    if settings.dry_run:
        for run in runs:
            print(run.line)
        return
    check(runs)
    if experiment.figures and importlib.util.find_spec("matplotlib") is None:
        log.warning("the figures are left out: they need matplotlib; pip install 'itp[report]'")
    failed = [run for run in runs if execute(run) != 0]
    print(f"\n{show(experiment, settings, runs, failed)}")
    print(f"\nresult: {out_folder(experiment, settings) / 'result.md'}")
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed: {', '.join(run.title for run in failed)}; what "
                        "they said stands above; the same command goes on")


def parse(argv: Sequence[str]) -> tuple[Experiment, Settings]:
    """The experiment that the first word names, and its settings from the others."""
    if not argv or argv[0].startswith("-"):
        shipped = [read_experiment(str(path)) for path in sorted(SHIPPED.glob("*.yaml"))]
        print(f"{__doc__}\nconfigs/experiments:", *(f"  {found.name:16}{found.title}" for found in shipped), sep="\n")
        sys.exit(0 if argv else 2)
    experiment = read_experiment(argv[0])
    about = f"{experiment.title}.\n\n{textwrap.fill(experiment.paper, 120)}"
    parser = argparse.ArgumentParser(prog=f"python scripts/experiment.py {argv[0]}", description=about,
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser, experiment.settings)
    return experiment, from_args(experiment.settings, parser.parse_args(argv[1:]))


def check(runs: Sequence[Run]) -> None:
    """Refuse, before anything starts, what would stop a run at once: models and files that aren't there, say."""
    from foresight_eval.runner import check as check_evaluation

    made = {run.out for run in runs}
    for run in runs:
        if any(made.intersection(Path(str(value)).parents) for value in run.flags.values()):
            continue  # it uses what another run makes first
        try:
            if isinstance(run.settings, EvalSettings):
                check_evaluation(run.settings)
                continue
            judged = isinstance(run.settings, FidelitySettings)
            for model in (run.settings.wm_model if judged else run.settings.model_path).split(","):
                check_model_path(model)
            for file in (run.settings.transitions if judged else run.settings.data_path).split(","):
                if not Path(file).is_file():
                    raise UserError(f"{file}: no such file")
        except UserError as error:
            raise UserError(f"{run.title}: {error}; give others, or leave it out by --only") from error


def execute(run: Run) -> int:
    print(f"\n== {run.title}", flush=True)
    return subprocess.run([sys.executable, "-m", run.program, *run.arguments], check=False).returncode


# ---------------------------------------------------------------- the result


def find(experiment: Experiment, shown: Shown | None, runs: Sequence[Run], names: Mapping[str, Any]) -> Found:
    """What a table (None: all of them) is made of, as far as it is there."""
    needs = TABLES[shown.table][0] if shown else ("results", "models")
    results, models, metrics = [], {}, {}
    for part in experiment.parts.values():
        if shown and shown.part not in ("", part.name):
            continue
        mine = [run for run in runs if run.part == part.name and run.out.exists()]
        if part.gives == "results" and "results" in needs:
            results += [read_result(run) for run in mine if (run.out / "summary.json").is_file()]
        if part.gives == "models" and "models" in needs:
            models |= {run.name: next(iter(read_json(run.out)["models"].values())) for run in mine}
        if part.gives == "metrics" and "metrics" in needs:
            files = {name: Path(fill(file, names, experiment.name)) for name, file in part.runs.items()}
            metrics |= {name: read_metrics(file) for name, file in files.items()}
    return Found(results, models, metrics)


def read_result(run: Run) -> Result:
    return dataclasses.replace(read_results([run.out])[0], name=run.name)


def read_metrics(path: Path) -> dict[str, Any] | None:
    """``metrics.json`` of a training; of ``timing.jsonl``, the seconds of all its lines together."""
    if not path.is_file():
        return None
    if path.suffix == ".jsonl":
        return {"seconds": sum(row["seconds"] for _, row in read_rows(path))}
    return read_json(path)


def beside(table: tables.Table, shown: Shown, names: Mapping[str, Any]) -> tables.Table:
    """``table`` with the columns that are asked for, and then the paper's."""
    at = [0, *map(table.header.index, shown.columns)] if shown.columns else list(range(len(table.header)))
    header, rows = [table.header[i] for i in at], [[row[i] for i in at] for row in table.rows]
    for column, figures in shown.paper.items():
        digits = max(len(repr(figure).partition(".")[2]) for figure in figures.values())
        figures = {str(fill(row, names, column)): f"{figure:.{digits}f}" for row, figure in figures.items()}
        header.append(column)
        for row in rows:
            row.append(figures.get(row[0], "-"))
    return dataclasses.replace(table, title=shown.title or table.title, header=tuple(header),
                               rows=tuple(map(tuple, rows)))


def show(experiment: Experiment, settings: Settings, runs: Sequence[Run], failed: Sequence[Run] = ()) -> str:
    """Write the result; return what the terminal shows of it.

    Runs that ``failed`` are named, and left out of the figures: what lies in their folders may be of other parameters.
    """
    out, names = out_folder(experiment, settings), names_of(experiment, settings)
    finished = [run for run in runs if run not in failed]
    missing = [f"LEFT OUT, because they failed: {', '.join(run.title for run in failed)}."] if failed else []
    made = []
    for shown in experiment.tables:
        found = find(experiment, shown, finished, names)
        if any(getattr(found, need) for need in TABLES[shown.table][0]):
            made.append(beside(TABLES[shown.table][1](found), shown, names))
    figures = draw(experiment, finished, names, out)
    given = "\n".join(f"- {name}: {value}" for name, value in names.items())
    texts = [f"# {experiment.title}\n", f"{experiment.paper}\n", *(f"**{line}**\n" for line in missing),
             *map(tables.markdown, made), *(f"![{name}](figures/{name}.svg)\n" for name in figures),
             f"## Parameters\n\n{given}\n"]
    write_atomic(out / "result.md", "\n".join(texts))
    write_json(out / "result.json", {
        "title": experiment.title, "paper": experiment.paper, "parameters": names, "versions": versions(),
        "tables": [dataclasses.asdict(table) for table in made],
        "paper_figures": [dict(shown.paper) for shown in experiment.tables],
        "runs": {run.title: run.line for run in runs}, "failed": [run.title for run in failed]})
    shown = [f"{table.title}\n{textwrap.fill(table.note, 120)}\n\n{tables.terminal(table)}" for table in made]
    return "\n\n".join([experiment.title, textwrap.fill(experiment.paper, 120), *shown, *missing])


def draw(experiment: Experiment, runs: Sequence[Run], names: Mapping[str, Any], out: Path) -> list[str]:
    """Draw the figures that the experiment names into ``figures/``, as far as there are data for them."""
    if not experiment.figures or importlib.util.find_spec("matplotlib") is None:
        return []
    from foresight_eval import plots

    found = find(experiment, None, runs, names)
    drawn = [plot for plot in plots.draw(found.results, [{"models": found.models}])
             if plot.name.startswith(tuple(experiment.figures))]
    for plot in drawn:
        plot.save(out / "figures")
    return [plot.name for plot in drawn]


if __name__ == "__main__":
    run_main(main)
