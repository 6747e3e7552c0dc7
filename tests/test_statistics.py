"""The statistics of reports, held against statsmodels and against values computed by hand."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import zconfint

from foresight_eval import statistics


def test_wilson_is_that_of_statsmodels() -> None:
    draw = random.Random(1)
    tables = [(draw.randint(0, n), n) for n in (draw.randint(1, 2000) for _ in range(500))]
    tables += [(won, n) for n in (1, 2, 10) for won in (0, n)]
    for won, n in tables:
        assert statistics.wilson(won, n) == pytest.approx(proportion_confint(won, n, 0.05, "wilson"), abs=1e-7)
    assert statistics.wilson(0, 0) == (0.0, 1.0)  # nothing is known; statsmodels divides by 0


def test_mcnemar_is_that_of_statsmodels() -> None:
    draw = random.Random(2)
    tables = [(draw.randint(0, 60), draw.randint(0, 60)) for _ in range(300)]
    tables += [(draw.randint(0, 5), draw.randint(0, 5)) for _ in range(100)] + [(400, 330), (0, 1), (1, 0)]
    for wins, losses in tables:
        # Only the cells where one of the two won count.
        table = [[draw.randint(0, 100), wins], [losses, draw.randint(0, 100)]]
        assert statistics.mcnemar(wins, losses) == pytest.approx(float(mcnemar(table, exact=True).pvalue), rel=1e-9)


def test_paired_counts_the_cells_of_the_table() -> None:
    draw = random.Random(3)
    for _ in range(100):
        games = range(draw.randint(1, 200))
        method, baseline = ({game: draw.random() < rate for game in games} for rate in (0.7, 0.5))
        table = [[sum(method[g] is a and baseline[g] is b for g in games) for b in (True, False)]
                 for a in (True, False)]
        found = statistics.paired(method, baseline)
        assert (found.wins, found.losses, found.n) == (table[0][1], table[1][0], len(games))
        assert found.p == pytest.approx(float(mcnemar(table, exact=True).pvalue), rel=1e-9)
        assert found.interval[0] <= found.difference <= found.interval[1]


def test_mean_interval_is_that_of_statsmodels_inside_its_bounds() -> None:
    draw = random.Random(4)
    for _ in range(200):
        values = [draw.uniform(30, 70) for _ in range(draw.randint(2, 300))]
        low, high = zconfint(values)
        assert statistics.mean_interval(values) == pytest.approx((max(0, low), min(100, high)), abs=1e-5)
    assert statistics.mean_interval([0, 100]) == (0.0, 100.0)  # cut: 50 ± 98 goes beyond what a value can be
    assert statistics.mean_interval([0.2, 0.4], high=1.0) == pytest.approx((0.104, 0.496), abs=1e-4)


@pytest.mark.parametrize("values, q, expected", [
    ([4, 1, 3, 2], 50, 2.5), ([4, 1, 3, 2], 75, 3.25), ([4, 1, 3, 2], 0, 1), ([4, 1, 3, 2], 100, 4),
    ([10, 20, 40], 95, 38),  # position .95 * 2 = 1.9, which is .9 of the way from 20 to 40
    ([7], 99, 7),
])
def test_percentile_is_linear_between_neighbors(values: list[float], q: float, expected: float) -> None:
    found = statistics.percentile(values, q)
    assert found == pytest.approx(expected) and type(found) is float  # JSON knows no type of numpy's


def test_of_nothing_there_is_no_percentile() -> None:
    assert statistics.percentile([], 50) is None


def test_statistics_load_without_numpy() -> None:
    """A program that only answers ``--help`` imports them too."""
    subprocess.run([sys.executable, "-c", "import sys, foresight_eval.statistics; assert 'numpy' not in sys.modules"],
                   check=True)
