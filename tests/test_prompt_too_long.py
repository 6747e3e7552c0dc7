"""A prompt that no budget can shorten ends its own episode, or leaves out its own row, and nothing else."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from foresight_eval.results import read_episodes
from foresight_eval.runner import evaluate
from foresight_eval.settings import AlfworldSettings
from itp.agent.prompt_budget import PromptBudget
from itp.errors import PromptTooLong, UserError
from itp.files import read_json, write_json
from itp.lm.base import GenParams
from itp.model_card import ModelCard
from itp.models import load_policy
from itp.text.state import State
from itp.training.itp_r import label
from itp.training.itp_r.label_settings import LabelSettings
from itp.transitions import Transition, write_transitions
from tests.tiny import write_tiny_model

CONTEXT = 100


@pytest.fixture(scope="module")
def short_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose context holds CONTEXT tokens."""
    folder = write_tiny_model(tmp_path_factory.mktemp("short") / "m")
    write_json(folder / "config.json", read_json(folder / "config.json") | {"max_position_embeddings": CONTEXT})
    ModelCard().write(folder)
    return str(folder)


def test_the_others_of_a_batch_are_answered(short_model: str) -> None:
    async def ask() -> list:
        lm = load_policy(short_model).lm
        asked = [lm.generate([f"Task: {'go ' * n}\nAction:"], GenParams(max_new_tokens=4)) for n in (1, 200, 2)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        await lm.close()
        return answers

    first, second, third = asyncio.run(ask())
    assert len(first) == len(third) == 1
    assert isinstance(second, PromptTooLong) and f"its context of {CONTEXT}" in str(second)
    assert "\n" not in str(second)


def test_an_evaluation_ends_such_episodes_and_goes_on(short_model: str, games_root: Path, tmp_path: Path,
                                                      caplog: pytest.LogCaptureFixture) -> None:
    settings = AlfworldSettings(policy_model=short_model, out_dir=str(tmp_path), method="sft", split="train",
                                env_data_root=str(games_root), max_steps=2, act_tokens=CONTEXT - 1, device="cpu",
                                env_processes=1)
    asyncio.run(evaluate(settings))
    records = read_episodes(tmp_path)
    assert len(records) == 6
    assert {r["meta"]["terminate_reason"] for r in records.values()} == {"prompt_too_long"}
    assert not any(r["meta"]["success"] or r["foresight_steps"] for r in records.values())
    summary = read_json(tmp_path / "summary.json")
    assert summary["endings"] == {"prompt_too_long": 6} and summary["overall"]["rate"] == 0.0
    assert "6 episodes ended because a prompt was longer than the model's context" in caplog.text


def test_a_context_of_the_size_of_the_answer_is_a_limit() -> None:
    for context, limit in ((0, None), (100, 1), (101, 1), (200, 100)):
        assert PromptBudget(context=context).limit(100) == limit
    assert PromptBudget(max_tokens=50, context=200).limit(100) == 50


def test_stage_1_leaves_such_rows_out_and_labels_the_others(short_model: str, tmp_path: Path) -> None:
    short = State("put a plate in fridge", "You are in a room.")
    long = State("put a plate in fridge", "You see a mug 2, " * 100)
    write_transitions(tmp_path / "expert.jsonl", [
        Transition(name, 0, state.render(), "look", "You see.", expert_action="look")
        for name, state in (("a", short), ("b", long), ("c", short))])
    settings = LabelSettings(expert_jsonl=str(tmp_path / "expert.jsonl"), policy_model=short_model,
                             wm_model=short_model, out_labeled_jsonl=str(tmp_path / "labeled.jsonl"), max_k=1,
                             wm_max_new_tokens=4, policy_device="cpu", wm_device="cpu")
    label.run(settings)
    rows = [json.loads(line) for line in (tmp_path / "labeled.jsonl").read_text().splitlines()]
    assert [row["episode_id"] for row in rows] == ["a", "c"]
    assert read_json(tmp_path / "labeled.jsonl.run/summary.json")["skipped"] == 1


def test_stage_1_refuses_to_write_nothing(short_model: str, tmp_path: Path) -> None:
    long = State("put a plate in fridge", "You see a mug 2, " * 100)
    write_transitions(tmp_path / "expert.jsonl", [
        Transition("a", 0, long.render(), "look", "You see.", expert_action="look")])
    with pytest.raises(UserError, match="expert.jsonl: no row is left to label; .*a prompt of"):
        label.run(LabelSettings(expert_jsonl=str(tmp_path / "expert.jsonl"), policy_model=short_model,
                                wm_model=short_model, out_labeled_jsonl=str(tmp_path / "labeled.jsonl"), max_k=1,
                                wm_max_new_tokens=4, policy_device="cpu", wm_device="cpu"))
    assert not (tmp_path / "labeled.jsonl").exists()
