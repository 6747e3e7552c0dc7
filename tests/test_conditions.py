"""Conditions from earlier trials: gathered, selected, written, read; and the training data that is made with them."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from foresight_eval import extract_conditions
from foresight_eval.results import write_episode
from itp.envs.alfworld.vocabulary import openable_types
from itp.errors import UserError
from itp.text.belief import Belief
from itp.text.conditions import Conditions, FailedAction, read_conditions, shows_contents, write_conditions
from itp.text.prompts import PERCEIVE, PREDICT, world_model_prompt
from itp.text.state import State
from itp.transitions import Transition, read_transitions, write_transitions
from tests.made_results import make_episode, make_games, write_result
from world_model.data_processing import metaicl
from world_model.data_processing.metaicl import sampled, scenes_of, to_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from chaos_mutations import mutated  # noqa: E402

FIRST = ("You are in the middle of a room. Looking quickly around you, you see a cabinet 1, a fridge 1, and a desk 2.")
STEPS = (
    ("go to desk 2", "You arrive at desk 2. On the desk 2, you see a mug 3, and a mug 1."),
    ("take mug 1 from desk 2", "You pick up the mug 1 from the desk 2."),
    ("cool mug 1 with fridge 1", "Nothing happens."),
    ("examine fridge 1", "Nothing happens."),
    ("go to fridge 1", "You arrive at fridge 1. The fridge 1 is closed."),
    ("move mug 1 to fridge 1", "Nothing happens."),
    ("open fridge 1", "You open the fridge 1. The fridge 1 is open. In it, you see a egg 1."),
    ("move mug 1 to fridge 1", "You move the mug 1 to the fridge 1."),
    ("move mug 1 to fridge 1", "Nothing happens."),
    ("go to desk 2", "You arrive at desk 2. On the desk 2, you see a mug 3."))
TRIAL = State("cool some mug and put it in desk", FIRST, STEPS)
INVALID = [seen == "Nothing happens." for _, seen in STEPS]
CLOSED = {"visited": False, "open": False, "objects": []}
FAILED = (
    FailedAction("cool mug 1 with fridge 1", "desk 2", "mug 1", {**CLOSED, "open": "N/A"}),
    FailedAction("move mug 1 to fridge 1", "fridge 1", "mug 1", CLOSED),
    FailedAction("move mug 1 to fridge 1", "fridge 1", None, {"visited": True, "open": True,
                                                              "objects": ["egg 1", "mug 1"]}))


def test_a_trial_by_hand() -> None:
    """Contents are those of the first visit, in types; examining is never a condition."""
    found = Conditions.of(TRIAL, INVALID)
    assert found == Conditions({"desk 2": ("mug", "mug"), "fridge 1": ("egg",)}, FAILED)
    other = State(TRIAL.task, FIRST, (("go to desk 2", "You arrive at desk 2. On the desk 2, you see nothing."),
                                      ("open cabinet 1", "Nothing happens.")))
    both = Conditions.of_all([(TRIAL, INVALID), (other, [False, True]), (TRIAL, INVALID)])
    assert both.object_lists == found.object_lists
    assert both.failed == (*FAILED, FailedAction("open cabinet 1", "desk 2", None, {**CLOSED, "open": "N/A"}))


def test_what_is_relevant_is_always_given_and_no_more_than_fifteen_others() -> None:
    lists = {f"shelf {i}": ("pen",) for i in range(30)} | {"drawer 1": ("mug",)}
    failed = tuple(FailedAction(f"take pen {i} from shelf 1", f"shelf {i}", f"pen {i}", {}) for i in range(40))
    known = Conditions(lists, failed)
    here = Belief(location="shelf 7", inventory=frozenset({"pen 9"}))
    for seed in range(50):
        given = known.chosen(here, "open drawer 1", openable_types(), random.Random(seed))
        assert "drawer 1" in given.object_lists and len(given.object_lists) == 16
        assert all(failed[i] in given.failed for i in (7, 9)) and len(given.failed) == 17
        given = known.chosen(here, "take pen 3 from shelf 1", openable_types(), random.Random(seed))
        assert not given.object_lists and all(failed[i] in given.failed for i in (3, 7, 9))
    assert known.chosen(here, "go to drawer 1", openable_types(), random.Random(0)).object_lists == {}
    assert known.chosen(here, "look", openable_types(), random.Random(0)) == Conditions()
    seen = {place for seed in range(200) for place in known.chosen(
        here, "go to shelf 3", openable_types(), random.Random(seed)).object_lists}
    assert seen == set(lists)


def test_which_actions_show_contents() -> None:
    shown = {action for action in ("go to desk 2", "go to fridge 1", "open fridge 1", "close fridge 1", "look",
                                   "take mug 1 from desk 2", "go to") if shows_contents(action, openable_types())}
    assert shown == {"go to desk 2", "open fridge 1"}


def test_the_files_are_read_as_they_were_written_also_by_result_folders(tmp_path: Path) -> None:
    write_conditions(tmp_path / "c", {"room": Conditions.of(TRIAL, INVALID), "empty": Conditions()})
    assert json.loads((tmp_path / "c" / "object_lists.json").read_text()) == {
        "room": {"desk 2": ["mug", "mug"], "fridge 1": ["egg"]}, "empty": {}}
    assert json.loads((tmp_path / "c" / "failed_actions.json").read_text())["room"][1] == [
        "move mug 1 to fridge 1", "fridge 1", "mug 1", CLOSED]
    assert read_conditions(tmp_path / "c") == {"room": Conditions.of(TRIAL, INVALID), "empty": Conditions()}


def test_a_thousand_mutated_files_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    write_conditions(tmp_path, {"room": Conditions.of(TRIAL, INVALID)})
    whole = {name: (tmp_path / name).read_bytes() for name in ("object_lists.json", "failed_actions.json")}
    draw, read = random.Random(1), 0
    for i in range(1000):
        name = list(whole)[i % 2]
        _, content = mutated(tmp_path / name, draw)
        (tmp_path / name).write_bytes(content)
        try:
            rooms = read_conditions(tmp_path)
        except UserError as error:
            assert len(str(error).splitlines()) == 1 and str(tmp_path) in str(error)
        else:
            read += 1
            for room in rooms.values():
                room.chosen(Belief(), "open fridge 1", openable_types(), draw)
        (tmp_path / name).write_bytes(whole[name])
    assert 20 < read < 950


def transitions(episode: str, steps: tuple[tuple[str, str], ...]) -> list[Transition]:
    state, rows = State(TRIAL.task, FIRST), []
    for t, (action, seen) in enumerate(steps):
        rows.append(Transition(episode, t, state.render(), action, seen))
        state = state.after(action, seen)
    return rows


def test_training_rows_say_what_the_engine_answered(tmp_path: Path) -> None:
    other = (("go to desk 2", "You arrive at desk 2. On the desk 2, you see a pen 1."),)
    same = (("go to cabinet 1", "You arrive at cabinet 1. The cabinet 1 is closed."),)
    data = [*transitions("a", STEPS), *transitions("b", other), *transitions("c", same)]
    write_transitions(tmp_path / "t.jsonl", data)
    run = [sys.executable, "-m", "world_model.data_processing.metaicl", "--transitions", str(tmp_path / "t.jsonl")]
    for name in ("one", "two"):
        subprocess.run([*run, "--out_dir", str(tmp_path / name)], check=True, capture_output=True)
    rows = read_transitions(tmp_path / "one" / "transitions.jsonl")
    assert rows == read_transitions(tmp_path / "two" / "transitions.jsonl") and len(rows) == 2 * len(data)
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert report["scenes"] == 2 and report["episodes"] == 3  # b shows another desk
    for perceive, predict, t in zip(rows[::2], rows[1::2], [*data[:10], *data[11:], data[10]], strict=True):
        assert perceive.state.startswith(f"{PERCEIVE}\n") and predict.state.startswith(f"{PREDICT}\n")
        assert perceive.action == predict.action == t.action and perceive.next_state == predict.next_state
        assert f"\nSeen: {t.next_state}\n" in perceive.state
        assert perceive.state.endswith("yes" if t.next_state != "Nothing happens." else "no")
    assert rows[2].next_state == json.dumps({"agent_location": "desk 2", "inventory": "mug 1", "world_state": {
        "cabinet 1": {**CLOSED, "open": "N/A"}, "fridge 1": {**CLOSED, "open": "N/A"},
        "desk 2": {"visited": True, "open": "N/A", "objects": ["mug 3"]}}})
    before, after = (Belief.parse(text) for text in (rows[2].state, rows[2].next_state))
    assert after == before.after("take mug 1 from desk 2", STEPS[1][1])
    prompt = world_model_prompt(rows[1].state, rows[1].action)
    assert prompt.startswith("[PRE]\nSeen in earlier trials: {")
    assert prompt.endswith("\nAction: go to desk 2\nObservation:")


def test_the_number_of_conditions_goes_from_none_to_all() -> None:
    known = Conditions({f"desk {i}": ("pen",) for i in range(4)}, FAILED)
    many = [sampled(known, "go to desk 1", openable_types(), random.Random(i)) for i in range(400)]
    assert {len(one.object_lists) for one in many} == set(range(5))
    assert {len(one.failed) for one in many} == set(range(4))
    assert all(set(one.object_lists) <= set(known.object_lists) and set(map(str, one.failed)) <= set(map(str, FAILED))
               for one in many)
    assert not sampled(known, "close desk 1", openable_types(), random.Random(2)).object_lists


def test_transitions_without_a_symbolic_state_are_counted_and_none_is_an_error(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Transition("x", 0, "Task: boil water\nObservation: This room is called the hallway.", "wait", "ok"),
            Transition("y", 3, f"Task: t\nObservation: {FIRST}\n[3 earlier steps omitted]", "look", "ok")]
    write_transitions(tmp_path / "t.jsonl", rows)
    monkeypatch.setattr(sys, "argv", ["x", "--transitions", str(tmp_path / "t.jsonl"), "--out_dir", str(tmp_path)])
    with pytest.raises(UserError, match="no transition of ALFWorld"):
        metaicl.main()
    assert list(to_rows(scenes_of([]), 0, metaicl.Counter())) == []


def test_the_training_program_takes_the_rows_as_they_are(tmp_path: Path) -> None:
    from tests.tiny import write_tiny_model

    write_transitions(tmp_path / "t.jsonl", transitions("a", STEPS))
    subprocess.run([sys.executable, "-m", "world_model.data_processing.metaicl", "--transitions",
                    str(tmp_path / "t.jsonl"), "--out_dir", str(tmp_path / "m")], check=True, capture_output=True)
    model = write_tiny_model(tmp_path / "tiny")
    done = subprocess.run([sys.executable, "-m", "world_model.base_tuning.finetune", "--model_path", str(model),
                           "--data_path", str(tmp_path / "m" / "transitions.jsonl"), "--out_dir", str(tmp_path / "wm"),
                           "--epochs", "1", "--eval_rows", "2", "--lora_r", "4"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert json.loads((tmp_path / "wm" / "metrics.json").read_text())["exact_match_rows"] > 0


def test_conditions_come_out_of_result_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_result(tmp_path / "run", [make_episode(game, success=True, imagined=[])
                                    for game in make_games(tmp_path / "games", 2)])
    monkeypatch.setattr(sys, "argv", ["x", "--results", str(tmp_path / "run"), "--out_dir", str(tmp_path / "c")])
    extract_conditions.main()
    rooms = read_conditions(tmp_path / "c")
    assert rooms == dict.fromkeys(("game_0", "game_1"), Conditions({"desk 1": ("mug", "pen")}))
    # Later trials tell of the same room: a place that the first didn't see, and a failure of their own.
    later = make_episode(make_games(tmp_path / "again", 1)[0], success=False, imagined=[], played=[
        ("go to fridge 1", "You arrive at fridge 1. The fridge 1 is open. In it, you see a egg 1."),
        ("close desk 1", "Nothing happens.")])
    later.trial, later.steps[1].invalid = 1, True
    write_episode(tmp_path / "run", 0, later)
    extract_conditions.main()
    assert read_conditions(tmp_path / "c") == {**rooms, "game_0": Conditions(
        {"desk 1": ("mug", "pen"), "fridge 1": ("egg",)}, (FailedAction("close desk 1", "fridge 1", None, {
            "visited": False, "open": "N/A", "objects": []}),))}
    monkeypatch.setattr(sys, "argv", ["x", "--results", str(tmp_path), "--out_dir", str(tmp_path / "c")])
    with pytest.raises(UserError, match="not a result folder"):
        extract_conditions.main()
