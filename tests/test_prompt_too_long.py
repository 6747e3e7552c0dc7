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
from itp.lm.local import context_of
from itp.lm.openai import _says_too_long
from itp.model_card import ModelCard
from itp.models import load_policy, load_world_model
from itp.text.state import State
from itp.training.itp_r import label
from itp.training.itp_r.label_settings import LabelSettings
from itp.transitions import Transition, write_transitions
from tests.tiny import write_tiny_model
from world_model.fidelity import measure, measure_depth

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


# ---------------------------------------------------------------- the remedy, on the same folder


def test_labels_of_a_smaller_budget_are_made_again_where_it_cut(tmp_path: Path) -> None:
    model = str(write_tiny_model(tmp_path / "m"))
    ModelCard().write(model)
    short, long = State("put a plate in fridge", "You are in a room."), State("put a mug in desk 2", "You see.")
    for n in range(1, 9):
        long = long.after(f"go to cabinet {n}", "You arrive at cabinet 1. The cabinet 1 is closed.")
    write_transitions(tmp_path / "expert.jsonl", [
        Transition(name, 0, state.render(), "look", "You see.", expert_action="look")
        for name, state in (("a", short), ("b", long))])

    def labeled(out: str, max_seq_len: int) -> list[dict]:
        settings = LabelSettings(expert_jsonl=str(tmp_path / "expert.jsonl"), policy_model=model, wm_model=model,
                                 out_labeled_jsonl=str(tmp_path / out), max_k=1, wm_max_new_tokens=4,
                                 max_seq_len=max_seq_len, policy_device="cpu", wm_device="cpu")
        label.run(settings)
        return [json.loads(line) for line in (tmp_path / out).read_text().splitlines()]

    first = labeled("grown.jsonl", 80)
    assert [row["shortened"] > 0 for row in first] == [False, True]
    grown, fresh = labeled("grown.jsonl", 800), labeled("fresh.jsonl", 800)
    for row, other in zip(grown, fresh, strict=True):
        assert row["imagined"] == other["imagined"] and row["k_label"] == other["k_label"]
        assert row["logprobs"] == pytest.approx(other["logprobs"], abs=1e-4)
    assert first[1]["logprobs"] != pytest.approx(grown[1]["logprobs"], abs=1e-4)
    assert [row["shortened"] for row in grown] == [0, 0]
    assert {row["shown"]["max_seq_len"] for row in grown} == {800}
    with pytest.raises(UserError, match="max_seq_len: 800 there, 80 now"):
        labeled("grown.jsonl", 80)


def test_games_of_a_smaller_budget_are_played_again_where_it_cut(games_root: Path, tmp_path: Path) -> None:
    model = str(write_tiny_model(tmp_path / "m"))
    ModelCard().write(model)

    def played(out: str, max_seq_len: int) -> dict:
        asyncio.run(evaluate(AlfworldSettings(
            policy_model=model, out_dir=str(tmp_path / out), method="sft", split="train", max_seq_len=max_seq_len,
            env_data_root=str(games_root), max_steps=4, act_tokens=8, device="cpu", env_processes=1)))
        return {i: (record["meta"]["usage"]["policy"]["shortened"],
                    [step["action"] for step in record["foresight_steps"]])
                for i, record in read_episodes(tmp_path / out).items()}

    small = played("grown", 40)
    assert any(shortened for shortened, _ in small.values())
    with pytest.raises(UserError, match="seed: "):  # another run: nothing of this one is removed
        asyncio.run(evaluate(AlfworldSettings(
            policy_model=model, out_dir=str(tmp_path / "grown"), method="sft", split="train", max_seq_len=0, seed=5,
            env_data_root=str(games_root), max_steps=4, act_tokens=8, device="cpu", env_processes=1)))
    assert len(read_episodes(tmp_path / "grown")) == len(small)
    grown = played("grown", 0)  # as much as the context holds
    assert grown == played("fresh", 0) and not any(shortened for shortened, _ in grown.values())


# ---------------------------------------------------------------- where the context's length stands, and who says so


@pytest.mark.parametrize("kind, options, context", [
    ("llama", {"max_position_embeddings": 64}, 64),
    ("gpt2", {"n_positions": 64}, 64),
    ("mpt", {"max_seq_len": 64}, 64),
    ("mistral", {"max_position_embeddings": 64, "sliding_window": 32}, 32),
    ("gemma3", {"text_config": {"max_position_embeddings": 64, "sliding_window": 4096}}, 64),
    ("bloom", {}, None),
])
def test_the_context_of_a_model_family(kind: str, options: dict, context: int | None) -> None:
    from transformers import AutoConfig

    assert context_of(AutoConfig.for_model(kind, **options)) == context


@pytest.mark.parametrize("status, said, too_long", [
    (400, "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens", True),
    (400, "the request exceeds the available context size, try increasing it", True),
    (400, "Your input exceeds the context window of this model", True),
    (413, "prompt is too long: 5000 tokens > 4096 maximum", True),
    (422, "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096", True),
    (400, "temperature must be positive", False),
    (500, "maximum context length", False),
])
def test_what_servers_say_of_long_prompts(status: int, said: str, too_long: bool) -> None:
    import httpx
    import openai

    answer = httpx.Response(status, request=httpx.Request("POST", "http://127.0.0.1"))
    assert _says_too_long(openai.APIStatusError("refused", response=answer, body={"message": said})) is too_long


def test_fidelity_leaves_such_rows_out(short_model: str) -> None:
    short, long = State("put a plate in fridge", "You are in a room."), State("put a plate", "You see a mug 2, " * 100)
    rows = [Transition(name, 0, state.render(), "look", "You see.") for name, state in (("a", short), ("b", long))]

    async def figures(chosen: list[Transition]) -> tuple[dict, dict]:
        world_model = load_world_model(short_model, max_new_tokens=4)
        try:
            return await measure(world_model, chosen), await measure_depth(world_model, [[t] for t in chosen])
        finally:
            await world_model.lm.close()

    both, alone = asyncio.run(figures(rows)), asyncio.run(figures(rows[:1]))
    assert both == alone and both[0]["all"]["n"] == both[1][1]["n"] == 1
    with pytest.raises(PromptTooLong):
        asyncio.run(figures(rows[1:]))


def test_a_rollout_ends_where_the_context_does(short_model: str) -> None:
    state = State("put a plate in fridge", "You are in a room.")
    later = State("put a plate in fridge", "You see a mug 2, " * 15)
    window = [Transition("a", t, state.render(), "look", "You see.") for t in range(2)]

    class Growing:
        """A world model whose predictions are too long for its next prompt."""

        async def step(self, states: list[State], actions: list[str]) -> list[str]:
            if any(s.history for s in states):
                raise PromptTooLong("a prompt of 200 tokens")
            return [later.first] * len(states)

    assert list(asyncio.run(measure_depth(Growing(), [window]))) == [1]
