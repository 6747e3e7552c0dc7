"""A world model on symbolic states in the place of the text world model: tokens, card, answers, measure."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foresight_eval.settings import AlfworldSettings, SciworldSettings
from itp.agent.policy import Policy
from itp.agent.state_model import StateModel
from itp.agent.world_model import WorldModel
from itp.envs.alfworld.env import AlfworldEnv
from itp.envs.alfworld.expert import Expert
from itp.envs.alfworld.games import list_games, task_params
from itp.envs.base import Observation
from itp.errors import UserError
from itp.games import Game
from itp.lm.base import GenParams, Generation
from itp.methods.base import Decision, EarlierTrial, View
from itp.methods.implement import Implement
from itp.methods.settings import MethodSettings
from itp.model_card import ModelCard, predicts_states
from itp.models import load_state_model, load_world_model
from itp.plan import make_plan
from itp.text.alfworld_phrases import NOTHING_HAPPENS
from itp.text.answers import answer
from itp.text.belief import Belief
from itp.text.prompts import belief_text, world_model_prompt
from itp.text.state import State
from itp.training.from_scratch.base_lm import _compounds
from itp.training.from_scratch.word_tokenizer import build_tokenizer
from itp.transitions import Transition
from tests.test_state_model import Scripted
from tests.tiny import write_tiny_model
from world_model import state_fidelity
from world_model.base_tuning.examples import predicts
from world_model.data_processing.metaicl import scenes_of, to_rows

Steps = list[tuple[Transition, State]]


@pytest.fixture(scope="module")
def episodes(games_root: Path) -> list[Steps]:
    """Two episodes of the expert in each game, with some actions that fail."""
    env, made = AlfworldEnv(), []
    for game in list_games("train", str(games_root)):
        for number in range(2):
            start = env.reset(game)
            state, steps = State(start.task, start.text), []
            expert = Expert(task_params(game), game.task_type, start.text)
            for step in range(40):
                action = "open desk 99" if step % 7 == 5 else expert.act()
                result = env.step(action)
                if step % 7 != 5:
                    expert.observe(action, result.obs.text)
                t = Transition(f"{game.game_id}#{number}", step, state.render(), action, result.obs.text)
                steps.append((t, state))
                state = state.after(action, result.obs.text)
                if result.success:
                    break
            made.append(steps)
    return made


def of_all(episodes: list[Steps]) -> Iterator[tuple[Transition, State]]:
    for steps in episodes:
        yield from steps


# --- what a change says


def test_the_change_of_a_real_state_says_what_the_game_said(episodes: list[Steps]) -> None:
    said = Counter()
    for t, state in of_all(episodes):
        before = Belief.of(state)
        told = answer(before, t.action, before.after(t.action, t.next_state))
        if t.action.split()[0] in ("look", "examine", "inventory"):
            assert told == NOTHING_HAPPENS
        else:
            assert told == t.next_state
        said[t.action.split()[0]] += 1
    assert {"go", "open", "take", "move", "heat", "cool", "clean", "use"} <= set(said)


def test_what_an_action_cannot_change_is_not_said() -> None:
    before = Belief.from_json({"agent_location": "desk 1", "inventory": "pen 1", "world_state": {
        "desk 1": {"visited": True, "open": "N/A", "objects": []},
        "safe 1": {"visited": False, "open": "N/A", "objects": []}}})
    elsewhere = dataclasses.replace(before, location="safe 1", inventory=frozenset({"pen 1", "cd 1"}))
    assert answer(before, "go to safe 1", elsewhere) == "You arrive at safe 1."
    assert answer(before, "take cd 2 from desk 1", elsewhere) == NOTHING_HAPPENS
    assert answer(before, "go to desk 1", before) == NOTHING_HAPPENS
    assert answer(before, "move cd 1 to desk 1", elsewhere) == NOTHING_HAPPENS


# --- tokens


def test_states_survive_the_tokenizer_and_a_place_is_one_token(episodes: list[Steps]) -> None:
    rows = list(to_rows(scenes_of(list(of_all(episodes))), 0, Counter()))
    texts = [text for row in rows for text in (world_model_prompt(row.state, row.action), row.next_state)]
    tokenizer = build_tokenizer(texts, joined=True, states=True)
    for row in rows:
        encoded = tokenizer.encode(f" {row.next_state}")
        assert tokenizer.decode(encoded.ids).strip() == row.next_state
        places = json.loads(row.next_state)["world_state"]
        heads = [token for token in encoded.tokens if re.match(r'"[a-z]+ \d+": {', token)]
        assert len(heads) == len(places) and "[UNK]" not in encoded.tokens
        assert Belief.parse(tokenizer.decode(encoded.ids)) == Belief.parse(row.next_state)
    prompt = tokenizer.encode(next(t for t in texts if '": ["' in t)).tokens
    assert any(token.endswith('": [') for token in prompt)
    head = '{"visited": true, "open": "N/A", "objects": ['
    assert dict(_compounds([f'"shelf 3": {head}', '"shelf 3": [', "shelf 3"])) == {
        f'"shelf 3": {head}': ["shelf", "3", head], '"shelf 3": [': ["shelf", "3", "["], "shelf 3": ["shelf", "3"]}


def test_without_states_the_tokenizer_is_as_it_was() -> None:
    assert build_tokenizer(["go to desk 1"]).to_str() == build_tokenizer(["go to desk 1"], states=False).to_str()
    assert not any("visited" in token for token in build_tokenizer(["go to desk 1"]).get_vocab())


def test_conditions_stand_in_the_order_of_a_states_objects(episodes: list[Steps]) -> None:
    for row in to_rows(scenes_of(list(of_all(episodes))), 0, Counter()):
        if row.source == "prediction":
            lists = json.loads(row.state.split("\n")[1].partition(": ")[2])
            assert all(things == sorted(things) for things in lists.values())


def test_failed_actions_of_a_row_can_be_limited(episodes: list[Steps]) -> None:
    def most(limit: int) -> int:
        return max(len(json.loads(row.state.split("\n")[2].partition(": ")[2]))
                   for row in to_rows(scenes_of(list(of_all(episodes))), 0, Counter(), limit)
                   if row.source == "prediction")

    assert most(0) > most(1) == 1


# --- the method

ROOM = "You are in the middle of a room. Looking quickly around you, you see a cabinet 1, a desk 1, and a shelf 1."
START = State("put some mug on shelf", ROOM)
SAW = (("go to desk 1", "You arrive at desk 1. On the desk 1, you see a pen 1, and a mug 2."),
       ("open desk 1", NOTHING_HAPPENS))
TRIAL = EarlierTrial(State(START.task, ROOM, SAW), (False, True), False, "")


class Chooses:
    """A policy LM that takes the first of its choices."""

    name, role, tokenizer, context_length = "chooses", "policy", None, None

    async def generate(self, prompts: list[str], params: GenParams) -> list[Generation]:
        return [Generation(params.choices[0], 1, 1, 0, "stop", 0.0) for _ in prompts]


def decided(lm: Scripted, *earlier: EarlierTrial, **settings: Any) -> Decision:
    method = Implement(Policy(Chooses(), selection="constrained"), StateModel(WorldModel(lm)),
                       MethodSettings(**{"implement_choice": "gain", "belief_samples": 2, "rounds": 1} | settings))
    admissible = ("go to desk 1", "go to shelf 1")
    view = View(Game("alfworld", "", "", "", ""), 0, START, Observation(ROOM, START.task, admissible), 5,
                invalid=(), earlier=tuple(earlier))
    return asyncio.run(method.act(view))


def test_it_plans_with_states_and_is_given_what_earlier_trials_showed() -> None:
    shown = belief_text(Belief.of(START).after(*SAW[0]).to_json())
    lm = Scripted(*[shown] * 8)
    decision = decided(lm, TRIAL)
    assert decision.action == "go to desk 1" and decision.considered[0][1:] == (1.0, 2)
    sorted_sight = "You arrive at desk 1. On the desk 1, you see a mug 2, and a pen 1."
    assert decision.imagined.steps == ((SAW[0][0], sorted_sight),)
    prompt, params = lm.asked[0]
    assert params.temperature == 1.0 and prompt.startswith(
        '[PRE]\nSeen in earlier trials: {"desk 1": ["mug", "pen"]}\n')
    assert 'Failed in earlier trials: [["open desk 1", "desk 1", null, {"visited": true' in prompt
    assert prompt.endswith(f"State: {belief_text(Belief.of(START).to_json())}\nAction: go to desk 1\nObservation:")


def test_without_memory_it_is_given_none() -> None:
    lm = Scripted(*[belief_text(Belief.of(START).to_json())] * 20)
    decided(lm, TRIAL, implement_memory="none")
    assert all("trials: {}\nFailed in earlier trials: []\n" in prompt for prompt, _ in lm.asked)


# --- the card


def test_rows_of_states_make_a_model_of_states(episodes: list[Steps]) -> None:
    rows, plain = list(to_rows(scenes_of(episodes[0]), 0, Counter())), [t for t, _ in episodes[0]]
    assert predicts(rows, "rows") == "state" and predicts(plain, "rows") == "observation"
    with pytest.raises(UserError, match=f"rows: {len(rows)} of {len(rows) + len(plain)} rows are of symbolic states"):
        predicts([*plain, *rows], "rows")


def test_the_card_decides_who_may_ask(tmp_path: Path, games_root: Path) -> None:
    policy, states = (str(write_tiny_model(tmp_path / name)) for name in ("policy", "states"))
    ModelCard(predicts="state", max_seq_len=512).write(states)
    assert ModelCard.read(states) == ModelCard(predicts="state", max_seq_len=512) and predicts_states(states)
    assert not predicts_states(policy) and isinstance(load_state_model(states), StateModel)
    with pytest.raises(UserError, match="predicts symbolic states, which only --method implement reads"):
        load_world_model(states)
    settings = AlfworldSettings(policy_model=policy, wm_model=states, out_dir="", env_data_root=str(games_root),
                                method="implement", prompt_style="tuned")
    assert make_plan(settings).predicts_states
    for other in ("foresight", "mpc"):
        with pytest.raises(UserError, match="predicts symbolic states, which --method implement asks for"):
            make_plan(dataclasses.replace(settings, method=other, fixed_k=-1))
    with pytest.raises(UserError, match="which --method implement asks for on ALFWorld"):
        make_plan(SciworldSettings(policy_model=policy, wm_model=states, out_dir="", method="implement"))
    (Path(states) / "itp_model.json").write_text('{"prompt_style": "tuned", "predicts": "stars"}', encoding="utf-8")
    with pytest.raises(UserError, match="field 'predicts' is 'stars', not observation or state"):
        predicts_states(states)


def test_without_imagination_no_world_model_is_needed(tmp_path: Path, games_root: Path) -> None:
    policy = str(write_tiny_model(tmp_path / "policy"))
    settings = AlfworldSettings(policy_model=policy, out_dir="", env_data_root=str(games_root), method="implement",
                                implement_imagination=False)
    assert not make_plan(settings).uses_world_model
    assert "wm_fingerprint" not in make_plan(dataclasses.replace(settings, wm_model="/no/such/model")).facts
    with pytest.raises(UserError, match="--method implement needs --wm_model"):
        make_plan(dataclasses.replace(settings, implement_imagination=True))


@pytest.mark.parametrize("changes", [{"implement_memory": "recall"}, {"implement_imagination": False}])
def test_memory_that_there_is_none_of_in_scienceworld_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    policy = str(write_tiny_model(tmp_path / "policy"))
    with pytest.raises(UserError, match="nothing is remembered of ScienceWorld's earlier trials"):
        make_plan(SciworldSettings(policy_model=policy, wm_model=policy, out_dir="", method="implement", **changes))


# --- the measure


def test_the_measure_of_a_perfect_model_and_of_one_that_says_nothing_changes(episodes: list[Steps]) -> None:
    """The second episode of a game sees again what the first one saw."""
    cases = list(state_fidelity.cases_of(list(of_all(episodes))))
    visits = state_fidelity.remembered_visits(cases)
    assert len(visits) > 20 and all(case.earlier for case, _ in visits)
    perfect = state_fidelity._found(visits, [case.after for case, _ in visits])
    assert (perfect["found"], perfect["true"]) == (1, 1) and perfect["types"] > 40
    still = state_fidelity._found(visits, [case.before for case, _ in visits])
    assert (still["found"], still["true"]) == (0, 0)
    figures = state_fidelity._by_kind(cases, [case.after for case in cases])
    assert figures["all"] == {"exact": 1, "changes_f1": 1, "n": len(cases)}
    nothing = state_fidelity._by_kind(cases, [case.before for case in cases])
    assert nothing["invalid"]["exact"] == 1 and nothing["first_visit"] == figures["first_visit"] | {
        "exact": 0, "changes_f1": 0}


def test_the_program_judges_both_kinds_of_models(episodes: list[Steps], tmp_path: Path, capsys: Any,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    from itp.transitions import write_transitions

    text, states = (str(write_tiny_model(tmp_path / name)) for name in ("text", "states"))
    ModelCard().write(text)
    write_transitions(tmp_path / "held.jsonl", [t for t, _ in of_all(episodes[:2])])
    command = ["state_fidelity", "--transitions", str(tmp_path / "held.jsonl"), "--max_rows", "3", "--device", "cpu",
               "--text_wm_model", text, "--max_new_tokens", "8", "--wm_model", states]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(UserError, match="predicts observations: it goes into --text_wm_model"):
        state_fidelity.main()
    ModelCard(predicts="state").write(states)
    monkeypatch.setattr("sys.argv", [*command, "--out_json", str(tmp_path / "figures.json")])
    state_fidelity.main()
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert set(figures) == {"state", "text"} and figures["state"]["memory"]["with"]["visits"] == 3
    assert "earlier trials" in capsys.readouterr().out
