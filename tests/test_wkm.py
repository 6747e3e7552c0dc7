"""WKM: retrieval, task knowledge and the mixture, each against values by hand."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from pathlib import Path

import pytest

from itp.agent.policy import Policy
from itp.envs.base import Observation
from itp.errors import UserError
from itp.games import Game
from itp.methods.base import View
from itp.methods.knowledge import (
    Knowledge, action_with_roles, features_of, learned, read_knowledge, similarity, task_with_roles, with_names,
)
from itp.methods.settings import MethodSettings
from itp.methods.wkm import Wkm, knowledge_shares, mixture
from itp.text.prompts import action_target, policy_prompt
from itp.text.state import State
from itp.transitions import Transition, write_transitions
from tests.toy import ToyLM, unit
from world_model import knowledge as program

ROOM = "You are in the middle of a room. Looking quickly around you, you see a desk 1, a shelf 1, and a shelf 2."
START = State("Put a hot mug in shelf.", ROOM)
AT_DESK = START.after("go to desk 1", "You arrive at desk 1. On the desk 1, you see a mug 3, and a pen 2.")


def test_states_and_actions_are_written_with_roles() -> None:
    assert task_with_roles(START.task) == "put a hot <1> in <2>"
    assert features_of(START) == {"task put a hot <1> in <2>", "at -", "held nothing"}
    assert features_of(AT_DESK) == {"task put a hot <1> in <2>", "at desk", "held nothing", "here <1>", "seen <1>",
                                    "after go to desk, new"}
    assert action_with_roles(AT_DESK, "take mug 3 from desk 1") == "take <1> from desk"
    assert action_with_roles(AT_DESK, "go to desk 1") == "go to desk, seen"
    assert action_with_roles(AT_DESK, "go to shelf 2") == "go to <2>, new"
    held = AT_DESK.after("take mug 3 from desk 1", "You pick up the mug 3 from the desk 1.")
    assert "held <1>" in features_of(held) and "here <1>" not in features_of(held)


def test_the_most_similar_states_say_what_comes_next() -> None:
    near, far = frozenset("abc"), frozenset("xyz")
    assert similarity(near, frozenset("abd")) == pytest.approx(2 / 4) and similarity(near, far) == 0
    base = Knowledge(((far, "look", 9), (near, "take", 3), (frozenset("abd"), "open", 4)))
    assert base.next_actions(near, 3) == {"take": 3}
    assert base.next_actions(near, 5) == {"take": 3, "open": 2}  # two of the four are among the five nearest
    assert base.next_actions(near, 10) == {"take": 3, "open": 4, "look": 3}


def test_knowledge_is_shared_out_among_what_it_stands_for() -> None:
    """Known: 3 times a shelf, once the desk, 4 times what isn't admissible here."""
    entry = features_of(START)
    base = Knowledge((
        (entry, "go to <2>, new", 3), (entry, "go to desk, new", 1), (entry, "heat <1> with microwave", 4)))
    actions = ["go to shelf 1", "go to shelf 2", "go to desk 1", "look"]
    assert knowledge_shares(base, START, actions, 8) == {
        "go to shelf 1": pytest.approx(0.375), "go to shelf 2": pytest.approx(0.375),
        "go to desk 1": pytest.approx(0.25), "look": 0.0}
    assert knowledge_shares(base, START, ["look"], 8) == {} == knowledge_shares(Knowledge(), START, actions, 8)


def test_the_mixture_by_hand() -> None:
    agent, know = {"a": 0.6, "b": 0.3, "c": 0.1}, {"b": 0.5, "c": 0.5}
    assert mixture(agent, know, 0.4) == {"a": pytest.approx(0.24), "b": pytest.approx(0.42), "c": pytest.approx(0.34)}
    assert mixture(agent, know, 1.0) == pytest.approx(agent) and mixture(agent, {}, 0.0) == agent


def view(state: State, actions: list[str]) -> View:
    return View(Game("alfworld", "train", "toy", "toy", ""), len(state.history), state,
                Observation(state.observation, state.task, tuple(actions)), 5)


def test_the_method_mixes_policy_and_knowledge(tmp_path: Path) -> None:
    actions = ["go to shelf 1", "go to desk 1", "look", "inventory"]
    lm = ToyLM("policy")
    prompt = policy_prompt(START.render())
    weights = {a: math.exp(-4 * unit(prompt, action_target(a).strip())) for a in actions}
    agent = {a: w / sum(weights.values()) for a, w in weights.items()}
    rare = min(agent, key=agent.__getitem__)
    base = Knowledge(((features_of(START), action_with_roles(START, rare), 2),))
    file = tmp_path / "knowledge.json"
    file.write_text(json.dumps(base.to_json()))
    policy = Policy(lm, selection="constrained")

    def decide(**changes):
        return asyncio.run(Wkm(policy, None, MethodSettings(wkm_base=str(file), **changes)).act(view(START, actions)))

    mixed = decide(wkm_gamma=0.5)
    assert {action: p for action, p, _ in mixed.considered} == pytest.approx(
        {a: 0.5 * p + 0.5 * (a == rare) for a, p in agent.items()})
    assert mixed.action == rare and decide(wkm_gamma=1.0).action == max(agent, key=agent.__getitem__)


def test_task_knowledge_contrasts_solved_and_failed() -> None:
    def steps(*actions: str) -> list[tuple[State, str]]:
        return [(START, action) for action in actions]

    solved = [steps("go to desk 1", "take mug 3 from desk 1", "move mug 3 to shelf 1"),
              steps("take mug 3 from desk 1", "look", "look", "look", "move mug 3 to shelf 1")]
    failed = [steps("inventory", "inventory", "inventory", "take mug 3 from desk 1")]
    knowledge = learned([*((s, True) for s in solved), *((s, False) for s in failed)])
    told = ("Solved in 4 steps by: take <1> from desk, move <1> to <2>. A failed attempt does this 3 times more than "
            "a solved one: inventory.")
    assert knowledge.tasks == {"put a hot <1> in <2>": told}
    assert with_names(told, START.task).startswith("Solved in 4 steps by: take mug from desk, move mug to shelf.")
    assert {(action, n) for _, action, n in knowledge.entries} >= {("take <1> from desk", 2), ("look", 3)}
    assert not any(action == "inventory" for _, action, _ in knowledge.entries)  # of failed attempts


def test_the_program_writes_what_the_method_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Transition("g#0", 0, START.render(), "go to desk 1", AT_DESK.observation, "go to desk 1"),
            Transition("g#0", 1, AT_DESK.render(), "take mug 3 from desk 1", "You pick up the mug 3 from the desk 1.",
                       "take mug 3 from desk 1", done=True, success=True)]
    file, out = tmp_path / "t.jsonl", tmp_path / "k.json"
    write_transitions(file, rows)
    monkeypatch.setattr(sys, "argv", ["knowledge", "--transitions", str(file), "--out_json", str(out)])
    program.main()
    assert "1 solved and 0 failed episodes: 2 states" in capsys.readouterr().out
    assert read_knowledge(str(out)).next_actions(features_of(AT_DESK), 1) == {"take <1> from desk": 1}
    out.write_text('{"tasks": {}, "entries": [{"state": ["a"], "action": "b"}]}')
    with pytest.raises(UserError, match="count"):
        Knowledge.from_json(json.loads(out.read_text()), str(out))
