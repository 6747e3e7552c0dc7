"""The statistics of the reports: intervals of success rates, and two methods compared on the same games."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

Z95 = 1.959964
"""The normal quantile of a two-sided 95 % interval."""


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def wilson(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """The 95 % Wilson score interval of a success rate."""
    if n == 0:
        return 0.0, 1.0
    p, zz = successes / n, z * z
    center = (p + zz / (2 * n)) / (1 + zz / n)
    half = z / (1 + zz / n) * math.sqrt(p * (1 - p) / n + zz / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def mean_interval(values: Sequence[float], low: float = 0.0, high: float = 100.0) -> tuple[float, float]:
    """The 95 % interval of a mean by the normal approximation, cut to ``low``..``high``, which no value exceeds."""
    center = sum(values) / len(values)
    half = Z95 * math.sqrt(sum((v - center) ** 2 for v in values) / max(1, len(values) - 1) / len(values))
    return max(low, center - half), min(high, center + half)


def percentile(values: Sequence[float], q: float) -> float | None:
    """The ``q``-th percentile (0..100), linear between neighbors; None of nothing."""
    import numpy as np  # here, because a program that only answers --help has no use for it

    return float(np.percentile(values, q)) if values else None


@dataclass(frozen=True)
class Paired:
    """A method against a baseline on the ``n`` games that both played.

    ``wins``: games that only the method solved; ``losses``: that only the baseline solved.
    ``difference`` of the success rates with its 95 % ``interval`` (Agresti and Min, 2005: Wald's for paired
    proportions with half a game added to every cell), ``p``: the exact McNemar test, two-sided.
    """

    n: int
    wins: int
    losses: int
    difference: float
    interval: tuple[float, float]
    p: float


def paired(method: Mapping[Hashable, bool], baseline: Mapping[Hashable, bool]) -> Paired | None:
    """Compare outcomes (game -> solved).  None where no game is in both."""
    games = method.keys() & baseline.keys()
    if not games:
        return None
    n = len(games)
    wins = sum(method[g] and not baseline[g] for g in games)
    losses = sum(baseline[g] and not method[g] for g in games)
    center = (wins - losses) / (n + 2)
    half = Z95 * math.sqrt(max(0.0, (wins + losses + 1) / (n + 2) - center ** 2) / (n + 2))
    interval = max(-1.0, center - half), min(1.0, center + half)
    return Paired(n, wins, losses, (wins - losses) / n, interval, mcnemar(wins, losses))


def mcnemar(wins: int, losses: int) -> float:
    """Exact two-sided p: how often fair coins split ``wins + losses`` at least that unevenly."""
    n = wins + losses
    tail = sum(math.comb(n, i) for i in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2 ** n)
