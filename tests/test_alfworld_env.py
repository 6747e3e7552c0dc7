"""The real ALFWorld engine: our contract on it, and the fast engine against TextWorld's own."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from itp.envs.alfworld.env import AlfworldEnv, split_intro, twin_if_admissible
from itp.envs.alfworld.games import list_games
from itp.errors import UserError
from itp.games import Game

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def games(games_root: Path) -> list[Game]:
    """Training games, those with the smallest worlds first: TextWorld's own engine is slow."""
    return sorted(list_games("train", games_root), key=lambda game: os.path.getsize(game.path))


@pytest.fixture
def env():
    env = AlfworldEnv(want_admissible=True)
    yield env
    env.close()


def walkthrough(game: Game) -> list[str]:
    return json.loads(Path(game.path).read_text())["walkthrough"]


def transcript(env: AlfworldEnv, game: Game, seed: int, steps: int) -> list:
    """Everything that the environment says in an episode of random actions, a tenth of them invalid."""
    rng = random.Random(seed)
    said = [env.reset(game)]
    seen = said[0]
    for _ in range(steps):
        said.append(env.step("fly" if rng.random() < 0.1 else rng.choice(seen.admissible)))
        seen = said[-1].obs
    return said


@pytest.mark.parametrize("expert", ["", "handcoded"])
def test_fast_engine_says_what_textworlds_own_says(games: list[Game], expert: str) -> None:
    game = games[1] if expert else games[0]
    own, fast = (AlfworldEnv(want_admissible=True, fast=is_fast, expert=expert) for is_fast in (False, True))
    assert transcript(fast, game, 0, 12) == transcript(own, game, 0, 12)
    # Again, now that the fast engine knows the world, and to its end.
    assert own.reset(game) == fast.reset(game)
    for action in walkthrough(game):
        assert own.step(action) == fast.step(action)
    assert fast.step("look").success
    own.close()
    fast.close()


def test_lazy_plan_is_the_plan_made_at_once(games: list[Game]) -> None:
    """The planner's problem may be loaded in the middle of an episode: TextWorld loads it at the reset."""
    import textworld
    from textworld.envs.pddl.pddl import PddlEnv

    from itp.envs.alfworld.fast_engine import FastPddlEnv

    own, fast = PddlEnv(textworld.EnvInfos()), FastPddlEnv(textworld.EnvInfos())
    for engine in (own, fast):
        engine.load(games[0].path)
        engine.reset()
    goto = [command for command in own.state["admissible_commands"] if command.startswith("go to")]
    for command in (goto[0], goto[-1]):
        own.step(command)
        fast.step(command)
    plans = [engine._pddl_state.replan(engine._entity_infos) for engine in (own, fast)]
    assert len(plans[0]) >= 2
    assert plans[0] == plans[1]


def test_each_world_is_translated_once(games: list[Game], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import fast_downward

    from itp.envs.alfworld import fast_translation as alfworld_translation

    translations = []
    translate = fast_downward.pddl2sas

    def counting(*args, optimize=False, **kwargs):
        translations.append(optimize)
        return translate(*args, optimize=optimize, **kwargs)

    monkeypatch.setattr(fast_downward, "pddl2sas", counting)
    monkeypatch.setenv("ITP_CACHE", str(tmp_path))
    alfworld_translation.world.cache_clear()
    alfworld_translation.planner_sas.cache_clear()
    env = AlfworldEnv()
    for game in (games[0], games[1], games[0], games[0]):
        env.reset(game)
        env.step("look")
    assert translations == [False, False]
    alfworld_translation.world.cache_clear()  # as in another process: the files are there
    env.reset(games[0])
    assert translations == [False, False]
    planning = AlfworldEnv(expert="planner")
    planning.reset(games[0])
    planning.reset(games[0])
    assert translations == [False, False, True]
    env.close()
    planning.close()


def test_reset_splits_the_intro(env: AlfworldEnv, games: list[Game]) -> None:
    obs = env.reset(games[0])
    sentence = re.search(r"Your task is to: ([^\"]*)\.\"", json.loads(Path(games[0].path).read_text())["grammar"])[1]
    assert obs.task == sentence
    assert obs.text.startswith("You are in the middle of a room. Looking quickly around you, you see a")
    assert "Welcome" not in obs.text and "task" not in obs.text and "\n" not in obs.text
    assert split_intro("-= Welcome to TextWorld, ALFRED! =-\n\nA room.\n\nYour task is to: go. Then stop.", "x") == (
        "A room.", "go. Then stop")


def test_walkthrough_wins_at_its_last_step(env: AlfworldEnv, games: list[Game]) -> None:
    for game in games:
        env.reset(game)
        results = [env.step(action) for action in walkthrough(game)]
        assert [r.success for r in results] == [False] * (len(results) - 1) + [True]
        assert [r.done for r in results] == [r.success for r in results]
        assert [r.reward for r in results] == [0.0] * (len(results) - 1) + [1.0]
        assert results[-1].score == 100.0 and not any(r.invalid for r in results)


def test_invalid_action_changes_nothing(env: AlfworldEnv, games: list[Game]) -> None:
    admissible = env.reset(games[0]).admissible
    for action in ("fly", "", "go to nowhere 1", "put a 1 in/on b 1"):
        result = env.step(action)
        assert result.invalid and result.obs.text == "Nothing happens." and not result.done
        assert result.obs.admissible == admissible
    assert not env.step(f"  {admissible[0]}  ").invalid


def test_older_wording_is_executed_as_its_twin(env: AlfworldEnv, games: list[Game]) -> None:
    game = next(game for game in games if any(a.startswith("move ") for a in walkthrough(game)))
    env.reset(game)
    for action in walkthrough(game):
        result = env.step(re.sub(r"move (.*) to (.*)", r"put \1 in/on \2", action))
        assert result.info["executed"] == action
    assert result.success


@pytest.mark.parametrize(("action", "admissible", "executed"), [
    ("move pen 1 to desk 1", ("put pen 1 in/on desk 1",), "put pen 1 in/on desk 1"),
    ("put pen 1 on desk 1", ("move pen 1 to desk 1",), "move pen 1 to desk 1"),
    ("put pen 1 in drawer 1", ("put pen 1 in/on drawer 1",), "put pen 1 in/on drawer 1"),
    ("put pen 1 in/on desk 2", ("move pen 1 to desk 1",), "put pen 1 in/on desk 2"),
    ("put knife 1 in pan 1", ("put knife 1 in pan 1", "move knife 1 to pan 1"), "put knife 1 in pan 1"),
])
def test_twins(action: str, admissible: tuple[str, ...], executed: str) -> None:
    assert twin_if_admissible(action, admissible) == executed


def test_planner_wins(games: list[Game]) -> None:
    env = AlfworldEnv(expert="planner")
    obs = env.reset(games[0])
    result = None
    for _ in range(20):
        result = env.step((result.obs if result else obs).expert_action)
        if result.success:
            break
    assert result.success and result.obs.expert_action == ""
    assert result.obs.admissible is None  # not asked for
    env.close()


def test_handcoded_expert_has_random_choices_of_its_own(games: list[Game]) -> None:
    def actions(env: AlfworldEnv, seed: int) -> list[str]:
        random.seed(seed)
        before = random.getstate()
        obs, said = env.reset(games[2]), []
        for _ in range(25):
            said.append(obs.expert_action)
            obs = env.step(obs.expert_action or "look").obs
        assert random.getstate() == before
        return said

    env = AlfworldEnv(expert="handcoded")
    first = actions(env, 1)
    assert first[0] == "look" and len(set(first)) > 3
    assert first == actions(env, 2)
    env.close()


def test_environments_of_one_process_dont_meet(games: list[Game]) -> None:
    alone = {}
    env = AlfworldEnv(want_admissible=True)
    for number, game in enumerate((games[0], games[1], games[0])):
        alone[number] = transcript(env, game, number, 10)
    envs = [env, AlfworldEnv(want_admissible=True), AlfworldEnv(want_admissible=True)]
    rngs = [random.Random(number) for number in range(3)]
    said = {n: [e.reset(g)] for n, (e, g) in enumerate(zip(envs, (games[0], games[1], games[0])))}
    seen = {n: s[0] for n, s in said.items()}
    for _ in range(10):
        for n, rng in enumerate(rngs):
            said[n].append(envs[n].step("fly" if rng.random() < 0.1 else rng.choice(seen[n].admissible)))
            seen[n] = said[n][-1].obs
    assert said == alone
    for each in envs:
        each.close()


def test_text_does_not_depend_on_the_hash_seed(games: list[Game]) -> None:
    program = ("import sys, random; from itp.envs.alfworld.env import AlfworldEnv; from itp.games import Game\n"
               "env, rng = AlfworldEnv(True), random.Random(0)\n"
               "game = Game('alfworld', 'train', 'g', sys.argv[1], '')\n"
               "obs = env.reset(game)\n"
               "for _ in range(20): print(obs); obs = env.step(rng.choice(obs.admissible)).obs\n")
    said = [subprocess.run([sys.executable, "-c", program, games[0].path], check=True, capture_output=True, text=True,
                           cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}).stdout for seed in ("1", "2")]
    assert said[0] == said[1] and said[0].count("Observation(") == 20


def test_bad_game_files_are_the_users_to_mend(env: AlfworldEnv, games: list[Game], tmp_path: Path) -> None:
    good = json.loads(Path(games[0].path).read_text())
    path = tmp_path / "game.tw-pddl"
    game = Game("alfworld", "train", "bad", str(path), "")
    bad = [None, "{", json.dumps({"grammar": ""}), json.dumps({**good, "pddl_problem": "(define (problem"}),
           json.dumps({**good, "pddl_problem": good["pddl_problem"].replace("(:domain alfred)", "")}),
           json.dumps({**good, "grammar": good["grammar"] + "action {"}),
           json.dumps({**good, "grammar": good["grammar"].replace("Your task is to: ", "Please ")})]
    for text in bad:
        if text is not None:
            path.write_text(text)
        with pytest.raises(UserError, match=re.escape(str(path))) as caught:
            env.reset(game)
        assert "\n" not in str(caught.value)
    path.write_text(json.dumps(good))
    assert env.reset(game).text == env.reset(games[0]).text


def test_argv_and_stdout_are_left_alone(games: list[Game], capfd: pytest.CaptureFixture[str],
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "--flag"])
    for fast in (True, False):
        env = AlfworldEnv(fast=fast)
        env.reset(games[0])
        env.step("look")
        env.close()
    assert sys.argv == ["program", "--flag"]
    assert capfd.readouterr() == ("", "")
