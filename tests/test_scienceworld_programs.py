"""Evaluation, report, labels and RL on ScienceWorld: the programs of ALFWorld by another environment's name."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from foresight_eval.results import read_episodes
from foresight_eval.runner import evaluate
from foresight_eval.settings import SciworldSettings
from foresight_eval.summary import summarize
from itp.errors import UserError
from itp.files import write_json
from itp.plan import make_plan
from itp.text.prompts import INSTRUCTION
from itp.text.state import State
from itp.training.from_scratch.learned_tokenizer import learn_tokenizer
from itp.training.itp_r import a2c
from itp.training.itp_r.a2c_settings import RlSettings
from itp.training.itp_r.label import LabelSettings
from itp.training.itp_r.warm_up_data import SftSettings
from tests.tiny import write_tiny_model
from world_model.fidelity import scienceworld_kind

TEXT = ("Task: Your task is to find a(n) plant.\nObservation: This room is called the hallway. In it, you see: \n"
        "  \tthe agent\nAction: go to greenhouse\nObservation: You move to the greenhouse.\n")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A random policy with heads and a random world model, with a tokenizer that knows every text."""
    import torch

    from itp.agent.policy_with_heads import PolicyWithHeads
    from itp.pretrained import load_causal_lm

    root = tmp_path_factory.mktemp("models")
    plain, world_model = (write_tiny_model(root / name, seed=seed, made=learn_tokenizer([TEXT] * 8))
                          for seed, name in enumerate(("plain", "world_model")))
    model, tokenizer = load_causal_lm(str(plain))
    policy = PolicyWithHeads.create(model, tokenizer, 2)
    torch.nn.init.normal_(policy.heads.k_head.weight, std=0.1)
    policy.save_pretrained(root / "policy", tokenizer)
    return str(root / "policy"), str(world_model)


def test_evaluation_writes_scores_and_chooses_among_hundreds_of_actions(models: tuple[str, str], tmp_path: Path,
                                                                        capsys: pytest.CaptureFixture) -> None:
    policy, world_model = models
    asyncio.run(evaluate(SciworldSettings(
        policy_model=policy, wm_model=world_model, out_dir=str(tmp_path), pairs="find-plant:298,find-plant:299",
        max_steps_override=2, k_policy="random", min_k=1, wm_max_new_tokens=8, act_tokens=8, prompt_style="tuned",
        wm_prompt_style="tuned", action_selection="constrained", policy_device="cpu", wm_device="cpu", concurrency=2,
        env_processes=1)))
    records = read_episodes(tmp_path)
    assert [r["meta"]["variation_idx"] for r in records.values()] == [298, 299]
    for index, record in records.items():
        meta, steps = record["meta"], record["foresight_steps"]
        assert (meta["episode_index"], meta["task_id"], meta["simplification"]) == (index, "find-plant", "easy")
        assert meta["best_score"] >= meta["score"] == max(0, meta["raw_score"]) == steps[-1]["score"]
        assert meta["terminate_reason"] in ("step_limit", "negative_score") and len(steps) <= 2
        assert all(1 <= step["k"] <= 2 and not step["completed"] for step in steps)
        # Commands of the game, which the random policy can't write.  The simulator lists some that it then refuses.
        assert all(step["action"].split(" ")[0] in INSTRUCTION["scienceworld"] for step in steps)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["buckets"] == ["find-plant"] and summary["overall_score"]["n"] == 2
    said = capsys.readouterr().out
    assert "score" in said and "find-plant" in said and "Pick2" not in said


def test_the_report_counts_scores_by_task(tmp_path: Path) -> None:
    rows = [("boil", 0, False, 30), ("boil", 100, True, 100), ("melt", 50, False, 60), ("melt", 70, False, 70)]
    for index, (task, score, success, best) in enumerate(rows):
        write_json(tmp_path / f"{index}.json", {"conversations": [], "foresight_steps": [], "meta": {
            "game_id": f"{task}/{index}", "split": "test", "task_type": task, "score": score, "reward": 0.0,
            "success": success, "best_score": best, "steps": 1, "usage": {}, "unparsed_actions": 0, "restarts": 0,
            "terminate_reason": "success" if success else "step_limit"}})
    summary = summarize(list(read_episodes(tmp_path).values()))
    assert summary["buckets"] == ["boil", "melt"] and summary["rates"] == {"boil": 0.5, "melt": 0.0}
    assert summary["scores"]["boil"]["score"] == 50 and summary["scores"]["boil"]["best_score"] == 65
    assert summary["overall_score"]["score"] == 55 and summary["endings"] == {"step_limit": 3, "success": 1}
    # Deviations -55, 45, -5, 15: variance 5300 / 3, standard error 21.02.
    assert summary["overall_score"]["interval"] == pytest.approx((55 - 41.20, 55 + 41.20), abs=0.01)


def test_horizons_of_scienceworld(models: tuple[str, str]) -> None:
    paths = {"policy_model": "p", "wm_model": "w", "expert_jsonl": "e", "out_labeled_jsonl": "o"}
    assert (LabelSettings(**paths).max_k, LabelSettings(**paths, env="scienceworld").max_k) == (5, 8)
    assert SftSettings(train_jsonl="t", policy_model="p", out_dir="o", env="scienceworld").max_k == 8
    assert SftSettings(train_jsonl="t", policy_model="p", out_dir="o", env="scienceworld", max_k=3).max_k == 3
    settings = {"policy_model": models[1], "wm_model": models[1], "out_dir": "o"}
    method_settings = make_plan(SciworldSettings(**settings)).method_settings
    assert (method_settings.max_k, method_settings.min_k) == (3, 0)
    with pytest.raises(UserError, match="--min_k 4"):
        make_plan(SciworldSettings(**settings, min_k=4))


def test_rl_plays_the_simulator(models: tuple[str, str], tmp_path: Path) -> None:
    policy, world_model = models
    a2c.run(RlSettings(
        env="scienceworld", pairs="find-plant:0,find-plant:1", max_steps_override=2, policy_model=policy,
        wm_model=world_model, out_dir=str(tmp_path), policy_device="cpu", wm_device="cpu", wm_max_new_tokens=6,
        action_max_new_tokens=6, imagine_action_max_new_tokens=6, episodes_per_epoch=2, episodes_per_update=2,
        num_envs=2, env_processes=1, lora_r=0, eval_every=0))
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["episodes"] == 2 and row["env_steps"] <= 4
    assert (tmp_path / "last").is_dir()


def test_kinds_of_actions() -> None:
    state = State("task", "first")
    assert scienceworld_kind(state, "look in fridge", "The fridge isn't open.") == "look in"
    assert scienceworld_kind(state, "pick up orange", "You move the orange to the inventory.") == "pick"
    assert scienceworld_kind(state, "fly", "No known action matches that input.") == "invalid"
