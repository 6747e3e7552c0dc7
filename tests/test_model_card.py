"""How a model is prompted goes with its rows and its checkpoint, and every stage, program and script follows it."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from foresight_eval.settings import AlfworldSettings
from itp.agent.imagination import ImaginedTrajectory
from itp.agent.policy import Policy
from itp.agent.prompt_budget import PromptBudget, prompt_tokens
from itp.agent.world_model import WorldModel
from itp.errors import UserError
from itp.files import write_json
from itp.lm.base import Usage, metered
from itp.lm.engine import Engine
from itp.lm.local import LocalLM
from itp.lm.scheduler import BatchBarrier
from itp.model_card import NOTHING_ON_RECORD, ModelCard, prompt_settings, recorded_settings, resolve, resolve_by_card
from itp.models import load_policy, load_world_model
from itp.plan import make_plan
from itp.pretrained import load_tokenizer
from itp.text.prompt_format import PromptTemplate
from itp.text.prompts import foresight_text
from itp.text.state import State
from itp.training.itp_r import warm_up as stage_2
from itp.training.itp_r.a2c_rollout import Player
from itp.training.itp_r.a2c_settings import RlSettings, checked
from itp.training.itp_r.expert_steps import ExpertStep
from itp.training.itp_r.label import load_labeler
from itp.training.itp_r.label_settings import LabelSettings
from itp.training.itp_r.warm_up_data import LabeledStep, SftSettings, as_labeled, read_labeled
from itp.training.itp_r.warm_up_task import WarmUpTask
from itp.transitions import Transition, write_transitions
from tests.tiny import write_tiny_model
from world_model import collect, fidelity
from world_model.base_tuning.examples import WorldModelSettings, examples_for

ROOT = Path(__file__).resolve().parents[1]
STATE = State("put a plate in fridge", "You are in a room.")
for _step in range(5):
    STATE = STATE.after(f"go to cabinet {_step}", "The cabinet is closed.")
IMAGINED = [["open cabinet 1", "In it, you see a plate 1."], ["take plate 1 from cabinet 1", "Nothing happens."]]
SHOWN = {"foresight_format": "last_obs", "history_keep_steps": 2}


def row(**changes) -> dict:
    return {"episode_id": "e", "step": 0, "state": STATE.render(), "action": "look", "next_state": "x", "k_label": 2,
            "imagined": IMAGINED, "shown": SHOWN} | changes


@pytest.fixture(scope="module")
def warm_up(tmp_path_factory: pytest.TempPathFactory) -> SftSettings:
    """Settings of a finished warm-up on rows that were labeled with ``SHOWN``, its flags left open."""
    root = tmp_path_factory.mktemp("shown")
    (root / "rows.jsonl").write_text("".join(json.dumps(row(episode_id=f"e{i}")) + "\n" for i in range(4)))
    plain = write_tiny_model(root / "plain")
    ModelCard().write(plain)
    settings = SftSettings(train_jsonl=str(root / "rows.jsonl"), out_dir=str(root / "out"), max_k=2, lora_r=0,
                           policy_model=str(plain), epochs=1.0, max_seq_len=400)
    stage_2.run(settings)
    return settings


# ---------------------------------------------------------------- the card


def test_a_card_is_written_and_read(tmp_path: Path) -> None:
    card = ModelCard("instruct", PromptTemplate("<u>", "<a>"), True, "last_obs", 4, 900, "not for reports", 7)
    card.write(tmp_path)
    assert ModelCard.read(tmp_path) == card
    assert ModelCard.read("") is None and ModelCard.read(tmp_path / "elsewhere") is None


def test_cards_of_earlier_versions_are_read(tmp_path: Path) -> None:
    write_json(tmp_path / "itp_model.json", {"prompt_style": "tuned", "turns": {"head": "<u>", "tail": "<a>"},
                                             "foresight_format": "full", "history_keep_steps": 0, "update": 3})
    assert ModelCard.read(tmp_path) == ModelCard("tuned", PromptTemplate("<u>", "<a>"), False, "full", 0, update=3)


def test_a_policy_that_acted_behind_the_control_token_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "itp_model.json", {"prompt_style": "tuned", "control": True})
    with pytest.raises(UserError, match=r"itp_model.json: this policy learned to act with <CTRL> .*stage 2"):
        ModelCard.read(tmp_path)


def test_a_hub_name_keeps_heads_and_card(tmp_path: Path) -> None:
    """In the hub's cache, without network: the files that tell how a model is prompted are found there."""
    snapshot = tmp_path / "models--me--policy" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--me--policy" / "refs").mkdir()
    (tmp_path / "models--me--policy" / "refs" / "main").write_text("0123abc")
    for name, content in (("config.json", {}), ("policy_heads.json", {"kmax": 4, "hidden_size": 8}),
                          ("itp_model.json", {"prompt_style": "tuned"} | SHOWN)):
        write_json(snapshot / name, content)
    code = ("from itp.agent.heads import has_heads, kmax_of\n"
            "from itp.pretrained import check_model_path, model_fingerprint\n"
            "from itp.model_card import ModelCard\n"
            "check_model_path('me/policy')\n"
            "print(has_heads('me/policy'), kmax_of('me/policy'), model_fingerprint('me/policy'),"
            " ModelCard.read('me/policy').foresight_format)")
    said = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=False,
                          env=os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert said.stdout == "True 4 me/policy@0123abc last_obs\n", said.stderr


def test_nothing_but_the_factories_constructs_a_policy_or_a_world_model() -> None:
    found = set()
    for folder in ("itp", "world_model", "foresight_eval", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Policy", "WorldModel"):
                    found.add(str(path.relative_to(ROOT)))
    assert found == {"itp/models.py"}


# ---------------------------------------------------------------- history and format, from stage to stage


def test_every_stage_and_evaluation_show_the_same(warm_up: SftSettings) -> None:
    policy = str(warm_up.merged_path)
    assert recorded_settings(policy) == SHOWN | {"max_seq_len": 400}
    rl = checked(RlSettings(policy_model=policy, out_dir="", fixed_k=0, report_to="none"))
    plan = make_plan(AlfworldSettings(policy_model=policy, out_dir="", method="sft"))
    assert prompt_settings(rl) == prompt_settings(plan.settings) == SHOWN | {"max_seq_len": 400}
    lm = load_policy(policy).lm

    trained = read_labeled(as_labeled(warm_up))[0]
    assert trained.foresight == foresight_text([tuple(pair) for pair in IMAGINED], "last_obs")
    assert trained.state.omitted == 3
    for acting in (Player(rl, lm, None, BatchBarrier()).policy, plan.load_policy(BatchBarrier(), lm=lm)):
        assert acting.foresight_format == "last_obs"
        assert acting.action_prompt(STATE) == acting.action_prompt(trained.state)
        assert "[3 earlier steps omitted]" in acting.action_prompt(STATE)


def test_a_contradiction_is_refused(warm_up: SftSettings, tmp_path: Path) -> None:
    policy = str(warm_up.merged_path)
    with pytest.raises(UserError, match="--foresight_format full, but .* was made with last_obs"):
        make_plan(AlfworldSettings(policy_model=policy, out_dir="", method="sft", foresight_format="full"))
    with pytest.raises(UserError, match="--history_keep_steps 6"):
        checked(RlSettings(policy_model=policy, out_dir="", history_keep_steps=6, fixed_k=0, report_to="none"))
    with pytest.raises(UserError, match="--history_keep_steps 3, but .*rows.jsonl was made with 2"):
        as_labeled(dataclasses.replace(warm_up, history_keep_steps=3))
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(json.dumps(row()) + "\n" + json.dumps(row(shown=SHOWN | {"history_keep_steps": 0})) + "\n")
    with pytest.raises(UserError, match="mixed.jsonl:2: labeled with"):
        read_labeled(as_labeled(dataclasses.replace(warm_up, train_jsonl=str(mixed))))


def test_another_budget_is_no_contradiction(warm_up: SftSettings) -> None:
    plan = make_plan(AlfworldSettings(policy_model=str(warm_up.merged_path), out_dir="", method="sft",
                                      max_seq_len=500))
    assert plan.settings.max_seq_len == 500


def test_where_nothing_is_on_record(tmp_path: Path) -> None:
    settings = AlfworldSettings(policy_model=str(tmp_path), out_dir="")
    assert prompt_settings(resolve_by_card(settings, str(tmp_path))) == NOTHING_ON_RECORD
    own = dataclasses.replace(settings, foresight_format="last_obs", history_keep_steps=4, max_seq_len=99)
    assert resolve_by_card(own, str(tmp_path)) == own
    rl = resolve(RlSettings(policy_model="", out_dir=""), {}, "x", {"foresight_format": "full", "max_seq_len": 7,
                                                                        "history_keep_steps": 6})
    assert (rl.history_keep_steps, rl.max_seq_len) == (6, 7)


# ---------------------------------------------------------------- the world model follows its own card


@pytest.fixture(scope="module")
def world_model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A world model whose card asks for other things than any policy's."""
    folder = write_tiny_model(tmp_path_factory.mktemp("world_model") / "m", seed=1)
    ModelCard(template=PromptTemplate("<u>\n", "\n<a>\n"), history_keep_steps=3, max_seq_len=900).write(folder)
    return str(folder)


def bench_module():
    """scripts/bench.py, which isn't in a package."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        spec = importlib.util.spec_from_file_location("bench", ROOT / "scripts/bench.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["bench"] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def test_the_world_model_is_prompted_alike_by_every_program(warm_up: SftSettings, world_model_path: str,
                                                            tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy's card has another history (2 steps) than the world model's (3), and another template."""
    policy_path = str(warm_up.merged_path)
    made: dict[str, WorldModel] = {}
    lm = load_world_model(world_model_path).lm

    plan = make_plan(AlfworldSettings(policy_model=policy_path, wm_model=world_model_path, out_dir=""))
    made["evaluation"] = plan.load_world_model(BatchBarrier(), lm=lm)
    made["labels"] = load_labeler(
        LabelSettings(expert_jsonl="", policy_model=policy_path, wm_model=world_model_path, max_k=2,
                      out_labeled_jsonl="", foresight_format="last_obs", history_keep_steps=2, max_seq_len=400,
                      policy_device="cpu", wm_device="cpu"), (0, 1, 2), BatchBarrier(), {}).world_model
    write_transitions(tmp_path / "t.jsonl", [Transition("e", 0, STATE.render(), "look", "x")])

    async def no_figures(world_model: WorldModel, *args) -> dict:
        made["fidelity"] = world_model
        return {}

    monkeypatch.setattr(fidelity, "measure", no_figures)
    asyncio.run(fidelity.judge(fidelity.FidelitySettings(wm_model=world_model_path, transitions="", device="cpu",
                                                         max_depth=0), world_model_path, {"expert": []}))
    bench = bench_module()
    settings = bench.BenchSettings(policy_model=policy_path, wm_model=world_model_path, heads_model=policy_path,
                                   env_data_root="", fixed_k=1)
    lms = {"policy": load_policy(policy_path).lm, "world_model": lm}
    made["bench"] = bench.planner(settings, lms, "foresight").world_model
    made["bench, stage 3"] = bench.rl_actor(settings, lms).world_model

    prompts = {name: model.prompt(STATE, "open cabinet 1") for name, model in made.items()}
    assert len(prompts) == 5 and len(set(prompts.values())) == 1, prompts
    prompt = prompts["fidelity"]
    assert prompt.startswith("<u>\nTask:") and prompt.endswith("\nAction: open cabinet 1\n<a>\nObservation:")
    assert "[2 earlier steps omitted]" in prompt
    assert {model.budget.max_tokens for model in made.values()} == {prompt_tokens(900, "observation", "alfworld")}


# ---------------------------------------------------------------- prompts beyond the budget


LONG = State("put a plate in fridge", "You are in a room.")
for _step in range(40):
    LONG = LONG.after(f"go to cabinet {_step}", f"You arrive at cabinet {_step}. The cabinet {_step} is closed.")
FUTURE = (("open cabinet 1", "In it, you see a plate 1, and a mug 2."),
          ("take plate 1 from cabinet 1", "You pick up the plate 1 from the cabinet 1."))
FORESIGHT = foresight_text(FUTURE)
BUDGET = 300


@pytest.fixture(scope="module")
def budgeted(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[LabeledStep]]:
    """A policy with heads that stage 2 trained within BUDGET on steps beyond it, and these steps."""
    root = tmp_path_factory.mktemp("budget")
    base = write_tiny_model(root / "base")
    ModelCard(max_seq_len=BUDGET).write(base)
    imagined = [list(pair) for pair in FUTURE]
    shown = {"foresight_format": "full", "history_keep_steps": 0, "max_seq_len": BUDGET}
    rows = [row(episode_id=f"e{k}", state=LONG.render(), k_label=k, imagined=imagined, shown=shown) for k in (0, 2, 2)]
    (root / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = SftSettings(train_jsonl=str(root / "rows.jsonl"), out_dir=str(root / "out"), max_k=2, lora_r=0,
                           policy_model=str(base), epochs=1.0, eval_share=0.0)
    stage_2.run(settings)
    settings = as_labeled(dataclasses.replace(settings, model_path=str(base)))
    return str(settings.merged_path), read_labeled(settings)


def seen_by_the_engine(monkeypatch: pytest.MonkeyPatch, call: str) -> list[tuple[int, ...]]:
    """The token ids of the prompts that reach an engine from here on."""
    ids: list[tuple[int, ...]] = []
    real = getattr(Engine, call)

    def caught(engine: Engine, requests: list) -> list:
        ids.extend(tuple(r.ids if call == "generate" else r[0] if call == "score" else r) for r in requests)
        return real(engine, requests)

    monkeypatch.setattr(Engine, call, caught)
    return ids


@pytest.mark.parametrize("k", [0, 2])
def test_a_long_history_is_cut_alike_in_training_and_everywhere_else(
        budgeted: tuple[str, list[LabeledStep]], k: int, world_model_path: str,
        monkeypatch: pytest.MonkeyPatch) -> None:
    path, steps = budgeted
    step = next(s for s in steps if s.k == k)
    tokenizer = load_tokenizer(path)
    task = WarmUpTask(SftSettings(train_jsonl="", policy_model="", out_dir="", model_path=path, max_k=2,
                                  foresight_format="full", history_keep_steps=0, max_seq_len=BUDGET), [step])
    trained, = task._tokens(tokenizer, dict.fromkeys(("examples", "cut", "lost_tokens", "too_long"), 0))
    limit = prompt_tokens(BUDGET, "action", "alfworld")
    assert len(trained.prompt) <= limit < len(tokenizer(LONG.render())["input_ids"])

    lm = load_policy(path).lm
    evaluation = make_plan(AlfworldSettings(policy_model=path, out_dir="", method="sft")).load_policy(
        BatchBarrier(), lm=lm)
    rl = checked(RlSettings(policy_model=path, out_dir="", fixed_k=0, report_to="none"))
    collected = collect._policy(collect.CollectSettings(out_dir="", policy_device="cpu"), path, BatchBarrier()).policy
    acting = {"evaluation": evaluation, "stage 3": Player(rl, lm, None, BatchBarrier()).policy, "collection": collected}
    prompts, heads = seen_by_the_engine(monkeypatch, "generate"), seen_by_the_engine(monkeypatch, "read_heads")
    for policy in acting.values():
        asyncio.run(policy.act(LONG, None, 0, foresight=step.foresight))
        asyncio.run(policy.read_heads(LONG))
    assert len(prompts) == len(heads) == 3
    assert set(prompts) == {tuple(trained.prompt)}
    assert set(heads) == {tuple(trained.heads_prompt)}

    # Stage 1 scores the labeled action behind the very same prompt.
    settings = LabelSettings(expert_jsonl="", policy_model=path, wm_model=world_model_path, max_k=2,
                             out_labeled_jsonl="", foresight_format="full", history_keep_steps=0, max_seq_len=BUDGET,
                             policy_device="cpu", wm_device="cpu")
    scored = seen_by_the_engine(monkeypatch, "score")
    labeler = load_labeler(settings, (0, 1, 2), BatchBarrier(), {})
    trajectory = ImaginedTrajectory(LONG, FUTURE)
    asyncio.run(labeler._score(ExpertStep(0, "x", Transition("e", 0, "", "look", "x"), LONG, ()), trajectory,
                               (0, 1, 2), " look\n"))
    assert tuple(trained.prompt) in scored and len(scored) == 3


def test_the_heads_may_read_more_history_than_the_action_has(budgeted: tuple[str, list[LabeledStep]]) -> None:
    path, steps = budgeted
    policy = load_policy(path)
    state, control = policy.heads_prompt(LONG).rsplit("\n", 1)
    assert control == "<CTRL>" and policy.action_prompt(LONG).startswith(state)
    assert not policy.action_prompt(LONG, foresight=FORESIGHT).startswith(state)


def test_a_world_model_is_prompted_as_it_was_trained_beyond_the_budget(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "wm")
    ModelCard(max_seq_len=BUDGET).write(folder)
    settings = WorldModelSettings(model_path=str(folder), out_dir="", data_path="", max_seq_len=BUDGET)
    tokenizer = load_tokenizer(str(folder))
    example, = examples_for(settings, tokenizer, [Transition("e", 0, LONG.render(), "look", "You see a mug 1.")])
    world_model = load_world_model(str(folder), max_new_tokens=12)
    assert world_model.prompt(LONG, "look") == example.segments[0][0]
    assert "earlier steps omitted" in example.segments[0][0]


def test_shortened_prompts_are_counted(budgeted: tuple[str, list[LabeledStep]]) -> None:
    policy = load_policy(budgeted[0])

    async def act() -> dict[str, Usage]:
        with metered() as usage:
            await policy.act(LONG, None, 0)
            await policy.act(STATE, None, 0)
        return usage

    assert asyncio.run(act())["policy"].shortened == 1


def test_what_a_budget_keeps() -> None:
    """Every prompt keeps task, first and current observation; a budget too small for these is exceeded."""
    def count(text: str) -> int:
        return len(text.split("\n"))

    for limit in range(1, 90):
        text = PromptBudget(limit, count=count).prompt(LONG, lambda s: f"{s.render()}\n<CTRL>\nAction:", 1)
        first, second, *_ = text.split("\n")
        assert (first, second) == ("Task: put a plate in fridge", "Observation: You are in a room.")
        assert "You arrive at cabinet 39." in text and text.endswith("\n<CTRL>\nAction:")
        assert count(text) == (84 if limit >= 84 else max(7, limit - (limit - 5) % 2))
    assert PromptBudget(count=count).prompt(LONG, State.render, 1) == LONG.render()
    assert PromptBudget(5).prompt(LONG, State.render, 1) == LONG.render()  # nobody can count


def test_an_lm_says_what_its_context_holds(tmp_path: Path) -> None:
    policy = load_policy(str(write_tiny_model(tmp_path / "m")), action_tokens=100)
    assert isinstance(policy, Policy) and isinstance(policy.lm, LocalLM)
    assert policy.budget.limit(100) == policy.lm.context_length - 100
