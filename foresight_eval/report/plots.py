"""The figures of a report, drawn with matplotlib (the extra ``itp[report]``).

Each is drawn where the results hold what it shows, and left out where they don't.
"""

from __future__ import annotations

import functools
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foresight_eval.hindsight import fact_f1_by_depth
from foresight_eval.report.tables import task_types
from foresight_eval.results import Result, bucket, by_fixed_k, mean_k_by_golden_steps
from foresight_eval.statistics import mean_interval
from itp.errors import UserError
from itp.files import write_atomic, writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5b5b5b", "#8c6bb1")
"""Told apart by the colour-blind too (Okabe and Ito)."""
MARKERS = "osD^vPX*"
DEPTHS = ("#e8edf3", "#b9d3ea", "#7fb1d8", "#4a8cc2", "#20659f", "#0b4477", "#062c52", "#031a33", "#000b1a")
"""k = 0, 1, 2, ...: the further it looked, the darker."""
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.color": "#e6e8eb", "axes.axisbelow": True, "legend.frameon": False, "svg.fonttype": "none",
         "svg.hashsalt": "itp", "pdf.fonttype": 42, "font.family": "sans-serif", "axes.titlesize": 9.5,
         "axes.titleweight": "bold", "axes.edgecolor": "#98a1ab"}
MIN_JUDGED = 10
"""A depth with fewer imagined steps that can be judged says nothing."""


@dataclass(frozen=True)
class Plot:
    """A drawn figure.  ``name``: its file's; ``caption``: what it shows and how to read it."""

    name: str
    title: str
    caption: str
    figure: Figure

    @functools.cached_property  # for the page and for a file
    def svg(self) -> str:
        from matplotlib import rc_context

        out = io.StringIO()
        with rc_context(STYLE):  # text as text, and the same ids every time
            self.figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
        return out.getvalue()

    def save(self, folder: Path) -> None:
        """Write ``NAME.svg`` and ``NAME.pdf``."""
        from matplotlib import rc_context

        write_atomic(folder / f"{self.name}.svg", self.svg)
        with writing(folder), rc_context(STYLE):
            self.figure.savefig(folder / f"{self.name}.pdf", metadata={"CreationDate": None})


def draw(results: Sequence[Result], fidelity: Sequence[dict[str, Any]]) -> list[Plot]:
    """All figures that these results, and figures of ``world_model.fidelity``, have the data for."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("the report's figures need matplotlib; pip install 'itp[report]'") from error
    results = [result for result in results if result.records]
    with matplotlib.rc_context(STYLE):
        plots = [success_against_budget(results), success_against_trials(results), *by_depth(results, fidelity),
                 *(k_histogram(result) for result in results if _chooses(result)), k_against_golden_steps(results)]
    return [plot for plot in plots if plot is not None]


def success_against_budget(results: Sequence[Result]) -> Plot | None:
    if not results:
        return None
    figure, (axes,) = _canvas(1, width=5.4)
    tokens = [result.summary["cost"]["tokens_per_episode"] for result in results]
    for i, (result, spent) in enumerate(zip(results, tokens, strict=True)):
        overall = result.summary["overall"]
        _errorbar(axes, [spent], [overall["rate"]], [overall["interval"]], i, label=result.title)
    if min(tokens) > 0 and max(tokens) > 5 * min(tokens):
        axes.set_xscale("log", subs=[2, 5])
        axes.xaxis.set_major_formatter(_thousands)
        axes.xaxis.set_minor_formatter(_thousands)
        axes.tick_params(axis="x", which="minor", labelsize=8)
    axes.set(xlabel="tokens per episode, all models together", ylabel="success, %")
    axes.set_ylim(bottom=0)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return Plot("success_against_budget", "Success against budget",
                "Success with its 95 % interval against the tokens that an episode took.", figure)


def success_by(curves: Mapping[str, Mapping[float, tuple[float, tuple[float, float]]]], variable: str) -> Plot:
    """Success against a variable of the experiment, a curve for each name: value -> (success, its interval)."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _canvas(1, width=5.4)
        for i, (name, points) in enumerate(curves.items()):
            _errorbar(axes, list(points), [rate for rate, _ in points.values()],
                      [interval for _, interval in points.values()], i, label=name, line=True)
        values = sorted({value for points in curves.values() for value in points})
        if values[0] > 0 and values[-1] > 5 * values[0]:
            axes.set_xscale("log")
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()
        axes.set(xlabel=variable, ylabel="success, %", ylim=(0, 102))
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return Plot(f"success_by_{variable}", f"Success by {variable}",
                "Success, a mean over seeds and games, with its 95 % interval over games.", figure)


def success_against_trials(results: Sequence[Result]) -> Plot | None:
    """SR@k, where games were played several times."""
    curves = [(result, result.summary["trials"]["success_within"]) for result in results if "trials" in result.summary]
    if not curves:
        return None
    figure, (axes,) = _canvas(1, width=5.4)
    for i, (result, within) in enumerate(curves):
        _errorbar(axes, [int(k) for k in within], [figures["rate"] for figures in within.values()],
                  [figures["interval"] for figures in within.values()], i, label=result.title, line=True)
    axes.set(xlabel="k: trials of a game", ylabel="SR@k, %", xticks=sorted({int(k) for _, by in curves for k in by}))
    axes.set_ylim(bottom=0)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return Plot("success_against_trials", "Success against trials",
                "Games solved in any of their first k trials, with 95 % intervals.", figure)


def _thousands(value: float, _: int) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def by_depth(results: Sequence[Result], fidelity: Sequence[dict[str, Any]]) -> Iterator[Plot]:
    """Success against a fixed K, and Fact-F1 against the depth of imagination."""
    curves = [by_k for by_k in by_fixed_k(results).values() if len(by_k) > 1]
    if curves:
        figure, (axes,) = _canvas(1)
        for i, by_k in enumerate(curves):
            overall = [by_k[k].summary["overall"] for k in sorted(by_k)]
            _errorbar(axes, sorted(by_k), [o["rate"] for o in overall], [o["interval"] for o in overall], i,
                      label=_policy_name(by_k), line=True)
        axes.set(xlabel="K, fixed: steps imagined before every action", ylabel="success, %",
                 xticks=sorted({k for by_k in curves for k in by_k}))
        axes.set_ylim(bottom=0)
        axes.legend()
        yield Plot("success_by_depth", "Success against depth",
                   "One policy made to look K steps ahead at every step; 95 % intervals.", figure)
    accuracies = dict(_accuracies(results, fidelity))
    if accuracies:
        figure, (axes,) = _canvas(1)
        for i, (name, by) in enumerate(accuracies.items()):
            _errorbar(axes, list(by), [row[0] for row in by.values()], [row[1] for row in by.values()], i, label=name,
                      line=True)
        axes.set(xlabel="depth: steps from the last real observation", ylabel="Fact-F1, %", ylim=(0, 102),
                 xticks=sorted({depth for by in accuracies.values() for depth in by}))
        axes.legend(fontsize=8)
        yield Plot("fact_f1_by_depth", "Truth of imagination against depth",
                   "Fact-F1 between imagined and true observations. Of results: the agent's own imagination, for as "
                   "long as it then did what it had imagined; of world models: recorded actions, fed with its own "
                   "predictions.", figure)


def _accuracies(results: Sequence[Result],
                fidelity: Sequence[dict[str, Any]]) -> Iterator[tuple[str, dict[int, tuple[float, Sequence[float]]]]]:
    """(name, depth -> (mean Fact-F1, its interval)) of the results' own imagination and of world models."""
    for result in results:
        scores = {d: s for d, s in sorted(fact_f1_by_depth(result.records).items()) if len(s) >= MIN_JUDGED}
        if scores:
            yield result.title, {d: (sum(s) / len(s), mean_interval(s, high=1.0)) for d, s in scores.items()}
    for report in fidelity:
        for model, figures in report["models"].items():
            for source, rows in figures["by_depth"].items():
                yield f"{model} on {source}", {int(d): (row["fact_f1"], row["fact_f1_interval"])
                                               for d, row in rows.items()}


def k_histogram(result: Result) -> Plot:
    """How far it looked, by task type and by progress."""
    figure, (types, progress) = _canvas(2, width=7.2)
    ks = sorted({step["k"] for step in result.steps})
    columns = [b for b in task_types([result]) if result.summary["counts"].get(b)]
    _shares(types, ks, columns, lambda meta, t: bucket(meta["task_type"]), result)
    types.set(title="by task type", ylabel="share of the steps, %")
    types.tick_params(axis="x", rotation=90 if len(columns) > 8 else 30)
    fifths = ["0-20", "20-40", "40-60", "60-80", "80-100"]
    _shares(progress, ks, fifths, lambda meta, t: fifths[5 * t // meta["steps"]], result)
    progress.set(title="by progress", xlabel="% of the episode's steps")
    progress.legend(title="k", loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    return Plot(f"k_of_{result.name.replace('/', '-')}", f"How far {result.title} looks ahead",
                "Share of the steps at which each k was chosen.", figure)


def _shares(axes: Axes, ks: Sequence[int], columns: Sequence[str], column: Callable[[dict, int], str],
            result: Result) -> None:
    """Stacked bars of the shares of every k."""
    counts = Counter((column(record["meta"], step["t"]), step["k"])
                     for record in result.records.values() for step in record["foresight_steps"])
    totals = [sum(counts[c, k] for k in ks) for c in columns]
    bottom = [0.0] * len(columns)
    for k in ks:
        height = [100 * counts[c, k] / total if total else 0.0 for c, total in zip(columns, totals, strict=True)]
        axes.bar(columns, height, bottom=bottom, color=DEPTHS[min(k, len(DEPTHS) - 1)], edgecolor="#98a1ab",
                 linewidth=0.5, label=str(k), width=0.75)
        bottom = [b + h for b, h in zip(bottom, height, strict=True)]
    axes.set_ylim(0, 100)
    axes.grid(False)


def k_against_golden_steps(results: Sequence[Result]) -> Plot | None:
    """Do longer problems make it look further?"""
    figure, (axes,) = _canvas(1, width=5.4)
    drawn = 0
    for i, result in enumerate(results):
        by_length = mean_k_by_golden_steps(result) if _chooses(result) else {}
        if by_length:
            lengths = sorted(by_length)
            axes.scatter(lengths, [sum(by_length[n]) / len(by_length[n]) for n in lengths],
                         s=[12 + 6 * len(by_length[n]) for n in lengths], color=COLOURS[i % len(COLOURS)], alpha=0.75,
                         label=result.title)
            drawn += 1
    if not drawn:
        return None
    axes.set(xlabel="steps of the expert's solution", ylabel="mean k of an episode")
    axes.set_ylim(bottom=0)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return Plot("k_against_golden_steps", "Mean k against the length of the expert's solution",
                "A dot is all games whose solution has that many steps; its size is their number.", figure)


def _chooses(result: Result) -> bool:
    return len({step["k"] for step in result.steps}) > 1


def _policy_name(by_k: dict[int, Result]) -> str:
    """A name for the policy of some results that differ in K: the beginning that theirs have in common."""
    names = [result.name for result in by_k.values()]
    name = os.path.commonprefix(names).rstrip("-_k") or names[0]
    return name + max(result.mark for result in by_k.values())  # with K fixed at 0 none was asked, and none is marked


def _canvas(panels: int, width: float = 4.4) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.1), layout="constrained")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _errorbar(axes: Axes, x: Sequence[float], rates: Sequence[float], intervals: Sequence[Sequence[float]], i: int, *,
              label: str, line: bool = False) -> None:
    """Rates in percent with their intervals, in the ``i``-th colour."""
    below = [max(0.0, 100 * (rate - low)) for rate, (low, _) in zip(rates, intervals, strict=True)]
    above = [max(0.0, 100 * (high - rate)) for rate, (_, high) in zip(rates, intervals, strict=True)]
    axes.errorbar(x, [100 * rate for rate in rates], yerr=[below, above], color=COLOURS[i % len(COLOURS)],
                  marker=MARKERS[i % len(MARKERS)], markersize=6, capsize=2.5, linewidth=1.4, elinewidth=1,
                  linestyle="-" if line else "none", label=label)
