"""On the real engine with tiny models: what a method does, doesn't depend on how many episodes run at once."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest

from foresight_eval import results
from foresight_eval.runner import evaluate
from foresight_eval.settings import AlfworldSettings
from itp.envs.alfworld.env import AlfworldEnv
from itp.envs.alfworld.games import list_games
from itp.envs.pool import EnvPool
from itp.errors import UserError
from itp.lm.local import LocalLM
from itp.lm.scheduler import BatchBarrier
from itp.methods.registry import METHODS
from itp.methods.settings import WRITE_THOUGHTS
from itp.plan import make_plan
from itp.rollout import run_episodes
from itp.text.prompts import NO, YES
from tests.rl_runs import write_models
from tests.test_evaluation import timeless
from tests.tiny import write_tiny_model

Records = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, games_root: Path) -> AlfworldSettings:
    """Small budgets: two steps of four games, drawn at temperature .8."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "heads").mkdir()
    critic, _ = write_models(folder / "heads", games_root)
    return AlfworldSettings(
        critic_model=str(critic), out_dir="",
        policy_model=str(write_tiny_model(folder / "policy", seed=0, words=(YES, NO))),
        wm_model=str(write_tiny_model(folder / "wm", seed=1)), env_data_root=str(games_root), split="train",
        only_ids="0,1,2,3", max_steps=2, max_k=2, act_tokens=8, wm_max_new_tokens=8, rap_wm_pred_tokens=8,
        rap_action_gen_tokens=6, prompt_style="tuned", wm_prompt_style="tuned", device="cpu", env_processes=1,
        candidates=3, rounds=2, belief_samples=3, rap_d_actions=3, rap_depth_limit=3, rap_num_rollouts=5,
        temperature=0.8, foresight_format="full", history_keep_steps=0)


@pytest.fixture(scope="module")
def played(base: AlfworldSettings) -> dict[tuple[str, int], Records]:
    """What every method did in the games, one at a time and all at once, by (method, concurrency)."""
    games = list_games("train", base.env_data_root)[:4]

    async def play_all() -> dict[tuple[str, int], Records]:
        barrier, found = BatchBarrier(), {}
        policy_lm = LocalLM.load(base.policy_model, barrier=barrier)
        wm_lm = LocalLM.load(base.wm_model, barrier=barrier, role="world_model")
        async with EnvPool(functools.partial(AlfworldEnv, want_admissible=True), 1) as pool:
            for name in METHODS:
                selection = "generate" if name in WRITE_THOUGHTS else "constrained"
                settings = dataclasses.replace(base, method=name, action_selection=selection)
                plan = make_plan(settings)
                method = plan.build_method(plan.load_policy(barrier, lm=policy_lm),
                                           plan.load_world_model(barrier, lm=wm_lm))
                for concurrency in (1, 4):
                    episodes = run_episodes(pool, method, games, max_steps=base.max_steps, seed=base.seed,
                                            concurrency=concurrency, barrier=barrier)
                    found[name, concurrency] = {
                        (i := games.index(e.game)): results.episode_record(i, e) async for e in episodes}
        await policy_lm.close()
        await wm_lm.close()
        return found

    return asyncio.run(play_all())


@pytest.mark.parametrize("method", METHODS)
def test_the_same_at_any_concurrency(played: dict[tuple[str, int], Records], method: str) -> None:
    alone, together = (timeless(played[method, concurrency]) for concurrency in (1, 4))
    for record in (*alone.values(), *together.values()):
        for step in record["foresight_steps"]:
            for valued in (step, *step["considered"]):  # whose last digits may depend on a batch's shape
                valued["value"] = None if valued["value"] is None else round(valued["value"], 4)
    assert together == alone and set(alone) == {0, 1, 2, 3}
    steps = [step for record in alone.values() for step in record["foresight_steps"]]
    assert len(steps) == 8 and all(step["usage"]["policy"]["calls"] for step in steps)
    assert len({step["action"] for step in steps}) > 1


def test_costs_are_in_the_summary(base: AlfworldSettings, tmp_path: Path) -> None:
    folder = tmp_path / "rap"
    asyncio.run(evaluate(dataclasses.replace(base, out_dir=str(folder), method="rap", only_ids="0,1")))
    records, cost = results.read_episodes(folder), json.loads((folder / "cost.json").read_text())
    steps = [step for record in records.values() for step in record["foresight_steps"]]
    for role in ("policy", "world_model"):
        spent = [step["usage"][role] for step in steps]
        for name in ("calls", "prompt_tokens", "completion_tokens", "cached_tokens", "seconds"):
            total = sum(usage[name] for usage in spent)
            assert cost[role][f"{name}_per_step"] == pytest.approx(total / len(steps)) != 0
            assert cost[role][f"{name}_per_episode"] == pytest.approx(total / 2)
        assert all(usage["seconds"] <= step["info"]["seconds"] + 1e-3
                   for usage, step in zip(spent, steps, strict=True))
    seconds = sorted(step["info"]["seconds"] for step in steps)
    assert seconds[0] <= cost["decision_seconds"]["p50"] <= cost["decision_seconds"]["p95"] <= seconds[-1]
    session, = (json.loads(line) for line in (folder / "timing.jsonl").read_text().splitlines())
    assert (session["episodes"], session["steps"]) == (2, len(steps))
    assert cost["episodes_per_hour"] == pytest.approx(2 / session["seconds"] * 3600)
    assert cost["peak_memory_bytes"] == session["peak_memory_bytes"] and session["peak_memory_bytes"]["cpu"] > 1e8


@pytest.mark.parametrize("changes, says", [
    ({"method": "rap", "wm_model": ""}, "--method rap needs --wm_model"),
    ({"method": "mpc", "disable_wm": 1}, "nothing without its world model"),
    ({"method": "tot", "max_k": 0}, "--max_k"),
    ({"method": "cot", "action_selection": "constrained"}, "--action_selection generate"),
])
def test_what_a_method_needs_is_checked_first(base: AlfworldSettings, tmp_path: Path, changes: dict,
                                              says: str) -> None:
    with pytest.raises(UserError, match=says):
        asyncio.run(evaluate(dataclasses.replace(base, out_dir=str(tmp_path / "out"), **changes)))
    assert not (tmp_path / "out").exists()


def test_a_policy_without_yes_and_no(base: AlfworldSettings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--method rap asks the policy for yes or no.*reasoning_share"):
        asyncio.run(evaluate(dataclasses.replace(base, out_dir=str(tmp_path / "out"), method="rap",
                                                 policy_model=base.wm_model)))
