"""Collection on real games: what is written, what it means, and going on after a cut."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from itp.envs.alfworld.env import AlfworldEnv
from itp.envs.alfworld.expert import Expert
from itp.envs.alfworld.games import list_games, task_params
from itp.envs.base import EnvDied, Observation
from itp.errors import UserError
from itp.games import Game
from itp.text.state import parse
from itp.training.base_policy import read_dialogues
from itp.transitions import Transition, read_transitions
from tests.tiny import write_tiny_model
from world_model import collect

ALL_FIELDS = ("episode_id", "step", "state", "action", "next_state")


def run(monkeypatch: pytest.MonkeyPatch, games_root: Path, out: Path, *flags: str) -> list[Transition]:
    argv = ["collect", "--env_data_root", str(games_root), "--out_dir", str(out), "--env_processes", "1", *flags]
    monkeypatch.setattr(sys, "argv", argv)
    collect.main()
    return read_transitions(out / "transitions.jsonl", required=ALL_FIELDS)


def by_episode(rows: list[Transition]) -> dict[str, list[Transition]]:
    episodes: dict[str, list[Transition]] = {}
    for t in rows:
        episodes.setdefault(t.episode_id, []).append(t)
    return episodes


def check_chain(episode: list[Transition]) -> None:
    """Each state is the one before, its action and its answer; only the last step is the end."""
    assert [t.step for t in episode] == list(range(len(episode)))
    assert [t.done for t in episode] == [False] * (len(episode) - 1) + [True]
    for t, after in zip(episode, episode[1:], strict=False):
        assert parse(t.state).after(t.action, t.next_state).render() == after.state


def test_the_expert_wins_every_game(monkeypatch, games_root: Path, tmp_path: Path, capsys) -> None:
    episodes = by_episode(run(monkeypatch, games_root, tmp_path, "--actor", "expert"))
    games = list_games("train", games_root)
    assert list(episodes) == [f"{g.game_id}#0" for g in games]
    for episode, game in zip(episodes.values(), games, strict=True):
        check_chain(episode)
        assert all(t.success and t.expert_action == t.action and t.source == "expert" for t in episode)
        assert {t.task_type for t in episode} == {game.task_type}
        assert [t.reward > 0 for t in episode] == [False] * (len(episode) - 1) + [True]
    assert "6 episodes (6 won" in capsys.readouterr().out

    talks = json.loads((tmp_path / "dialogues.json").read_text())
    assert [talk["id"] for talk in talks] == list(episodes)
    for talk, episode in zip(talks, episodes.values(), strict=True):
        turns = talk["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * len(episode) + ["human"]
        assert [turn["value"] for turn in turns[1::2]] == [f"Action: {t.action}" for t in episode]
        assert all("weight" not in turn for turn in turns)
    assert len(read_dialogues(str(tmp_path / "dialogues.json"))) == 6


def test_noise_is_history_and_never_a_lesson(monkeypatch, games_root: Path, tmp_path: Path) -> None:
    rows = run(monkeypatch, games_root, tmp_path, "--noise", "0,0.5", "--episodes_per_game", "3", "--max_games", "4",
               "--max_steps", "25", "--foresight_k", "3", "--foresight_share", "1.5", "--reasoning_share", "0.5")
    episodes = by_episode(rows)
    assert len(read_dialogues(str(tmp_path / "dialogues.json"))) > 12
    assert len(episodes) == 12 and {name.rpartition("#")[2] for name in episodes} == {"0", "1", "2"}
    explored = {name: sum(t.action != t.expert_action for t in episode) for name, episode in episodes.items()}
    quiet = [name for name, count in explored.items() if not count]
    assert 0 < len(quiet) < 12  # each episode draws its share of noise: none or a half
    noisy = [t for name in episodes if name not in quiet for t in episodes[name]]
    assert 0.3 < sum(t.action != t.expert_action for t in noisy) / len(noisy) < 0.7
    assert all(t.expert_action for t in rows)
    for episode in episodes.values():
        check_chain(episode)

    talks = json.loads((tmp_path / "dialogues.json").read_text())
    foresight, horizon = (Counter(talk["id"].rpartition("/")[0] for talk in talks if f"/{form}-" in talk["id"])
                          for form in ("foresight", "horizon"))
    assert [t["id"] for t in talks if t["id"] in episodes] == list(episodes)
    assert horizon == dict.fromkeys(episodes, 1) and set(foresight.values()) == {1, 2}
    words = re.compile("/(thought|reflection|helps)-")
    told = sorted(talk["id"].rpartition("/")[0] for talk in talks if words.search(talk["id"]))
    assert told[::4] == told[1::4] == told[2::4] == told[3::4] and 0 < len(told) // 4 < 12
    for talk in talks:
        gpt = [turn for turn in talk["conversations"] if turn["from"] == "gpt"]
        learned = [turn["value"] for turn in gpt if turn.get("weight", 1)]
        if talk["id"] in episodes:
            rows = episodes[talk["id"]]
            assert learned == [f"Action: {t.expert_action}" for t in rows if t.action == t.expert_action]
            corrections = [turn["correction"] for turn in gpt if "correction" in turn]
            assert corrections == [f"Action: {t.expert_action}" for t in rows if t.action != t.expert_action]
        else:  # the short forms teach their last turn only
            assert learned == [turn["value"] for turn in gpt[-2 if "/reflection-" in talk["id"] else -1:]]
    read_dialogues(str(tmp_path / "dialogues.json"))


def test_failing_actions_worked_before_and_are_never_a_lesson(monkeypatch, games_root: Path, tmp_path: Path) -> None:
    rows = run(monkeypatch, games_root, tmp_path, "--noise", "0.667", "--failing", "0.4", "--max_steps", "30")
    failed = [t for t in rows if t.next_state == "Nothing happens."]
    assert 0.25 < len(failed) / len(rows) < 0.55  # nothing is gone at the first steps of an episode
    assert all(t.expert_action not in ("", t.action) for t in failed)
    assert {t.action.split()[0] for t in failed} >= {"take", "go"}  # what lies elsewhere; to where the agent is
    for episode in by_episode(rows).values():
        check_chain(episode)


def test_the_expert_teaches_in_the_states_that_a_policy_reaches(monkeypatch, games_root: Path, tmp_path: Path) -> None:
    learner = write_tiny_model(tmp_path / "learner")
    flags = ("--noise", "0.5", "--noise_policy", str(learner), "--action_selection", "constrained", "--max_steps", "3")
    rows = run(monkeypatch, games_root, tmp_path / "out", *flags)
    alone = run(monkeypatch, games_root, tmp_path / "alone", "--actor", "policy", "--policy_model", str(learner),
                "--action_selection", "constrained", "--max_steps", "3")
    first = {t.episode_id: t.action for t in alone if t.step == 0}
    taught = [t for t in rows if t.step == 0 and t.action != t.expert_action]
    assert taught and all(t.action == first[t.episode_id] for t in taught)  # the policy's own, not a random one
    for episode in by_episode(rows).values():
        check_chain(episode)
        teacher = None
        game = next(g for g in list_games("train", games_root) if f"{g.game_id}#0" == episode[0].episode_id)
        for t in episode:  # what the expert would do after all that was really done
            teacher = teacher or Expert(task_params(game), game.task_type, parse(t.state).first)
            assert t.expert_action == teacher.act()
            teacher.observe(t.action, t.next_state)


def test_walks_take_whatever_there_is_and_come_back(monkeypatch, games_root: Path, tmp_path: Path) -> None:
    walks = by_episode(run(monkeypatch, games_root, tmp_path / "walks", "--actor", "random", "--max_steps", "30"))
    verbs = Counter(t.action.split()[0] for walk in walks.values() for t in walk)
    assert verbs["go"] < 0.7 * verbs.total() and verbs["take"] > 0.05 * verbs.total() and not verbs["help"]
    others = 0
    assert not any(t.expert_action for walk in walks.values() for t in walk)  # nothing is to be imitated
    for walk in walks.values():
        visits = [t.action for t in walk if t.action.startswith("go to ")]
        assert len(set(visits)) < len(visits)
        task = walk[0].state.split("\n")[0]
        others += sum(t.action.startswith("take ") and t.action.split()[1] not in task for t in walk)
    assert others > verbs["take"] / 2  # of things that the task isn't about


def test_collection_goes_on_after_a_cut(monkeypatch, games_root: Path, tmp_path: Path) -> None:
    flags = ("--actor", "random", "--max_steps", "8")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(monkeypatch, games_root, whole, *flags)
    expected = (whole / "transitions.jsonl").read_bytes()

    run(monkeypatch, games_root, cut, *flags, "--concurrency", "1")
    assert (cut / "transitions.jsonl").read_bytes() == expected  # at any concurrency
    episodes = cut / "episodes.jsonl"
    lines = episodes.read_bytes().splitlines(keepends=True)
    episodes.write_bytes(b"".join(lines[:3]) + lines[3][:40])
    (cut / "transitions.jsonl").unlink()
    run(monkeypatch, games_root, cut, *flags)
    assert (cut / "transitions.jsonl").read_bytes() == expected
    assert (cut / "dialogues.json").read_bytes() == (whole / "dialogues.json").read_bytes()
    names = [json.loads(line)["game_id"] for line in episodes.read_bytes().splitlines()]
    assert len(names) == len(set(names)) == 6
    assert episodes.read_bytes().startswith(b"".join(lines[:3]))

    before = episodes.read_bytes()
    run(monkeypatch, games_root, cut, *flags)  # nothing left to play
    assert episodes.read_bytes() == before
    with pytest.raises(UserError, match="max_steps: 8 there, 9 now"):
        run(monkeypatch, games_root, cut, "--actor", "random", "--max_steps", "9")


class Mortal(AlfworldEnv):
    """Its engine dies of one game, as long as there is a file that says so."""

    def __init__(self, want_admissible: bool, expert: str, fatal: str) -> None:
        super().__init__(want_admissible, expert=expert)
        self.fatal = Path(fatal)

    def reset(self, game: Game) -> Observation:
        if self.fatal.exists() and game.task_type == self.fatal.read_text():
            raise EnvDied("the engine is gone")
        return super().reset(game)


def test_an_episode_that_the_engine_lost_is_no_failure(monkeypatch, games_root: Path, tmp_path: Path) -> None:
    flags, fatal = ("--actor", "random", "--max_steps", "3"), tmp_path / "fatal"
    expected = run(monkeypatch, games_root, tmp_path / "whole", *flags)
    monkeypatch.setattr(collect, "engine_of", lambda settings, want_admissible, expert: functools.partial(
        Mortal, want_admissible, expert, str(fatal)))
    fatal.write_text("look_at_obj_in_light")
    with pytest.raises(UserError, match=r"1 episodes lost .*\(look_at_obj.*start the same command again"):
        run(monkeypatch, games_root, tmp_path / "out", *flags)
    rows = [json.loads(line) for line in (tmp_path / "out" / "episodes.jsonl").read_text().splitlines()]
    assert len(rows) == 5 and all(row["transitions"] for row in rows)
    assert not (tmp_path / "out" / "transitions.jsonl").exists()
    fatal.unlink()
    assert run(monkeypatch, games_root, tmp_path / "out", *flags) == expected


@pytest.mark.parametrize("flags, says", [
    (("--actor", "policy"), "--policy_model"),
    (("--actor", "policy", "--policy_model", "./polcy"), "./polcy: no such model folder"),
    (("--actor", "random", "--reasoning_share", "0.1"), "only --actor expert knows why"),
    (("--env", "scienceworld", "--reasoning_share", "0.1"), "only ALFWorld's expert knows why"),
    (("--noise", "0,often"), "--noise '0,often'"),
    (("--noise", "1.5"), "between 0 and 1"),
    (("--failing", "2"), "--failing 2.0"),
    (("--noise_policy", "somewhere"), "never acts at --noise 0"),
])
def test_errors_come_before_anything_is_played(monkeypatch, games_root: Path, tmp_path: Path, flags, says) -> None:
    with pytest.raises(UserError, match=says):
        run(monkeypatch, games_root, tmp_path / "out", *flags)
    assert not (tmp_path / "out" / "transitions.jsonl").exists()
