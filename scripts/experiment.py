"""Run an experiment of the paper, and print its figures beside the paper's.

    python scripts/experiment.py configs/experiments/lookahead.yaml
    python scripts/experiment.py configs/experiments/lookahead.yaml --max_games 12 --max_k 3 --dry_run
    python scripts/experiment.py configs/experiments/lookahead.yaml --help         its parameters

The parameters are models, games and sizes.  Their defaults are what scripts/quickstart.sh leaves in runs/quickstart.
Each run is a command, in a process and a folder of its own.  All commands are checked before the first one starts.
Start this script again to go on after an interruption.  A run that fails is named at the end, and the others go on.
--dry_run prints the commands.  You may start some of them by hand: this script takes what they finished.  The folder
--out gets result.md, result.json and figures/.  docs/reproducing.md explains the form of the files.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import logging
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foresight_eval.report import analyses, plots, tables
from foresight_eval.results import Result, read_results
from foresight_eval.settings import AlfworldSettings, EvalSettings, SciworldSettings
from foresight_eval.summary import write_summary
from itp.config import add_flags, did_you_mean, flag, from_args
from itp.errors import UserError
from itp.files import read_object, read_records, read_yaml, write_atomic, write_json
from itp.pretrained import check_model_path
from itp.program import run_main
from itp.run_dir import versions
from world_model.base_tuning.examples import WorldModelSettings
from world_model.fidelity import FidelitySettings

log = logging.getLogger(__name__)
SHIPPED = Path(__file__).resolve().parents[1] / "configs/experiments"
PROGRAMS = {
    "python -m foresight_eval": (AlfworldSettings, "--out_dir", ""),
    "python -m foresight_eval.runner_sciworld": (SciworldSettings, "--out_dir", ""),
    "python -m world_model.fidelity": (FidelitySettings, "--out_json", ".json"),
    "python -m world_model.base_tuning.finetune": (WorldModelSettings, "--out_dir", ""),
}
"""What a run may start: its settings, the flag that names its output, and how that name ends."""
TABLES = {
    "overview": tables.overview, "scores": tables.scores, "cost": tables.cost, "deployment": analyses.deployment,
    "decisions": analyses.decisions,
    "comparison": lambda results: tables.comparison(results, results[0]), "k_by_length": analyses.k_by_length,
    "accuracy": analyses.accuracy, "depth": analyses.depth, "training": analyses.training,
    "success_within": lambda results: tables.success_within(results, doubling=True), "by_trial": tables.by_trial,
    "against_best_without_imagination": analyses.against_best_without_imagination, "trial_cost": analyses.trial_cost,
}
POOLED = "pooled"
"""The table that pools runs which differ in one variable, as their seed, and compares them with others."""
VARIABLE = re.compile(r"\{(\w+)\}")
FIGURES = ("success_against_budget", "success_by_depth", "fact_f1_by_depth", "k_against_golden_steps", "k_of",
           "success_against_trials")


@dataclass
class Settings:
    out: str = flag("", help="folder of the results (empty: runs/experiments/NAME)")
    only: str = flag("", help="only these parts or runs, separated by commas")
    dry_run: bool = flag(False, help="print the commands and start nothing")
    override: bool = flag(False, help="evaluations: delete the results of other settings and start anew")


@dataclass(frozen=True)
class Run:
    """One process.  ``settings``: what its program reads from ``command``.  ``out``: the file or folder it makes.

    ``form``: its name before ``variables`` are filled in: K, and those of ``over``.
    """

    part: str
    name: str
    form: str
    variables: Mapping[str, Any]
    command: Sequence[str]
    settings: Any
    out: Path

    @property
    def title(self) -> str:
        return f"{self.part}/{self.name}"

    def name_without(self, *variables: str) -> str:
        """Its name, the same whatever ``variables`` are."""
        return fill(without(self.form, *variables), self.variables)


def main() -> None:
    experiment, values = parse(sys.argv[1:])
    runs = chosen(plan(experiment, values), values["only"])
    if values["dry_run"]:
        for run in runs:
            print(shlex.join(run.command))
        return
    check(runs)
    failed = [run for run in runs if execute(run) != 0]
    print(f"\n{show(experiment, values, runs, failed)}\n\nresult: {values['out']}/result.md")
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed: {', '.join(run.title for run in failed)}; their "
                        "messages stand above; start the same command again to go on")


def parse(argv: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The experiment of the file that ``argv`` names first, and the values of this script's flags."""
    if not argv or argv[0].startswith("-"):
        shipped = [f"  {path.stem:16}{read_experiment(path)['title']}" for path in sorted(SHIPPED.glob("*.yaml"))]
        print(f"{__doc__}\nconfigs/experiments:", *shipped, sep="\n")
        sys.exit(0 if argv else 2)
    experiment = read_experiment(Path(argv[0]))
    about = f"{experiment['title']}.\n\n{textwrap.fill(experiment['paper'], 120)}"
    parser = argparse.ArgumentParser(prog=f"python scripts/experiment.py {argv[0]}", description=about,
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    fields = [(name, type(parameter["default"]), flag(parameter["default"], help=parameter["help"]))
              for name, parameter in experiment["parameters"].items()]
    settings = dataclasses.make_dataclass("Parameters", fields, bases=(Settings,))
    add_flags(parser, settings)
    values = dataclasses.asdict(from_args(settings, parser.parse_args(argv[1:])))
    return experiment, values | {"out": values["out"] or f"runs/experiments/{Path(argv[0]).stem}"}


# ---------------------------------------------------------------- the file


def read_experiment(path: Path) -> dict[str, Any]:
    """What a file holds, with the parameters that it uses.  Raises UserError for an unknown name in it."""
    said = read_file(path)
    check_keys(said, path, ("title", "paper", "tables"), optional=("common", "parameters", "over", "runs", "figures"))
    for name, kind in (("runs", dict), ("parameters", dict), ("common", str), ("over", dict), ("tables", list),
                       ("figures", list)):
        if not isinstance(said.get(name, kind()), kind):
            raise UserError(f"{path}: {name} is {said[name]!r}, which is not a {kind.__name__}")
    runs, own, over = said.get("runs", {}), said.get("parameters", {}), said.get("over", {})
    for name, values in over.items():
        if not isinstance(values, list) or not values or name in own:
            raise UserError(f"{path}, over: {name} must be a list of values, and no parameter's name")
    for name, part in runs.items():
        check_keys(part, f"{path}, part {name}", ("command", "each"))
    for shown in said["tables"]:
        check_table(shown, runs, over, f"{path}, tables")
    for name in said.get("figures", ()):
        known(name, FIGURES, f"{path}, figures", "figure")
    common = read_file(path.parent / said["common"]) if "common" in said else {}
    if not isinstance(common, dict):
        raise UserError(f"{path.parent / said['common']}: must hold `name: value` lines")
    parameters = own | common | own
    for name, parameter in parameters.items():
        check_keys(parameter, f"{path}, parameter {name}", ("default", "help"))
    used = {"max_k" if name == "k" else name for name in VARIABLE.findall(f"{runs} {said['tables']}")} - {"out", *over}
    for name in sorted(used):
        known(name, parameters, path, "parameter")
    parameters = {name: parameter for name, parameter in parameters.items() if name in used}
    return {"figures": [], **said, "runs": runs, "over": over, "parameters": parameters}


def read_file(path: Path) -> Any:
    try:
        return read_yaml(path)
    except UserError as error:
        raise UserError(f"{path}: not an experiment ({error}); those of the project are "
                        "configs/experiments/*.yaml") from error


def check_table(shown: Any, runs: Mapping[str, Any], over: Mapping[str, Any], where: str) -> None:
    check_keys(shown, where, ("table",),
               optional=("part", "title", "columns", "paper", "files", "pool", "against", "x"))
    known(shown["table"], (*TABLES, POOLED), where, "table")
    if shown["table"] == POOLED:
        check_pooled(shown, runs, over, where)
    known(shown.get("part", ""), ("", *runs), where, "part")
    for column in shown.get("columns", ()):
        known(column, tables.overview([]).header if shown["table"] == "overview" else (), where, "column")
    parts = [part for name, part in runs.items() if shown.get("part", name) == name]
    rows = [*(name for part in parts for name in part["each"]), *shown.get("files", ())]
    for column, figures in shown.get("paper", {}).items():
        for row, figure in figures.items():
            # The rows of these two are numbers.  k3 is one of k{k}, whatever K_max is.
            if shown["table"] not in ("depth", "k_by_length") and re.sub(r"\d+", "{k}", row) not in rows:
                known(row, rows, f"{where}, {column}", "run")
            if not isinstance(figure, int | float):
                raise UserError(f"{where}, {column}: {row} must be a number, not {figure!r}")


def check_pooled(shown: Mapping[str, Any], runs: Mapping[str, Any], over: Mapping[str, Any], where: str) -> None:
    """Raise UserError where runs can't be pooled: their names must have the pooled variable, and differ without both.

    A run without ``x`` in its name is the same at each of its values, but not all runs may be.
    """
    check_keys(shown, where, ("pool", "against"), optional=tuple(shown))
    variables = [shown[name] for name in ("pool", "x") if name in shown]
    for name in variables:
        known(name, over, where, "variable")
    forms = [form for name, part in runs.items() if shown.get("part", name) == name for form in part["each"]]
    for name, count in zip(variables, (0, len(forms) - 1), strict=False):
        missing = [form for form in forms if f"{{{name}}}" not in form]
        if len(missing) > count:
            raise UserError(f"{where}: the run {missing[0]} has no {{{name}}} in its name")
    pooled = [without(form, *variables) for form in forms]
    if "" in pooled or len(set(pooled)) < len(pooled):
        raise UserError(f"{where}: without {' and '.join(variables)} these runs have the same name or none: "
                        f"{', '.join(forms)}")
    known(shown["against"], [without(form, shown["pool"]) for form in forms], f"{where}, against", "run")


def check_keys(value: Any, where: object, required: Sequence[str], *, optional: Sequence[str] = ()) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{where}: must hold `name: value` lines, not {value!r}")
    for name in value:
        known(name, (*required, *optional), where, "key")
    if missing := [name for name in required if value.get(name) is None]:
        raise UserError(f"{where}: needs {', '.join(missing)}")


def known(name: Any, names: Iterable[str], where: object, what: str) -> None:
    """Raise UserError for a ``name`` that isn't among ``names``."""
    if name not in names:
        raise UserError(f"{where}: unknown {what} {name!r}"
                        + (did_you_mean(name, names) or f"; choose among {', '.join(names)}"))


# ---------------------------------------------------------------- the runs


class Parser(argparse.ArgumentParser):
    """A parser of a run's flags, which raises UserError."""

    def error(self, message: str) -> Any:
        raise UserError(message)


def plan(experiment: Mapping[str, Any], values: dict[str, Any]) -> list[Run]:
    """All runs in their order.  Raises UserError for a command that its program refuses."""
    runs: dict[str, Run] = {}
    for part, said in experiment["runs"].items():
        for name, flags in said["each"].items():
            for variables in combinations(name, experiment["over"], values):
                run = make_run(part, name, f"{said['command']} {flags or ''}", values, variables)
                if run.title in runs:
                    raise UserError(f"two runs are named {run.title}; give other parameters")
                runs[run.title] = run
    return list(runs.values())


def combinations(name: str, over: Mapping[str, Sequence[Any]], values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All values together of the variables that are in a run's ``name``: K, and those of ``over``."""
    used = [variable for variable in VARIABLE.findall(name) if variable == "k" or variable in over]
    choices = [range(values["max_k"] + 1) if variable == "k" else over[variable] for variable in used]
    return [dict(zip(used, chosen, strict=True)) for chosen in itertools.product(*choices)]


def make_run(part: str, form: str, command: str, values: Mapping[str, Any], variables: Mapping[str, Any]) -> Run:
    """The run of ``command``, with the flag for its output."""
    values = {**values, **variables}
    name, words = fill(form, values), [fill(word, values) for word in shlex.split(command)]
    program = " ".join(words[:3])
    known(program, PROGRAMS, f"{part}/{name}", "program")
    settings, out_flag, suffix = PROGRAMS[program]
    out = Path(values["out"], part, name + suffix)
    words += [out_flag, str(out)]
    if values["override"] and issubclass(settings, EvalSettings):
        words.append("--override")
    parser = Parser(allow_abbrev=False)
    add_flags(parser, settings)
    try:
        return Run(part, name, form, variables, words, from_args(settings, parser.parse_args(words[3:])), out)
    except UserError as error:
        raise UserError(f"{part}/{name}: {error}") from error


def without(form: str, *variables: str) -> str:
    """The name ``form`` without the fields of ``variables``, and the letter before one, as in a-s{seed}."""
    for variable in variables:
        form = re.sub(rf"(-[a-z]?)?\{{{variable}\}}", "", form)
    return form


def fill(text: str, values: Mapping[str, Any]) -> str:
    """``text`` with the values of its {names}."""
    return VARIABLE.sub(lambda match: str(values.get(match[1], match[0])), text)


def chosen(runs: Sequence[Run], only: str) -> list[Run]:
    """The runs that --only asks for."""
    names = dict.fromkeys(name for run in runs for name in (run.part, run.name, run.title))
    wanted = [word for word in only.split(",") if word]
    for word in wanted:
        known(word, names, "--only", "part or run")
    return [run for run in runs if not wanted or {run.part, run.name, run.title} & set(wanted)]


def check(runs: Sequence[Run]) -> None:
    """Raise UserError for what would stop a run at its start: a model or a file that doesn't exist, say."""
    from itp.plan import make_plan

    made = {run.out for run in runs}
    for run in runs:
        if any(made.intersection(Path(word).parents) for word in run.command):
            continue  # another run makes a file that it needs
        try:
            if isinstance(run.settings, EvalSettings):
                make_plan(run.settings)
                continue
            judged = isinstance(run.settings, FidelitySettings)
            for model in (run.settings.wm_model if judged else run.settings.model_path).split(","):
                check_model_path(model)
            for file in (run.settings.transitions if judged else run.settings.data_path).split(","):
                if not Path(file).is_file():
                    raise UserError(f"{file}: no such file")
        except UserError as error:
            raise UserError(f"{run.title}: {error}; or leave this run out with --only") from error


def execute(run: Run) -> int:
    print(f"\n== {run.title}", flush=True)
    return subprocess.run([sys.executable, *run.command[1:]], check=False).returncode


# ---------------------------------------------------------------- the result


def show(experiment: Mapping[str, Any], values: Mapping[str, Any], runs: Sequence[Run],
         failed: Sequence[Run] = ()) -> str:
    """Write the result, and return what the terminal shows of it.

    Runs that ``failed`` are named, and the tables leave them out: their folders may hold results of other parameters.
    """
    out, finished = Path(values["out"]), [run for run in runs if run not in failed]
    made = [table for shown in experiment["tables"] if (table := make_table(shown, finished, values))]
    figures = draw(experiment, finished, out / "figures")
    missing = [f"LEFT OUT, because they failed: {', '.join(run.title for run in failed)}."] if failed else []
    given = {name: values[name] for name in (*experiment["parameters"], "out")}
    write_atomic(out / "result.md", "\n".join([
        f"# {experiment['title']}\n", f"{experiment['paper']}\n", *(f"**{line}**\n" for line in missing),
        *map(tables.markdown, made), *(f"![{name}](figures/{name}.svg)\n" for name in figures),
        "## Parameters\n", *(f"- {name}: {value}" for name, value in given.items()), ""]))
    write_json(out / "result.json", {
        "title": experiment["title"], "paper": experiment["paper"], "parameters": given, "versions": versions(),
        "tables": [dataclasses.asdict(table) for table in made],
        "paper_figures": [shown.get("paper", {}) for shown in experiment["tables"]],
        "runs": {run.title: shlex.join(run.command) for run in runs}, "failed": [run.title for run in failed]})
    shown = [f"{table.title}\n{textwrap.fill(table.note, 120)}\n\n{tables.terminal(table)}" for table in made]
    return "\n\n".join([experiment["title"], textwrap.fill(experiment["paper"], 120), *shown, *missing])


def collect(runs: Sequence[Run]) -> tuple[list[Result], dict[str, Any]]:
    """The results that ``runs`` left, and the figures of world models by run."""
    finished = [run for run in runs if isinstance(run.settings, EvalSettings) and (run.out / "summary.json").is_file()]
    for run in finished:  # from the games' files, which are checked: a summary may have been edited or cut
        write_summary(run.out)
    results = [dataclasses.replace(read_results([run.out])[0], name=run.name) for run in finished]
    models = {run.name: next(iter(read_object(run.out, {"models": dict})["models"].values())) for run in runs
              if isinstance(run.settings, FidelitySettings) and run.out.is_file()}
    return results, models


def make_table(shown: Mapping[str, Any], runs: Sequence[Run], values: Mapping[str, Any]) -> tables.Table | None:
    """A table with the columns that the file names, and then the paper's.  None if there are no data for it."""
    runs = [run for run in runs if shown.get("part", run.part) == run.part]
    results, models = collect(runs)
    if shown["table"] == POOLED:
        return analyses.pooled(*pools(shown, runs)) if results else None
    took = {name: read_metrics(Path(fill(file, values))) for name, file in shown.get("files", {}).items()}
    made_of = {"accuracy": [models], "depth": [results, models], "training": [took]}.get(shown["table"], [results])
    if not any(made_of):
        return None
    table = TABLES[shown["table"]](*made_of)
    at = [0, *map(table.header.index, shown.get("columns", table.header[1:]))]
    header, rows = [table.header[i] for i in at], [[row[i] for i in at] for row in table.rows]
    for column, figures in shown.get("paper", {}).items():
        digits = max(len(repr(figure).partition(".")[2]) for figure in figures.values())
        texts = {fill(row, values): f"{figure:.{digits}f}" for row, figure in figures.items()}
        header.append(column)
        for row in rows:
            row.append(texts.get(row[0], "-"))
    return dataclasses.replace(table, title=shown.get("title", table.title), header=tuple(header),
                               rows=tuple(map(tuple, rows)))


def curves(shown: Mapping[str, Any], runs: Sequence[Run]) -> dict[str, dict[float, Any]]:
    """Of the runs without their variables ``pool`` and ``x``, by name: x -> success with its interval.

    A run without ``x`` in its name is a level line.
    """
    runs = [run for run in runs if shown.get("part", run.part) == run.part]
    found: dict[str, dict[float, Any]] = {}
    everywhere = sorted({run.variables[shown["x"]] for run in runs if shown["x"] in run.variables})
    for name, results in pools(shown, runs)[0].items():
        run = next(run for run in runs if run.name_without(shown["pool"]) == name)
        if results:
            at = [run.variables[shown["x"]]] if shown["x"] in run.variables else everywhere
            found.setdefault(run.name_without(shown["pool"], shown["x"]), {}).update(
                dict.fromkeys(at, analyses.pooled_success(results)))
    return found


def pools(shown: Mapping[str, Any], runs: Sequence[Run]) -> tuple[dict[str, dict[Any, Result]], dict[str, str]]:
    """The results of the runs that only differ in the variable ``pool``, by name; of each, what it is compared with."""
    groups: dict[str, dict[Any, Result]] = {}
    baselines: dict[str, str] = {}
    for run in runs:
        name = run.name_without(shown["pool"])
        groups.setdefault(name, {}).update({run.variables[shown["pool"]]: result for result in collect([run])[0]})
        baselines[name] = fill(shown["against"], run.variables)
    return groups, baselines


def read_metrics(path: Path) -> dict[str, Any] | None:
    """The content of ``metrics.json``, or the sum of the seconds in ``timing.jsonl``.  None if the file is missing."""
    if not path.is_file():
        return None
    if path.suffix == ".jsonl":
        return {"seconds": sum(row["seconds"] for row in read_records(path, {"seconds": (int, float)}))}
    return read_object(path)


def draw(experiment: Mapping[str, Any], runs: Sequence[Run], folder: Path) -> list[str]:
    """Draw the figures that there are data for into ``folder``.  Returns the names of the drawn ones."""
    figures, by = tuple(experiment["figures"]), [shown for shown in experiment["tables"] if "x" in shown]
    if not figures and not by:
        return []
    results, models = collect(runs)
    try:
        drawn = [plot for plot in plots.draw(results, [{"models": models}])
                 if figures and plot.name.startswith(figures)]
        drawn += [plots.success_by(found, shown["x"]) for shown in by if (found := curves(shown, runs))]
    except UserError as error:  # matplotlib is missing
        log.warning("the figures are left out: %s", error)
        return []
    for plot in drawn:
        plot.save(folder)
    return [plot.name for plot in drawn]


if __name__ == "__main__":
    run_main(main)
