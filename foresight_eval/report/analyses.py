"""Tables for one question each: accuracy, depth, K by length, cost.

Figures of world models are the ``models`` of ``world_model.fidelity --out_json``, by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from foresight_eval.hindsight import fact_f1_by_depth
from foresight_eval.report.tables import (
    Table, common_depth, comparison_within, number, percent, roles_of, with_interval,
)
from foresight_eval.results import Result, mean_k_by_golden_steps
from foresight_eval.statistics import mean, mean_interval
from foresight_eval.trials import tokens


def deployment(results: Sequence[Result]) -> Table:
    """What an agent is like to wait for: its decisions, and how much of them each model took."""
    roles, rows = roles_of(results), []
    for result in results:
        spent, seconds = result.summary["cost"], [step["info"]["seconds"] for step in result.steps]
        waited = [number(spent[role]["seconds_per_step"], 2) if role in spent else "-" for role in roles]
        generated = sum(usage["completion_tokens"] for step in result.steps for usage in step["usage"].values())
        asked = sum(spent[role]["calls_per_step"] for role in roles if role in spent)
        memory = ", ".join(f"{device} {n / 1e9:.1f}" for device, n in spent["peak_memory_bytes"].items())
        rows.append((result.title, *(number(spent["decision_seconds"][p], 2) for p in ("p50", "p95", "p99")), *waited,
                     number(asked, 1), number(spent["tokens_per_episode"]),
                     number(generated / sum(seconds) if seconds else None, 1),
                     number(spent["episodes_per_hour"], 1), memory or "-"))
    models = ", ".join(f"the {role.replace('_', ' ')} ({sign})" for role, sign in roles.items())
    return Table("deployment", "Deployment", f"Seconds a decision; of these, waited for {models} on average; calls a "
                 "decision and tokens an episode of all models; generated tokens a second of deciding; episodes an "
                 "hour; most memory in use at a time, in GB.",
                 ("", "p50 s", "p95 s", "p99 s", *(f"{sign} s" for sign in roles.values()), "calls",
                  "tokens/ep", "tokens/s", "ep/h", "memory"),
                 tuple(rows))


def decisions(results: Sequence[Result]) -> Table:
    """Methods side by side: what a decision costs, and what it comes to."""
    rows = []
    for result in results:
        found, overall = result.summary["metrics"], result.summary["overall"]
        rows.append((result.title, with_interval(overall["rate"], overall["interval"]), str(overall["n"]),
                     number(found["calls_per_decision"]["value"], 1), number(found["tokens_per_decision"]["value"]),
                     *(percent(found[name]["value"]) for name in (
                         "invalid_action_rate", "repeated_action_rate", "revisit_rate")),
                     number(found["steps_to_success"]["value"], 1)))
    panels = "".join(f" Panel {panel}." for panel in dict.fromkeys(r.panel for r in results) if panel)
    return Table("decisions", "Methods by decision", "Success in percent with its 95 % interval; calls and tokens a "
                 "decision of all models; steps, in percent, that were invalid, repeated an action in the same state, "
                 f"led to a state that the episode had been in; steps of the episodes that succeeded.{panels}",
                 ("", "success", "n", "calls", "tokens", "invalid", "repeated", "revisits", "steps"), tuple(rows))


def accuracy(models: Mapping[str, Any]) -> Table:
    """How true world models are, one step ahead, of each actor's episodes."""
    rows = []
    for name, figures in models.items():
        for source, kinds in figures["one_step"].items():
            row = kinds["all"]
            rows.append((name, source, percent(row["exact_match"]), percent(row["token_f1"]),
                         with_interval(row["fact_f1"], row["fact_f1_interval"]), str(row["n"])))
    return Table("accuracy", "Accuracy of world models, one step ahead",
                 "Of held-out episodes, in percent; Fact-F1 with its 95 % interval.",
                 ("", "episodes of", "exact match", "token F1", "Fact-F1", "n"), tuple(rows))


def depth(results: Sequence[Result], models: Mapping[str, Any]) -> Table:
    """Success with K fixed beside how true the K-th imagined step is.

    The accuracy is that of world models on recorded actions, and of the agent's own imagination as far as it came true.
    """
    fixed = {result.fixed_k: result for result in results if result.fixed_k is not None}
    curves = {f"{name}, {source}" if len(models) > 1 else source: by for name, figures in models.items()
              for source, by in figures["by_depth"].items()}
    own = fact_f1_by_depth(fixed[max(fixed)].records) if fixed else {}
    rows = []
    for k in sorted({*fixed, *(int(d) for by in curves.values() for d in by)}):
        overall = fixed[k].summary["overall"] if k in fixed else None
        accuracies = [with_interval(by[str(k)]["fact_f1"], by[str(k)]["fact_f1_interval"]) if str(k) in by else "-"
                  for by in curves.values()]
        mine = own.get(k)
        rows.append((str(k), with_interval(overall["rate"], overall["interval"]) if overall else "-", *accuracies,
                     with_interval(sum(mine) / len(mine), mean_interval(mine, high=1.0)) if mine else "-",
                     number(fixed[k].summary["cost"]["tokens_per_episode"]) if k in fixed else "-"))
    return Table("depth", "Success and accuracy by depth",
                 "Success with K fixed, and Fact-F1 of the K-th imagined step, in percent with 95 % intervals: "
                 "on recorded actions by actor; own: what the agent itself imagined, as long as it then did that."
                 + "".join(f"  World model of the agent{mark}." for mark in sorted({r.mark for r in results} - {""})),
                 ("K", "success", *(f"Fact-F1, {name}" for name in curves), "Fact-F1, own", "tokens/ep"), tuple(rows))


def k_by_length(results: Sequence[Result]) -> Table:
    """Do longer problems make it look further?  Mean k by the length of the expert's solution."""
    curves = [mean_k_by_golden_steps(result) for result in results]
    rows = []
    for length in sorted(set().union(*curves)):
        cells = [f"{sum(ks) / len(ks):.2f} ({len(ks)})" if (ks := by.get(length)) else "-" for by in curves]
        rows.append((str(length), *cells))
    return Table("k_by_length", "Mean k by the length of the expert's solution",
                 "Mean over games of an episode's mean k; in brackets, how many games have a solution of that length.",
                 ("steps", *(result.title for result in results)), tuple(rows))


Seeds = Mapping[object, Result]
"""The results of runs that differ in one variable, by its value."""


def pooled(groups: Mapping[str, Seeds], baselines: Mapping[str, str]) -> Table:
    """Results of several seeds as one, each compared with its baseline on the seeds and games that both have.

    ``baselines``: to what each name of ``groups`` is compared.  A game's success is its share over the seeds.  The
    intervals are those of means over games, so they say what other games would do; the single seeds stand beside them.
    """
    rows = []
    for name, results in groups.items():
        if not results:
            continue
        won, (success, interval) = by_game(results), pooled_success(results)
        rates = [percent(result.summary["overall"]["rate"]) for result in results.values()]
        before = groups.get(baselines[name], {}) if baselines[name] != name else {}
        rows.append((name, with_interval(success, interval), ", ".join(rates), f"{len(won)} x {len(results)}",
                     _difference(results, before),
                     number(mean([result.summary["mean_k"] for result in results.values()]), 2),
                     number(mean([result.summary["cost"]["tokens_per_episode"] for result in results.values()]))))
    return Table("pooled", "All seeds together",
                 "Success in percent, a mean over seeds and games, with its 95 % interval over games; each seed; games "
                 "x seeds; the difference to the baseline on the games and seeds that both have, in points (with the "
                 "number of seeds, where it isn't all).",
                 ("", "success", "seeds", "n", "difference", "mean k", "tokens/ep"), tuple(rows))


def _difference(results: Seeds, before: Seeds) -> str:
    """How much more ``results`` solve than ``before``, in points with the 95 % interval over games."""
    seeds = [seed for seed in results if seed in before]
    if not seeds:
        return "-"
    one, other = (by_game({seed: each[seed] for seed in seeds}) for each in (results, before))
    changes = [one[game] - other[game] for game in one if game in other]
    if not changes:
        return "-"
    low, high = mean_interval(changes, low=-1.0, high=1.0)
    few = f", {len(seeds)} of {max(len(results), len(before))} seeds" * (len(seeds) < max(len(results), len(before)))
    return f"{100 * sum(changes) / len(changes):+.1f} ({100 * low:+.1f} to {100 * high:+.1f}{few})"


def pooled_success(results: Seeds) -> tuple[float, tuple[float, float]]:
    """The mean success of several seeds, with its 95 % interval over games."""
    shares = list(by_game(results).values())
    return sum(shares) / len(shares), mean_interval(shares, high=1.0)


def by_game(results: Seeds) -> dict[tuple[str, str], float]:
    """The share of ``results`` that solved a game, of the games that all of them played."""
    outcomes = [result.outcomes for result in results.values()]
    games = set.intersection(*map(set, outcomes))
    return {game: sum(each[game] for each in outcomes) / len(outcomes) for game in sorted(games)}


def against_best_without_imagination(results: Sequence[Result]) -> Table:
    """Every result by SR@k against the best one that asks no world model; the first where there is none.

    The best is that with the highest SR@k at the largest k that is known of all these, and of those with the highest
    SR@1.  It is chosen on the games of the comparison, which favours it.
    """
    alone = [result for result in results if result.world_model is None]
    if not alone:
        return comparison_within(results, results[0])
    k = common_depth(alone)
    best = max(alone, key=lambda result: [mean([*result.outcomes_within(at).values()]) or 0 for at in (k, 1)])
    return comparison_within(results, best)


def trial_cost(results: Sequence[Result]) -> Table:
    """What all trials of a game took together."""
    rows = []
    for result in results:
        games = list(result.trials.values())
        took = [sum(map(tokens, trials)) for trials in games]
        solved = sum(any(record["meta"]["success"] for record in trials) for trials in games)
        rows.append((result.title, str(len(games)), number(mean([len(trials) for trials in games]), 2),
                     number(mean(took)), number(sum(took) / solved if solved else None)))
    return Table("trial_cost", "Tokens of all trials",
                 "Trials and tokens of a game, on average, with those of the notes on it; all tokens of all games by "
                 "the games that were solved in any trial.",
                 ("", "games", "trials/game", "tokens/game", "tokens/solved"), tuple(rows))


def training(metrics: Mapping[str, Mapping[str, Any] | None]) -> Table:
    """What training took, from the ``metrics.json`` and ``timing.jsonl`` that its programs leave; None: not there."""
    rows = []
    for name, took in metrics.items():
        took = took or {}
        seconds, devices = took.get("seconds"), took.get("world_size", 1)
        hours = number(seconds * devices / 3600, 3) if seconds is not None else "-"
        rows.append((name, number(seconds), "≥ " + hours if took.get("resumed") else hours,
                     number(took.get("tokens_per_second")), number(took.get("steps", took.get("update")))))
    return Table("training", "Cost of training", "Seconds by the clock, and times the number of processes in hours (≥: "
                 "of the last start of an interrupted run only); tokens a second; optimizer steps.",
                 ("", "seconds", "device-hours", "tokens/s", "steps"), tuple(rows))
