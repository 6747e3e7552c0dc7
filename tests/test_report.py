"""Statistics, tables and figures of reports, against values computed by hand."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from foresight_eval import statistics
from foresight_eval.hindsight import fact_f1_by_depth, judged
from foresight_eval.report import analyses, page, plots, report, tables
from foresight_eval.results import Result, read_results
from itp.errors import UserError
from itp.lm.base import Usage
from tests.made_results import CONFIG, PLAYED, TAKEN, make_episode, make_games, write_result

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("won, n, low, high", [
    (5, 10, 0.2366, 0.7634),  # by hand: centre .5, half 1.96/(1+.38415) * sqrt(.025 + .0096)
    (0, 10, 0.0, 0.2775),
    (10, 10, 0.7225, 1.0),
    (119, 140, 0.7816, 0.8997),
    (0, 0, 0.0, 1.0),
])
def test_wilson_interval(won: int, n: int, low: float, high: float) -> None:
    assert statistics.wilson(won, n) == pytest.approx((low, high), abs=1e-4)


def test_percentile_and_mean_interval() -> None:
    assert [statistics.percentile([4, 1, 3, 2], q) for q in (0, 50, 75, 100)] == [1, 2.5, 3.25, 4]
    assert statistics.percentile([], 50) is None and statistics.percentile([7], 99) == 7
    # mean 2, variance (1 + 0 + 1) / 2 = 1, half 1.96 / sqrt(3)
    assert statistics.mean_interval([1, 2, 3]) == pytest.approx((2 - 1.1316, 2 + 1.1316), abs=1e-4)
    assert statistics.mean_interval([5]) == (5, 5)


def test_mcnemar_is_the_two_sided_sign_test() -> None:
    assert statistics.mcnemar(0, 0) == 1
    assert statistics.mcnemar(0, 5) == pytest.approx(2 / 32)
    assert statistics.mcnemar(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert statistics.mcnemar(3, 3) == 1


def test_paired_compares_the_games_that_both_played() -> None:
    baseline = {g: g in (0, 1, 2) for g in range(10)} | {"only here": True}
    method = {g: g in (1, 2, 3, 4, 5) for g in range(10)} | {"and here": False}
    pair = statistics.paired(method, baseline)
    assert (pair.n, pair.wins, pair.losses, pair.difference) == (10, 3, 1, pytest.approx(0.2))
    # centre 2/12; variance (5/12 - (2/12)²) / 12
    half = 1.959964 * ((5 / 12 - 4 / 144) / 12) ** 0.5
    assert pair.interval == pytest.approx((2 / 12 - half, 2 / 12 + half))
    assert pair.p == pytest.approx(2 * (1 + 4) / 16)
    assert statistics.paired({1: True}, {2: True}) is None


def test_a_prediction_is_judged_until_the_agent_does_something_else(tmp_path: Path) -> None:
    game, = make_games(tmp_path / "games", 1)
    half = "You arrive at desk 1. On the desk 1, you see a mug 1."
    imagined = [[PLAYED[0], (PLAYED[1][0], "Nothing happens."), ("look", TAKEN)],
                [("open fridge 1", TAKEN)], [("go to fridge 1", half), ("look", "The room.")]]
    result = write_result(tmp_path / "r", [make_episode(game, success=False, imagined=imagined)])
    steps = result.records[0]["foresight_steps"]
    assert judged(steps, 0) == [1.0, 0.0, None] and judged(steps, 1) == [None]
    assert judged(steps, 2) == [0.0, None]  # the episode ended before the second could happen
    assert fact_f1_by_depth(result.records) == {1: [1.0, 0.0], 2: [0.0]}
    wrong = [make_episode(game, success=False, imagined=[[("go to desk 1", half)]])]
    # two of three facts are foreseen and nothing else: precision 1, recall 2/3
    assert fact_f1_by_depth(write_result(tmp_path / "w", wrong).records) == {1: [pytest.approx(0.8)]}


def test_normalized_budget() -> None:
    assert tables.normalized_budget(300, 100, 900) == pytest.approx(0.25)  # (300 - 100) / (900 - 100)
    assert tables.normalized_budget(100, 100, 900) == 0
    assert tables.normalized_budget(100, 100, 100) is None


def test_a_budget_is_measured_against_the_same_policy_with_k_fixed() -> None:
    def result(name: str, tokens: float, games: str = "ab", **config: object) -> Result:
        records = {i: {"meta": {"split": "dev", "game_id": game, "success": False}} for i, game in enumerate(games)}
        return Result(name, CONFIG | {"max_k": 5} | config, {"cost": {"tokens_per_episode": tokens}}, records)

    made = [result("head", 500), result("k0", 100, fixed_k=0), result("k2", 600, fixed_k=2),
            result("k5", 900, fixed_k=5), result("sft", 50, method="sft", policy_fingerprint="base"),
            result("other split", 500, split="dev"), result("other games", 500, games="a")]
    assert tables.budgets(made) == [pytest.approx(0.5), 0, pytest.approx(0.625), 1, None, None, None]
    assert tables.budgets(made[:3]) == [None] * 3  # K = 2 is not K_max
    assert tables.budgets(made[:1]) == [None]
    # One that looks farther than K_max costs more than all of it, and is no end of the scale.
    assert tables.budgets([*made[:4], result("k8", 1300, fixed_k=8)])[0::4] == [pytest.approx(0.5), 1.5]
    # What other methods do without a world model isn't the policy with K = 0.
    others = [result("cot", 40, method="cot", disable_wm=1), result("rap", 1700, method="rap")]
    assert tables.budgets([*others, *made[:4]])[:3] == [pytest.approx(-0.075), 2, pytest.approx(0.5)]
    # Each world model has its own upper end; what asks none is measured by neither.
    second = [result("head, wm 2", 250, wm_fingerprint="v"), result("k5, wm 2", 400, fixed_k=5, wm_fingerprint="v")]
    assert tables.budgets([*made[:4], *second, others[0]]) == [
        pytest.approx(0.5), None, pytest.approx(0.625), 1, pytest.approx(0.5), 1, None]
    assert tables.budgets([*made[:3], *second])[0] is None
    assert result("off", 9, disable_wm=1).fixed_k == 0 and result("cot", 9, method="cot", disable_wm=1).fixed_k is None


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """sft and a policy that chooses, fixed to 0 and fixed to 2, on twelve games."""
    root = tmp_path_factory.mktemp("results")
    games = make_games(root / "games", 12)
    sft = [make_episode(g, success=i < 6, imagined=[], tokens=100) for i, g in enumerate(games)]
    head = [make_episode(g, success=i != 3, imagined=[PLAYED[:i % 3]], tokens=200) for i, g in enumerate(games)]
    k0 = [make_episode(g, success=False, imagined=[], tokens=100) for g in games]
    k2 = [make_episode(g, success=False, imagined=[PLAYED[:2], PLAYED[1:3]], tokens=400) for g in games]
    write_result(root / "sft", sft, method="sft", policy_fingerprint="base")
    write_result(root / "itp_r", head)
    write_result(root / "itp_r-k0", k0, fixed_k=0)
    write_result(root / "itp_r-k2", k2, fixed_k=2)
    return [root / name for name in ("sft", "itp_r", "itp_r-k0", "itp_r-k2")]


def test_tables(folders: list[Path]) -> None:
    made = read_results(folders)
    by_name = {table.name: table for table in tables.all_tables(made, made[0])}
    assert set(by_name) == {"success", "comparison", "metrics", "cost"}
    success = by_name["success"]
    assert success.header == ("", "Pick", "Look", "Clean", "Heat", "Cool", "Pick2", "All", "n")
    # one of two games of each type: Wilson's interval of 1/2 is [9, 91], that of 6/12 [25, 75]
    assert success.rows[0] == ("sft", *["50.0 [9, 91]"] * 6, "50.0 [25, 75]", "12")
    # itp_r solves 11 games: five of them sft's, six that sft doesn't, and loses game 3
    compared = by_name["comparison"].rows
    assert [row[0] for row in compared] == ["itp_r", "itp_r-k0", "itp_r-k2"]
    assert compared[0][1:3] == ("12", "+41.7") and compared[0][4:6] == ("6", "1")
    assert compared[2][1] == "12" and compared[2][4:] == ("0", "6", "0.031")  # 2 / 2⁶
    cost = dict(zip(by_name["cost"].header, by_name["cost"].rows[1], strict=True))
    # three steps of .1, .2, .3 s; k 0, 1, 2, 0, ... at the first of three steps
    assert (cost["p50"], cost["mean k"], cost["cached"], cost["M calls"]) == ("0.20", "0.33", "50.0", "-")
    assert (cost["π calls"], cost["π prompt"], cost["π generated"]) == ("6.0", "600", "12")
    assert cost["NB"] == "0.33"  # (612 - 312) / (1212 - 312)


def test_scores_between_nothing_and_everything_get_a_table(tmp_path: Path) -> None:
    episodes = [make_episode(game, success=False, imagined=[]) for game in make_games(tmp_path / "games", 2)]
    episodes[0].score = 30.0
    made = write_result(tmp_path / "r", episodes)
    assert not tables.graded([made])
    made.records[0]["meta"]["best_score"] = 40.0
    table = next(t for t in tables.all_tables([made], made) if t.name == "scores")
    # mean 15, deviation 21.2, half 1.96 * 15 = 29.4
    assert table.rows == (("r", "30.0 [30, 30]", "0.0 [0, 0]", *["-"] * 4, "15.0 [0, 44]"),)


def test_many_task_types_are_rows(tmp_path: Path) -> None:
    episode = make_episode(make_games(tmp_path / "games", 1)[0], success=True, imagined=[])
    made = write_result(tmp_path / "r", [episode])
    made.summary["buckets"] += [f"task-{i}" for i in range(20)]
    table = tables.success([made])
    assert table.header == ("", "r") and table.rows[0] == ("Pick", "100.0 [21, 100]")
    assert table.rows[-3:] == (("task-19", "-"), ("All", "100.0 [21, 100]"), ("n", "1"))
    assert "task-0" not in tables.terminal(tables.overview([made]))


def test_the_forms_of_a_table() -> None:
    table = tables.Table("t", "A & B", "100 % of it.", ("", "p_x"), (("a|b", "< 1"), ("long name", "-")))
    assert tables.terminal(table) == "           p_x\na|b        < 1\nlong name    -"
    assert tables.markdown(table).splitlines()[4:] == ["|  | p_x |", "| --- | ---: |", "| a\\|b | < 1 |",
                                                       "| long name | - |"]
    assert list(csv.reader(tables.to_csv(table).splitlines())) == [["", "p_x"], ["a|b", "< 1"], ["long name", "-"]]
    latex = tables.latex(table)
    assert r"\caption{A \& B. 100 \% of it.}" in latex and r" & p\_x \\" in latex and r"a|b & $<$ 1 \\" in latex
    assert r"\begin{tabular}{lr}" in latex and latex.count(r"\\") == 3


FIDELITY = {"models": {"wm": {"one_step": {}, "by_depth": {"expert": {
    "1": {"fact_f1": 0.9, "fact_f1_interval": [0.85, 0.95]}, "2": {"fact_f1": 0.7, "fact_f1_interval": [0.6, 0.8]}}}}}}


def test_figures_show_what_the_results_say(folders: list[Path]) -> None:
    made = {plot.name: plot.figure.axes for plot in plots.draw(read_results(folders), [FIDELITY])}
    assert set(made) == {"success_against_budget", "success_by_depth", "fact_f1_by_depth", "k_of_itp_r",
                         "k_of_itp_r-k2", "k_against_golden_steps"}
    depth = made["success_by_depth"][0].containers[0]
    assert list(depth.lines[0].get_xdata()) == [0, 2] and list(depth.lines[0].get_ydata()) == [0, 0]
    truths = {c.get_label(): c.lines[0] for c in made["fact_f1_by_depth"][0].containers}
    assert list(truths["wm on expert"].get_ydata()) == [90, 70]
    assert list(truths["itp_r-k2"].get_xdata()) == [1, 2] and list(truths["itp_r-k2"].get_ydata()) == [100, 100]
    # itp_r: Pick is games 0 and 6, which imagine nothing; Look is 1 and 7: one step at the first of three.
    types, progress = made["k_of_itp_r"]
    shares = {int(bars.get_label()): [bar.get_height() for bar in bars] for bars in types.containers}
    assert [shares[k][0] for k in (0, 1, 2)] == [100, 0, 0]
    assert [shares[k][1] for k in (0, 1, 2)] == pytest.approx([200 / 3, 100 / 3, 0])
    by_progress = {int(bars.get_label()): [bar.get_height() for bar in bars] for bars in progress.containers}
    assert [by_progress[k][0] for k in (0, 1, 2)] == pytest.approx([100 / 3] * 3)  # all first steps
    dots = made["k_against_golden_steps"][0].collections[0].get_offsets()
    assert dots[:3].tolist() == [[4, 0], [5, pytest.approx(1 / 3)], [6, pytest.approx(2 / 3)]]


def test_results_without_what_a_figure_shows_have_none(tmp_path: Path) -> None:
    episode = make_episode(make_games(tmp_path / "games", 1)[0], success=True, imagined=[])
    made = write_result(tmp_path / "old", [episode])
    del made.records[0]["meta"]["golden_steps"]  # results of before it was recorded
    assert [plot.name for plot in plots.draw([made], [])] == ["success_against_budget"]


def run_report(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "foresight_eval.report", *map(str, args)], capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300)


def test_the_program_writes_everything(folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(json.dumps(FIDELITY))
    said = run_report(*folders, "--baseline", "itp_r", "--fidelity", tmp_path / "f.json", "--out_dir", tmp_path / "out")
    assert said.returncode == 0, said.stderr
    assert "Compared with itp_r on the same games" in said.stdout
    written = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {"index.html", "report.md", "report.tex", "success.csv", "comparison.csv", "cost.csv",
            "figures/success_against_budget.svg", "figures/success_against_budget.pdf"} <= written
    # A pure function of the folders: another process makes the same page of them.
    made = read_results(folders)
    again = page.render(made, tables.all_tables(made, made[1]), plots.draw(made, [FIDELITY]), made[1])
    assert (tmp_path / "out" / "index.html").read_text() == again


def test_mistakes_are_one_line(folders: list[Path], tmp_path: Path) -> None:
    said = run_report(tmp_path)
    assert said.returncode == 2 and said.stderr.strip() == (
        f"error: {tmp_path}: not a result folder (no config.json of an evaluation); give what --out_dir named")
    with pytest.raises(UserError, match="--baseline 'x': give one of sft, itp_r"):
        report.find_baseline(read_results(folders), "x")


def test_names_tell_folders_apart(folders: list[Path], tmp_path: Path) -> None:
    assert [result.name for result in read_results(folders)] == ["sft", "itp_r", "itp_r-k0", "itp_r-k2"]
    other = write_result(tmp_path / "sft", [])
    assert other.summary["overall"]["n"] == 0
    assert [r.name for r in read_results([folders[0], tmp_path / "sft"])] == [
        f"{folders[0].parent.name}/sft", f"{tmp_path.name}/sft"]


def test_a_result_without_games_is_shown(tmp_path: Path) -> None:
    made = write_result(tmp_path / "empty", [])
    assert tables.terminal(tables.overview([made])).splitlines()[1].split()[0] == "empty"
    assert tables.terminal(tables.cost([made])).splitlines()[1].split()[0] == "empty"


def test_what_a_critic_was_asked_is_among_the_costs(tmp_path: Path) -> None:
    game, = make_games(tmp_path / "games", 1)
    episode = make_episode(game, success=True, imagined=[])
    plain = write_result(tmp_path / "plain", [episode])
    assert not any(name.startswith("Q") for t in (tables.cost, analyses.deployment) for name in t([plain]).header)
    for step in episode.steps:
        step.usage["critic"] = Usage(3, 50, 0, 0)
    judged = write_result(tmp_path / "judged", [episode])
    for made in (tables.cost([plain, judged]), analyses.deployment([plain, judged])):
        assert all(len(row) == len(made.header) for row in made.rows)
    cost = tables.cost([plain, judged])
    at = cost.header.index("Q calls")
    n = len(episode.steps)
    assert [row[at:at + 3] for row in cost.rows] == [("-",) * 3, (f"{3 * n:.1f}", f"{50 * n}", "0")]
    calls = tables.overview([plain, judged]).header.index("calls/step")
    assert [row[calls] for row in tables.overview([plain, judged]).rows] == ["2.0", "5.0"]
