"""Metrics of recorded episodes, against values counted by hand; and old result folders scored again."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from foresight_eval import metrics
from foresight_eval.metrics import METRICS, measure, measure_all
from tests.made_results import DESK, PLAYED, make_episode, make_games, write_result

BACK_AND_FORTH = (*PLAYED[:1], ("look", "Nothing happens."), ("look", "Nothing happens."), *PLAYED[1:])
"""The second ``look`` is done again in the same state; both lead to a state that the episode is in already."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    games = make_games(tmp_path / "games", 3)
    write_result(tmp_path / "out", [
        make_episode(games[0], success=True, imagined=[[PLAYED[0]]]),
        make_episode(games[1], success=False, imagined=[[("go to desk 1", DESK), ("wait", "x")]],
                     played=BACK_AND_FORTH, tokens=200),
        make_episode(games[2], success=True, imagined=[], played=BACK_AND_FORTH)])
    return tmp_path / "out"


def records(folder: Path) -> list[dict]:
    return [json.loads((folder / f"{i}.json").read_text()) for i in range(3)]


def test_values_counted_by_hand(folder: Path) -> None:
    found = {name: figures["value"] for name, figures in measure_all(records(folder)).items()}
    assert found == {
        "steps_per_episode": pytest.approx(13 / 3), "steps_to_success": 4, "invalid_action_rate": 0,
        "unparsed_action_rate": 0, "repeated_action_rate": pytest.approx(2 / 13),
        "revisit_rate": pytest.approx(4 / 13), "mean_k": pytest.approx(3 / 13), "imagined_fact_f1": 1,
        "calls_per_decision": 2, "tokens_per_decision": pytest.approx((8 * 104 + 5 * 204) / 13),
        "tokens_per_episode": pytest.approx((8 * 104 + 5 * 204) / 3)}


def test_an_episode_without_steps_counts_where_it_says_something(folder: Path) -> None:
    empty = records(folder)[0] | {"foresight_steps": []}
    empty["meta"] |= {"steps": 0, "usage": {}, "success": False}
    found = measure_all([empty])
    assert found["steps_per_episode"] == {"value": 0, "interval": None, "episodes": 1}
    for name in ("steps_to_success", "invalid_action_rate", "revisit_rate", "tokens_per_decision"):
        assert found[name] == {"value": None, "interval": None, "episodes": 0}


def test_the_interval_is_that_of_a_bootstrap_over_games() -> None:
    rng = random.Random(0)
    made = [(rng.random() * n, n) for n in (rng.randint(3, 40) for _ in range(150))]
    found = measure(lambda pair: pair, made)
    draws = []
    for _ in range(2000):
        sample = rng.choices(made, k=len(made))
        draws.append(sum(a for a, _ in sample) / sum(n for _, n in sample))
    low, high = found["interval"]
    assert (high - low) / 2 == pytest.approx(1.959964 * statistics.stdev(draws), rel=0.1)
    assert found["value"] == pytest.approx(statistics.fmean(draws), abs=0.01)


def test_a_metric_of_ones_own_on_an_old_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the docstring says: a function, and its name in METRICS."""
    from foresight_eval import summary
    from foresight_eval.report import tables
    from foresight_eval.results import read_results

    before = json.loads((folder / "summary.json").read_text())
    monkeypatch.setitem(METRICS, "looks", lambda record: (
        sum(step["action"] == "look" for step in record["foresight_steps"]), 1))
    after = summary.write_summary(folder)
    assert after["metrics"].pop("looks")["value"] == pytest.approx(4 / 3)
    assert json.loads(json.dumps(after)) == before
    table = tables.metrics(read_results([folder]), ["looks"])
    assert [row[0] for row in table.rows] == ["success", "looks"] and table.rows[1][1].startswith("1.333 [")


def test_the_program_scores_folders_of_before_there_were_metrics(folder: Path, tmp_path: Path) -> None:
    old = json.loads((folder / "summary.json").read_text())
    wanted = old.pop("metrics")
    (folder / "summary.json").write_text(json.dumps(old))
    command = [sys.executable, "-m", "foresight_eval.score", str(folder)]
    said = subprocess.run([*command, "--out_csv", str(tmp_path / "t.csv")], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert json.loads((folder / "summary.json").read_text())["metrics"] == wanted
    assert [line.split(",")[0] for line in (tmp_path / "t.csv").read_text().splitlines()] == [
        "", "success", *METRICS]
    for words, complaint in ((["--metrics", "revisits"], "--metrics revisits: no such metric, did you mean"),
                             ([str(tmp_path)], "not a result folder")):
        said = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
        assert said.returncode == 2 and complaint in said.stderr


def test_states_are_those_of_no_repeat(folder: Path) -> None:
    """In ScienceWorld the last observation is the state."""
    record = records(folder)[1]
    assert metrics.repeated_action_rate(record) == (1, 5) and metrics.revisit_rate(record) == (2, 5)
    record["meta"]["task_type"] = "boil"
    # of the observations: room, desk, nothing, nothing, taken, closed
    assert metrics.revisit_rate(record) == (1, 5) and metrics.repeated_action_rate(record) == (0, 5)
