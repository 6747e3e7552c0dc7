"""SR@k and the figures of each trial, where games are played several times.

SR@k is the share of the games that were solved in any of their first k trials (Reflexion, 2303.11366).  A solved game
needs no further trial.  So SR@k is known once every game has k trials or is solved, and it isn't given before: of a run
that was stopped, the games with more trials would be a selection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from foresight_eval.metrics import invalid_action_rate, measure, steps_per_episode
from foresight_eval.statistics import mean, wilson

Records = Mapping[int, Sequence[dict[str, Any]]]
"""The records of a game's trials, in order, by the game's index."""


def known_depth(trials: Records) -> int | None:
    """The largest k of which SR@k is known; None: of every k, because all games are solved."""
    return min((len(each) for each in trials.values() if not _solved(each)), default=None)


def summarize_trials(trials: Records) -> dict[str, Any] | None:
    """The ``trials`` of ``summary.json``; None where every game was played once.

    ``success_within``: k -> SR@k of all games with its Wilson interval, up to the largest k that is known, or that was
    needed to solve all.  ``by_trial``: means over the episodes that are a t-th trial.  Unless games went on after
    success, these are of the games that weren't solved before, so they get harder with t.  ``tokens_per_game``:
    mean over games of the tokens of all trials and notes together.
    """
    most = max(map(len, trials.values()), default=0)
    if most < 2:
        return None
    depth = known_depth(trials) or most
    return {
        "success_within": {str(k): _rate([_solved(each[:k]) for each in trials.values()]) for k in range(1, depth + 1)},
        "by_trial": {str(t + 1): _figures([each[t] for each in trials.values() if len(each) > t])
                     for t in range(most)},
        "tokens_per_game": mean([sum(map(tokens, each)) for each in trials.values()]),
    }


def tokens(record: dict[str, Any]) -> int:
    """The tokens of an episode, and of the note that was made on it: prompts and answers of all models."""
    return sum(spent["prompt_tokens"] + spent["completion_tokens"] for spent in usages(record))


def usages(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What an episode, and the note that was made on it, asked of each model."""
    return [*record["meta"]["usage"].values(), *record.get("look_back", {}).get("usage", {}).values()]


def _solved(trials: Sequence[dict[str, Any]]) -> bool:
    return any(record["meta"]["success"] for record in trials)


def _rate(outcomes: Sequence[bool]) -> dict[str, Any]:
    won, n = sum(outcomes), len(outcomes)
    return {"n": n, "success": won, "rate": won / n, "interval": wilson(won, n)}


def _figures(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return _rate([record["meta"]["success"] for record in records]) | {
        "steps_per_episode": measure(steps_per_episode, records)["value"],
        "invalid_action_rate": measure(invalid_action_rate, records)["value"],
        "tokens_per_episode": mean([tokens(record) for record in records])}
