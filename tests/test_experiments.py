"""configs/experiments/ and the program that runs them: what they may hold, what they plan, what they print."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from foresight_eval.report import analyses
from foresight_eval.results import write_episode
from itp.config import parse_settings
from itp.errors import UserError
from itp.run_dir import timed
from tests.made_results import PLAYED, make_episode, make_games, write_result
from tests.test_docs import PAGES, commands
from tests.tiny import write_tiny_model

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import experiment as program  # noqa: E402

SHIPPED = sorted((ROOT / "configs/experiments").glob("*.yaml"))
SMALL: dict[str, Any] = {
    "title": "Small", "paper": "The paper's.",
    "parameters": {"policy": {"default": "p", "help": "a policy"}, "max_k": {"default": 2, "help": "K_max"},
                   "run": {"default": "r", "help": "a folder"}, "idle": {"default": "x", "help": "in no command"}},
    "runs": {
        "play": {"command": "python -m foresight_eval --policy_model {policy} --max_k {max_k}",
                 "each": {"k{k}": "--fixed_k {k}", "best-{max_k}": None}},
        "truth": {"command": "python -m world_model.fidelity --transitions t.jsonl",
                  "each": {"wm": "--wm_model {out}/train/x"}},
    },
    "tables": [{"table": "overview", "part": "play", "columns": ["All", "NB"],
                "paper": {"paper": {"best-{max_k}": 88.5, "k1": 7, "k7": 6}}},
               {"table": "depth"},
               {"table": "training", "paper": {"paper": {"stage 2": 12.8, "rollouts": 9.55}},
                "files": {"stage 2": "{run}/metrics.json", "rollouts": "{run}/timing.jsonl", "none": "{run}/no"}}],
    "figures": ["k_of"],
}


def write(tmp_path: Path, change: Callable[[dict[str, Any]], Any] = lambda said: None) -> str:
    said = json.loads(json.dumps(SMALL))
    change(said)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(said, sort_keys=False))
    return str(tmp_path / "small.yaml")


def put(*keys: Any) -> Callable[[dict[str, Any]], None]:
    """A change: the last of ``keys`` under the others."""
    def change(said: Any) -> None:
        *path, last, value = keys
        for key in path:
            said = said[key]
        said[last] = value
    return change


def pooled(against: str, *names: str) -> Callable[[dict[str, Any]], None]:
    """A change: runs of these names, which a table pools over their seeds."""
    def change(said: Any) -> None:
        said |= {"over": {"seed": [1, 2]}, "figures": [], "runs": {"play": said["runs"]["play"] | {
            "each": dict.fromkeys(names)}}, "tables": [{"table": "pooled", "pool": "seed", "against": against}]}
    return change


def on_axis(against: str, *names: str) -> Callable[[dict[str, Any]], None]:
    """A change: the same with an axis of games."""
    def change(said: Any) -> None:
        pooled(against, *names)(said)
        said["over"]["games"] = [18, 55]
        said["tables"][0]["x"] = "games"
    return change


# ---------------------------------------------------------------- what a file may hold


@pytest.mark.parametrize("change, said", [
    (put("over", {"seed": 3}), "over: seed must be a list of values, and no parameter's name"),
    (put("over", {"max_k": [3]}), "over: max_k must be a list of values, and no parameter's name"),
    (put("tables", 0, {"table": "pooled", "pool": "seed", "against": "a"}), "tables: unknown variable 'seed'"),
    (put("tables", 0, {"table": "pooled", "against": "a"}), "tables: needs pool"),
    (pooled("a", "a-{seed}", "b"), "tables: the run b has no {seed} in its name"),
    (pooled("a", "a-{seed}", "a-s{seed}"), "without seed these runs have the same name or none: a-{seed}, a-s{seed}"),
    (on_axis("a", "a-s{seed}", "b-s{seed}"), "tables: the run a-s{seed} has no {games} in its name"),
    (pooled("a", "{seed}"), "without seed these runs have the same name or none: {seed}"),
    (pooled("sft", "a-{seed}", "b-{seed}"), "tables, against: unknown run 'sft'; choose among a, b"),
    (put("titel", "x"), "unknown key 'titel', did you mean 'title'"),
    (put("tables", None), "needs tables"),
    (put("tables", {"table": "overview"}), "tables is {'table': 'overview'}, which is not a list"),
    (put("figures", ["k_off"]), "figures: unknown figure 'k_off', did you mean 'k_of'"),
    (put("parameters", "policy", "defualt", "x"), "parameter policy: unknown key 'defualt', did you mean 'default'"),
    (put("parameters", "policy", "default", None), "parameter policy: needs default"),
    (put("runs", "play", "run", {}), "part play: unknown key 'run'; choose among command, each"),
    (put("runs", "play", None), "part play: must hold `name: value` lines"),
    (put("runs", "play", "command", "python -m foresight_evil"), "play/k0: unknown program 'python -m foresight_evil', "
                                                                 "did you mean 'python -m foresight_eval'"),
    (put("runs", "play", "command", "rm -r x"), "unknown program 'rm -r x'"),
    (put("runs", "play", "each", "x", "--fixed_q 1"), "play/x: unrecognized arguments: --fixed_q 1"),
    (put("runs", "play", "each", "x", {"fixed_k": 1}), "play/x: unrecognized arguments: {fixed_k: 1}"),
    (put("runs", "play", "each", "x", "--fixed_k one"), "play/x: argument --fixed_k: invalid int value: 'one'"),
    (put("runs", "play", "each", "x", "--method foreseen"), "play/x: argument --method: invalid choice: 'foreseen'"),
    (put("runs", "play", "each", "x", "--candidates 0"), "play/x: --candidates 0: must be at least 1"),
    (put("runs", "play", "each", "x", "--seed {max_q}"), "unknown parameter 'max_q', did you mean 'max_k'"),
    (put("runs", "play", "each", "x", "--seed {k}"), "play/x: argument --seed: invalid int value: '{k}'"),
    (put("runs", "play", "each", "best-2", None), "two runs are named play/best-2"),
    (put("runs", "play", "command", "python -m foresight_eval --wm_model {policy}"), "play/k0: missing required "
                                                                                     "--policy_model"),
    (put("parameters", {}), "unknown parameter 'max_k'"),
    (put("tables", 0, "table", "overvue"), "tables: unknown table 'overvue', did you mean 'overview'"),
    (put("tables", 0, "part", "plays"), "unknown part 'plays', did you mean 'play'"),
    (put("tables", 0, "columns", ["Al"]), "unknown column 'Al', did you mean 'All'"),
    (put("tables", 1, "columns", ["K"]), "unknown column 'K'"),
    (put("tables", 0, "paper", {"paper": {"best-k": 1}}), "tables, paper: unknown run 'best-k'"),
    (put("tables", 0, "paper", {"paper": {"k1": "high"}}), "k1 must be a number, not 'high'"),
    (put("runs", ["x"]), "runs is ['x'], which is not a dict"),
    (put("common", "none.yaml"), "no such file"),
])
def test_what_is_not_known_is_refused_in_a_line(change: Callable, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        planned(write(tmp_path, change))
    assert "\n" not in str(refused.value)


def planned(*argv: str) -> list[program.Run]:
    return program.plan(*program.parse(argv))


def test_files_and_names_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.yaml: .*no such file"):
        program.read_experiment(Path("none.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match="bad.yaml: not an experiment .*line 1"):
        program.read_experiment(tmp_path / "bad.yaml")
    runs = planned(write(tmp_path))
    assert [run.name for run in program.chosen(runs, "k1,truth")] == ["k1", "wm"]
    assert [run.name for run in program.chosen(runs, "play/k1")] == ["k1"]
    with pytest.raises(UserError, match="--only: unknown part or run 'k3'"):
        program.chosen(runs, "k3")


def test_parameters_reach_the_flags_and_later_ones_win(tmp_path: Path) -> None:
    (tmp_path / "common.yaml").write_text(yaml.safe_dump({
        "split": {"default": "seen", "help": "a split"}, "policy": {"default": "common", "help": "p"}}))

    def change(said: dict[str, Any]) -> None:
        said["common"] = "common.yaml"
        said["runs"]["play"]["command"] += " --split {split} --fixed_k 9"

    k0, k1, best, truth = planned(write(tmp_path, change), "--max_k", "1", "--split", "unseen", "--out", "o o",
                                  "--override")
    assert [run.name for run in (k0, k1, best)] == ["k0", "k1", "best-1"]
    said = k1.settings
    assert (said.fixed_k, said.split, said.max_k, said.policy_model) == (1, "unseen", 1, "p")
    assert (k1.settings.override, k1.settings.out_dir, best.settings.fixed_k) == (True, "o o/play/k1", 9)
    assert (truth.settings.wm_model, truth.settings.out_json) == ("o o/train/x", "o o/truth/wm.json")
    assert planned(write(tmp_path, change), "--policy", "")[0].settings.policy_model == ""


def test_a_parameter_that_no_command_uses_is_no_flag(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        program.parse([write(tmp_path), "--idle", "y"])
    assert "unrecognized arguments: --idle y" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        program.parse([write(tmp_path), "--help"])
    shown = capsys.readouterr().out
    assert "--policy STR" in shown and "a policy (default: p)" in shown and "The paper's." in shown


# ---------------------------------------------------------------- the experiments of the project


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_experiments_plan_what_the_programs_take(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    runs = planned(str(path))
    assert len(runs) == len({run.out for run in runs}) and (runs or path.stem == "training_cost")
    for run in runs:
        settings, _, _ = program.PROGRAMS[" ".join(run.command[:3])]
        assert parse_settings(settings, run.command[3:]) == run.settings
        assert not any("{" in word for word in run.command)


def test_the_experiments_are_those_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)

    def names(stem: str, *flags: str) -> list[str]:
        return [run.title for run in planned(f"configs/experiments/{stem}.yaml", *flags)]

    assert {path.stem for path in SHIPPED} == {
        "table1", "methods", "lookahead", "without_rl", "world_models", "depth", "k_by_length", "deployment",
        "training_cost", "implement", "trials", "when_it_pays", "experience"}
    assert names("trials") == [f"alfworld/{name}" for name in (
        "sft", "no_repeat", "reflexion", "implement-no-memory", "implement", "implement-no-imagination")]
    assert {(run.settings.trials, run.settings.temperature, run.settings.max_steps) for run in planned(
        "configs/experiments/trials.yaml", "--trials", "4")} == {(4, 1.0, 30)}
    assert names("implement")[:2] == ["alfworld/without-planning", "alfworld/gain"] and len(names("implement")) == 8
    assert names("lookahead", "--max_k", "5") == [*(f"play/fixed-k{k}" for k in range(6)), "play/random",
                                                  "play/adaptive"]
    methods = ["CoT", "ReAct", "RAP", "ITP-I", "SFT", "ITP-R"]
    assert names("table1") == [f"{part}/{method}" for part in ("alfworld", "scienceworld-seen", "scienceworld-unseen")
                               for method in methods]
    splits = {run.part: run.settings.split for run in planned("configs/experiments/table1.yaml")}
    assert splits == {"alfworld": "unseen", "scienceworld-seen": "dev", "scienceworld-unseen": "test"}
    from itp.methods.registry import METHODS
    # reflexion is sft where games are played once; the others need what they have learned.
    once = set(METHODS) - {"reflexion", "walle", "wkm", "step_q", "armap"}
    assert {run.settings.method for run in planned("configs/experiments/methods.yaml")} == once


def test_commands_of_the_pages_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = [words[2:] for page in PAGES for words in commands(page) if words[1:2] == ["scripts/experiment.py"]]
    assert len(found) >= 4
    for words in found:
        experiment, values = program.parse(words)
        assert program.chosen(program.plan(experiment, values), values["only"])


def test_the_form_that_the_page_shows_is_one_that_is_read(tmp_path: Path) -> None:
    shown = re.search(r"```yaml\n(.*?)```", (ROOT / "docs/reproducing.md").read_text(), re.DOTALL)[1]
    (tmp_path / "e.yaml").write_text(shown.replace("common/", f"{ROOT}/configs/experiments/common/"))
    assert [run.title for run in planned(str(tmp_path / "e.yaml"), "--max_k", "1")] == [
        "play/fixed-k0", "play/fixed-k1", "play/adaptive"]


# ---------------------------------------------------------------- what is printed


@pytest.fixture
def played(tmp_path: Path) -> tuple[str, Path]:
    """The small experiment with results of K fixed at 0, 1 and 2, figures of a world model, and metrics."""
    games, out = make_games(tmp_path / "games", 4), tmp_path / "out"
    for k, won in ((0, 1), (1, 3), (2, 2)):
        episodes = [make_episode(game, success=i < won, imagined=[PLAYED[:k]], tokens=100 * (k + 1))
                    for i, game in enumerate(games)]
        write_result(out / f"play/k{k}", episodes, fixed_k=k)
    write_result(out / "play/best-2", [make_episode(game, success=True, imagined=[PLAYED[:1]], tokens=150)
                                       for game in games])
    row = {"exact_match": .5, "token_f1": .5, "fact_f1": .625, "fact_f1_interval": [.5, .75], "n": 9}
    (out / "truth").mkdir()
    (out / "truth/wm.json").write_text(json.dumps(
        {"models": {"merged": {"one_step": {"expert": {"all": row}}, "by_depth": {"expert": {"1": row, "3": row}}}}}))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.json").write_text('{"seconds": 1800, "world_size": 4, "steps": 7, "tokens_per_second": 12.3}')
    (folder / "timing.jsonl").write_text('{"seconds": 30}\n{"seconds": 60.5}\n')
    return write(tmp_path), out


def test_the_papers_figures_stand_beside_their_rows(played: tuple[str, Path], tmp_path: Path) -> None:
    path, out = played
    found, values = program.parse([path, "--out", str(out), "--run", str(tmp_path / "run")])
    text = program.show(found, values, program.plan(found, values))
    made = json.loads((out / "result.json").read_text())["tables"]
    overview, depth, training = made
    assert overview["header"] == ["", "All", "NB", "paper"]
    # Tokens an episode: three steps of (tokens + 4): 312, 612, 912; of best: 462.
    assert overview["rows"] == [["k0", "25.0", "0.00", "-"], ["k1", "75.0", "0.50", "7.0"], ["k2", "50.0", "1.00", "-"],
                                ["best-2", "100.0", "0.25", "88.5"]]
    assert depth["header"] == ["K", "success", "Fact-F1, expert", "Fact-F1, own", "tokens/ep"]
    assert [row[:3] for row in depth["rows"]] == [
        ["0", "25.0 [5, 70]", "-"], ["1", "75.0 [30, 95]", "62.5 [50, 75]"], ["2", "50.0 [15, 85]", "-"],
        ["3", "-", "62.5 [50, 75]"]]
    assert [row[3] for row in depth["rows"]] == ["-", "100.0 [100, 100]", "100.0 [100, 100]", "-"]
    assert training["rows"] == [["stage 2", "1800", "2.000", "12", "7", "12.80"],
                                ["rollouts", "90", "0.025", "-", "-", "9.55"], ["none", "-", "-", "-", "-", "-"]]
    assert sorted(path.name for path in (out / "figures").glob("*.svg")) == [
        "k_of_best-2.svg", "k_of_k1.svg", "k_of_k2.svg"]  # k0 chose nothing
    page = (out / "result.md").read_text()
    assert page.startswith("# Small\n") and "| best-2 | 100.0 | 0.25 | 88.5 |" in page
    assert "- max_k: 2" in page and re.search(r"best-2 +100\.0 +0\.25 +88\.5", text)


def test_only_what_was_asked_for_and_found_is_shown(played: tuple[str, Path]) -> None:
    path, out = played
    found, values = program.parse([path, "--out", str(out), "--max_k", "4"])
    program.show(found | {"figures": []}, values, program.chosen(program.plan(found, values), "k1,k4"))
    overview, depth, *_ = json.loads((out / "result.json").read_text())["tables"]
    assert [row[0] for row in overview["rows"]] == ["k1"] and [row[0] for row in depth["rows"]] == ["1"]


def test_k_by_length_and_deployment(tmp_path: Path) -> None:
    games = make_games(tmp_path / "games", 3)  # solutions of 4, 5 and 6 steps
    episodes = [make_episode(game, success=True, imagined=[PLAYED[:2]] * i, tokens=100)
                for i, game in enumerate(games)]
    result = write_result(tmp_path / "r", episodes)
    table = analyses.k_by_length([result, dataclasses.replace(result, name="none", records={})])
    assert table.header == ("steps", "r", "none")
    # Mean k of 3 steps: none, one of k = 2, two of k = 2.
    assert table.rows == (("4", "0.00 (1)", "-"), ("5", "0.67 (1)", "-"), ("6", "1.33 (1)", "-"))
    profile = analyses.deployment([result])
    row = dict(zip(profile.header, profile.rows[0], strict=True))
    # Each step: 0.1, 0.2 or 0.3 s, two calls, 100 tokens read and 4 written.
    columns = ("p50 s", "calls", "tokens/ep", "tokens/s", "M s")
    assert [row[name] for name in columns] == ["0.20", "2.0", "312", "20.0", "-"]


def test_seeds_are_pooled_and_compared_on_the_same_games_and_seeds(tmp_path: Path) -> None:
    games = make_games(tmp_path / "games", 4)
    solved = {"sft-18-s1": (0, 0, 1, 1), "sft-18-s2": (0, 0, 0, 1),
              "itp-18-s1": (1, 0, 1, 1), "itp-18-s2": (0, 1, 1, 1)}
    said = json.loads(json.dumps(SMALL))
    said |= {"over": {"games": [18], "seed": [1, 2]}, "figures": [],
             "tables": [{"table": "pooled", "part": "play", "pool": "seed", "against": "sft-{games}"}]}
    said["runs"] = {"play": {"command": "python -m foresight_eval --policy_model {policy}-{games}-{seed}", "each": {
        "sft-{games}-s{seed}": "--method sft", "itp-{games}-s{seed}": "--fixed_k 1"}}}
    (tmp_path / "pooled.yaml").write_text(yaml.safe_dump(said, sort_keys=False))
    experiment, values = program.parse([str(tmp_path / "pooled.yaml"), "--out", str(tmp_path / "out")])
    runs = program.plan(experiment, values)
    assert [run.name for run in runs] == list(solved)
    assert [run.settings.policy_model for run in runs] == ["p-18-1", "p-18-2"] * 2
    assert {run.name_without("seed") for run in runs} == {"sft-18", "itp-18"}
    for run in runs:
        write_result(run.out, [make_episode(game, success=bool(won), imagined=())
                               for game, won in zip(games, solved[run.name], strict=True)])
    table = program.make_table(experiment["tables"][0], runs, values)
    rows = {row[0]: row[1:] for row in table.rows}
    # Shares of each game: sft 0, 0, .5, 1; itp .5, .5, 1, 1.  Differences .5, .5, .5, 0: mean .375, deviation .25.
    assert rows["sft-18"][1:4] == ("50.0, 25.0", "4 x 2", "-") and rows["sft-18"][0].startswith("37.5")
    assert rows["itp-18"][1:4] == ("75.0, 75.0", "4 x 2", "+37.5 (+13.0 to +62.0)")
    assert rows["itp-18"][0].startswith("75.0")
    # Where a seed is missing, only those that both have are compared: 0, 0, 0, 1 and 0, 1, 1, 1.
    table = program.make_table(experiment["tables"][0], runs[1:], values)
    assert {row[0]: row[5 - 1] for row in table.rows}["itp-18"] == "+50.0 (-6.6 to +100.0, 1 of 2 seeds)"
    assert runs[0].name_without("seed", "games") == "sft"
    assert {name: {x: rate for x, (rate, _) in points.items()} for name, points in program.curves(
        experiment["tables"][0] | {"x": "games"}, runs).items()} == {"sft": {18: 0.375}, "itp": {18: 0.75}}
    assert program.draw({"figures": [], "tables": [experiment["tables"][0] | {"x": "games"}]}, runs,
                        tmp_path / "figures") == ["success_by_games"]


def test_a_run_without_the_variable_of_the_axis_is_a_level_line(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    experiment, values = program.parse(["configs/experiments/experience.yaml", "--out", str(tmp_path / "out")])
    runs, games = program.plan(experiment, values), make_games(tmp_path / "games", 4)
    assert [run.name for run in runs][:4] == ["sft-s1", "sft-s2", "iwm-2000-s1", "iwm-2000-s2"] and len(runs) == 10
    for run in runs:
        won = {"sft": (0, 0, 0, 1), "iwm": (1, 0, 0, 1), "a2c": (0, 0, 1, 1)}[run.name[:3]]
        write_result(run.out, [make_episode(game, success=bool(w), imagined=())
                               for game, w in zip(games, won, strict=True)])
    shown, = experiment["tables"]
    assert {name: {x: rate for x, (rate, _) in points.items()} for name, points in program.curves(
        shown, runs).items()} == {"sft": {2000: 0.25, 8000: 0.25}, "iwm": {2000: 0.5, 8000: 0.5},
                                  "a2c": {2000: 0.5, 8000: 0.5}}
    rows = {row[0]: row[1:] for row in program.make_table(shown, runs, values).rows}
    assert list(rows) == ["sft", "iwm-2000", "iwm-8000", "a2c-2000", "a2c-8000"]
    assert rows["sft"][3] == "-" and rows["a2c-8000"][3].startswith("+25.0 (")


def test_trials_are_compared_with_the_best_method_without_imagination(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    experiment, values = program.parse(["configs/experiments/trials.yaml", "--out", str(tmp_path / "out")])
    runs, games = program.plan(experiment, values), make_games(tmp_path / "games", 4)
    # + is a success; a game ends with it, or after five trials.
    played = {"sft": ["+", "+", "-----", "-----"], "no_repeat": ["+", "--+", "-----", "-+"],
              "reflexion": ["-+", "--+", "-----", "-+"], "implement": ["+", "+", "-+", "+"],
              "implement-no-imagination": ["-----"] * 4}
    for run in runs:
        if run.name not in played:
            continue
        write_result(run.out, [make_episode(game, success=letters == "+", imagined=())
                               for game, letters in zip(games, played[run.name], strict=True)],
                     method=run.settings.method, implement_imagination=run.settings.implement_imagination)
        for i, (game, letters) in enumerate(zip(games, played[run.name], strict=True)):
            for trial, letter in enumerate(letters[1:], 1):
                episode = make_episode(game, success=letter == "+", imagined=(), tokens=200)
                episode.trial = trial
                write_episode(run.out, i, episode)
    program.show(experiment, values, runs)
    within, against, by_trial, cost = json.loads((tmp_path / "out/result.json").read_text())["tables"]
    assert within["header"] == ["", "SR@1", "SR@2", "SR@4", "SR@5", "n"]
    rates = {row[0]: [cell.split()[0] for cell in row[1:5]] for row in within["rows"]}
    assert rates == {"sft": ["50.0"] * 4, "no_repeat": ["25.0", "50.0", "75.0", "75.0"],
                     "reflexion": ["0.0", "50.0", "75.0", "75.0"], "implement": ["75.0", *["100.0"] * 3],
                     "implement-no-imagination": ["0.0"] * 4}
    # Of no_repeat and reflexion, which solve as many, the one that solves more in its first trials.
    assert against["title"].startswith("SR@k compared with no_repeat")
    assert {row[0]: row[1:4] for row in against["rows"]} == {
        "sft": ["5", "4", "-25.0"], "reflexion": ["5", "4", "+0.0"], "implement": ["5", "4", "+25.0"],
        "implement-no-imagination": ["5", "4", "-75.0"]}
    assert [row[:3] for row in by_trial["rows"] if row[0] == "implement"] == [["implement", "1", "4"],
                                                                              ["implement", "2", "1"]]
    # A trial is three steps of (100 or 200) + 4 tokens.
    assert {row[0]: row[1:] for row in cost["rows"]}["implement"] == [
        "4", "1.25", str(round((4 * 312 + 612) / 4)), str(round((4 * 312 + 612) / 4))]
    assert {row[0]: row[-1] for row in cost["rows"]}["implement-no-imagination"] == "-"
    assert [path.name for path in (tmp_path / "out/figures").glob("*.svg")] == ["success_against_trials.svg"]
    only = program.make_table({"table": "against_best_without_imagination"}, program.chosen(runs, "implement"), values)
    assert only.rows == ()


def test_what_a_program_took_adds_up_over_its_starts(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), timed(tmp_path):
        raise KeyboardInterrupt
    with timed(tmp_path):
        time.sleep(0.05)
    assert 0.05 <= program.read_metrics(tmp_path / "timing.jsonl")["seconds"] < 5
    assert len((tmp_path / "timing.jsonl").read_text().splitlines()) == 2


# ---------------------------------------------------------------- a real one


def test_a_real_experiment_goes_on_where_it_was(tmp_path: Path, games_root: Path) -> None:
    write_tiny_model(tmp_path / "policy")
    said = {
        "title": "Tiny", "paper": "Nothing.", "common": str(ROOT / "configs/experiments/common/alfworld.yaml"),
        "parameters": {"policy": {"default": str(tmp_path / "policy"), "help": "a policy"}},
        "runs": {"play": {
            "command": "python -m foresight_eval --policy_model {policy} --method sft --prompt_style tuned "
                       "--act_tokens 4 --env_data_root {data} --max_games {max_games} --max_steps {max_steps} "
                       "--max_k {max_k} --env_processes {env_processes} --action_selection {selection}",
            "each": {"k{k}": "--seed {k}", "lost": "--env_data_root nowhere"}}},
        "tables": [{"table": "overview", "columns": ["n", "mean k"], "paper": {"paper": {"k0": 1.5}}}],
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(said))
    command = [sys.executable, "scripts/experiment.py", str(tmp_path / "tiny.yaml"), "--data",
               str(games_root), "--max_games", "1", "--max_steps", "2", "--max_k", "0", "--out", str(tmp_path / "out"),
               "--env_processes", "1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *more], cwd=ROOT, env=env, capture_output=True, text=True, check=False)

    first = start()
    assert first.returncode == 2, first.stderr[-2000:]
    assert "1 of 2 runs failed: play/lost" in first.stderr and "no such folder: nowhere/" in first.stderr
    table, = json.loads((tmp_path / "out/result.json").read_text())["tables"]
    assert table["rows"] == [["k0", "1", "0.00", "1.5"]]
    written = (tmp_path / "out/play/k0/0.json").stat().st_mtime_ns
    again = start("--only", "k0")
    assert again.returncode == 0 and "1 finished before" in again.stderr, again.stderr[-2000:]
    assert (tmp_path / "out/play/k0/0.json").stat().st_mtime_ns == written
    # What lies there is of another configuration: it isn't shown as that of this one.
    other = start("--only", "k0", "--max_steps", "3")
    assert other.returncode == 2 and "max_steps: 2 there, 3 now" in other.stderr
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["tables"] == [] and result["failed"] == ["play/k0"]
    assert "**LEFT OUT, because they failed: play/k0.**" in (tmp_path / "out/result.md").read_text()
    assert "LEFT OUT" in other.stdout
    missing = start("--policy", str(tmp_path / "gone"), "--only", "k0")
    assert missing.returncode == 2 and "error: play/k0: " in missing.stderr and "Traceback" not in missing.stderr
