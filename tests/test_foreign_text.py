"""Converted dialogues hold the environment's own words: other text is cut and counted, and arrivals are restored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from itp.envs.alfworld.env import AlfworldEnv
from itp.envs.alfworld.games import list_games
from itp.envs.scienceworld.env import ScienceworldEnv
from itp.games import Game
from itp.text.alfworld_phrases import with_arrival
from itp.text.state import parse
from tests.test_data_processing import CLOSED, OPENING, converted, eto, gpt, human
from world_model.data_processing.convert import NOTHING_TO_IMITATE, WITHOUT_FIRST
from world_model.data_processing.foreign_text import observation_in
from world_model.data_processing.recorded import ARRIVALS, FIRST_OBSERVATION, NOT_ENVIRONMENT, REPEATED_TASK


def test_put_to_move_restores_arrivals(tmp_path: Path, games_root: Path) -> None:
    """ETO cut the engine's sentence, and older ALFWorld named a location; both become what the engine says."""
    row = eto()
    turns = row["conversations"]
    turns[3:] = [gpt("Action: go to cabinet 1"), human("Observation: The cabinet 1 is closed."),
                 gpt("Action: go to desk 2"),
                 human("Observation: You arrive at loc 7. On the desk 2, you see nothing."),
                 gpt("Action: go to fridge 1"), human("The fridge 1 is open. In it, you see a mug 1."),
                 gpt("Action: go to desk 2"), human("Observation: Nothing happens."),
                 gpt("Action: go to desk 2"), human("You arrive at desk 2. On the desk 2, you see nothing."),
                 gpt("Action: examine cabinet 1"), human("Observation: The cabinet 1 is closed.")]
    assert converted(tmp_path, [row]).transitions[0].next_state == "The cabinet 1 is closed."
    out = converted(tmp_path, [row], put_to_move=True)
    assert [t.next_state for t in out.transitions] == [
        "You arrive at cabinet 1. The cabinet 1 is closed.", "You arrive at desk 2. On the desk 2, you see nothing.",
        "You arrive at fridge 1. The fridge 1 is open. In it, you see a mug 1.", "Nothing happens.",
        "You arrive at desk 2. On the desk 2, you see nothing.", "The cabinet 1 is closed."]
    assert out.notes[ARRIVALS] == 3
    game = list_games("train", games_root)[0]
    env = AlfworldEnv(want_admissible=True)
    going = [action for action in env.reset(game).admissible if action.startswith("go to ")]
    for action in going:
        seen = env.step(action).obs.text
        _, _, cut = seen.partition(". ")
        assert with_arrival(action, cut) == with_arrival(action, seen) == seen
    env.close()


def science_chat(opening: Sequence[str], answers: Sequence[str]) -> dict[str, Any]:
    turns = [{"role": "system", "content": opening[0]}] if len(opening) > 1 else []
    turns.append({"role": "user", "content": opening[-1]})
    for answer in answers:
        turns += [{"role": "assistant", "content": "Thought: hm\nAction: wait"}, {"role": "user", "content": answer}]
    return {"id": "s", "messages": turns}


BOIL = "Your task is to boil water.  First, focus on it."
BOILED = "Your task is to boil water. First, focus on it."
HALL = "This room is called the hallway. In it, you see: \n\tthe agent"
WAITED = "You decide to wait."


@pytest.mark.parametrize("opening, answers, first, cut", [
    ([f"{BOIL}\n{HALL}"], [WAITED], HALL, 0),
    ([f"{BOIL} Observation: {HALL}"], [WAITED], HALL, 0),
    ([f"{BOIL}\nGuideline: fill a pot."], [WAITED], "", 1),
    ([f"{BOIL} Guideline: fill a pot."], [WAITED], "", 1),
    ([f"{BOIL}\nGuideline: fill a pot.\n{HALL}"], [WAITED], HALL, 1),
    ([f"{BOIL}\nFirst go to the kitchen, where a pot is."], [WAITED], "", 1),
    ([f"You are a scientist. {BOIL}\n\n## Instructions\nAnswer as Action: <command>.", f"Observation: {HALL}"],
     [WAITED], HALL, 1),
    ([f"You are a scientist. {BOIL}", f"{HALL}\n\n# Tools\nwait"], [WAITED], HALL, 1),
    ([f"{BOIL}\n{HALL}\nSUMMARIZATION: in the hallway"], [f"{WAITED}\nSUMMARIZATION: I waited."], HALL, 2),
    ([f"{BOIL}\n{HALL}"], [f"Observation: {WAITED} SUMMARIZATION: I waited."], HALL, 1),
    ([f"{BOIL}\n{HALL}"], [f"{WAITED}\n**State knowledge**: warm"], HALL, 1),
    ([f"{BOIL}\n{HALL}"], [f"{WAITED} Available actions: wait, look around"], HALL, 1),
    ([f"{BOIL}\n{HALL}"], [f"Step 2 of 9\nObservation: {WAITED}\nAction:"], HALL, 1),
])
def test_what_is_not_scienceworlds_is_cut_and_counted(tmp_path: Path, opening: list[str], answers: list[str],
                                                      first: str, cut: int) -> None:
    out = converted(tmp_path, [science_chat(opening, answers)])
    step, = out.transitions
    assert (parse(step.state).task, parse(step.state).first) == (BOILED, first)
    assert (step.action, step.next_state, out.notes[NOT_ENVIRONMENT]) == ("wait", WAITED, cut)
    assert out.notes[WITHOUT_FIRST] == (not first)


@pytest.mark.parametrize("between", ["\n", " ", "\n\n"])
def test_what_is_not_alfworlds_is_cut_and_counted(tmp_path: Path, between: str) -> None:
    row = eto()
    turns, choices = row["conversations"], f"{between}AVAILABLE ACTIONS: look, go to desk 2"
    expected = converted(tmp_path, [row])
    for turn in turns[2::2]:
        turn["value"] += choices
    turns[5]["value"] += f"{between}SUMMARIZATION: opened it".replace("\n\n", "\n")
    out = converted(tmp_path, [row])
    assert out.transitions == expected.transitions and out.talks == expected.talks
    assert out.notes[NOT_ENVIRONMENT] == 3 and expected.notes[NOT_ENVIRONMENT] == 0
    turns[2]["value"] = OPENING.replace("\n\nYour", f"{between}Hint: look well.\nYour")
    assert converted(tmp_path, [row]).transitions == expected.transitions


@pytest.mark.parametrize("posed", ["{task}\nObservation: {seen}", "{task} Observation: {seen}", "{task}\n{seen}",
                                   "Task: {task}\n\n{seen}"])
def test_a_task_that_every_turn_repeats_is_one_episode(tmp_path: Path, posed: str) -> None:
    said = [posed.format(task=BOIL, seen=seen) for seen in (HALL, WAITED, HALL, WAITED)]
    out = converted(tmp_path, [science_chat(said[:1], said[1:])])
    assert [t.next_state for t in out.transitions] == [WAITED, HALL, WAITED]
    assert (parse(out.transitions[0].state).task, parse(out.transitions[0].state).first) == (BOILED, HALL)
    assert out.notes[REPEATED_TASK] == 3


@pytest.mark.parametrize("repeated", ["Your task is to: put a clean plate in fridge.\n", f"{OPENING}\n\n"])
def test_alfworlds_repeated_task_is_one_episode(tmp_path: Path, repeated: str) -> None:
    row = eto()
    expected = converted(tmp_path, [row]).transitions
    for turn in row["conversations"][4::2]:
        turn["value"] = repeated + turn["value"]
    assert converted(tmp_path, [row]).transitions == expected
    row["conversations"][4]["value"] = CLOSED  # and where only some turns do
    if not repeated.startswith("You"):
        assert converted(tmp_path, [row]).transitions == expected


def test_an_example_with_the_same_task_is_not_part_of_the_episode(tmp_path: Path) -> None:
    row = eto()
    expected = converted(tmp_path, [row]).transitions
    row["conversations"][2:2] = [human(OPENING), gpt("Action: look"), human("Nothing happens."), gpt("Action: look")]
    assert converted(tmp_path, [row]).transitions == expected


def test_an_episode_without_a_transition_is_dropped(tmp_path: Path) -> None:
    short = eto()
    del short["conversations"][4:]
    out = converted(tmp_path, [short])
    assert (out.kept, dict(out.dropped), out.talks) == (0, {"no action that was answered": 1}, [])


@pytest.mark.parametrize("loss", [False, None, 0])
def test_an_episode_of_which_nothing_is_learned_makes_no_dialogue(tmp_path: Path, loss: Any) -> None:
    """One such dialogue would make the base policy refuse the whole file."""
    row = eto()
    for turn in row["conversations"][1::2]:
        turn["loss"] = loss
    out = converted(tmp_path, [row, eto(1)])
    assert [talk["id"] for talk in out.talks] == ["alfworld/alfworld_1"] and out.notes[NOTHING_TO_IMITATE] == 1
    assert [t.expert_action for t in out.transitions[:2]] == ["", ""]


def test_nothing_that_the_engines_say_is_cut(games_root: Path) -> None:
    """An independent check of the labels: on the engines' own words nothing is foreign."""
    env = AlfworldEnv(want_admissible=True)
    said = []
    for game in list_games("train", games_root):
        seen = env.reset(game)
        said.append(seen.text)
        for action in (*seen.admissible, "sing"):
            said.append(env.step(action).obs.text)
    env.close()
    science = ScienceworldEnv()
    for kind in ("boil", "find-plant", "lifespan-longest-lived"):
        seen = science.reset(Game("scienceworld", "train", "x", f"{kind}/0/easy", kind))
        assert FIRST_OBSERVATION.match(seen.text)
        said += [seen.text, *(science.step(action).obs.text for action in (
            "inventory", "teleport to kitchen", "look around", "open cupboard", "task", "look at fridge", "sing",
            "open fridge", "pick up thermometer", "focus on stove", "wait1"))]
    science.close()
    assert len(said) > 60
    for text in said:
        assert observation_in(text) == (text.strip(), False)


@pytest.mark.parametrize("more", [
    "Current score: 10", "Steps left: 5", "Step 3/30", "[Step 3 of 30]", "Inventory: x", "Available objects: a",
    "Valid objects:", "Your available actions are: look", "Available Actions\n- a", "[Available actions] a",
    "<available_actions>a</available_actions>", "admissible actions = [a]", "Important: x", "Warning: x", "Rules:\nx",
    "Experience: x", "Insights:", "== Hints ==\nx", "System: x", "Human: x", "Think: x", "- Note: x", "* Hint: x",
    "1. Hint: x", "> Hint: x", "💡 Hint: x", "**Hint:** x", "⚠️ **Warning**: x", "Recent Actions: a",
    "Your next action:", "Please respond with Action: <command>", "You have 5 steps left.", "(Hint: x)"])
def test_all_of_a_foreign_line_is_cut(more: str) -> None:
    for said in (WAITED, HALL, "On the desk 1, you see a mug 1."):
        for between in ("\n", "\n\n", " ")[:2 if more[0] == "1" else 3]:  # "a mug 1. Hint: x" is of mug 1
            assert observation_in(f"{said}{between}{more}") == (said, True)


@pytest.mark.parametrize("text", [
    "In your inventory, you see:\n\tan orange", "You are carrying: a mug 1.", "In the sink is: nothing.",
    "Task Description:\nYour task is to boil water.", "a note (reading: 3 actions)", "In it, you see:\n\ta door",
    "a book. The recipe reads: \nTo make salt water, you need to mix water.", "0:\tpick up the red - box\n1:\tlook"])
def test_what_looks_like_a_label_stays(text: str) -> None:
    assert observation_in(text) == (text, False)


@pytest.mark.parametrize("again", [
    "{task}\n{seen}\n{task}", "Remember, your task is to boil water. First, focus on it.\n{seen}",
    'The task: "{task}"\n{seen}', "{task} {seen}", "{seen}\nReminder: {task}"])
def test_a_task_said_again_in_other_words_is_removed(tmp_path: Path, again: str) -> None:
    said = [again.format(task=BOILED, seen=seen) for seen in (WAITED, HALL, WAITED)]
    out = converted(tmp_path, [science_chat([f"{BOIL}\n{HALL}"], said)])
    assert [t.next_state for t in out.transitions] == [WAITED, HALL, WAITED]
    assert parse(out.transitions[0].state).task == BOILED


def test_alfworlds_task_is_its_sentence(tmp_path: Path) -> None:
    row = eto()
    row["conversations"][2]["value"] += " You have 30 steps. Do it well."
    assert parse(converted(tmp_path, [row]).transitions[0].state).task == "put a clean plate in fridge"


def test_an_episode_with_no_answer_but_ok_is_dropped(tmp_path: Path) -> None:
    row = eto()
    for turn in row["conversations"][4::2]:
        turn["value"] = "OK"
    assert dict(converted(tmp_path, [row]).dropped) == {"no answer but OK": 1}
