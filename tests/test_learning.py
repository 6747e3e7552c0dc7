"""Small models really learn: a rule of acting from dialogues, and how far to look ahead from labels.

What is learned is asked for on states that no training saw, through the same functions as in an evaluation.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from foresight_eval.settings import AlfworldSettings
from itp.envs.base import Observation
from itp.games import Game
from itp.lm.scheduler import BatchBarrier
from itp.methods.base import View
from itp.models import load_policy
from itp.plan import make_plan
from itp.text.dialogues import episode_dialogue
from itp.text.state import State, parse
from itp.training.base_policy import BasePolicySettings, read_dialogues
from itp.training.from_scratch.base_lm import BaseLMSettings, write_initial
from itp.training.itp_r import warm_up
from itp.training.itp_r.warm_up_data import SftSettings
from itp.training.run import finetune
from itp.transitions import Transition

THINGS, PLACES = ("mug 1", "plate 1", "apple 1", "bread 1"), ("desk 1", "cabinet 1", "shelf 1", "drawer 1")
KMAX = 2


def episode(thing: str, other: str, first: str, second: str, goal: str, closed: bool) -> list[Transition]:
    """The rule: go to the first place, open it if it is closed, take what the task names, and bring it to its goal."""
    state = State(f"put a {thing.split()[0]} in {goal}.", "You are in the middle of a room. Looking quickly around "
                  f"you, you see a {first}, a {second}, and a {goal}.")
    seen = f"you see a {min(thing, other)}, and a {max(thing, other)}."
    steps = [(f"go to {first}", f"You arrive at {first}. " + (f"The {first} is closed." if closed
                                                              else f"On the {first}, {seen}"))]
    if closed:
        steps.append((f"open {first}", f"You open the {first}. The {first} is open. In it, {seen}"))
    steps += [(f"take {thing} from {first}", f"You pick up the {thing} from the {first}."),
              (f"go to {goal}", f"You arrive at {goal}. On the {goal}, you see nothing."),
              (f"move {thing} to {goal}", f"You move the {thing} to the {goal}.")]
    made = []
    for step, (action, observation) in enumerate(steps):
        name = f"{thing} {other} {first} {second} {goal} {closed}"
        made.append(Transition(name, step, state.render(), action, observation, expert_action=action))
        state = state.after(action, observation)
    return made


def split_episodes(train: int, unseen: int) -> tuple[list[list[Transition]], list[list[Transition]]]:
    """Different episodes, drawn from all that the rule has: those to learn from, and those that are asked about."""
    made = [episode(*things, *places, closed) for things in itertools.permutations(THINGS, 2)
            for places in itertools.permutations(PLACES, 3) for closed in (False, True)]
    random.Random(0).shuffle(made)
    return made[:train], made[train:train + unseen]


TRAIN, UNSEEN = split_episodes(96, 30)
STEPS = [step for steps in UNSEEN for step in steps]


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose tokenizer knows the words of the dialogues."""
    torch.set_num_threads(1)
    settings = BaseLMSettings(transitions="", out_dir="", hidden_size=64, num_layers=2, num_heads=4,
                              intermediate_size=128)
    folder = tmp_path_factory.mktemp("untrained")
    write_initial(settings, TRAIN, folder)
    return folder


@pytest.fixture(scope="module")
def learned(untrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after supervised fine-tuning."""
    folder = tmp_path_factory.mktemp("learned")
    (folder / "dialogues.json").write_text(json.dumps([episode_dialogue(steps) for steps in TRAIN]))
    settings = BasePolicySettings(model_path=str(untrained), out_dir=str(folder / "out"),
                                  train_json=str(folder / "dialogues.json"), epochs=25.0, batch_size=8, grad_accum=1,
                                  lr=6e-3, optimizer="muon", lora_r=0, eval_share=0.0, max_seq_len=512)
    finetune(settings, read_dialogues(settings.train_json))
    return settings.merged_path


async def actions(path: Path, steps: Sequence[Transition]) -> list[str]:
    """What the policy at ``path`` does, writing freely, in the state of each step."""
    policy = load_policy(str(path), style="tuned")
    choices = await asyncio.gather(*(policy.act(parse(step.state), None, seed=0) for step in steps))
    await policy.lm.close()
    return [choice.action for choice in choices]


def share_right(found: Sequence[str], steps: Sequence[Transition]) -> float:
    return sum(action == step.action for action, step in zip(found, steps, strict=True)) / len(steps)


@pytest.mark.asyncio
async def test_a_policy_learns_a_rule_from_dialogues(untrained: Path, learned: Path) -> None:
    assert share_right(await actions(untrained, STEPS), STEPS) < 0.05
    assert share_right(await actions(learned, STEPS), STEPS) > 0.9


# ---------------------------------------------------------------- the K-head


def k_label(state: str) -> int:
    """0 where something is in sight, 1 where something has just been picked up, 2 in front of a closed door."""
    observation = parse(state).observation
    return 2 if "is closed" in observation else 1 if "pick up" in observation else 0


def labeled_rows(steps: Sequence[Transition]) -> list[dict]:
    """The steps of an episode as stage 1 labels them; the imagined future is what really came."""
    rows = []
    for t, step in enumerate(steps):
        ahead = [(s.action, s.next_state) for s in steps[t:t + KMAX]]
        ahead += [("look", "Nothing happens.")] * (KMAX - len(ahead))
        rows.append({"episode_id": step.episode_id, "step": t, "state": step.state, "next_state": step.next_state,
                     "action": step.action, "k_label": k_label(step.state), "imagined": ahead})
    return rows


async def chosen_horizons(policy_path: Path, steps: Sequence[Transition], out: Path) -> list[int]:
    """K_t in the state of each step, as an evaluation with ``--k_policy head`` chooses it."""
    plan = make_plan(AlfworldSettings(policy_model=str(policy_path), wm_model=str(policy_path), out_dir=str(out),
                                      k_policy="head", device="cpu", policy_dtype="fp32"))
    assert plan.how_k == "head" and plan.method_settings.max_k == KMAX
    policy = plan.load_policy(BatchBarrier())
    method = plan.build_method(policy, None)
    states = [parse(step.state) for step in steps]
    horizons = await asyncio.gather(*(method.choose_horizon(
        View(Game("alfworld", "train", "game", "", ""), 0, state, Observation(state.observation, state.task), seed))
        for seed, state in enumerate(states)))
    await policy.lm.close()
    return [horizon.k for horizon in horizons]


@pytest.mark.asyncio
async def test_the_k_head_chooses_what_its_labels_taught(learned: Path, tmp_path: Path) -> None:
    rows = [row for steps in TRAIN for row in labeled_rows(steps)]
    (tmp_path / "labeled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = SftSettings(train_jsonl=str(tmp_path / "labeled.jsonl"), policy_model=str(learned),
                           out_dir=str(tmp_path / "out"), max_k=KMAX, epochs=6.0, batch_size=8, grad_accum=1, lr=2e-3,
                           lora_r=0, eval_share=0.0, steps_per_sequence=0, max_seq_len=512)
    warm_up.run(settings)
    labels = [k_label(step.state) for step in STEPS]
    assert set(labels) == {0, 1, 2}
    assert await chosen_horizons(settings.merged_path, STEPS, tmp_path / "eval") == labels
