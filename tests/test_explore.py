"""From exploration to an evaluation with a critic, on real games with tiny random models."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path

import pytest

from foresight_eval import results
from itp.plan import make_plan
from foresight_eval.runner import evaluate
from foresight_eval.settings import AlfworldSettings
from itp.agent.policy import Policy
from itp.config import parse_settings
from itp.errors import UserError
from itp.games import Game
from itp.methods.base import Decision
from itp.rollout import Episode, Step
from itp.text.state import State, parse
from itp.training import critic, explore
from itp.training.critic_data import read_scored
from tests.tiny import write_tiny_model
from tests.toy import ToyLM


def test_from_exploration_to_an_evaluation_by_q(tmp_path: Path, games_root: Path, monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    policy, tree = write_tiny_model(tmp_path / "policy"), tmp_path / "tree"
    argv = ["explore", "--policy_model", str(policy), "--env_data_root", str(games_root), "--out_dir", str(tree),
            "--max_games", "2", "--max_steps", "3", "--branch_points", "1", "--candidates", "3", "--explore", "0",
            "--temperature", "10",
            "--env_processes", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", argv)
    explore.main()
    rows = [json.loads(line) for line in (tree / explore.EXPLORED).read_text().splitlines()]
    assert len(rows) == 2 and all(row["episodes"] > 1 for row in rows)
    for row in rows:
        states = [parse(node["state"]) for node in row["nodes"]]
        assert len(set(zip(states, (node["action"] for node in row["nodes"]), strict=True))) == len(states)
        tried = {len(state.history): [node["action"] for node, other in zip(row["nodes"], states, strict=True)
                                      if other == state] for state in states}
        assert any(len(actions) == row["episodes"] for actions in tried.values())  # all proposals of one step
        assert all(node["q"] == 0.0 for node in row["nodes"]) or row["solved"]
    before = (tree / explore.EXPLORED).read_bytes()
    explore.main()
    said = capsys.readouterr().out
    assert (tree / explore.EXPLORED).read_bytes() == before and "2 games" in said
    assert f"next: python -m itp.training.critic --learn q --train_jsonl {tree / explore.EXPLORED} " in said

    monkeypatch.setattr(sys, "argv", [
        "critic", "--learn", "q", "--train_jsonl", str(tree / explore.EXPLORED), "--model_path", str(policy),
        "--epochs", "1", "--out_dir", str(tmp_path / "q"), "--steps_per_sequence", "0",
        "--eval_share", "0.5", "--lora_r", "2"])
    critic.main()
    next_command = f"next: python -m foresight_eval --method step_q --critic_model {tmp_path / 'q' / 'merged_full'} "
    assert next_command in capsys.readouterr().out
    settings = AlfworldSettings(
        policy_model=str(policy), critic_model=str(tmp_path / "q" / "merged_full"), out_dir=str(tmp_path / "eval"),
        env_data_root=str(games_root), split="unseen", method="step_q", action_selection="constrained", candidates=3,
        max_steps=2, max_games=1, env_processes=1, concurrency=1, device="cpu", prompt_style="tuned",
        temperature=10.0)
    asyncio.run(evaluate(settings))
    assert json.loads((tmp_path / "eval" / "config.json").read_text())["config"]["critic_fingerprint"]
    record, = results.read_episodes(tmp_path / "eval").values()
    assert '"critic"' in json.dumps(record)  # what it was asked is counted

    with pytest.raises(UserError, match="needs --critic_model"):
        make_plan(AlfworldSettings(policy_model=str(policy), out_dir="x", method="step_q"))


class FakePool:
    """Sessions of nothing, which must have ended when it is closed."""

    open = 0

    @contextlib.asynccontextmanager
    async def session(self):
        self.open += 1
        try:
            yield None
        finally:
            self.open -= 1

    async def close(self) -> None:
        assert self.open == 0


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explore, "engine_of", lambda *_, **__: None)
    monkeypatch.setattr(explore, "EnvPool", lambda *_: FakePool())
    monkeypatch.setattr(explore, "load_policy", lambda *_, **__: Policy(ToyLM("policy")))


GAMES = [Game("alfworld", "train", f"game {i}", "toy", "") for i in range(6)]
START = State("put a mug in fridge", "You see a fridge 1.")


def grow(out: Path) -> None:
    settings = explore.ExploreSettings(policy_model="m", out_dir=str(out), concurrency=2, branch_points=1,
                                       candidates=2, max_steps=3)
    asyncio.run(explore.explore(settings, GAMES, out))


@pytest.mark.usefixtures("faked")
def test_trees_are_written_while_others_are_still_to_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a game whose first prompt doesn't fit is a tree without actions."""
    file, missing = tmp_path / explore.EXPLORED, []

    async def play(env, method, game: Game, *, begin: State | None = None, **_) -> Episode:
        if begin is None:
            written = len(file.read_text().splitlines()) if file.exists() else 0
            missing.append(GAMES.index(game) - written)
        for _ in range(5):
            await asyncio.sleep(0)
        if game is GAMES[3]:
            return Episode(game, reason="prompt_too_long", first=START)
        decision = Decision("look", memory=("look", "inventory"))
        return Episode(game, [Step(START, decision, "A room.", 0.0, 0.0, False, False)], first=START)

    monkeypatch.setattr(explore, "play", play)
    grow(tmp_path)
    assert len(missing) == len(GAMES) and max(missing) == 1  # of two games at a time one is still open
    rows = {row["game_id"]: row for row in map(json.loads, file.read_text().splitlines())}
    assert set(rows) == {game.game_id for game in GAMES}
    assert rows["game 3"]["nodes"] == [] and rows["game 3"]["steps"] == 0
    assert len(read_scored(str(file))) == 5  # the branch repeats the only action


@pytest.mark.usefixtures("faked")
def test_no_game_is_played_any_more_when_an_error_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                              ) -> None:
    async def play(env, method, game: Game, **_) -> Episode:
        if game is GAMES[1]:
            await asyncio.sleep(0)
            raise UserError("the model is lost")
        await asyncio.sleep(60)

    monkeypatch.setattr(explore, "play", play)
    with pytest.raises(UserError, match="the model is lost"):
        grow(tmp_path)


def test_games_without_an_action_have_no_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    model = write_tiny_model(tmp_path / "policy")
    row = {"game_id": "game 0", "success": False, "episodes": 1, "solved": 0, "steps": 0, "nodes": []}

    async def unplayed(settings, games, out: Path) -> None:
        (out / explore.EXPLORED).write_text(json.dumps(row) + "\n")

    monkeypatch.setattr(explore, "explore", unplayed)
    monkeypatch.setattr(explore, "games_of", lambda *_: GAMES[:1])
    monkeypatch.setattr(explore, "goals_of", lambda _, game: [game])
    monkeypatch.setattr(sys, "argv", ["explore", "--policy_model", str(model), "--out_dir", str(tmp_path / "out")])
    explore.main()
    assert "1 games, 1 episodes" in capsys.readouterr().out


def test_the_folder_of_games_is_called_as_elsewhere() -> None:
    needed = ["--policy_model", "p", "--out_dir", "o"]
    for name in ("--env_data_root", "--env_data_path"):  # the second is the name that it had
        assert parse_settings(explore.ExploreSettings, [*needed, name, "data"]).env_data_root == "data"
