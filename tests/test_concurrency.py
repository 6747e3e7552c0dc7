"""On the real engine with tiny models: what a method does, doesn't depend on how many episodes run at once."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path

import pytest

from foresight_eval import results
from foresight_eval.methods.settings import METHODS, NEED_YES_OR_NO, WRITE_THOUGHTS
from foresight_eval.runner import evaluate
from foresight_eval.settings import AlfworldSettings
from itp.runtime import UserError
from itp.text.prompts import NO, YES
from tests.test_evaluation import timeless
from tests.tiny import write_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, games_root: Path) -> AlfworldSettings:
    """Small budgets: two steps of four games."""
    folder = tmp_path_factory.mktemp("models")
    return AlfworldSettings(
        policy_model=str(write_tiny_model(folder / "policy", seed=0, words=(YES, NO))), output_path="",
        wm_model=str(write_tiny_model(folder / "wm", seed=1)), env_data_root=str(games_root), split="train",
        only_ids="0,1,2,3", max_steps=2, max_k=2, act_tokens=8, foresight_tokens=8, rap_wm_pred_tokens=8,
        rap_action_gen_tokens=6, prompt_style="tuned", wm_prompt_style="tuned", device="cpu", env_processes=1,
        candidates=3, rounds=2, belief_samples=3, rap_d_actions=3, rap_depth_limit=3, rap_num_rollouts=5,
        temperature=0.8)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_at_any_concurrency(base: AlfworldSettings, tmp_path: Path, method: str) -> None:
    selection = "generate" if method in WRITE_THOUGHTS else "constrained"

    def run(concurrency: int) -> dict[int, dict]:
        folder = tmp_path / str(concurrency)
        asyncio.run(evaluate(dataclasses.replace(base, output_path=str(folder), method=method, concurrency=concurrency,
                                                 action_selection=selection)))
        return timeless(results.read_episodes(folder))

    alone, together = run(1), run(4)
    for records in (alone, together):
        for record in records.values():
            for step in record["foresight_steps"]:
                for tried in step["considered"]:
                    tried["value"] = round(tried["value"], 4)
    assert together == alone and len(alone) == 4

    cost = json.loads((tmp_path / "4" / "summary.json").read_text())["cost"]
    steps = [step for record in alone.values() for step in record["foresight_steps"]]
    for role in ("policy", "world_model"):
        spent = [step["usage"].get(role, {"calls": 0})["calls"] for step in steps]
        assert cost.get(role, {"calls_per_step": 0})["calls_per_step"] == pytest.approx(sum(spent) / len(steps))
    assert 0 < cost["decision_seconds"]["p50"] <= cost["decision_seconds"]["p95"] <= cost["decision_seconds"]["p99"]
    assert cost["episodes_per_hour"] > 0 and cost["peak_memory_bytes"]["cpu"] > 1e8


@pytest.mark.parametrize("changes, says", [
    ({"method": "rap", "wm_model": ""}, "--method rap needs --wm_model"),
    ({"method": "mpc", "disable_wm": 1}, "nothing without its world model"),
    ({"method": "tot", "max_k": 0}, "--max_k"),
    ({"method": "rap", "rap_num_rollouts": 0}, "--rap_num_rollouts 0: must be at least 1"),
    ({"method": "cot", "action_selection": "constrained"}, "--action_selection generate"),
])
def test_what_a_method_needs_is_checked_first(base: AlfworldSettings, tmp_path: Path, changes: dict,
                                              says: str) -> None:
    with pytest.raises(UserError, match=says):
        asyncio.run(evaluate(dataclasses.replace(base, output_path=str(tmp_path / "out"), **changes)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", NEED_YES_OR_NO)
def test_a_policy_without_yes_and_no(base: AlfworldSettings, tmp_path: Path, method: str) -> None:
    with pytest.raises(UserError, match=f"--method {method} asks the policy for yes or no.*reasoning_share"):
        asyncio.run(evaluate(dataclasses.replace(base, output_path=str(tmp_path / "out"), method=method,
                                                 policy_model=base.wm_model)))
