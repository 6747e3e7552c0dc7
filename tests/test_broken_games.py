"""A game whose files are broken is left out, the others are played, and the run names it at its end."""

from __future__ import annotations

import asyncio
import functools
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foresight_eval.results import read_episodes
from foresight_eval.runner import evaluate
from foresight_eval.settings import AlfworldSettings
from itp.envs.alfworld.env import AlfworldEnv
from itp.envs.alfworld.games import is_whole, list_games, task_params, with_alternative_goals
from itp.envs.base import Observation
from itp.envs.pool import EnvPool
from itp.envs.scienceworld.env import ScienceworldEnv
from itp.errors import UnplayableGame, UserError
from itp.files import read_json
from itp.games import Game
from itp.methods.actors import RandomWalk
from itp.rollout import BROKEN_SHOWN, LeftOut, run_episodes
from itp.training.itp_r import a2c
from tests.rl_runs import metrics, settings, write_models
from tests.tiny import write_tiny_model
from world_model import collect
from world_model.consistency import consistency

FAULTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no problem": lambda game: game | {"pddl_problem": ""},
    "a blank problem": lambda game: game | {"pddl_problem": " \n"},
    "a problem that is null": lambda game: game | {"pddl_problem": None},
    "a problem without contents": lambda game: game | {"pddl_problem": "()"},
    "a cut problem": lambda game: game | {"pddl_problem": game["pddl_problem"][:900]},
    "a missing type": lambda game: game | {"pddl_problem": re.sub(r" - \w+", "", game["pddl_problem"], count=1)},
    "an unknown type": lambda game: game | {"pddl_problem": re.sub(r" - \w+", " - x", game["pddl_problem"], count=1)},
    "an unreachable goal": lambda game: game | {
        "pddl_problem": game["pddl_problem"].partition("(:goal")[0] + "(:goal (and (isclean nothing))))"},
    "no goal": lambda game: game | {"pddl_problem": game["pddl_problem"].partition("(:goal")[0] + ")"},
    "no domain": lambda game: game | {"pddl_domain": ""},
    "another domain": lambda game: game | {"pddl_domain": "(define (domain x))"},
    "a grammar that is null": lambda game: game | {"grammar": None},
    "a grammar of another kind": lambda game: game | {"grammar": '{"a": 1}'},
    "a grammar without rules": lambda game: game | {"grammar": 'grammar :: """\n{ "intro": [{"rhs": "x"}] }\n""";'},
    "no fields": lambda game: ["solvable"],
}


@pytest.fixture
def games(games_root: Path, tmp_path: Path) -> Path:
    """A copy of the games, to be broken."""
    shutil.copytree(games_root, tmp_path / "games")
    return tmp_path / "games"


def files(root: Path, split: str = "train") -> list[Path]:
    return [Path(game.path) for game in list_games(split, root)]


def change(path: Path, by: Callable[[dict[str, Any]], Any]) -> None:
    path.write_text(json.dumps(by(json.loads(path.read_text()))))


@pytest.mark.parametrize("fault", FAULTS)
def test_the_error_names_the_file_and_the_engine_goes_on(games: Path, fault: str) -> None:
    env, (broken, whole, *_) = AlfworldEnv(), list_games("train", games)
    untouched = Path(broken.path).read_text()
    change(Path(broken.path), FAULTS[fault])
    argv = list(sys.argv)
    with pytest.raises(UnplayableGame, match=re.escape(broken.path)) as raised:
        env.reset(broken)
    assert "\n" not in str(raised.value) and sys.argv == argv
    assert env.reset(whole).text.startswith("You are in the middle of a room")
    Path(broken.path).write_text(untouched)
    assert env.reset(broken).text.startswith("You are in the middle of a room")
    env.close()


def test_a_game_file_that_cannot_be_read_keeps_its_place_in_the_list(games: Path) -> None:
    before = list_games("train", games)
    Path(before[1].path).write_text(Path(before[1].path).read_text()[:300])
    Path(before[2].path).write_bytes(b"\xff\xfe\x00")
    Path(before[3].path).write_text("[" * 100_000)
    assert list_games("train", games) == before
    Path(before[4].path).unlink()
    Path(before[4].path).mkdir()
    assert list_games("train", games) == before
    assert [is_whole(game) for game in before] == [True, False, False, False, False, True]


class StopsEarly:
    """An environment whose engine raises what a future doesn't take."""

    want_admissible = False

    def reset(self, game: Game) -> Observation:
        raise StopIteration("no more")

    def close(self) -> None:
        pass


@pytest.mark.asyncio
async def test_a_stop_iteration_of_an_environment_reaches_the_caller() -> None:
    async with EnvPool(StopsEarly, 1) as pool, pool.session() as env:
        for _ in range(2):  # the process lives on
            with pytest.raises(RuntimeError, match="StopIteration: no more"):
                await asyncio.wait_for(env.reset(Game("toy", "train", "0", "", "")), 60)


def test_an_evaluation_plays_the_others_and_the_mended_game_later(games: Path, tmp_path: Path) -> None:
    first, second, *others = files(games)
    untouched = second.read_text()
    change(second, FAULTS["no problem"])
    change(others[0], lambda game: game | {"walkthrough": None})  # some games come without a solution
    model, out = str(write_tiny_model(tmp_path / "m")), tmp_path / "out"
    settings = AlfworldSettings(policy_model=model, out_dir=str(out), method="sft", split="train", max_steps=2,
                                env_data_root=str(games), act_tokens=8, device="cpu", env_processes=1)
    with pytest.raises(UserError, match=f"1 left out: {second}: the game file has no pddl_problem; .* mended"):
        asyncio.run(evaluate(settings))
    assert sorted(read_episodes(out)) == [0, 2, 3, 4, 5] and read_json(out / "summary.json")["overall"]["n"] == 5
    assert read_episodes(out)[2]["meta"]["golden_steps"] is None
    second.write_text(untouched)
    asyncio.run(evaluate(settings))
    assert sorted(read_episodes(out)) == [0, 1, 2, 3, 4, 5]


def test_an_evaluation_of_broken_games_alone_ends_in_one_line(games: Path, tmp_path: Path) -> None:
    for path in files(games):
        change(path, FAULTS["a grammar that is null"])
    settings = AlfworldSettings(policy_model=str(write_tiny_model(tmp_path / "m")), out_dir=str(tmp_path / "out"),
                                method="sft", split="train", env_data_root=str(games), device="cpu", env_processes=1)
    with pytest.raises(UserError, match="6 left out: .*the game file has no grammar"):
        asyncio.run(evaluate(settings))


def collected(monkeypatch: pytest.MonkeyPatch, root: Path, out: Path, *flags: str) -> set[str]:
    """The episodes that a collection has put on file."""
    argv = ["collect", "--env_data_root", str(root), "--out_dir", str(out), "--env_processes", "1", "--max_steps", "40"]
    monkeypatch.setattr("sys.argv", [*argv, *flags])
    try:
        collect.main()
    finally:
        rows = [json.loads(line) for line in (out / "transitions.jsonl").read_text().splitlines()]
    return {row["episode_id"] for row in rows}


def test_a_collection_plays_the_others_and_the_mended_games_later(monkeypatch: pytest.MonkeyPatch, games: Path,
                                                                  tmp_path: Path) -> None:
    every = list_games("train", games)
    first, second = Path(every[0].path), Path(every[1].path).with_name("traj_data.json")
    untouched = first.read_text(), second.read_text()
    change(first, FAULTS["a missing type"])
    second.write_text(untouched[1][:200])
    with pytest.raises(UserError) as raised:
        collected(monkeypatch, games, tmp_path / "out")
    assert str(raised.value).startswith("2 left out: ")
    assert str(first) in str(raised.value) and str(second) in str(raised.value)
    there = (tmp_path / "out" / "transitions.jsonl").read_text()
    assert all(f"{game.game_id}#0" in there for game in every[2:])
    first.write_text(untouched[0])
    second.write_text(untouched[1])
    assert collected(monkeypatch, games, tmp_path / "out") == {f"{game.game_id}#0" for game in every}


def test_goals_that_cannot_be_read_are_left_out_and_the_own_goal_is_played(
        monkeypatch: pytest.MonkeyPatch, games: Path, tmp_path: Path) -> None:
    game = list_games("unseen", games)[0]
    traj = Path(game.path).with_name("traj_data.json")
    change(traj, lambda data: data | {"other_missions": [{"task_type": "look_at_obj_in_light"}]})
    assert with_alternative_goals(game, 1) == [game] and len(with_alternative_goals(game, 3)) == 2
    with pytest.raises(UserError, match=f"left out: {traj}: goal 1: field 'pddl_params' is missing"):
        collected(monkeypatch, games, tmp_path / "out", "--actor", "random", "--split", "unseen", "--missions", "3")
    assert f"{game.game_id}#0" in (tmp_path / "out" / "transitions.jsonl").read_text()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"pddl_params": null}', '{"pddl_params": {}}'])
def test_a_goal_that_cannot_be_read_names_its_file(games: Path, text: str) -> None:
    game = list_games("train", games)[0]
    traj = Path(game.path).with_name("traj_data.json")
    traj.write_text(text)
    with pytest.raises(UnplayableGame, match=re.escape(str(traj))):
        task_params(game)
    env = AlfworldEnv(expert="handcoded")
    with pytest.raises(UnplayableGame, match=re.escape(str(Path(game.path)))):
        env.reset(game)
    env.close()


def test_consistency_counts_the_games_that_were_played(games: Path) -> None:
    class Wanders(RandomWalk):
        """Stands in for policy and world model: nothing that it says is ever accomplished."""

        async def act(self, state, admissible, seed):
            return type("Choice", (), {"action": "look"})

        async def step(self, states, actions):
            return ["You see nothing."] * len(states)

    every = list_games("train", games)
    change(Path(every[0].path), FAULTS["no domain"])
    said = asyncio.run(consistency(Wanders(), Wanders(), every[:3], max_steps=2, seed=1))
    assert said["games"] == 2 and len(said["left_out"]) == 1 and every[0].path in said["left_out"][0]


@pytest.mark.parametrize("expert", ["", "gold"])  # with it, the simulator raises an exception of its own
def test_a_variation_that_scienceworld_lacks_is_left_out(expert: str) -> None:
    games = [Game("scienceworld", "train", f"boil/{n}", f"boil/{n}/easy", "boil") for n in (9999, 0)]

    async def main() -> list:
        class Look:
            name, want_admissible = "look", False

            async def act(self, view):
                from itp.methods.base import Decision

                return Decision("look around")

        async with EnvPool(functools.partial(ScienceworldEnv, expert=expert), 1) as pool:
            return [e async for e in run_episodes(pool, Look(), games, max_steps=1, seed=1, concurrency=1)]

    played = {episode.game.game_id: episode for episode in asyncio.run(main())}
    assert played["boil/9999"].fault.startswith("boil/9999/easy: ") and len(played["boil/0"].steps) == 1


def test_many_faults_are_one_line_of_bounded_length() -> None:
    LeftOut().check_none_broken()
    with pytest.raises(UserError, match="^30 left out: 0; 1; .*; and 20 more") as raised:
        LeftOut(broken=[str(n) for n in range(30)] * 2).check_none_broken()
    assert f"; {BROKEN_SHOWN};" not in str(raised.value)


def test_stage_3_learns_from_the_other_games_and_names_the_broken_one(games_root: Path, games: Path,
                                                                      tmp_path: Path) -> None:
    chosen = settings(write_models(tmp_path, games_root), games, tmp_path / "out", eval_every=0, episodes_per_epoch=6,
                      episodes_per_update=3, report_to="none")
    broken = files(games)[0]
    change(broken, FAULTS["no problem"])
    with pytest.raises(UserError, match=f"1 left out: {broken}: .*the training is finished without them"):
        a2c.run(chosen)
    rows = metrics(tmp_path / "out")
    assert len(rows) == 2 and (tmp_path / "out" / "metrics.json").is_file()
