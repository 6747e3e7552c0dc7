"""From exploration to an evaluation with a critic, on real games with tiny random models."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

from foresight_eval import results
from itp.plan import make_plan
from foresight_eval.runner import evaluate
from foresight_eval.settings import AlfworldSettings
from itp.config import parse_settings
from itp.errors import UserError
from itp.text.state import parse
from itp.training import critic, explore
from tests.tiny import write_tiny_model


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


def test_the_folder_of_games_is_called_as_elsewhere() -> None:
    needed = ["--policy_model", "p", "--out_dir", "o"]
    for name in ("--env_data_root", "--env_data_path"):  # the second is the name that it had
        assert parse_settings(explore.ExploreSettings, [*needed, name, "data"]).env_data_root == "data"
