"""Metrics of episodes: each is one small function of one episode's record, named once in :data:`METRICS`.

To add one, write a function of a record (:func:`foresight_eval.results.episode_record`) that returns a pair: an
amount, and of how many.  Name it in METRICS.  ``python -m foresight_eval.score DIR ...`` then computes it for result
folders of any age, and summaries and reports have it.  A metric's value is the sum of the amounts over the sum of the
counts.  So ``(invalid actions, steps)`` is a share of all steps, ``(tokens, 1)`` a mean over episodes, and an episode
that the metric says nothing of returns ``(0, 0)``.

Success and SR@k aren't here: :mod:`foresight_eval.summary` and :mod:`foresight_eval.trials` have them, with the
intervals of shares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from foresight_eval.hindsight import judged
from foresight_eval.results import earlier_trial
from foresight_eval.statistics import Z95
from itp.envs.alfworld.games import ALFWORLD_TASK_TYPES
from itp.methods.no_repeat import states

Record = dict[str, Any]
Metric = Callable[[Record], tuple[float, float]]


def steps_per_episode(record: Record) -> tuple[float, float]:
    return record["meta"]["steps"], 1


def steps_to_success(record: Record) -> tuple[float, float]:
    """Steps of the episodes that succeeded."""
    won = record["meta"]["success"]
    return (record["meta"]["steps"], 1) if won else (0, 0)


def invalid_action_rate(record: Record) -> tuple[float, float]:
    """The share of steps whose action the engine didn't take."""
    steps = record["foresight_steps"]
    return sum(step["invalid"] for step in steps), len(steps)


def unparsed_action_rate(record: Record) -> tuple[float, float]:
    """The share of steps whose reply held no command."""
    return record["meta"]["unparsed_actions"], record["meta"]["steps"]


def repeated_action_rate(record: Record) -> tuple[float, float]:
    """The share of steps whose action was done before in the same state, as ``--method no_repeat`` tells states."""
    done = list(zip(_states(record), (step["action"] for step in record["foresight_steps"]), strict=False))
    return len(done) - len(set(done)), len(done)


def revisit_rate(record: Record) -> tuple[float, float]:
    """The share of steps that led to a state that the episode had been in, as ``--method no_repeat`` tells states."""
    seen = _states(record)
    return len(seen) - len(set(seen)), max(0, len(seen) - 1)


def mean_k(record: Record) -> tuple[float, float]:
    """Imagined steps a decision."""
    steps = record["foresight_steps"]
    return sum(step["k"] for step in steps), len(steps)


def imagined_fact_f1(record: Record) -> tuple[float, float]:
    """Fact-F1 of the imagined steps that then were really taken (:mod:`foresight_eval.hindsight`)."""
    steps = record["foresight_steps"]
    scores = [score for t in range(len(steps)) for score in judged(steps, t) if score is not None]
    return sum(scores), len(scores)


def calls_per_decision(record: Record) -> tuple[float, float]:
    """Calls of all models together."""
    return sum(spent["calls"] for spent in record["meta"]["usage"].values()), record["meta"]["steps"]


def tokens_per_decision(record: Record) -> tuple[float, float]:
    """Tokens of prompts and answers of all models together."""
    return _tokens(record), record["meta"]["steps"]


def tokens_per_episode(record: Record) -> tuple[float, float]:
    return _tokens(record), 1


METRICS: dict[str, Metric] = {metric.__name__: metric for metric in (
    steps_per_episode, steps_to_success, invalid_action_rate, unparsed_action_rate, repeated_action_rate, revisit_rate,
    mean_k, imagined_fact_f1, calls_per_decision, tokens_per_decision, tokens_per_episode)}
"""The metrics by name.  None depends on the machine; ``cost.json`` has seconds and memory."""


def measure(metric: Metric, records: Sequence[Record]) -> dict[str, Any]:
    """``value`` of a metric over some episodes, its 95 % ``interval`` over games, and the ``episodes`` that count.

    The value is a ratio of two sums; its variance is that of the ratio estimator, with games as the sample (Cochran,
    *Sampling Techniques*, 1977, section 2.11).  Value and interval are None where nothing counts; the interval is None
    for one episode.
    """
    pairs = [pair for record in records if (pair := metric(record))[1]]
    count = sum(of for _, of in pairs)
    value = sum(amount for amount, _ in pairs) / count if pairs else None
    if len(pairs) < 2:
        return {"value": value, "interval": None, "episodes": len(pairs)}
    n = len(pairs)
    residuals = sum((amount - value * of) ** 2 for amount, of in pairs)
    half = Z95 * math.sqrt(residuals / (n - 1) * n) / count
    return {"value": value, "interval": (value - half, value + half), "episodes": n}


def measure_all(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Every metric, by name."""
    return {name: measure(metric, records) for name, metric in METRICS.items()}


def _states(record: Record) -> list[Hashable]:
    """The states of an episode, from its first to the one after its last step; none where it says nothing of them."""
    if not record["foresight_steps"] or not record["conversations"]:
        return []
    env = "alfworld" if record["meta"]["task_type"] in ALFWORLD_TASK_TYPES else "scienceworld"
    return list(states(earlier_trial(record, record["meta"]["game_id"]).state, env))


def _tokens(record: Record) -> int:
    return sum(spent["prompt_tokens"] + spent["completion_tokens"] for spent in record["meta"]["usage"].values())
