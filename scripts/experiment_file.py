"""The files of configs/experiments/: what they may hold, and the runs that they ask for.

    title: what is asked                         paper: what the paper has of it, in words
    common: common/alfworld.yaml                 # parameters, and flags by program, that lie below those here
    parameters:                                  # flags of scripts/experiment.py; their type is the default's
      policy: {default: runs/quickstart/itp_r/last, help: policy with a K-head}
    parts:
      play:                                      # one program's runs; a run's flags go on top of the part's
        program: foresight_eval
        flags: {policy_model: "{policy}", split: unseen}
        runs:
          "k{k}": {fixed_k: "{k}"}               # a name with {k} is one run for every k from 0 to {max_k}
          adaptive: {}
      cost: {metrics: {"stage 2": "{run}/warm_up/metrics.json"}}     # or files that a training left
    tables:                                      # of one part's runs, or of all; columns: some of its own
      - {table: overview, part: play, columns: [All, NB], paper: {"paper, Qwen3-8B": {adaptive: 88.57}}}
    figures: [success_by_depth]                  # of foresight_eval.report

{name} is a parameter's value, {out} the experiment's own folder.  Whatever isn't known is refused before anything
starts.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foresight_eval import analyses, tables
from foresight_eval.results import Result
from foresight_eval.settings import AlfworldSettings, EvalSettings, SciworldSettings
from itp.config import did_you_mean, flag, from_values
from itp.runtime import UserError
from world_model import fidelity
from world_model.base_tuning.finetune import WorldModelSettings

PROGRAMS: dict[str, tuple[type, str]] = {
    "foresight_eval": (AlfworldSettings, "output_path"), "foresight_eval.runner_sciworld": (SciworldSettings,
                                                                                            "output_path"),
    "world_model.fidelity": (fidelity.Settings, "out_json"),
    "world_model.base_tuning.finetune": (WorldModelSettings, "out_dir"),
}
"""What a part may run: its settings, and the flag that says where its output goes."""


@dataclass(frozen=True)
class Found:
    """What tables are made of: results, figures of world models by run, and what trainings took by name."""

    results: Sequence[Result] = ()
    models: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)


TABLES: dict[str, tuple[tuple[str, ...], Callable[[Found], tables.Table]]] = {
    "overview": (("results",), lambda found: tables.overview(found.results)),
    "success": (("results",), lambda found: tables.success(found.results)),
    "scores": (("results",), lambda found: tables.scores(found.results)),
    "cost": (("results",), lambda found: tables.cost(found.results)),
    "comparison": (("results",), lambda found: tables.comparison(found.results, found.results[0])),
    "deployment": (("results",), lambda found: analyses.deployment(found.results)),
    "k_by_length": (("results",), lambda found: analyses.k_by_length(found.results)),
    "truth": (("models",), lambda found: analyses.truth(found.models)),
    "depth": (("results", "models"), lambda found: analyses.depth(found.results, found.models)),
    "training": (("metrics",), lambda found: analyses.training(found.metrics)),
}
"""What each table is made of, and how; ``comparison`` is with the first run."""

FIGURES = ("success_against_budget", "success_by_depth", "fact_f1_by_depth", "k_against_golden_steps", "k_of")
"""Of foresight_eval.report; ``k_of`` is one for every run that chose k."""


@dataclass
class Settings:
    out: str = flag("", help="folder of the results (empty: runs/experiments/NAME)")
    only: str = flag("", help="only these parts or runs, separated by commas")
    dry_run: bool = flag(False, help="print the commands and start nothing")
    override: bool = flag(False, help="evaluations: delete the results of other settings and start anew")


RESERVED = ("config", "out", "only", "dry_run", "override", "k")


@dataclass(frozen=True)
class Part:
    """Runs of one program, or (without one) ``runs`` that name files of metrics."""

    name: str
    program: str
    flags: Mapping[str, Any]
    runs: Mapping[str, Any]

    @property
    def gives(self) -> str:
        """Which field of :class:`Found` it fills; nothing, where it trains what other parts use."""
        if not self.program:
            return "metrics"
        if issubclass(PROGRAMS[self.program][0], EvalSettings):
            return "results"
        return "models" if self.program == "world_model.fidelity" else ""


@dataclass(frozen=True)
class Shown:
    """A table of the result: ``columns`` of it (none: all), and ``paper``'s columns, {column: {row: figure}}."""

    table: str
    part: str = ""
    title: str = ""
    columns: Sequence[str] = ()
    paper: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    file: Path
    title: str
    paper: str
    settings: type
    parts: Mapping[str, Part]
    tables: Sequence[Shown]
    figures: Sequence[str]

    @property
    def name(self) -> str:
        return self.file.stem


@dataclass(frozen=True)
class Run:
    """One process: ``flags`` as its command line has them, ``settings`` as the program will understand them."""

    part: str
    name: str
    program: str
    flags: Mapping[str, Any]
    settings: Any
    out: Path

    @property
    def arguments(self) -> list[str]:
        values = {name: str(value).lower() if isinstance(value, bool) else str(value)
                  for name, value in self.flags.items()}
        return [word for name, value in values.items() for word in (f"--{name}", value)]

    @property
    def title(self) -> str:
        return f"{self.part}/{self.name}"

    @property
    def line(self) -> str:
        """The command for a shell."""
        return shlex.join(["python", "-m", self.program, *self.arguments])


# ---------------------------------------------------------------- reading a file


def read_experiment(path: str) -> Experiment:
    """The experiment of a file.  Raises UserError, a line, for what isn't known in it."""
    said = _read_yaml(path)
    _keys(said, path, required=("title", "parts", "tables"), optional=("paper", "common", "parameters", "figures"))
    parameters, common = said.get("parameters") or {}, {}
    if said.get("common"):
        file = str(Path(path).parent / said["common"])
        below = _read_yaml(file)
        _keys(below, file, required=("parameters", "flags"))
        parameters = _mapping(parameters, f"{path}: parameters") | {
            name: value for name, value in _mapping(below["parameters"], file).items() if name not in parameters}
        common = _mapping(below["flags"], f"{file}: flags")
        for program in common:
            _known(program, PROGRAMS, f"{file}: flags", "program")
    parts = {name: _part(name, part, common, path) for name, part in _mapping(said["parts"], f"{path}: parts").items()}
    settings = _parameters(parameters, path)
    used = repr(parts)
    for name in parameters:
        if f"{{{name}}}" not in used and not (name == "max_k" and "{k}" in used):
            raise UserError(f"{path}: parameter {name}: no run uses it, as {{{name}}}; leave it out")
    shown = [_shown(table, parts, f"{path}: tables, number {i}")
             for i, table in enumerate(_list(said["tables"], f"{path}: tables"), start=1)]
    figures = _list(said.get("figures") or [], f"{path}: figures")
    for name in figures:
        _known(name, FIGURES, f"{path}: figures", "figure")
    return Experiment(Path(path), said["title"], said.get("paper") or "", settings, parts, shown, figures)


def _read_yaml(path: str) -> Any:
    import yaml

    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; the project's are configs/experiments/*.yaml")
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())})") from error


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{where}: must be a list, not {value!r}")
    return value


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{where}: must hold `name: value` lines, not {value!r}")
    return value


def _keys(value: Any, where: str, *, required: Iterable[str] = (), optional: Iterable[str] = ()) -> None:
    for name in _mapping(value, where):
        _known(name, (*required, *optional), where, "key")
    if missing := [name for name in required if not value.get(name)]:
        raise UserError(f"{where}: needs {', '.join(missing)}")


def _known(name: Any, known: Iterable[str], where: str, what: str) -> None:
    if name not in known:
        raise UserError(f"{where}: unknown {what} {name!r}"
                        + (did_you_mean(name, known) or f"; choose among {', '.join(known)}"))


def _parameters(said: Any, path: str) -> type:
    """Settings with the experiment's parameters besides everyone's."""
    fields = []
    for name, parameter in _mapping(said, f"{path}: parameters").items():
        where = f"{path}: parameter {name}"
        if name in RESERVED or not name.isidentifier():
            raise UserError(f"{where}: this name is taken or no name; choose another")
        _keys(parameter, where, required=("help",), optional=("default",))
        default = parameter.get("default")
        if type(default) not in (str, int, float, bool):
            raise UserError(f"{where}: needs a default, a text or a number, not {default!r}")
        fields.append((name, type(default), flag(default, help=parameter["help"])))
    return dataclasses.make_dataclass("Parameters", fields, bases=(Settings,))


def _part(name: str, said: Any, common: Mapping[str, Any], path: str) -> Part:
    where = f"{path}: part {name}"
    if isinstance(said, dict) and "metrics" in said:
        _keys(said, where, required=("metrics",))
        return Part(name, "", {}, _mapping(said["metrics"], f"{where}, metrics"))
    _keys(said, where, required=("program", "runs"), optional=("flags",))
    _known(said["program"], PROGRAMS, where, "program")
    runs = _mapping(said["runs"], f"{where}, runs")
    for run, flags in runs.items():
        if not re.fullmatch(r"[\w.+{}-]+", run):
            raise UserError(f"{where}: run {run!r} names a folder; use letters, digits and . + - _")
        _mapping({} if flags is None else flags, f"{where}, run {run}")
    below = _mapping(common.get(said["program"]) or {}, f"{where}, common flags")
    flags = {**below, **_mapping(said.get("flags") or {}, f"{where}, flags")}
    own = PROGRAMS[said["program"]][1]
    if taken := {own, "override"} & {*flags, *(name for run in runs.values() for name in run or {})}:
        raise UserError(f"{where}: {taken.pop()} is the experiment's own to set; leave it out")
    return Part(name, said["program"], flags, runs)


def _shown(said: Any, parts: Mapping[str, Part], where: str) -> Shown:
    _keys(said, where, required=("table",), optional=("part", "title", "columns", "paper"))
    shown = Shown(**said)
    _known(shown.table, TABLES, where, "table")
    needs, make = TABLES[shown.table]
    if shown.part:
        _known(shown.part, parts, where, "part")
    of = [part for part in parts.values() if shown.part in ("", part.name) and part.gives in needs]
    if not of:
        raise UserError(f"{where}: {shown.table} is of {' and '.join(needs)}, which "
                        f"{f'part {shown.part}' if shown.part else 'no part'} gives")
    if "metrics" not in needs and sum(part.gives == "results" for part in of) > 1:
        raise UserError(f"{where}: several parts have results; say which, as part: {of[0].name}")
    if shown.columns and shown.table == "comparison":
        raise UserError(f"{where}: comparison has all its columns; leave out columns")
    for column in shown.columns:
        _known(column, make(Found()).header[1:], where, "column")
    for column, figures in _mapping(shown.paper, f"{where}, paper").items():
        for row, figure in _mapping(figures, f"{where}, paper, {column}").items():
            if type(figure) not in (int, float):
                raise UserError(f"{where}, paper, {column}: {row} must be a number, not {figure!r}")
            names = [name for part in of for name in part.runs]
            if shown.table not in ("depth", "k_by_length") and not any(_stands_for(name, row) for name in names):
                _known(row, names, f"{where}, paper, {column}", "run")
    return shown


def _stands_for(name: str, row: str) -> bool:
    """Is ``row`` a run that ``name`` may become?  The paper's K_max may be another: k3 is one of k{k} in any case."""
    return bool(re.fullmatch(re.escape(name).replace(r"\{k\}", r"\d+"), row))


# ---------------------------------------------------------------- the runs


def fill(value: Any, names: Mapping[str, Any], where: str) -> Any:
    """``value`` with every {name} in it replaced; one that is nothing else keeps the type of what it names."""
    if not isinstance(value, str):
        return value
    for name in re.findall(r"\{(\w+)\}", value):
        _known(name, names, where, "parameter")
    whole = re.fullmatch(r"\{(\w+)\}", value)
    return names[whole[1]] if whole else re.sub(r"\{(\w+)\}", lambda m: str(names[m[1]]), value)


def plan(experiment: Experiment, settings: Settings) -> list[Run]:
    """All processes, in their order, those that --only leaves out too.  Every flag of theirs is known and in bounds."""
    out = out_folder(experiment, settings)
    names = names_of(experiment, settings)
    runs = []
    for part in experiment.parts.values():
        for run, flags in part.runs.items() if part.program else ():
            where = f"{experiment.file}: part {part.name}, run {run}"
            for k in every_k(run, names, where):
                known = names | k
                filled = {name: fill(value, known, f"{where}, {name}")
                          for name, value in {**part.flags, **(flags or {})}.items()}
                runs.append(_run(part, fill(run, known, where), filled, out, settings.override, where))
    taken: dict[Path, Run] = {}
    for run in runs:
        if run.out in taken:
            raise UserError(f"{experiment.file}: part {run.part} has two runs named {run.name}")
        taken[run.out] = run
    return runs


def every_k(name: str, names: Mapping[str, Any], where: str) -> list[dict[str, int]]:
    """What a run's name with {k} stands for: every k from 0 to max_k."""
    if "{k}" not in name:
        return [{}]
    if type(names.get("max_k")) is not int:
        raise UserError(f"{where}: a name with {{k}} needs a parameter max_k, a whole number")
    return [{"k": k} for k in range(names["max_k"] + 1)]


def _run(part: Part, name: str, flags: Mapping[str, Any], out: Path, override: bool, where: str) -> Run:
    program, own = PROGRAMS[part.program]
    folder = out / part.name / name
    if part.gives == "models":
        folder = folder.with_name(f"{name}.json")
    flags = {**flags, own: str(folder)}
    if override and part.gives == "results":
        flags["override"] = True
    return Run(part.name, name, part.program, flags, from_values(program, flags, where), folder)


def chosen(runs: Sequence[Run], experiment: Experiment, only: str) -> list[Run]:
    """The runs that --only asks for."""
    wanted = [word for word in only.split(",") if word]
    known = dict.fromkeys([*experiment.parts, *(name for run in runs for name in (run.name, run.title))])
    for word in wanted:
        _known(word, known, f"--only {only}", "part or run")
    return [run for run in runs if not wanted or {run.part, run.name, run.title} & set(wanted)]


def out_folder(experiment: Experiment, settings: Settings) -> Path:
    return Path(settings.out or f"runs/experiments/{experiment.name}")


def names_of(experiment: Experiment, settings: Settings) -> dict[str, Any]:
    """What {name} may stand for: the parameters, and ``out``."""
    own = {f.name for f in dataclasses.fields(Settings)}
    values = {name: value for name, value in dataclasses.asdict(settings).items() if name not in own}
    return values | {"out": str(out_folder(experiment, settings))}
