"""Imagination in the game itself: it says what then happens, on real engines, and every result of it is marked."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from foresight_eval import results
from foresight_eval.report import analyses, plots, tables
from foresight_eval.runner import evaluate
from foresight_eval.settings import AlfworldSettings, SciworldSettings
from foresight_eval.summary import write_summary
from itp.agent.engine_world_model import NAME, EngineWorldModel
from itp.agent.policy import Choice, Policy
from itp.envs.alfworld.env import AlfworldEnv
from itp.envs.alfworld.games import list_games
from itp.envs.base import EnvDied, TextEnv
from itp.envs.pool import EnvHandle, EnvPool
from itp.envs.scienceworld.env import ScienceworldEnv
from itp.errors import UserError
from itp.games import Game
from itp.lm.base import GenParams, Generation, metered
from itp.methods import implement
from itp.methods.registry import build
from itp.methods.settings import NEED_WORLD_MODEL, MethodSettings
from itp.plan import make_plan
from itp.rollout import Episode, run_episodes
from itp.text.state import State, parse
from tests.made_results import make_episode, make_games, write_result
from tests.test_evaluation import timeless
from tests.tiny import write_tiny_model
from tests.toy import ToyLM, unit

Records = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def games(games_root: Path) -> list[Game]:
    return list_games("train", str(games_root))


class Walker(ToyLM):
    """Goes to places of the room, opens them and looks around, also in imagination."""

    def answer(self, prompt: str, seed: int, params: GenParams) -> Generation:
        if prompt.endswith("Helps:"):
            return super().answer(prompt, seed, params)
        if params.choices:
            choice = params.choices[int(len(params.choices) * unit(prompt, seed))]
            return Generation(choice, 9, 4, 0, "stop", -unit(prompt))
        room = prompt.partition("Looking quickly around you, you see")[2].partition("\n")[0]
        places = re.findall(r"an? ([a-z]+ \d+)", room)
        actions = [f"{verb} {place}" for place in places for verb in ("go to", "go to", "open")] + ["inventory"]
        return Generation(f" {actions[int(len(actions) * unit(prompt, seed))]}", 9, 4, 0, "stop", -unit(prompt))


class Script:
    """A policy that knows the solution of every game, as far as ImagineThenPlan needs one."""

    selection, foresight_format = "generate", "full"

    def __init__(self, games: Sequence[Game]) -> None:
        self.form = Policy(ToyLM("policy")).form
        self.solutions = {}
        for game in games:
            task = AlfworldEnv().reset(game).task
            self.solutions[task] = json.loads(Path(game.path).read_text())["walkthrough"]

    async def propose(self, state: State, seed: int) -> str:
        return next(iter(self.solutions[state.task][len(state.history):]), "look")

    async def act(self, state: State, *_: Any, **__: Any) -> Choice:
        action = await self.propose(state, 0)
        return Choice(action, raw=action)


class Overheard(EngineWorldModel):
    """Keeps what it is asked, and what it answers."""

    def __init__(self, *how: Any) -> None:
        super().__init__(*how)
        self.asked: list[tuple[Game, State, str, str]] = []

    async def observe(self, game: Game, state: State, action: str) -> str:
        said = await super().observe(game, state, action)
        self.asked.append((game, state, action, said))
        return said


@contextlib.asynccontextmanager
async def opened(simulators: int) -> AsyncIterator[Overheard]:
    """ALFWorld's engine in the place of a world model, in one process."""
    engine = Overheard(AlfworldEnv, 1, simulators)
    try:
        yield engine
    finally:
        await engine.close()


def check_by_replay(env: TextEnv, game: Game, record: dict[str, Any]) -> list[str]:
    """Play an episode again, and at each step what was imagined there.  Returns all imagined observations."""
    steps, imagined = record["foresight_steps"], []
    for t, step in enumerate(steps):
        for actions, observations in (
                ([step["action"]], [step["obs_next"]]), (step["imagined_actions"], step["wm_raw_output"])):
            first = env.reset(game)
            assert parse(record["conversations"][0]["value"]) == State(first.task, first.text)
            for before in steps[:t]:
                env.step(before["action"])
            assert [env.step(action).obs.text for action in actions] == observations
        imagined += step["wm_raw_output"]
    return imagined


def test_what_is_imagined_comes_true(games: list[Game]) -> None:
    """Six episodes that act as they imagined share two simulators, which therefore replay again and again."""
    script = Script(games)
    assert len(script.solutions) == len(games)

    async def main() -> tuple[dict[str, Episode], dict[str, Episode], int]:
        async with EnvPool(AlfworldEnv, 1) as pool, opened(2) as engine:
            made = []
            for method in (build("foresight", script, engine, MethodSettings(fixed_k=2)),
                           build("sft", script, None, MethodSettings())):
                episodes = run_episodes(pool, method, games, max_steps=50, seed=3, concurrency=6)
                made.append({e.game.game_id: e async for e in episodes})
            return *made, sum(len(slot.taken) for slot in engine.pool._slots)

    foresight, alone, open_games = asyncio.run(main())
    assert open_games == 2
    for game in games:
        steps = foresight[game.game_id].steps
        assert foresight[game.game_id].success and len(steps) > 4
        # Nothing that was imagined changed the game itself.
        assert [s.observation for s in steps] == [s.observation for s in alone[game.game_id].steps]
        happened = [(step.decision.action, step.observation) for step in steps]
        for t, step in enumerate(steps):
            assert len(step.decision.imagined.steps) == 2
            assert list(step.decision.imagined.steps)[:len(happened) - t] == happened[t:t + 2]
            spent = step.usage["world_model"]
            assert (spent.calls, spent.tokens) == (2, 0)


@pytest.fixture(scope="module")
def by_method(games: list[Game]) -> dict[str, tuple[Records, Records, list[tuple[Game, State, str, str]]]]:
    """Four games by every method: one at a time, all at once, and what both asked the engine."""

    async def main() -> dict[str, tuple[Records, Records, list[tuple[Game, State, str, str]]]]:
        policy, found = Policy(Walker("policy"), temperature=0.9), {}
        async with EnvPool(AlfworldEnv, 1) as pool, opened(3) as engine:
            for name in NEED_WORLD_MODEL:
                engine.asked = []
                method = build(name, policy, engine, MethodSettings(
                    max_k=2, fixed_k=2 if name == "foresight" else -1, candidates=3, rounds=2, belief_samples=3,
                    rap_d_actions=3, rap_depth_limit=3, rap_num_rollouts=5))
                made = [{(i := games.index(e.game)): results.episode_record(i, e) async for e in run_episodes(
                    pool, method, games[:4], max_steps=4, seed=3, concurrency=n)} for n in (1, 4)]
                found[name] = (*made, engine.asked)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(implement, "RECENT", 1)  # so that it asks about states without their beginning
        patch.setattr(implement, "FAILED", 1)
        return asyncio.run(main())


@pytest.mark.parametrize("name", NEED_WORLD_MODEL)
def test_every_method_imagines_in_the_game_and_the_same_at_any_concurrency(
        games: list[Game], by_method: dict[str, Any], name: str) -> None:
    alone, together, asked = by_method[name]
    assert timeless(alone) == timeless(together) and set(alone) == {0, 1, 2, 3}
    env = AlfworldEnv()
    for game, state, action, said in asked:
        env.reset(game)
        assert [env.step(before).obs.text for before, _ in state.history] == [seen for _, seen in state.history]
        assert env.step(action).obs.text == said
    assert len({said for *_, said in asked} - {"Nothing happens."}) > 5
    assert max(len(state.history) for _, state, *_ in asked) >= 3
    for i, record in alone.items():
        check_by_replay(env, games[i], record)
        spent = record["meta"]["usage"]["world_model"]
        assert spent["calls"] >= 4 and spent["prompt_tokens"] == spent["completion_tokens"] == spent["cut"] == 0


def test_a_game_that_does_not_repeat_itself_is_an_error_of_one_line(games: list[Game]) -> None:
    game, env = games[0], AlfworldEnv()
    first = env.reset(game)
    start, go = State(first.task, first.text), json.loads(Path(game.path).read_text())["walkthrough"][0]
    there, around = (env.step(action).obs.text for action in (go, "look"))
    assert go.startswith("go to ") and around.startswith("You are facing")
    right = start.after(go, there)
    wrong = ((start.after("inventory", "You are carrying: a moon 1."),
              r"after step 1, 'inventory', its copy .* says 'You are .*moon 1.*repeats itself"),
             (State(first.task, "You are on the moon."), "at its start its copy .*on the moon"),
             (State("find the moon", first.text), "at its start its copy .*find the moon"))

    async def main() -> None:
        async with opened(1) as engine:
            for state, says in wrong:
                with pytest.raises(UserError, match=says) as error:
                    await engine.at(game, state).step([state], ["look"])
                assert "\n" not in str(error.value) and game.game_id in str(error.value)
                # It still serves others, and knows that its simulator isn't where it was.
                assert await engine.at(game, right).step([right], ["look"]) == [around]
                assert await engine.at(game, start).step([start], [go]) == [there]
            assert await engine.at(game, right).sample(right, "look", 3, seed=1) == [around] * 3

    asyncio.run(main())


def test_a_state_of_another_episode_is_not_imagined(games: list[Game]) -> None:
    real = State("a", "b", (("look", "c"), ("look", "d")))
    at = EngineWorldModel(AlfworldEnv, 1, 1).at(games[0], real)
    further = real.after("open", "e")
    assert at.whole(real) == real and at.whole(further) == at.whole(further.last(2)) == further
    assert at.whole(further.last(1)) == further
    for other in (State("a", "b"), State("a", "b", (("look", "c"), ("look", "other"))), State("x", "b", real.history),
                  real.after("open", "e").after("go", "f").last(1)):
        with pytest.raises(ValueError, match="doesn't follow"):
            at.whole(other)


def test_a_simulator_that_died_is_started_again(games: list[Game]) -> None:
    async def main() -> None:
        first = AlfworldEnv().reset(games[0])
        real = State(first.task, first.text)
        async with opened(2) as engine:
            here = engine.at(games[0], real)
            before = await here.step([real], ["inventory"])
            os.kill(*engine.pool.pids(), signal.SIGSTOP)
            hanging = asyncio.ensure_future(here.step([real.after("inventory", *before)], ["look"]))
            await asyncio.sleep(0.2)
            os.kill(*engine.pool.pids(), signal.SIGKILL)
            with pytest.raises(EnvDied):  # it costs the episode a restart, as the death of its own environment does
                await hanging
            assert await here.step([real], ["inventory"]) == before and engine.pool.deaths == 1

    asyncio.run(main())


def test_a_simulator_on_the_way_goes_on_and_another_one_starts_anew(games: list[Game],
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    resets: list[Game] = []
    reset = EnvHandle.reset

    async def counted(self: EnvHandle, game: Game) -> Any:
        resets.append(game)
        return await reset(self, game)

    async def main() -> None:
        first = AlfworldEnv().reset(games[0])
        state = earlier = State(first.task, first.text)
        async with opened(1) as engine:
            with metered() as usage:
                for _ in range(3):
                    (said,) = await engine.at(games[0], state).step([state], ["inventory"])
                    earlier, state = state, state.after("inventory", said)
            assert len(resets) == 1 and usage["world_model"].calls == 3
            await engine.at(games[0], earlier).step([earlier], ["look"])
            assert len(resets) == 2
            # Two at a time share the only simulator, which goes the wrong way for the second.
            both = await engine.at(games[0], state).step([state, state], ["inventory", "look"])
            assert both[0] == said != both[1] and len(resets) == 4

    monkeypatch.setattr(EnvHandle, "reset", counted)
    asyncio.run(main())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, games_root: Path) -> AlfworldSettings:
    """A tiny random policy, which acts as a trie lets it and imagines freely, and no world model."""
    return AlfworldSettings(
        policy_model=str(write_tiny_model(tmp_path_factory.mktemp("models") / "policy")), out_dir="",
        wm_backend="engine", env_data_root=str(games_root), split="train", only_ids="0,1,2", max_steps=3, max_k=2,
        k_policy="random", act_tokens=8, action_selection="constrained", prompt_style="tuned", device="cpu",
        env_processes=1, concurrency=3, temperature=0.7)


def test_an_evaluation_is_marked_and_is_the_same_at_any_concurrency(
        base: AlfworldSettings, games: list[Game], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    made = {}
    for concurrency in (1, 3):
        folder = tmp_path / str(concurrency)
        asyncio.run(evaluate(dataclasses.replace(base, out_dir=str(folder), concurrency=concurrency)))
        made[concurrency] = results.read_episodes(folder)
    assert timeless(made[1]) == timeless(made[3]) and len(made[1]) == 3
    for i, record in made[1].items():
        check_by_replay(AlfworldEnv(), games[i], record)
        ks = [step["k"] for step in record["foresight_steps"]]
        assert record["meta"]["usage"].get("world_model", {"calls": 0})["calls"] == sum(ks)
    assert NAME == "engine (perfect imagination)" and f"3: {NAME}" in capsys.readouterr().out
    config = json.loads((folder / "config.json").read_text())["config"]
    assert (config["wm_backend"], config["world_model"]) == ("engine", NAME)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["world_model"] == NAME
    assert summary["cost"]["world_model"]["calls_per_step"] == summary["mean_k"] > 0
    assert summary["cost"]["tokens_per_episode"] == sum(
        summary["cost"]["policy"][f"{kind}_tokens_per_episode"] for kind in ("prompt", "completion"))
    with pytest.raises(UserError, match="wm_backend: 'engine' there, 'local' now"):
        asyncio.run(evaluate(dataclasses.replace(base, out_dir=str(folder), wm_backend="local",
                                                 wm_model=base.policy_model)))


def test_what_imagines_nothing_is_not_marked(base: AlfworldSettings, tmp_path: Path) -> None:
    for changes in ({"method": "sft"}, {"disable_wm": 1, "k_policy": "auto"}, {"fixed_k": 0, "k_policy": "auto"}):
        plan = make_plan(dataclasses.replace(base, **changes))
        assert not plan.imagines_in_engine and "world_model" not in plan.facts
    assert make_plan(base).imagines_in_engine
    local = make_plan(dataclasses.replace(base, wm_backend="local", wm_model=base.policy_model))
    assert not local.imagines_in_engine and "world_model" not in local.facts
    result = write_result(tmp_path / "r", [])
    assert result.title == result.name and "world_model" not in write_summary(tmp_path / "r")


def test_every_table_and_figure_shows_the_mark(tmp_path: Path) -> None:
    games = make_games(tmp_path / "games", 3)
    played = [make_episode(game, success=True, imagined=[]) for game in games]
    alone = write_result(tmp_path / "sft", played, method="sft")
    engine = write_result(tmp_path / "eng", played, world_model=NAME, wm_backend="engine", fixed_k=1)
    assert engine.name == "eng" and engine.title == f"eng: {NAME}" and alone.title == "sft"
    for made in (*tables.all_tables([alone, engine], alone), tables.overview([alone, engine]),
                 analyses.deployment([alone, engine]), analyses.k_by_length([alone, engine])):
        cells = {*made.header, *(row[0] for row in made.rows)}
        assert engine.title in cells and engine.name not in cells, made.name
    against = tables.comparison([alone, engine], engine)
    assert engine.title in against.title and f"only {engine.title}" in against.header
    assert NAME in analyses.depth([alone, engine], {}).note and NAME not in analyses.depth([alone], {}).note
    shown = {plot.name: plot.svg for plot in plots.draw([alone, engine], [])}
    assert {"success_against_budget", "success_by_depth"} <= shown.keys()
    assert plots._policy_name({0: alone, 1: engine}).endswith(NAME)


@pytest.mark.parametrize("changes, says", [
    ({"wm_model": "/no/such/model"}, "--wm_backend engine imagines in the game itself and asks no world model"),
    ({"method": "mpc", "disable_wm": 1}, "nothing without its world model"),
])
def test_what_contradicts_it_is_refused(base: AlfworldSettings, tmp_path: Path, changes: dict[str, Any],
                                        says: str) -> None:
    with pytest.raises(UserError, match=says):
        asyncio.run(evaluate(dataclasses.replace(base, out_dir=str(tmp_path / "out"), **changes)))
    assert not (tmp_path / "out").exists()


def test_a_server_of_the_policy_is_no_hindrance(base: AlfworldSettings) -> None:
    served = dataclasses.replace(base, policy_backend="openai", policy_api_base_url="http://127.0.0.1:1/v1",
                                 action_selection="generate")
    assert make_plan(served).imagines_in_engine and make_plan(served).wm_server is None


def test_scienceworld(tmp_path: Path) -> None:
    from itp.training.from_scratch.learned_tokenizer import learn_tokenizer

    text = "Action: look around\nObservation: This room is called the hallway. In it, you see: \n  \tthe agent\n"
    policy = write_tiny_model(tmp_path / "policy", made=learn_tokenizer([text] * 8))
    settings = SciworldSettings(
        policy_model=str(policy), wm_backend="engine", out_dir=str(tmp_path / "out"),
        pairs="find-plant:298", max_steps_override=3, fixed_k=1, act_tokens=12, prompt_style="tuned",
        action_selection="constrained", policy_device="cpu", concurrency=1, env_processes=1)
    asyncio.run(evaluate(settings))
    env = ScienceworldEnv()
    try:
        imagined = check_by_replay(env, *settings.games(), results.read_episodes(tmp_path / "out")[0])
        assert len(imagined) == 3
    finally:
        env.close()
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["world_model"] == NAME
