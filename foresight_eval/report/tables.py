"""Tables of results side by side, and their four forms: terminal, Markdown, CSV and LaTeX.

A table holds finished text, so that all forms show the same figures.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from foresight_eval.metrics import METRICS
from foresight_eval.results import Result, bucket, by_fixed_k
from foresight_eval.statistics import mean_interval, paired
from foresight_eval.trials import known_depth

ROLES = {"policy": "π", "world_model": "M", "critic": "Q"}
"""The models that calls are counted of, by their signs in a table."""
MANY_TYPES = 8
"""More task types than this (ScienceWorld has 24) are rows instead of columns."""
_LATEX = str.maketrans({"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
                        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}",
                        "π": r"$\pi$", "<": "$<$", ">": "$>$", "×": r"$\times$"})


@dataclass(frozen=True)
class Table:
    """``rows`` of cells under ``header``; the first column names, the others hold figures.  ``note``: what they are."""

    name: str
    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def overview(results: Sequence[Result]) -> Table:
    """One line a result: success by task type, and what it cost."""
    buckets = task_types(results)
    if len(buckets) > MANY_TYPES:
        buckets = []
    rows = []
    for result, budget in zip(results, budgets(results), strict=True):
        summary, overall = result.summary, result.summary["overall"]
        low, high = overall["interval"]
        rows.append((result.title, *(percent(summary["rates"].get(b)) for b in buckets), percent(overall["rate"]),
                     f"{100 * low:.0f}-{100 * high:.0f}", str(overall["n"]), percent(summary["invalid_action_rate"]),
                     number(summary["mean_k"], 2), number(_calls_per_step(summary["cost"]), 1),
                     number(summary["cost"]["tokens_per_episode"]), number(budget, 2),
                     number(summary["cost"]["decision_seconds"]["p50"], 2)))
    panels = "".join(f" Panel {panel}." for panel in dict.fromkeys(r.panel for r in results) if panel)
    return Table("overview", "Overview", f"Success in percent by task type, with the 95 % interval of all.{panels}",
                 ("", *buckets, "All", "95 %", "n", "invalid", "mean k", "calls/step", "tokens/ep", "NB",
                  "p50 s"), tuple(rows))


def _calls_per_step(spent: dict[str, Any]) -> float:
    """Of all models together."""
    return sum(spent[role]["calls_per_step"] for role in ROLES if role in spent)


def success(results: Sequence[Result]) -> Table:
    """Methods × task types with intervals: the paper's Table 1."""
    buckets = task_types(results)

    def cell(result: Result, bucket: str) -> str:
        rate = result.summary["rates"].get(bucket)
        return "-" if rate is None else with_interval(rate, result.summary["intervals"][bucket])

    rows = [(result.title, *(cell(result, b) for b in buckets),
             with_interval(overall["rate"], overall["interval"]), str(overall["n"]))
            for result in results if (overall := result.summary["overall"])["n"]]
    return _upright(Table("success", "Success by task type", "Success in percent with its 95 % Wilson interval.",
                          ("", *buckets, "All", "n"), tuple(rows)))


def scores(results: Sequence[Result]) -> Table:
    """Mean score 0..100 with intervals, where an environment gives more than all or nothing (ScienceWorld)."""
    buckets = task_types(results)

    def cell(values: list[float]) -> str:
        if not values:
            return "-"
        return with_interval(sum(values) / len(values) / 100, [end / 100 for end in mean_interval(values)])

    rows = []
    for result in results:
        by = {b: [m["score"] for m in result.metas if bucket(m["task_type"]) == b] for b in buckets}
        rows.append((result.title, *(cell(by[b]) for b in buckets), cell([m["score"] for m in result.metas])))
    return _upright(Table("scores", "Mean score by task type", "Mean final score, 0 to 100, with its 95 % interval.",
                          ("", *buckets, "All"), tuple(rows)))


def _upright(table: Table) -> Table:
    """Task types as rows and results as columns, where the types are many."""
    if len(table.header) <= MANY_TYPES + 3:  # a name, the types, All and n
        return table
    header, *rows = zip(table.header, *table.rows, strict=True)
    return dataclasses.replace(table, header=header, rows=tuple(rows))


def graded(results: Sequence[Result]) -> bool:
    """Does an environment among theirs give more than all or nothing?  Then the best score on the way is recorded."""
    return any("best_score" in meta for result in results for meta in result.metas)


def metrics(results: Sequence[Result], names: Sequence[str] = ()) -> Table:
    """Metrics × results with intervals, below success and, where games were played repeatedly, SR@k.

    ``names``: of the metrics; all where it is empty.
    """
    shown = [result for result in results if result.records]
    depth = max((len(_within(result)) for result in shown), default=1)
    rows = [("success", *(_interval_cell(r.summary["overall"]["rate"], r.summary["overall"]["interval"])
                          for r in shown))]
    for k in range(2, depth + 1):
        found = [_within(result).get(str(k)) for result in shown]
        rows.append((f"SR@{k}", *(_interval_cell(f["rate"], f["interval"]) if f else "-" for f in found)))
    for name in names or METRICS:
        found = [result.summary["metrics"][name] for result in shown]
        rows.append((name, *(_interval_cell(f["value"], f["interval"]) for f in found)))
    return Table("metrics", "Metrics", "Value with its 95 % interval over games: success and SR@k are Wilson's, the "
                 "others those of a ratio of two sums. Names that end in _rate are shares.",
                 ("", *(result.title for result in shown)), tuple(rows))


def _interval_cell(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" + (f" [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else "")


def success_within(results: Sequence[Result], *, doubling: bool = False) -> Table:
    """Methods × k: SR@k with intervals.  ``doubling``: for k = 1, 2, 4, ... and the largest, instead of every k."""
    depth = max(len(_within(result)) for result in results)
    ks = [k for k in range(1, depth + 1) if not doubling or k == depth or k.bit_count() == 1]

    def cell(result: Result, k: int) -> str:
        known = known_depth(result.trials)
        if known is not None and k > known:
            return "-"
        within = _within(result)
        figures = within[str(min(k, len(within)))]  # all games are solved where there is none of this k
        return with_interval(figures["rate"], figures["interval"])

    rows = [(result.title, *(cell(result, k) for k in ks), str(len(result.records)))
            for result in results if result.records]
    return _upright(Table("success_within", "SR@k", "Share of the games, in percent, that were solved in any of their "
                          "first k trials, with its 95 % Wilson interval.",
                          ("", *(f"SR@{k}" for k in ks), "n"), tuple(rows)))


def _within(result: Result) -> dict[str, dict[str, Any]]:
    """k -> SR@k; of games that were played once SR@1 alone."""
    return result.summary.get("trials", {"success_within": {"1": result.summary["overall"]}})["success_within"]


def tried_again(results: Sequence[Result]) -> bool:
    """Were games played several times?"""
    return any("trials" in result.summary for result in results)


def by_trial(results: Sequence[Result]) -> Table:
    """Each trial of each result."""
    rows = []
    for result in results:
        for t, figures in result.summary.get("trials", {}).get("by_trial", {}).items():
            rows.append((result.title, t, str(figures["n"]), with_interval(figures["rate"], figures["interval"]),
                         number(figures["steps_per_episode"], 1), percent(figures["invalid_action_rate"]),
                         number(figures["tokens_per_episode"])))
    return Table("by_trial", "Trial by trial", "Means over the episodes that are a t-th trial. Where games end with "
                 "their first success, these are of the games that no earlier trial solved. Tokens are those of the "
                 "episode and of the note made on it. Tables that don't speak of trials are of first trials.",
                 ("", "trial", "episodes", "success", "steps", "invalid", "tokens"), tuple(rows))


def comparison(results: Sequence[Result], baseline: Result) -> Table:
    """Every result against ``baseline`` on the games that both played."""
    rows = [(result.title, *cells) for result in results
            if result.name != baseline.name and (cells := _compared(result, baseline, 1))]
    return Table("comparison", f"Compared with {baseline.title} on the same games",
                 "Difference of success in points with its 95 % interval; games that only one of the two solved; "
                 "exact McNemar test.",
                 ("", "games", "difference", "95 %", "only it", f"only {baseline.title}", "p"), tuple(rows))


def comparison_within(results: Sequence[Result], baseline: Result) -> Table:
    """Every result against ``baseline`` by SR@k, with the largest k that is known of both."""
    rows = []
    for result in results:
        k = common_depth([result, baseline])
        if result.name != baseline.name and (cells := _compared(result, baseline, k)):
            rows.append((result.title, str(k), *cells))
    return Table("comparison_within", f"SR@k compared with {baseline.title} on the same games",
                 "Difference of SR@k in points with its 95 % interval, for the largest k that is known of both; games "
                 "that only one of the two solved in its first k trials; exact McNemar test.",
                 ("", "k", "games", "difference", "95 %", "only it", f"only {baseline.title}", "p"), tuple(rows))


def common_depth(results: Sequence[Result]) -> int:
    """The largest k of which SR@k is known of all ``results``, and that one of them played or needed."""
    depths = [depth for each in results if (depth := known_depth(each.trials)) is not None]
    return min(depths, default=max(len(_within(each)) for each in results))


def _compared(result: Result, baseline: Result, k: int) -> tuple[str, ...]:
    """The cells of a comparison by success in any of the first ``k`` trials; none without a game that both played."""
    pair = paired(result.outcomes_within(k), baseline.outcomes_within(k))
    if pair is None:
        return ()
    low, high = pair.interval
    return (str(pair.n), f"{100 * pair.difference:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}", str(pair.wins),
            str(pair.losses), "< 0.001" if pair.p < 0.001 else f"{pair.p:.3f}")


def roles_of(results: Sequence[Result]) -> dict[str, str]:
    """The ROLES of ``results``: a critic only where one was asked."""
    asked = any("critic" in result.summary["cost"] for result in results)
    return {role: sign for role, sign in ROLES.items() if role != "critic" or asked}


def cost(results: Sequence[Result]) -> Table:
    """What a result cost: calls and tokens an episode by model, seconds a decision, throughput, memory."""
    roles, rows = roles_of(results), []
    for result, budget in zip(results, budgets(results), strict=True):
        spent = result.summary["cost"]
        cells = [result.title, number(result.summary["mean_k"], 2), number(result.summary["steps_per_episode"], 1)]
        for role in roles:
            cells += [number(spent[role]["calls_per_episode"], 1), number(spent[role]["prompt_tokens_per_episode"]),
                      number(spent[role]["completion_tokens_per_episode"])] if role in spent else ["-"] * 3
        asked = sum(spent[role]["prompt_tokens_per_episode"] for role in roles if role in spent)
        cached = sum(spent[role]["cached_tokens_per_episode"] for role in roles if role in spent)
        memory = ", ".join(f"{device} {n / 1e9:.1f}" for device, n in spent["peak_memory_bytes"].items())
        rows.append((*cells, percent(cached / asked if asked else None),
                     *(number(spent["decision_seconds"][p], 2) for p in ("p50", "p95", "p99")),
                     number(spent["episodes_per_hour"]), memory or "-", number(budget, 2)))
    models = ", ".join(f"{sign}: {role.replace('_', ' ')}" for role, sign in roles.items())
    return Table("cost", "Cost", f"Calls and tokens an episode ({models}); share of the prompt tokens "
                 "that a cache had, in percent; seconds a decision at the concurrency of the run; episodes an hour; "
                 "most memory in use at a time, in GB; NB: normalized budget.",
                 ("", "mean k", "steps", *(f"{sign} {what}" for sign in roles.values()
                                           for what in ("calls", "prompt", "generated")),
                  "cached", "p50", "p95", "p99", "ep/h", "memory", "NB"), tuple(rows))


def all_tables(results: Sequence[Result], baseline: Result) -> list[Table]:
    tables = [success(results)]
    if graded(results):
        tables.append(scores(results))
    if len(results) > 1:
        tables.append(comparison(results, baseline))
    if tried_again(results):
        tables.append(success_within(results))
        if len(results) > 1:
            tables.append(comparison_within(results, baseline))
        tables.append(by_trial(results))
    return [*tables, metrics(results), cost(results)]


def task_types(results: Sequence[Result]) -> list[str]:
    """The columns of some results: their buckets, each once, in the order of the first that has it."""
    return list(dict.fromkeys(b for result in results for b in result.summary["buckets"]))


def normalized_budget(tokens: float, at_zero: float, at_max: float) -> float | None:
    """NB = (T̄ − T̄(0)) / (T̄(K_max) − T̄(0)), with T̄ the mean tokens an episode of all models together.

    T̄(k) is that of the same policy with K fixed at k.  None where imagining costs nothing.
    """
    return (tokens - at_zero) / (at_max - at_zero) if at_max > at_zero else None


def budgets(results: Sequence[Result]) -> list[float | None]:
    """The normalized budget of each result; None where the two results that it needs aren't among them.

    A result is measured against those of the same policy on the same games with K fixed at 0 and, with its own world
    model, at K_max: the largest ``--max_k`` of these results.  One that asks no world model is measured where there
    is only one.
    """
    groups, k_max = by_fixed_k(results), {}
    for result in results:
        k_max[result.setting] = max(k_max.get(result.setting, 0), result.config["max_k"])

    def budget(result: Result) -> float | None:
        mine = [by_k for (setting, world_model), by_k in groups.items()
                if setting == result.setting and result.world_model in (None, world_model)]
        if len(mine) != 1 or not {0, k_max[result.setting]} <= mine[0].keys():
            return None
        ends = [mine[0][k].summary["cost"]["tokens_per_episode"] for k in (0, k_max[result.setting])]
        return normalized_budget(result.summary["cost"]["tokens_per_episode"], *ends)

    return [budget(result) for result in results]


def percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.1f}"


def number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def with_interval(rate: float, interval: Sequence[float]) -> str:
    return f"{100 * rate:.1f} [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"


# The forms of a table


def terminal(table: Table) -> str:
    lines = [table.header, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines)


def markdown(table: Table) -> str:
    lines = [table.header, ("---", *["---:"] * (len(table.header) - 1)), *table.rows]
    rows = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"## {table.title}\n\n{table.note}\n\n{rows}\n"


def to_csv(table: Table) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([table.header, *table.rows])
    return out.getvalue()


def latex(table: Table) -> str:
    """A ``booktabs`` table."""
    def line(cells: Sequence[str]) -> str:
        return " & ".join(cell.translate(_LATEX) for cell in cells) + r" \\"

    columns = "l" + "r" * (len(table.header) - 1)
    body = "\n".join(map(line, table.rows))
    return (f"\\begin{{table}}[t]\n\\centering\n\\caption{{{table.title.translate(_LATEX)}. "
            f"{table.note.translate(_LATEX)}}}\n\\label{{tab:{table.name}}}\n\\begin{{tabular}}{{{columns}}}\n\\toprule\n"
            f"{line(table.header)}\n\\midrule\n{body}\n\\bottomrule\n\\end{{tabular}}\n\\end{{table}}\n")
