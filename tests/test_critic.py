"""Critics: Q of a tree by hand, a known Q and a known order learned from text, and the methods that ask them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from itp.agent.imagination import ImaginedTrajectory
from itp.agent.policy import Policy
from itp.chat_template import template_of
from itp.envs.base import Observation
from itp.errors import UserError
from itp.games import Game
from itp.methods.armap import Armap
from itp.methods.base import Decision, View
from itp.methods.settings import MethodSettings
from itp.methods.step_q import StepQ
from itp.model_card import ModelCard
from itp.models import load_policy
from itp.pretrained import load_tokenizer
from itp.text.prompt_format import PLAIN
from itp.text.prompts import value_prompt
from itp.text.state import State
from itp.training.critic_data import CriticSettings, Preferred, Scored, pairs_of, read_examples, read_scored
from itp.training.explore import q_values
from itp.transitions import Transition, write_transitions
from tests.families import TEMPLATES
from tests.tiny import write_tiny_model
from tests.toy import ToyLM, unit

ROOM = "You are in the middle of a room. Looking quickly around you, you see a cabinet 1, a fridge 1, and a desk 2."
START = State("put a clean plate in fridge", ROOM)
GAME = Game("alfworld", "train", "toy/1", "toy", "")
TRAINING = {"lora_r": 0, "epochs": 40.0, "lr": 0.003, "batch_size": 16, "grad_accum": 1, "save_every_steps": 100000,
            "eval_share": 0.0, "warmup_ratio": 0.1, "logging_steps": 100000}


def test_q_of_a_tree_by_hand() -> None:
    """Three episodes that share their beginning: one solved after two steps, one after three, one failed."""
    s1 = START.after("go to cabinet 1", "x")
    solved, dead = s1.after("take plate 1", "y"), s1.after("look", "z")
    late = dead.after("take plate 1", "y")
    s2 = START.after("go to desk 2", "w")
    episodes = [
        ([(START, "go to cabinet 1"), (s1, "take plate 1")], solved, True),
        ([(s1, "look"), (dead, "take plate 1")], late, True),  # a branch at s1
        ([(START, "go to desk 2")], s2, False)]
    assert {(len(state.history), action): q for state, action, q in q_values(episodes, 0.9)} == {
        (1, "take plate 1"): 1.0, (2, "take plate 1"): 1.0, (1, "look"): pytest.approx(0.9),
        (0, "go to cabinet 1"): pytest.approx(0.9),  # the better of 1 and 0.9 behind it
        (0, "go to desk 2"): 0.0}


def trained(tmp_path: Path, file: Path, learn: str, **changes) -> Policy:
    from itp.training.critic_task import CriticTask
    from itp.training.run import open_run, train

    model = write_tiny_model(tmp_path / "model")
    settings = CriticSettings(train_jsonl=str(file), learn=learn, model_path=str(model),
                              out_dir=str(tmp_path / "out"), **TRAINING | changes)
    examples = read_examples(settings)
    assert not open_run(settings, [file])
    train(settings, CriticTask(settings, examples))
    return load_policy(str(settings.merged_path))


def test_a_critic_is_trained_on_the_prompts_that_are_wanted(tmp_path: Path) -> None:
    from itp.training.critic_task import CriticTask

    tokenizer = load_tokenizer(str(write_tiny_model(tmp_path)))
    ModelCard(template=PLAIN).write(tmp_path)
    tokenizer.chat_template = next(iter(TEMPLATES.values()))
    for form, template in (("auto", PLAIN), ("plain", PLAIN), ("chat", template_of(tokenizer))):
        settings = CriticSettings(train_jsonl="x", learn="q", model_path=str(tmp_path), out_dir="o", prompt_form=form)
        task = CriticTask(settings, [])
        assert task.prompt_format(tokenizer).template == template == task.card(tokenizer).template, form
    assert template != PLAIN


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_weight_that_is_trained_has_a_gradient(tmp_path: Path, tied: bool) -> None:
    """As several processes need it."""
    import torch
    from transformers import AutoModelForCausalLM

    from itp.training.critic_task import CriticTask

    folder = str(write_tiny_model(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(folder, tie_word_embeddings=tied)
    model.save_pretrained(folder)
    settings = CriticSettings(train_jsonl="x", learn="q", model_path=folder, out_dir="o", steps_per_sequence=1,
                              lora_r=0)
    task, tokenizer = CriticTask(settings, [Scored("g", *row) for row in known_q()]), load_tokenizer(folder)
    critic = task.load(tokenizer, torch.float32)
    torch.nn.init.ones_(critic.policy.heads.v_head.weight)  # at zero nothing below has one
    task.forward(critic, task.collator(0)(task.encode(tokenizer).rows))["loss"].backward()
    trained = {name: weight.grad for name, weight in critic.named_parameters() if weight.requires_grad}
    assert len(trained) > 15 and [name for name, grad in trained.items() if grad is None] == []
    assert critic.policy.causal_lm.get_input_embeddings().weight.requires_grad


def known_q() -> list[tuple[State, str, float]]:
    """What is worth something depends on state and action together: a place's worth times an action's."""
    worth = {"cabinet 1": 0.2, "fridge 1": 0.6, "desk 2": 1.0}
    return [(START.after(f"go to {place}", f"You arrive at {place}."), action, here * share)
            for place, here in worth.items() for action, share in (("look", 1.0), ("open", 0.5), ("inventory", 0.0))]


@pytest.mark.parametrize("together", [0, 1], ids=["packed", "one by one"])
def test_a_known_q_is_recovered(tmp_path: Path, together: int) -> None:
    file = tmp_path / "explored.jsonl"
    nodes = [{"state": state.render(), "action": action, "q": q} for state, action, q in known_q()]
    file.write_text(json.dumps({"game_id": "g", "nodes": nodes}) + "\n")
    assert set(read_scored(str(file))) == {Scored("g", *row) for row in known_q()}
    critic = trained(tmp_path, file, "q", steps_per_sequence=together, epochs=100.0)

    async def ask() -> list[float]:
        return list(await asyncio.gather(*(critic.value(state, action) for state, action, _ in known_q())))

    found = asyncio.run(ask())
    assert max(abs(value - q) for value, (_, _, q) in zip(found, known_q(), strict=True)) < 0.1, found


def trajectory(number: int, words: Sequence[str], solved: bool) -> list[Transition]:
    state, rows = START, []
    for t, action in enumerate(words):
        said = f"You arrive at {action.removeprefix('go to ')}."
        rows.append(Transition(f"game#{number}", t, state.render(), action, said, action, 0.0, t == len(words) - 1,
                               solved))
        state = state.after(action, said)
    return rows


def test_separable_trajectories_are_ranked_right(tmp_path: Path) -> None:
    good = [["go to desk 2", "go to fridge 1"], ["go to cabinet 1", "go to fridge 1"]]
    bad = [["go to fridge 1", "go to desk 2"], ["go to cabinet 1", "go to desk 2"]]
    rows = [row for i, words in enumerate([*good, *bad]) for row in trajectory(i, words, i < 2)]
    file = tmp_path / "transitions.jsonl"
    write_transitions(file, rows)
    critic = trained(tmp_path, file, "reward", steps_per_sequence=0, pairs_per_task=4, unfinished=2, epochs=120.0)

    def end(words: Sequence[str]) -> State:
        state = START
        for action in words:
            state = state.after(action, f"You arrive at {action.removeprefix('go to ')}.")
        return state

    async def ask(ends: Sequence[State]) -> list[float]:
        return list(await asyncio.gather(*map(critic.value, ends)))

    won, lost = asyncio.run(ask([end(w) for w in good])), asyncio.run(ask([end(w) for w in bad]))
    begun = asyncio.run(ask([end(w[:1]) for w in good]))
    assert min(won) > max(lost) and min(won) > max(begun)


def test_pairs_are_of_one_task_and_of_a_solved_one_with_its_beginnings() -> None:
    from itp.text.episodes import parse

    rows = [*trajectory(0, ["look", "go to desk 2"], True), *trajectory(1, ["go to fridge 1"], False)]
    settings = CriticSettings(train_jsonl="x", learn="reward", model_path="m", out_dir="o", unfinished=1)
    pairs = pairs_of([(t, parse(t.state)) for t in rows], settings)
    won = parse(rows[1].state).after("go to desk 2", "You arrive at desk 2.")
    assert pairs[0] == Preferred("game", won, START.after("go to fridge 1", "You arrive at fridge 1."))
    assert len(pairs) == 2 and pairs[1].better == won and len(pairs[1].worse.history) < 2
    with pytest.raises(UserError, match="no task has a solved episode"):
        pairs_of([(t, parse(t.state)) for t in rows[2:]], settings)


def test_step_q_takes_the_candidate_with_the_highest_q() -> None:
    lm = ToyLM("policy")
    view = View(GAME, 0, START, Observation(START.observation, START.task), 5)
    decision = asyncio.run(StepQ(Policy(lm), None, MethodSettings(candidates=6)).act(view))
    values = {action: value for action, value, _ in decision.considered}
    assert len(values) > 2
    assert values == {action: unit(value_prompt(START.render(), action=action)) for action in values}
    assert decision.action == max(values, key=values.__getitem__) and decision.value == max(values.values())


class Echo:
    """A world model whose answers say how far it is."""

    async def step(self, states: Sequence[State], actions: Sequence[str]) -> list[str]:
        return [f"step {len(state.history) + 1}" for state in states]


def test_armap_follows_the_best_trajectory_while_it_comes_as_imagined() -> None:
    method = Armap(Policy(ToyLM("policy")), Echo(), MethodSettings(candidates=4, armap_depth=3))
    view = View(GAME, 0, START, Observation(START.observation, START.task), 5)
    first = asyncio.run(method.act(view))
    plan, rewards = first.memory, [reward for _, reward, _ in first.considered]
    assert len(rewards) == 4 and max(rewards) == unit(value_prompt(plan.end.render())) and 1 <= len(plan.steps) <= 3
    assert all(unit(value_prompt(State(START.task, ROOM, plan.steps[:n]).render())) <= max(rewards)
               for n in range(1, len(plan.steps) + 1))

    def after(answer: str) -> View:
        state = START.after(first.action, answer)
        return View(GAME, 1, state, Observation(answer, START.task), 6, (first,))

    surprised = asyncio.run(method.act(after("something else")))
    assert len(surprised.considered) == 4  # a new plan
    if len(plan.steps) > 1:
        second = asyncio.run(method.act(after("step 1")))
        assert second.action == plan.steps[1][0] and not second.considered


def test_armap_executes_admissible_actions_only_where_they_are_chosen_among() -> None:
    policy = Policy(ToyLM("policy"), selection="constrained")
    method = Armap(policy, Echo(), MethodSettings(candidates=4, armap_depth=3))
    allowed = ("go to cabinet 1", "go to desk 2", "go to fridge 1")  # nothing that the toy writes freely

    def decision(state: State, past: tuple[Decision, ...] = ()) -> Decision:
        seen = Observation(state.observation, state.task, allowed)
        return asyncio.run(method.act(View(GAME, len(past), state, seen, 5 + len(past), past)))

    first = decision(START)
    assert {action for action, _, _ in first.considered} <= {*allowed} and len(first.considered) == 4
    assert len({action for action, _, _ in first.considered}) > 1
    plan = ImaginedTrajectory(START, ((first.action, "step 1"), ("take mug 1", "step 2")))
    second = decision(START.after(first.action, "step 1"), (replace(first, memory=plan),))
    assert second.action in allowed and len(second.considered) == 4  # a new plan
