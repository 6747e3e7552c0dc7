"""World-model fidelity: kinds of transitions, facts and the figures, on hand-made cases; consistency on a real game."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from itp.agent.policy import Choice
from itp.agent.world_model import WorldModel
from itp.envs.alfworld.env import AlfworldEnv
from itp.envs.alfworld.expert import Expert
from itp.envs.alfworld.games import list_games, task_params
from itp.errors import PromptTooLong, UserError
from itp.games import Game
from itp.lm.base import GenParams, Generation
from itp.text.belief import delta_f1
from itp.text.facts import fact_f1, facts
from itp.text.kinds import kind_of, kinds_of
from itp.text.state import State
from itp.transitions import Transition
from tests.toy import ToyLM
from world_model import fidelity
from world_model.calibration import calibration, judged
from world_model.consistency import consistency
from world_model.fidelity import (
    FidelitySettings, identify, measure, measure_depth, print_figures, read_measured, scienceworld_kind, token_f1,
    windows_of,
)

CARRIED = ("pick_and_place_simple", "pick_clean_then_place_in_recep")

START = State("put a mug in shelf", "You are in the middle of a room. Looking quickly around you, you see a desk 1.")
DESK = "You arrive at desk 1. On the desk 1, you see a mug 1."
SAW_DESK = START.after("go to desk 1", DESK)
SAW_DRAWER = START.after("open drawer 2", "You open the drawer 2. The drawer 2 is open. In it, you see a pen 1.")


@pytest.mark.parametrize("state, action, seen, kind", [
    (START, "go to desk 1", DESK, "first_visit"),
    (SAW_DESK, "go to desk 1", "You arrive at desk 1. On the desk 1, you see nothing.", "revisit"),
    (SAW_DESK, "go to desk 10", "You arrive at desk 10. On the desk 10, you see nothing.", "first_visit"),
    (SAW_DESK, "examine desk 1", "On the desk 1, you see a mug 1.", "revisit"),
    (START, "go to drawer 2", "You arrive at drawer 2. The drawer 2 is closed.", "deterministic"),
    (START, "open drawer 2", "You open the drawer 2. The drawer 2 is open. In it, you see nothing.", "first_visit"),
    (SAW_DRAWER, "go to drawer 2", "You arrive at drawer 2. The drawer 2 is open. In it, you see a pen 1.", "revisit"),
    (SAW_DESK, "take mug 1 from desk 1", "You pick up the mug 1 from the desk 1.", "deterministic"),
    (SAW_DESK, "use desklamp 1", "You turn on the desklamp 1.", "deterministic"),
    (SAW_DESK, "look", "You are facing the desk 1. Next to it, you see nothing.", "inspect"),
    (START, "inventory", "You are not carrying anything.", "inspect"),
    (SAW_DESK, "examine mug 1", "There's nothing special about mug 1.", "inspect"),
    (SAW_DESK, "go to moon 1", "Nothing happens.", "invalid"),
    (SAW_DESK, "examine moon 1", "Nothing happens.", "invalid"),
])
def test_kind_of(state: State, action: str, seen: str, kind: str) -> None:
    assert kind_of(state, action, seen) == kind


def test_token_f1() -> None:
    assert token_f1("a mug 1", "a mug 1.") == 1.0
    # 3 words in common of 4 and 5: precision 3/4, recall 3/5.
    assert token_f1("you see mug 1", "you see a mug 2") == pytest.approx(2 * 0.75 * 0.6 / (0.75 + 0.6))
    assert token_f1("mug mug mug", "mug") == pytest.approx(0.5)
    assert token_f1("apple", "mug") == 0.0
    assert token_f1("", "mug") == 0.0


class Oracle:
    """A world model that knows everything but ``wrong``'s answers."""

    def __init__(self, rows: Sequence[Transition], wrong: dict[str, str]) -> None:
        self.answers = {(t.state, t.action): wrong.get(t.action, t.next_state) for t in rows}

    async def step(self, states: Sequence[State], actions: Sequence[str]) -> list[str]:
        return [self.answers[state.render(), action] for state, action in zip(states, actions, strict=True)]


@pytest.mark.parametrize("observation, stated", [
    ("You arrive at desk 1. On the desk 1, you see a mug 1, and a pen 2.",
     {("at", "desk 1"), ("in", "mug 1", "desk 1"), ("in", "pen 2", "desk 1")}),
    ("You arrive at drawer 2. The drawer 2 is closed.", {("at", "drawer 2"), ("closed", "drawer 2")}),
    ("You open the drawer 2. The drawer 2 is open. In it, you see nothing.",
     {("open", "drawer 2"), ("empty", "drawer 2")}),
    ("The safe 1 is open. In it, you see a watch 3.", {("open", "safe 1"), ("in", "watch 3", "safe 1")}),
    ("You close the drawer 2.", {("closed", "drawer 2")}),
    ("You pick up the mug 1 from the desk 1.", {("held", "mug 1")}),
    ("You move the mug 1 to the desk 1.", {("in", "mug 1", "desk 1")}),
    ("You put the mug 1 in/on the desk 1.", {("in", "mug 1", "desk 1")}),
    ("You heat the egg 1 using the microwave 1.", {("hot", "egg 1")}),
    ("You cool the egg 1 using the fridge 1.", {("cool", "egg 1")}),
    ("You clean the egg 1 using the sinkbasin 1.", {("clean", "egg 1")}),
    ("This is a cold egg 1.", {("cool", "egg 1")}),
    ("This is a cool and clean egg 1.", {("cool", "egg 1"), ("clean", "egg 1")}),
    ("You turn on the desklamp 1.", {("lit", "desklamp 1")}),
    ("You are carrying: a mug 1.", {("held", "mug 1")}),
    ("You are not carrying anything.", {("held", "nothing")}),
    ("Nothing happens.", {("says", "Nothing happens.")}),
    ("The door is  ajar.\nA cat sleeps.", {("says", "The door is ajar."), ("says", "A cat sleeps.")}),
    ("", set()),
])
def test_facts(observation: str, stated: set[tuple[str, ...]]) -> None:
    assert facts(observation) == stated


def test_fact_f1() -> None:
    assert fact_f1("On the desk 1, you see a pen 2, and a mug 1.", "On the desk 1, you see a mug 1, and a pen 2.") == 1
    # one fact in common of two and three
    predicted = "You arrive at desk 1. On the desk 1, you see a cup 1."
    assert fact_f1(predicted, DESK + " It is dark.") == pytest.approx(2 / 5)
    assert fact_f1("On the desk 1, you see a mug 1.", "On the desk 2, you see a mug 1.") == 0
    assert fact_f1("", "") == 1 and fact_f1("", DESK) == 0


def test_measure_counts_by_kind() -> None:
    played = [(START, "go to desk 1", DESK), (SAW_DESK, "go to desk 1", DESK), (SAW_DESK, "look", "You see."),
              (SAW_DESK, "examine desk 1", "On the desk 1, you see a mug 1."), (START, "fly", "Nothing happens.")]
    rows = [Transition("e", 0, state.render(), action, seen) for state, action, seen in played]
    perfect = asyncio.run(measure(Oracle(rows, {}), rows))
    assert perfect["all"] == {"exact_match": 1.0, "token_f1": 1.0, "fact_f1": 1.0, "delta_f1": 1.0,
                              "delta_n": 1, "fact_f1_interval": [1, 1], "token_f1_interval": [1, 1], "n": 5, "cut": 0}
    assert {kind: row["n"] for kind, row in perfect.items()} == {
        "revisit": 2, "revisit_unchanged": 2, "first_visit": 1, "inspect": 1, "invalid": 1, "all": 5}

    figures = asyncio.run(measure(Oracle(rows, {"examine desk 1": "On the desk 1, you see nothing."}), rows))
    # 6 of 7 and 9 words in common (On the desk 1 you see | nothing / a mug 1); no fact.
    f1 = 2 * 6 / (7 + 9)
    revisit = figures["revisit"]
    assert (revisit["exact_match"], revisit["token_f1"], revisit["fact_f1"], revisit["n"]) == (
        0.5, pytest.approx((1 + f1) / 2), 0.5, 2)
    assert revisit["fact_f1_interval"] == [0, 1]  # .5 ± 1.96 * .5 / sqrt(2), cut
    everything = figures["all"]
    assert (everything["exact_match"], everything["token_f1"], everything["fact_f1"]) == pytest.approx(
        (0.8, (4 + f1) / 5, 0.8))
    assert figures["first_visit"]["exact_match"] == 1.0


def test_a_revisit_is_changed_where_the_place_no_longer_shows_what_it_did() -> None:
    taken = SAW_DESK.after("take mug 1 from desk 1", "You pick up the mug 1 from the desk 1.")
    assert kinds_of(SAW_DESK, "go to desk 1", DESK) == ("revisit", "revisit_unchanged")
    assert kinds_of(taken, "examine desk 1", "On the desk 1, you see nothing.") == ("revisit", "revisit_changed")


def test_delta_f1_counts_changes_only() -> None:
    """A prediction that copies what was known gets nothing for it."""
    taken = SAW_DESK.after("take mug 1 from desk 1", "You pick up the mug 1 from the desk 1.")
    empty, full = "On the desk 1, you see nothing.", "On the desk 1, you see a mug 1."
    # One stands at desk 1 and holds mug 1: to see the empty desk changes nothing ...
    assert delta_f1(taken, "examine desk 1", empty, empty) is None
    # ... and a mug that isn't there is one change that didn't happen.
    assert delta_f1(taken, "examine desk 1", full, empty) == 0
    # Arriving at shelf 1: one is there (and no longer nowhere), it was visited, and two objects are seen; of two
    # predicted objects one is right: 4 of 5 changes on each side.
    seen = "You arrive at shelf 1. On the shelf 1, you see a cup 1, and a pen 2."
    wrong = "You arrive at shelf 1. On the shelf 1, you see a cup 1, and a pen 3."
    assert delta_f1(START, "go to shelf 1", wrong, seen) == pytest.approx(4 / 5)
    assert delta_f1(START, "go to shelf 1", seen, seen) == 1


def test_delta_f1_of_invalid_actions_is_not_a_figure() -> None:
    """Only where it is predicted that something changes would there be one, and it would always be 0."""
    rows = [Transition("e", 0, START.render(), f"fly {i}", "Nothing happens.") for i in range(9)]
    rows.append(Transition("e", 0, START.render(), "go to desk 1", DESK))
    figures = asyncio.run(measure(Oracle(rows, {"fly 3": DESK}), rows))
    assert figures["invalid"]["exact_match"] == pytest.approx(8 / 9) and "delta_f1" not in figures["invalid"]
    assert (figures["all"]["delta_f1"], figures["all"]["delta_n"], figures["all"]["n"]) == (0.5, 2, 10)


def test_figures_are_printed_with_how_many_delta_f1_is_of(capsys: pytest.CaptureFixture) -> None:
    row = {"exact_match": 1.0, "token_f1": 1.0, "fact_f1": 1.0, "n": 9}
    judged_rows = {"all": {**row, "delta_f1": 0.5, "delta_n": 4}, "look": row, "old": {**row, "delta_f1": 0.25}}
    print_figures("m", {"one_step": {"walk": judged_rows}, "by_depth": {}})
    said = [line.split()[1:] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[3:] for line in said] == [["0.500", "4", "9"], ["-", "-", "9"], ["0.250", "-", "9"]]


def test_calibration_of_hand_computed_probabilities() -> None:
    # Three visits, five samples each; Brier: (.2² + .8² + .4²) / 3, less p (1 - p) / 4 of each.
    figures = judged([0.2, 0.2, 0.6], [False, True, True], samples=5)
    assert figures["brier"] == pytest.approx(((0.04 - 0.04) + (0.64 - 0.04) + (0.16 - 0.06)) / 3)
    assert figures["brier_of_base_rate"] == pytest.approx(2 / 9) and figures["n"] == 3
    assert figures["bins"] == [
        {"from": 0.2, "to": 0.4, "predicted": pytest.approx(0.2), "observed": 0.5, "n": 2},
        {"from": 0.6, "to": 0.8, "predicted": pytest.approx(0.6), "observed": 1.0, "n": 1}]


def test_calibration_samples_first_visits_only() -> None:
    class HalfTheTime:
        """Shows the mug in every second sample."""

        asked: list[tuple[str, int]] = []

        async def sample(self, state: State, action: str, n: int, seed: int) -> list[str]:
            self.asked.append((action, n))
            return [DESK if i % 2 else "You arrive at desk 1. On the desk 1, you see nothing." for i in range(n)]

    played = [(START, "go to desk 1", DESK), (SAW_DESK, "go to desk 1", DESK), (SAW_DESK, "look", "You see.")]
    rows = [Transition("e", 0, state.render(), action, seen) for state, action, seen in played]
    model = HalfTheTime()
    figures = asyncio.run(calibration(model, rows, 4, seed=1))
    assert model.asked == [("go to desk 1", 4)]
    assert figures["n"] == 1 and figures["bins"][0]["predicted"] == 0.5 and figures["bins"][0]["observed"] == 1
    assert asyncio.run(calibration(model, rows[2:], 4, seed=1)) == {}


def test_calibration_leaves_out_what_the_context_does_not_hold(caplog: pytest.LogCaptureFixture) -> None:
    """As the figures of one step do; it comes after them, and all of them would be lost."""
    class Small:
        async def sample(self, state: State, action: str, n: int, seed: int) -> list[str]:
            if "desk" in action:
                raise PromptTooLong("too long")
            return ["On the shelf 1, you see a mug 2."] * n

    played = [("go to desk 1", DESK), ("go to shelf 1", "You arrive at shelf 1. On the shelf 1, you see a mug 2.")]
    rows = [Transition("e", 0, START.render(), action, seen) for action, seen in played]
    figures = asyncio.run(calibration(Small(), rows, 3, seed=1))
    assert figures["n"] == 1 and figures["brier"] == 0 and "1 of 2 first visits are left out" in caplog.text
    assert asyncio.run(calibration(Small(), rows[:1], 3, seed=1)) == {}


def episode(name: str, actions: Sequence[str], first_step: int = 0) -> list[Transition]:
    """A recorded episode in which every action is answered by its own name."""
    state, rows = START, []
    for t, action in enumerate(actions, start=first_step):
        rows.append(Transition(name, t, state.render(), action, f"You {action}."))
        state = state.after(action, f"You {action}.")
    return rows


def test_windows_are_runs_of_one_episode() -> None:
    a, b = episode("a", ["x", "y", "z"]), episode("b", ["u", "v"])
    windows = windows_of([b[1], a[0], a[2], b[0], a[1]], 2)
    assert {tuple(t.action for t in w) for w in windows} == {("x", "y"), ("y", "z"), ("u", "v")}
    assert windows_of([a[0], a[2]], 2) == []  # a step is missing
    assert len(windows_of([*a, *b], 3)) == 1


def test_no_window_mixes_episodes_of_one_id() -> None:
    """Files that were joined: an expert and a random walk played the same game."""
    rows = episode("a", ["x", "y", "z"]) + episode("a", ["u", "v", "w"])
    assert [[t.action for t in w] for w in windows_of(rows, 2)] == [["x", "y"], ["y", "z"], ["u", "v"], ["v", "w"]]
    assert [[t.action for t in w] for w in windows_of(rows, 3)] == [["x", "y", "z"], ["u", "v", "w"]]


def test_rows_in_another_form_are_refused_before_a_model_is_loaded(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text('{"state": "You see a mug.", "action": "look", "next_state": "o"}\n')
    monkeypatch.setattr("sys.argv", ["fidelity", "--wm_model", str(tmp_path / "model"), "--transitions",
                                     str(tmp_path / "rows.jsonl")])
    with pytest.raises(UserError, match="rows.jsonl:1: field 'state' isn't a state .*; convert the file first"):
        fidelity.main()


def test_kinds_of_scienceworld_are_verbs() -> None:
    kinds = [scienceworld_kind(START, action, "o") for action in ("look around", "pick up fork", "", "look")]
    assert kinds == ["look around", "pick", "", "look"]
    assert scienceworld_kind(START, "dance", "No known action matches that input.") == "invalid"


class Brief(ToyLM):
    """A world model that knows each answer, and whose limit of tokens ends "You y."."""

    def answer(self, prompt: str, seed: int, params: GenParams) -> Generation:
        action = prompt.rpartition("Action: ")[2].split("\n")[0]
        return Generation(f" You {action}.", 9, 4, 0, "length" if action == "y" else "stop")


def test_predictions_that_are_cut_are_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    rows = episode("a", ["x", "y", "z"]) + episode("b", ["y", "y", "x"])
    world_model = WorldModel(Brief("world_model"), max_new_tokens=4, limit_flag="--wm_max_new_tokens")
    figures = asyncio.run(measure(world_model, rows))
    assert figures["all"]["cut"] == 3 and figures["all"]["exact_match"] == 1
    depths = asyncio.run(measure_depth(world_model, windows_of(rows, 3)))
    assert [depths[d]["cut"] for d in (1, 2, 3)] == [1, 2, 0]
    said, = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "cut at 4 tokens" in said and said.endswith("raise --wm_max_new_tokens")


class Forgetful:
    """Answers what is true as long as what it reads is true; the action "slip" is answered wrongly."""

    def __init__(self) -> None:
        self.read: list[list[State]] = []

    async def step(self, states: Sequence[State], actions: Sequence[str]) -> list[str]:
        self.read.append(list(states))
        lost = [any("lost" in seen for _, seen in state.history) for state in states]
        return ["You are lost." if gone or action == "slip" else f"You {action}."
                for gone, action in zip(lost, actions, strict=True)]


def test_depth_is_measured_on_its_own_predictions() -> None:
    rows = [*episode("a", ["go", "slip", "go"]), *episode("b", ["slip", "go", "go"]), *episode("c", ["go"] * 3)]
    world_model = Forgetful()
    by_depth = asyncio.run(measure_depth(world_model, windows_of(rows, 3)))
    assert {d: row["exact_match"] for d, row in by_depth.items()} == pytest.approx({1: 2 / 3, 2: 1 / 3, 3: 1 / 3})
    assert {d: row["fact_f1"] for d, row in by_depth.items()} == pytest.approx({1: 2 / 3, 2: 1 / 3, 3: 1 / 3})
    assert all(row["n"] == 3 for row in by_depth.values())
    assert [seen for _, seen in world_model.read[2][1].history] == ["You are lost."] * 2  # not "You slip.", "You go."


class Teacher:
    """A policy that knows the missions: the expert, on the text that it is shown."""

    def __init__(self, games: dict[str, Game]) -> None:
        self.games = games

    async def act(self, state: State, admissible: None, seed: int) -> Choice:
        game = self.games[state.first]
        expert = Expert(task_params(game), game.task_type, state.first)
        for action, seen in state.history:
            expert.observe(action, seen)
        return Choice(expert.act(), "")


class Real:
    """The true world model: the engine, played up to the state."""

    def __init__(self, games: dict[str, Game]) -> None:
        self.games, self.env = games, AlfworldEnv()

    async def step(self, states: Sequence[State], actions: Sequence[str]) -> list[str]:
        answers = []
        for state, action in zip(states, actions, strict=True):
            self.env.reset(self.games[state.first])
            for past, _ in state.history:
                self.env.step(past)
            answers.append(self.env.step(action).obs.text)
        return answers


class Obliging(Real):
    """The same, but nothing lies anywhere where one looks, except what is sought."""

    async def step(self, states: Sequence[State], actions: Sequence[str]) -> list[str]:
        answers = []
        for state, action in zip(states, actions, strict=True):
            target = str(task_params(self.games[state.first])["object_target"]).lower()
            place = action.removeprefix("go to ").removeprefix("open ")
            answers.append(f"You {action}." if place == action else f"On the {place}, you see a {target} 99.")
        return answers


@pytest.mark.parametrize("world_model, expected", [
    (Real, {"games": 2, "dreamed": 2, "replayed": 2, "both": 2, "ratio": 1.0}),
    (Obliging, {"games": 2, "dreamed": 2, "replayed": 0, "both": 0, "ratio": 0.0}),
])
def test_consistency_on_real_games(games_root: Path, world_model: type, expected: dict[str, float]) -> None:
    games = [g for g in list_games("train", games_root) if g.task_type in CARRIED]
    env = AlfworldEnv()
    by_first = {env.reset(game).text: game for game in games}
    env.close()
    said = asyncio.run(consistency(Teacher(by_first), world_model(by_first), games, max_steps=40, seed=1))
    assert said == expected


def test_nothing_dreamed_has_no_ratio(games_root: Path) -> None:
    games = list_games("train", games_root)[:1]
    env = AlfworldEnv()
    by_first = {env.reset(games[0]).text: games[0]}
    env.close()
    said = asyncio.run(consistency(Teacher(by_first), Real(by_first), games, max_steps=1, seed=1))
    assert said == {"games": 1, "dreamed": 0, "replayed": 0, "both": 0, "ratio": None}


def test_what_was_measured_is_kept_until_models_or_data_change(tmp_path: Path) -> None:
    out, model, rows = tmp_path / "fidelity.json", tmp_path / "model", tmp_path / "rows.jsonl"
    model.mkdir()
    (model / "config.json").write_text("{}")
    rows.write_text("{}\n")
    settings = FidelitySettings(wm_model=str(model), transitions=str(rows), out_json=str(out))
    measured = {"model": {"one_step": {}}}
    assert read_measured(str(out), identify(settings)) == {}
    out.write_text(json.dumps(identify(settings) | {"models": measured}))
    assert read_measured(str(out), identify(settings)) == measured
    out.write_text(out.read_text().replace("wm_max_new_tokens", "foresight_tokens"))  # as older records name it
    assert read_measured(str(out), identify(settings)) == measured
    assert read_measured(str(out), identify(dataclasses.replace(settings, max_depth=1))) == {}
    rows.write_text("{} \n")
    assert read_measured(str(out), identify(settings)) == {}
    rows.write_text("{}\n")
    (model / "config.json").write_text("{} ")
    assert read_measured(str(out), identify(settings)) == {}
    with pytest.raises(UserError, match="--transitions .*gone.jsonl: no such file"):
        identify(dataclasses.replace(settings, transitions=str(tmp_path / "gone.jsonl")))
