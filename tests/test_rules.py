"""Rules of WALL-E: exactly those of a toy world are found, a wrong one isn't, and they veto and correct."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from itp.agent.policy import Choice
from itp.agent.ruled_world_model import RuledWorldModel
from itp.envs.base import Observation
from itp.errors import UserError
from itp.games import Game
from itp.methods.base import View
from itp.methods.settings import MethodSettings
from itp.methods.walle import Walle
from itp.text.alfworld_phrases import NOTHING_HAPPENS
from itp.text.belief import Belief
from itp.text.rules import Condition, Rule, Situation, fill, lift, predicted, read_rules
from itp.text.state import State
from itp.transitions import Transition
from world_model import rules as program
from world_model.rules import RuleLearner, RulesSettings, cases_of, split_steps
from world_model.rule_induction import Case, InductionLimits, explained, induce, prune, verify

ROOM = "You are in the middle of a room. Looking quickly around you, you see a desk 1, a lamp 2, and a shelf 3."
START = State("toy", ROOM)
GO_FAILS = Rule("go to {0}", (Condition(("at", "{0}")),), NOTHING_HAPPENS)
USE_FAILS = Rule("use {0}", (Condition(("at", "{0}"), False),), NOTHING_HAPPENS)
LIMITS = InductionLimits(max_conditions=2, support=2)


def toy_answer(at: str, action: str) -> str:
    """A world of two rules: one goes to where one isn't, and uses what is there."""
    place = action.removeprefix("go to ").removeprefix("use ")
    if action.startswith("go to "):
        return NOTHING_HAPPENS if at == place else f"You arrive at {place}."
    return f"You turn on the {place}." if at == place else NOTHING_HAPPENS


def toy_cases(places: Sequence[str]) -> list[Case]:
    """Every action at every one of ``places``, and a world model that never foresees a failure."""
    cases = []
    for at in places:
        state = START.after(f"go to {at}", f"You arrive at {at}.")
        for action in (f"{verb} {place}" for verb in ("go to", "use") for place in places):
            said = toy_answer(at, action)
            cases.append(Case.of(state, action, said, wrong=said == NOTHING_HAPPENS))
    return cases


def test_exactly_the_rules_of_the_toy_world_are_found() -> None:
    cases = toy_cases(("desk 1", "lamp 2", "shelf 3"))
    rules = verify(induce(cases, LIMITS), cases)
    # 3 places x 3 actions: going fails at the place itself (3), using everywhere else (6).
    assert prune(rules, cases) == [(USE_FAILS, 6), (GO_FAILS, 3)]
    assert {len(explained(rule, cases)) for rule in (USE_FAILS, GO_FAILS)} == {6, 3}
    assert prune(rules, cases, max_rules=1) == [(USE_FAILS, 6)]
    assert prune(rules, cases, least=4) == [(USE_FAILS, 6)]
    known = [rule for rule in rules if rule.action == "go to {0}" and not rule.fails]
    assert [str(rule) for rule in known] == ["go to {0}: not at {0} -> You arrive at {0}."]


def test_a_rule_that_others_contradict_is_dropped() -> None:
    """Where only lamps were used elsewhere, 'a lamp can't be used' holds, until one is used beside it."""
    at_desk = START.after("go to desk 1", "You arrive at desk 1.")
    at_lamp = START.after("go to lamp 2", "You arrive at lamp 2.")
    seen = [Case.of(at_desk, "use lamp 2", NOTHING_HAPPENS, True)] * 3 + [
        Case.of(at_desk, "use desk 1", "You turn on the desk 1.")] * 3
    wrong = Rule("use {0}", (Condition(("is", "{0}", "lamp")),), NOTHING_HAPPENS)
    found = induce(seen, LIMITS)
    assert wrong in found and USE_FAILS in found
    sound = verify(found, [Case.of(at_lamp, "use lamp 2", "You turn on the lamp 2.")])
    assert wrong not in sound and USE_FAILS in sound


def test_coverage_takes_the_rule_that_explains_the_most_first() -> None:
    cases = toy_cases(("desk 1", "lamp 2"))  # going fails twice, using fails twice
    part = Rule("use {0}", (Condition(("at", "{0}"), False), Condition(("is", "{0}", "desk"))), NOTHING_HAPPENS)
    assert prune([part, USE_FAILS, GO_FAILS], cases) == [(GO_FAILS, 2), (USE_FAILS, 2)]
    assert len(explained(part, cases)) == 1  # of what the whole rule explains


def test_contents_are_lifted_to_what_is_remembered() -> None:
    shows = "You arrive at desk 1. On the desk 1, you see a pen 2, and a mug 1."
    state = START.after("go to desk 1", "You arrive at desk 1. On the desk 1, you see a mug 1, and a pen 2.")
    there = Situation.of(Belief.of(state), "go to desk 1")
    said = state.observation
    assert lift(said, there) == "You arrive at {0}. On the {0}, you see {in 0}."
    assert fill(lift(said, there), there) == said
    assert "pen 2" in lift(shows, there)  # in another order than the engine's it isn't the known list
    unseen = Situation.of(Belief.of(START), "go to desk 1")
    assert fill("On the {0}, you see {in 0}.", unseen) is None


def test_a_file_is_read_as_it_was_written_and_a_bad_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rules.json"
    file.write_text(json.dumps({"rules": [GO_FAILS.to_json(), USE_FAILS.to_json()]}))
    assert read_rules(str(file)) == (GO_FAILS, USE_FAILS)
    for i, (row, what) in enumerate((
            ({"action": "go to {0}", "if": [{"fact": ["__import__", "os"], "holds": True}], "then": "x"}, "no fact"),
            ({"action": "go to {0}", "if": [{"fact": ["at", "{1}"], "holds": True}], "then": "x"}, "no slot"),
            ({"action": "go to {0}", "if": [], "then": "at {3}"}, "no slot"),
            ({"action": "go to {0}", "if": []}, "missing"))):
        bad = tmp_path / f"{i}.json"
        bad.write_text(json.dumps({"rules": [row]}))
        with pytest.raises(UserError, match=what):
            read_rules(str(bad))


class Model:
    """A world model that says the same to everything, and counts."""

    def __init__(self, says: str) -> None:
        self.says, self.asked = says, []

    async def step(self, states: Sequence[State], actions: Sequence[str]) -> list[str]:
        self.asked += actions
        return [self.says] * len(actions)


def toy_steps(game: str) -> list[tuple[Transition, State]]:
    steps = []
    for at in ("desk 1", "lamp 2", "shelf 3"):
        state = START.after(f"go to {at}", f"You arrive at {at}.")
        for action in (f"{verb} {place}" for verb in ("go to", "use") for place in ("desk 1", "lamp 2", "shelf 3")):
            steps.append((Transition(game, 1, state.render(), action, toy_answer(at, action)), state))
    return steps


def test_the_program_learns_from_some_games_checks_and_measures_on_others() -> None:
    steps = [step for i in range(8) for step in toy_steps(f"game {i}#0") + toy_steps(f"game {i}@1#0")]
    known, check, measure = split_steps(steps, 0.5, seed=1)
    games = [{t.episode_id.split("@")[0].split("#")[0] for t, _ in part} for part in (known, check, measure)]
    assert [len(part) for part in games] == [4, 2, 2] and len(set.union(*games)) == 8
    settings = RulesSettings(wm_model="", transitions="", out_dir="")

    async def learned() -> RuleLearner:
        model = Model("You arrive at lamp 2.")  # right for one of three places, from two of three
        learner = RuleLearner(settings, await cases_of(model, check), await cases_of(model, measure), model)
        await learner.add(known)
        learner.learn()
        return learner

    learner = asyncio.run(learned())
    assert {USE_FAILS, GO_FAILS} <= set(learner.rules)
    figures = learner.accuracy()
    assert figures["n"] == 4 * 18 and figures["world_model"] == pytest.approx(2 / 18) and figures["with_rules"] == 1.0
    assert (figures["failed_n"], figures["failed_world_model"], figures["failed_with_rules"]) == (4 * 9, 0.0, 1.0)


class Proposals:
    """A policy that would go where it is, and has other ideas when it is asked again."""

    form = selection = None

    async def act(self, state: State, admissible, seed: int) -> Choice:
        return Choice("go to desk 1", "")

    async def candidates(self, state: State, admissible, n: int, seed: int) -> list[Choice]:
        return [Choice("go to desk 1", ""), Choice("use lamp 2", ""), Choice("go to shelf 3", "")]


def walle(tmp_path: Path, model: Model, rules: Sequence[Rule], **changes) -> Walle:
    file = tmp_path / f"{len(rules)}.json"
    file.write_text(json.dumps({"rules": [rule.to_json() for rule in rules]}))
    return Walle(Proposals(), model, MethodSettings(walle_rules=str(file), **changes))


def test_what_a_rule_forbids_is_not_executed(tmp_path: Path) -> None:
    state = START.after("go to desk 1", "You arrive at desk 1.")
    view = View(Game("alfworld", "train", "toy", "toy", ""), 1, state, Observation(state.observation, ""), 5)
    model = Model("You arrive somewhere.")
    decision = asyncio.run(walle(tmp_path, model, [GO_FAILS, USE_FAILS]).act(view))
    assert decision.action == "go to shelf 3" and model.asked == ["go to shelf 3"]
    assert {action: ok for action, ok, _ in decision.considered} == {
        "go to desk 1": 0.0, "use lamp 2": 0.0, "go to shelf 3": 1.0}
    assert asyncio.run(walle(tmp_path, Model("You arrive."), []).act(view)).action == "go to desk 1"
    # Where nothing passes, the first proposal is executed.
    assert asyncio.run(walle(tmp_path, Model(NOTHING_HAPPENS), [GO_FAILS]).act(view)).action == "go to desk 1"


def test_rules_correct_the_world_model() -> None:
    state = START.after("go to desk 1", "You arrive at desk 1.")
    model = RuledWorldModel(Model("I don't know."), [GO_FAILS])
    assert asyncio.run(model.step([state, state], ["go to desk 1", "go to lamp 2"])) == [
        NOTHING_HAPPENS, "I don't know."]
    assert asyncio.run(model.sample(state, "go to desk 1", 2, 0)) == [NOTHING_HAPPENS] * 2
    assert predicted([GO_FAILS], Belief.of(state), "go to lamp 2") is None


def test_every_round_plays_with_the_rules_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closes:
        form = selection = None

        async def close(self) -> None:
            pass

    Closes.lm = Closes()
    played = []

    async def episodes(pool: object, method: Walle, games: object, **options: object):
        played.append(method.world_model.rules)
        return
        yield

    for name in ("load_policy", "load_world_model", "EnvPool"):
        monkeypatch.setattr(program, name, lambda *args, **options: Closes())
    for name in ("list_games", "read_transitions"):
        monkeypatch.setattr(program, name, lambda *args: [])
    monkeypatch.setattr(program, "run_episodes", episodes)
    settings = RulesSettings(wm_model="", transitions="", out_dir="", policy_model="p")
    for number, rules in ((1, (GO_FAILS,)), (2, (GO_FAILS, USE_FAILS))):
        asyncio.run(program.play(settings, number, rules, tmp_path))
    assert played == [(GO_FAILS,), (GO_FAILS, USE_FAILS)]
