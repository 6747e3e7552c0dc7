"""Several trials of each game: their order, their seeds, going on after a kill, SR@k, and Reflexion."""

from __future__ import annotations

import asyncio
import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from foresight_eval import results
from foresight_eval.report import page, report, tables
from foresight_eval.results import read_results
from foresight_eval.runner import Recorder, evaluate
from foresight_eval.settings import AlfworldSettings
from foresight_eval.summary import write_summary
from foresight_eval.trials import known_depth, summarize_trials
from itp.agent.policy import Policy
from itp.envs.alfworld.games import list_games
from itp.envs.base import Observation
from itp.errors import UserError
from itp.games import Game
from itp.lm.base import Usage
from itp.methods.base import Decision, EarlierTrial, View
from itp.methods.reflexion import MEMORY, Reflexion
from itp.methods.settings import MethodSettings
from itp.model_card import PromptFormat
from itp.rollout import Episode, run_episodes, step_seed
from itp.seeding import derive_seed
from itp.text.prompts import look_back_prompt, policy_prompt
from itp.text.state import State
from tests.killed import ENVIRONMENT, command_of, finish, kill
from tests.made_results import make_episode, make_games, write_result
from tests.tiny import write_tiny_model
from tests.toy import ToyLM

GAME = Game("alfworld", "train", "g", "", "pick_and_place_simple")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, games_root: Path) -> AlfworldSettings:
    """Reflexion with a tiny random model on the six train games, three trials of four steps."""
    folder = tmp_path_factory.mktemp("models")
    return AlfworldSettings(
        policy_model=str(write_tiny_model(folder / "policy", seed=0)), out_dir="", method="reflexion", trials=3,
        env_data_root=str(games_root), split="train", max_steps=4, act_tokens=8, prompt_style="tuned", device="cpu",
        env_processes=1, concurrency=3, temperature=0.9)


def run(base: AlfworldSettings, out: Path, **changes: Any) -> dict[int, list[dict[str, Any]]]:
    asyncio.run(evaluate(dataclasses.replace(base, out_dir=str(out), **changes)))
    return stories(out)


def stories(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """All trials without seconds, cache hits and the last digits of probabilities."""
    volatile = ("seconds", "cached_tokens", "action_logprob")
    text = json.dumps([*results.read_trials(folder).items()])
    return dict(json.loads(text, object_hook=lambda d: {k: v for k, v in d.items() if k not in volatile}))


def actions(record: dict[str, Any]) -> list[str]:
    return [step["action"] for step in record["foresight_steps"]]


@pytest.fixture(scope="module")
def finished(base: AlfworldSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "eval"
    run(base, out)
    return out


def test_each_trial_is_a_file_with_a_note_for_the_next(finished: Path) -> None:
    names = {f"{i}{t}.json" for i in range(6) for t in ("", ".t1", ".t2")}
    assert names == {file.name for file in finished.glob("[0-9]*.json")}
    for trials in results.read_trials(finished).values():
        assert [record["meta"].get("trial", 0) for record in trials] == [0, 1, 2]
        # The last one isn't looked back on: no trial comes after it.
        assert ["look_back" in record for record in trials] == [True, True, False]
        assert trials[0]["look_back"]["usage"]["policy"]["calls"] == 1
    written = {file.name: file.stat().st_mtime_ns for file in finished.glob("[0-9]*.json")}
    for i in range(6):
        assert written[f"{i}.json"] < written[f"{i}.t1.json"] < written[f"{i}.t2.json"]
    assert sum(" trial=" in line for line in (finished / "log.txt").read_text().splitlines()) == 12


def test_a_first_trial_is_what_a_run_without_trials_plays(base: AlfworldSettings, finished: Path,
                                                          tmp_path: Path) -> None:
    once = run(base, tmp_path / "sft", method="sft", trials=1)
    assert {file.name for file in (tmp_path / "sft").glob("[0-9]*.json")} == {f"{i}.json" for i in range(6)}
    first = {i: [{k: v for k, v in trials[0].items() if k != "look_back"}] for i, trials in stories(finished).items()}
    assert first == once
    summary = json.loads((tmp_path / "sft" / "summary.json").read_text())
    assert "trials" not in summary and "SR@" not in (tmp_path / "sft" / "summary.csv").read_text()


def test_a_method_without_memory_draws_anew_in_each_trial(base: AlfworldSettings, tmp_path: Path) -> None:
    trials = run(base, tmp_path, method="sft", trials=2)
    assert any(actions(first) != actions(second) for first, second in trials.values())
    assert not any("look_back" in record for each in trials.values() for record in each)


def test_seeds_differ_between_trials_and_the_first_has_those_of_one_trial() -> None:
    assert step_seed(5, GAME, 2, 0) == derive_seed(5, "g", 2)
    assert len({step_seed(5, GAME, step, trial) for step in range(9) for trial in range(9)}) == 81


def test_more_trials_are_added_to_a_finished_run(base: AlfworldSettings, finished: Path, tmp_path: Path) -> None:
    run(base, tmp_path / "out", trials=1)
    before = {file.name: file.read_text() for file in (tmp_path / "out").glob("[0-9]*.json")}
    run(base, tmp_path / "out", trials=2)
    assert run(base, tmp_path / "out") == stories(finished)
    for name in before:  # only the note came to the first trials
        now = json.loads((tmp_path / "out" / name).read_text())
        assert now.pop("look_back") and now == json.loads(before[name])
    summary = (tmp_path / "out" / "summary.json").read_text()
    assert summary == (finished / "summary.json").read_text()
    assert run(base, tmp_path / "out", trials=1) == stories(finished)  # fewer play nothing, and remove nothing


def test_a_run_that_was_killed_between_trials_goes_on_as_if_nothing_had_been(base: AlfworldSettings, finished: Path,
                                                                             tmp_path: Path) -> None:
    out = tmp_path / "eval"
    command = command_of(["foresight_eval"], dataclasses.replace(base, out_dir=str(out)))
    for enough in (2, 8):  # killed twice
        kill(command, lambda n=enough: len(list(out.glob("[0-9]*.json"))) >= n, tmp_path / "log")
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("[0-9]*.json")}
    assert 8 <= len(before) < 18
    finish(command, tmp_path / "log")
    assert stories(out) == stories(finished)
    assert (out / "summary.json").read_text() == (finished / "summary.json").read_text()


def test_a_kill_before_the_note_asks_for_it_again(base: AlfworldSettings, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "eval")
    record = json.loads((tmp_path / "eval" / "2.t1.json").read_text())
    del record["look_back"]
    (tmp_path / "eval" / "2.t1.json").write_text(json.dumps(record))
    (tmp_path / "eval" / "2.t2.json").unlink()
    assert run(base, tmp_path / "eval") == stories(finished)


def test_a_missing_trial_is_played_again(base: AlfworldSettings, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "eval")
    (tmp_path / "eval" / "4.t1.json").unlink()
    assert len(results.read_trials(tmp_path / "eval")[4]) == 1  # not those behind it
    assert run(base, tmp_path / "eval", only_ids="4") == stories(finished)
    # What was played after a trial that is missing is played again: it built on that one.
    shutil.copytree(finished, tmp_path / "first")
    (tmp_path / "first" / "4.json").unlink()
    before = (tmp_path / "first" / "4.t2.json").stat().st_mtime_ns
    assert run(base, tmp_path / "first", only_ids="4") == stories(finished)
    assert (tmp_path / "first" / "4.t2.json").stat().st_mtime_ns != before


def test_two_processes_give_what_one_gives(base: AlfworldSettings, finished: Path, tmp_path: Path) -> None:
    """Also when one of them is killed, and the launcher starts both again."""
    out, log = tmp_path / "out", tmp_path / "log"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
              "--max-restarts", "2"]
    program = command_of(["foresight_eval"], dataclasses.replace(base, out_dir=str(out), concurrency=2))[1:]
    with open(log, "w") as file:
        launcher = subprocess.Popen([*launch, *program], stdout=file, stderr=file, env=ENVIRONMENT, cwd=tmp_path)
    deadline = time.monotonic() + 300
    while len(list(out.glob("[0-9]*.json"))) < 3:
        assert launcher.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    worker = next(int(pid) for pid in children(launcher.pid) if b"foresight_eval" in command_line(pid))
    os.kill(worker, signal.SIGKILL)
    assert launcher.wait(400) == 0, log.read_text()
    assert stories(out) == stories(finished)


def children(pid: int) -> list[str]:
    return (Path("/proc") / str(pid) / "task" / str(pid) / "children").read_text().split()


def command_line(pid: str) -> bytes:
    return (Path("/proc") / pid / "cmdline").read_bytes()


def test_starting_anew_removes_all_trials(base: AlfworldSettings, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "eval")
    assert set(run(base, tmp_path / "eval", override=True, only_ids="1", trials=1)) == {1}
    assert [file.name for file in (tmp_path / "eval").glob("[0-9]*.json")] == ["1.json"]


def test_a_larger_context_plays_again_from_the_first_shortened_trial_on(base: AlfworldSettings, tmp_path: Path) -> None:
    """The prompt of a note holds the last step, too: it can be cut where no action's prompt is."""
    plain = run(base, tmp_path / "plain", only_ids="0,1", trials=2)
    longest = max(step["usage"]["policy"]["prompt_tokens"] for trials in plain.values()
                  for step in trials[0]["foresight_steps"])
    cut = run(base, tmp_path / "out", only_ids="0,1", trials=2, max_seq_len=longest + 16)
    assert 1 in [trials[0]["look_back"]["usage"]["policy"]["shortened"] for trials in cut.values()]
    assert run(base, tmp_path / "out", only_ids="0,1", trials=2, max_seq_len=0) == plain


def test_a_later_trial_of_another_game_is_refused(base: AlfworldSettings, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "eval")
    shutil.copy(finished / "3.t1.json", tmp_path / "eval" / "2.t1.json")
    with pytest.raises(UserError, match="2.t1.json is a result of .*, which is not game 2"):
        run(base, tmp_path / "eval")


class Counting:
    """Solves a game in its ``solve``-th trial; remembers nothing itself."""

    name, want_admissible = "counting", False

    def __init__(self, folder: Path, solve: int) -> None:
        self.folder, self.solve, self.seen, self.asked = folder, solve, [], 0

    async def act(self, view: View) -> Decision:
        # The trials before this one are on file, and what was said of them.
        there = [file.name for file in results.trial_files(self.folder, 0)]
        assert len(there) == len(view.earlier), there
        self.seen.append((view.step, [(trial.note, trial.success, len(trial.state.history)) for trial in view.earlier]))
        return Decision("win" if len(view.earlier) + 1 == self.solve else "look")

    async def look_back(self, trial: EarlierTrial, seed: int) -> str:
        self.asked += 1
        return f"note {self.asked}"


class Room:
    """An environment of one action that wins."""

    alive = True

    async def reset(self, game: Game) -> Observation:
        return Observation("You see a room.", "win", None)

    async def step(self, action: str) -> Any:
        from itp.envs.base import StepResult

        won = action == "win"
        return StepResult(Observation("Won." if won else "You see a room.", "win"), float(won), won, False,
                          100.0 * won, won, not won)


class Pool:
    def session(self) -> Any:
        import contextlib

        @contextlib.asynccontextmanager
        async def one() -> Any:
            yield Room()
        return one()


@pytest.mark.parametrize("after, played", [(False, 2), (True, 4)])
def test_trials_end_with_success_unless_told_otherwise(tmp_path: Path, after: bool, played: int) -> None:
    game, = make_games(tmp_path / "games", 1)
    settings = AlfworldSettings(policy_model="", out_dir=str(tmp_path), trials=4, trials_after_success=after)
    method = Counting(tmp_path, solve=2)

    async def play() -> list[Episode]:
        record = Recorder(tmp_path, {0: game}, settings)
        return [e async for e in run_episodes(Pool(), method, [game], max_steps=2, seed=1, concurrency=1,
                                              trials=record)]

    episodes = asyncio.run(play())
    assert [(e.trial, e.success) for e in episodes] == [(0, False), (1, True), (2, False), (3, False)][:played]
    first, second = (0, []), (0, [("note 1", False, 2)])
    assert method.seen[:3] == [first, (1, []), second] and method.asked == played - 1
    if after:
        assert method.seen[-1] == (1, [("note 1", False, 2), ("note 2", True, 1), ("note 3", False, 2)])


def test_an_earlier_trial_is_what_was_played(finished: Path) -> None:
    for file in results.all_trial_files(finished):
        record = json.loads(file.read_text())
        trial = results.earlier_trial(record, file)
        turns = [turn["value"] for turn in record["conversations"]]
        assert trial.state.render() == "\n".join(value.replace("\n", "\n  ") if i else value
                                                 for i, value in enumerate(turns))
        assert list(trial.invalid) == [step["invalid"] for step in record["foresight_steps"]]


# ---------------------------------------------------------------- SR@k


def made(folder: Path, outcomes: Sequence[str], **config: Any) -> results.Result:
    """A result folder: a string a game, a letter a trial, + for success."""
    games = make_games(folder / "games", len(outcomes))
    for i, (game, letters) in enumerate(zip(games, outcomes, strict=True)):
        for trial, letter in enumerate(letters):
            episode = make_episode(game, success=letter == "+", imagined=[], tokens=100 * (trial + 1))
            episode.trial = trial
            results.write_episode(folder, i, episode)
            if trial + 1 < len(letters):
                results.write_note(folder, i, trial, f"note {trial}", {"policy": Usage(1, 10, 5)})
    return write_result(folder, [], **config)


def test_success_within_k_trials(tmp_path: Path) -> None:
    result = made(tmp_path / "r", ["+", "-+", "---", "--+"])
    within = result.summary["trials"]["success_within"]
    assert {k: (figures["success"], figures["n"]) for k, figures in within.items()} == {
        "1": (1, 4), "2": (2, 4), "3": (3, 4)}
    assert within["3"]["rate"] == 0.75 and within["3"]["interval"] == pytest.approx([0.3006, 0.9544], abs=1e-4)
    by_trial = result.summary["trials"]["by_trial"]
    assert {t: (row["success"], row["n"]) for t, row in by_trial.items()} == {"1": (1, 4), "2": (1, 3), "3": (1, 2)}
    # Three steps of (100 t + 4) tokens, and 15 of the note, which the last trial of a game has none of.
    assert by_trial["1"]["tokens_per_episode"] == (4 * 3 * 104 + 3 * 15) / 4
    assert by_trial["3"]["tokens_per_episode"] == 3 * 304
    assert result.summary["trials"]["tokens_per_game"] == (4 * 312 + 3 * 612 + 2 * 912 + 5 * 15) / 4
    # Everything else is of first trials.
    assert result.summary["overall"]["success"] == 1 and result.summary["cost"]["tokens_per_episode"] == 312
    with open(tmp_path / "r" / "summary.csv", newline="") as file:
        header, row = csv.reader(file)
    assert header[-4:] == ["All", "SR@1", "SR@2", "SR@3"] and row[-4:] == ["25.00", "25.00", "50.00", "75.00"]


def test_what_isnt_known_of_every_game_isnt_given(tmp_path: Path) -> None:
    # The run was stopped: the second game has one trial, so SR@2 would be of a selection.
    stopped = made(tmp_path / "r", ["--+", "-", "+"])
    assert list(stopped.summary["trials"]["success_within"]) == ["1"] and known_depth(stopped.trials) == 1
    solved = made(tmp_path / "s", ["-+", "+"])
    assert known_depth(solved.trials) is None and list(solved.summary["trials"]["success_within"]) == ["1", "2"]
    assert summarize_trials({0: [stopped.records[0]]}) is None and known_depth({}) is None


def test_trials_after_success_leave_the_success_within_k_as_it_is(tmp_path: Path) -> None:
    stops = made(tmp_path / "stops", ["+", "-+"]).summary["trials"]["success_within"]
    goes_on = made(tmp_path / "on", ["+--", "-+-"]).summary["trials"]
    assert {k: goes_on["success_within"][k] for k in stops} == stops
    assert [row["n"] for row in goes_on["by_trial"].values()] == [2, 2, 2]


def test_reports_of_trials(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "a", ["+", "--", "--", "-+"], method="sft")
    made(tmp_path / "b", ["-+", "-+", "--", "+"], method="reflexion")
    made(tmp_path / "once", ["-", "-", "-", "-"], method="cot")
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "once"),
                                      "--out_dir", str(tmp_path / "out")])
    report.main()
    printed = capsys.readouterr().out
    compared = printed.split("SR@k compared with a")[1].splitlines()
    # Games 0 and 3 by both within two trials, game 1 by b alone; with the result of one trial SR@1 is compared.
    assert compared[2].split()[:4] == ["b", "2", "4", "+25.0"] and compared[2].split()[-3:-1] == ["1", "0"]
    assert compared[3].split()[:4] == ["once", "1", "4", "-25.0"]
    rows = {row[0]: row for row in tables.success_within(read_results([tmp_path / "a", tmp_path / "once"])).rows}
    assert rows["a"][1:] == ("25.0 [5, 70]", "50.0 [15, 85]", "4") and rows["once"][1:] == ("0.0 [0, 49]", "-", "4")
    assert (tmp_path / "out" / "figures" / "success_against_trials.svg").is_file()
    html = (tmp_path / "out" / "index.html").read_text()
    assert 'id="plot-success_against_trials"' in html and 'id="table-by_trial"' in html
    rows, records = page._episodes(read_results([tmp_path / "b"]))
    assert [row.get("trial") for row in rows] == [1, 2, 1, 2, 1, 2, None]
    assert [record["note"] for record in records] == ["note 0", "", "note 0", "", "note 0", "", ""]


def test_a_summary_is_of_the_files_alone(finished: Path) -> None:
    before = (finished / "summary.json").read_text()
    write_summary(finished)
    assert (finished / "summary.json").read_text() == before


# ---------------------------------------------------------------- Reflexion


def view(earlier: Sequence[EarlierTrial]) -> View:
    return View(GAME, 0, State("t", "o"), Observation("o", "t"), 1, earlier=tuple(earlier))


def test_the_prompt_of_reflexion_holds_the_last_notes() -> None:
    lm = ToyLM("policy")
    method = Reflexion(Policy(lm), None, MethodSettings())
    ended = State("t", "o", (("look", "o"),))
    earlier = [EarlierTrial(ended, (False,), False, f"note {i}" if i != 3 else "") for i in range(5)]
    asyncio.run(method.act(view(earlier)))
    (prompt, _), = lm.asked
    assert MEMORY == 3
    assert prompt == "Task: t\nObservation: o\nReflection: note 1\nReflection: note 2\nReflection: note 4\nAction:"
    lm.asked.clear()
    asyncio.run(method.act(view([])))
    assert lm.asked[0][0] == policy_prompt("Task: t\nObservation: o")


def test_reflexion_reflects_on_the_whole_episode_and_not_on_success() -> None:
    lm = ToyLM("policy")
    style = PromptFormat(style="instruct", env="alfworld")
    ended = State("t", "o", (("look", "o"), ("open box", "A box.")))
    for policy in (Policy(lm), Policy(lm, style, history=False)):  # what actions are shown doesn't matter
        lm.asked.clear()
        note = asyncio.run(Reflexion(policy, None, MethodSettings()).look_back(EarlierTrial(ended, (), False), 3))
        (prompt, _), = lm.asked
        assert prompt == look_back_prompt(ended.render(), policy.form) and ended.render() in prompt
        assert prompt.endswith("\nReflection:") and note and "\n" not in note
    assert "has failed" in prompt
    assert asyncio.run(Reflexion(Policy(lm), None, MethodSettings()).look_back(EarlierTrial(ended, (), True), 3)) == ""


def test_reflexion_plays_with_its_notes(base: AlfworldSettings, finished: Path) -> None:
    """The notes are in the prompts of the next trial: they are longer by the notes' tokens and labels."""
    games = list_games("train", base.env_data_root)
    noted = 0
    for i, trials in results.read_trials(finished).items():
        assert trials[0]["meta"]["game_id"] == games[i].game_id
        for t in (1, 2):
            first = trials[t]["foresight_steps"][0]["usage"]["policy"]["prompt_tokens"]
            plain = trials[0]["foresight_steps"][0]["usage"]["policy"]["prompt_tokens"]
            notes = [trial["look_back"]["note"] for trial in trials[:t] if trial["look_back"]["note"]]
            assert first >= plain + 2 * len(notes) and (first == plain) == (not notes)
            noted += len(notes)
    assert noted
