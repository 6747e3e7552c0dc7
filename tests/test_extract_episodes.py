"""Episodes of result folders become training data: what was solved is imitated, what was refused isn't."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from foresight_eval import extract_episodes
from foresight_eval.results import write_episode
from itp.envs.alfworld.games import list_games
from itp.errors import UserError
from itp.files import read_json
from itp.text.state import parse
from itp.training.base_policy import read_dialogues
from itp.training.critic_data import CriticSettings, read_examples
from itp.training.itp_r.branches import find_games
from itp.training.itp_r.expert_steps import read_expert
from itp.transitions import read_transitions
from tests.made_results import PLAYED, make_episode, make_games, write_result
from world_model import knowledge
from world_model.early_experience import EarlySettings

REFUSED = ("open desk 1", "Nothing happens.")


def extract(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["x", *flags])
    extract_episodes.main()


def test_solved_episodes_are_imitated_but_for_what_was_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solved_game, lost_game = make_games(tmp_path / "games", 2)
    solved = make_episode(solved_game, success=True, imagined=[], played=[REFUSED, *PLAYED])
    solved.steps[0].invalid = True
    lost = make_episode(lost_game, success=False, imagined=[])
    again = make_episode(lost_game, success=True, imagined=[])
    again.trial = 1
    write_result(tmp_path / "play", [solved, lost], split="train", method="implement")
    write_episode(tmp_path / "play", 1, again)
    extract(monkeypatch, "--results", str(tmp_path / "play"), "--out_dir", str(tmp_path / "data"))

    rows = read_transitions(tmp_path / "data" / "transitions.jsonl")
    assert [(row.action, row.next_state) for row in rows] == [REFUSED, *PLAYED, *PLAYED, *PLAYED]
    assert [row.expert_action for row in rows] == ["", *(a for a, _ in PLAYED), *[""] * len(PLAYED),
                                                   *(a for a, _ in PLAYED)]
    for before, after in zip(rows, rows[1:]):  # the states chain as the environment answered
        if before.episode_id == after.episode_id:
            assert parse(before.state).after(before.action, before.next_state) == parse(after.state)
    assert len({row.episode_id for row in rows}) == 3 and rows[0].source == "implement"

    dialogues = read_json(tmp_path / "data" / "dialogues.json")
    assert [turn.get("weight", 1) for turn in dialogues[0]["conversations"] if turn["from"] == "gpt"] == [
        0, *[1] * len(PLAYED)]
    assert len(dialogues) == 2 == len(read_dialogues(str(tmp_path / "data" / "dialogues.json")))


def test_the_episodes_of_a_game_in_two_folders_are_of_one_game(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                               games_root: Path,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    game = list_games("train", games_root)[0]
    for name, success in (("one", True), ("two", False)):
        episode = make_episode(game, success=success, imagined=[], task="put a mug in fridge.",
                               played=PLAYED if success else [REFUSED])
        write_result(tmp_path / name, [episode], split="train")
    extract(monkeypatch, "--results", f"{tmp_path / 'one'},{tmp_path / 'two'}", "--out_dir", str(tmp_path / "data"))
    file = str(tmp_path / "data" / "transitions.jsonl")
    assert list(dict.fromkeys(row.episode_id for row in read_transitions(file))) == [
        f"{game.game_id}#one.0", f"{game.game_id}#two.0"]

    settings = EarlySettings(expert_jsonl=file, out_dir="x", env_data_root=str(games_root))
    assert {found.game_id for found in find_games(settings, read_expert(file, None)).values()} == {game.game_id}
    critic = CriticSettings(train_jsonl=file, learn="reward", model_path="m", out_dir="o", unfinished=0)
    pair, = read_examples(critic)  # the solved one of a folder against the failed one of the other
    assert pair.group == game.game_id and pair.worse.history == (REFUSED,)

    monkeypatch.setattr(sys, "argv", ["x", "--transitions", file, "--out_json", str(tmp_path / "knowledge.json")])
    knowledge.main()
    assert "1 solved and 1 failed episodes" in capsys.readouterr().out


def test_held_out_games_and_nothing_to_imitate_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    game = make_games(tmp_path / "games", 1)
    write_result(tmp_path / "unseen", [make_episode(game[0], success=True, imagined=[])], split="unseen")
    write_result(tmp_path / "lost", [make_episode(game[0], success=False, imagined=[])], split="train")
    out = ("--out_dir", str(tmp_path / "data"))
    with pytest.raises(UserError, match="played the split unseen, not train"):
        extract(monkeypatch, "--results", str(tmp_path / "unseen"), *out)
    with pytest.raises(UserError, match="none of 1 episodes was solved"):
        extract(monkeypatch, "--results", str(tmp_path / "lost"), *out)
    with pytest.raises(UserError, match="not a result folder"):
        extract(monkeypatch, "--results", str(tmp_path), *out)
