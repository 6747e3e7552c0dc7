"""IMPLEMENT: what a task needs, what an outcome is worth, what is remembered, and both ways to choose."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from itp.agent.policy import Policy
from itp.envs.alfworld.env import AlfworldEnv
from itp.envs.alfworld.expert import Expert
from itp.envs.alfworld.games import list_games, task_params
from itp.envs.alfworld.needs import DELIVERED, Needs
from itp.envs.alfworld.vocabulary import object_types, place_types
from itp.envs.base import Observation
from itp.games import Game
from itp.lm.base import GenParams, Generation, asking
from itp.methods.base import Decision, EarlierTrial, View
from itp.methods.gain import NEW, Gain, frequencies, gathers_information
from itp.methods.implement import MARGIN, Implement, preferred
from itp.methods.memory import chosen, remembered, unseen, with_memory
from itp.methods.settings import MethodSettings
from itp.text.belief import Belief
from itp.text.prompt_format import PromptFormat
from itp.text.state import State

ROOM = ("You are in the middle of a room. Looking quickly around you, you see a cabinet 1, a cabinet 2, a desk 1, a "
        "microwave 1, and a shelf 1.")
START = State("put a hot mug in shelf", ROOM)
DESK = ("go to desk 1", "You arrive at desk 1. On the desk 1, you see a pen 1.")
CLOSED = ("go to cabinet 1", "You arrive at cabinet 1. The cabinet 1 is closed.")
OPENED = ("open cabinet 1", "You open the cabinet 1. The cabinet 1 is open. In it, you see a mug 2.")
EMPTY = ("open cabinet 1", "You open the cabinet 1. The cabinet 1 is open. In it, you see nothing.")
TAKE = ("take mug 2 from cabinet 1", "You pick up the mug 2 from the cabinet 1.")
PEN = ("take pen 1 from desk 1", "You pick up the pen 1 from the desk 1.")
SHUT = ("close cabinet 1", "You close the cabinet 1.")
OVEN = ("go to microwave 1", "You arrive at microwave 1. The microwave 1 is closed.")
HEAT = ("heat mug 2 with microwave 1", "You heat the mug 2 using the microwave 1.")
SHELF = ("go to shelf 1", "You arrive at shelf 1. On the shelf 1, you see nothing.")
PUT = ("move mug 2 to shelf 1", "You move the mug 2 to the shelf 1.")


def after(*steps: tuple[str, str], task: str = START.task) -> State:
    return State(task, ROOM, steps)


# --- what the task needs


@pytest.mark.parametrize(("task", "needs"), [
    ("put a hot mug in shelf.", Needs("mug", "shelf", "", "hot")),
    ("heat some egg and put it in garbagecan", Needs("egg", "garbagecan", "", "hot")),
    ("cool some pan and put it in diningtable", Needs("pan", "diningtable", "", "cool")),
    ("put a clean plate in microwave", Needs("plate", "microwave", "", "clean")),
    ("find two apple and put them in countertop", Needs("apple", "countertop", number=2)),
    ("put some box on coffeetable", Needs("box", "coffeetable")),
    ("look at cd under the desklamp", Needs("cd", "", "desklamp")),
    ("Examine the mug with the floorlamp", Needs("mug", "", "floorlamp")),
    ("boil water", None), ("", None), ("put a mug somewhere", None), ("put it in shelf", None)])
def test_needs_are_read_off_the_task(task: str, needs: Needs | None) -> None:
    assert Needs.of(task) == needs


def test_needs_of_made_games_are_those_of_their_files(games_root: Path) -> None:
    """The file says what the task means; an agent that only reads the words finds the same."""
    for split in ("train", "seen", "unseen"):
        for game in list_games(split, str(games_root)):
            start, params = AlfworldEnv().reset(game), task_params(game)
            needs = Needs.of(start.task)
            assert (needs.target, needs.place, needs.lamp) == tuple(
                str(params[key]).lower() for key in ("object_target", "parent_target", "toggle_target"))
            assert (needs.number == 2) == ("two" in game.task_type)


def test_progress_rises_along_a_solution_and_a_second_object_must_join_the_first() -> None:
    needs, steps, seen = Needs.of(START.task), [], []
    for step in (DESK, CLOSED, OPENED, TAKE, OVEN, HEAT, SHELF, PUT):
        steps.append(step)
        seen.append(needs.progress(Belief.of(after(*steps))))
    assert seen == [0, 0, 2, 4, 5, 6, 7, DELIVERED]
    assert needs.progress(Belief.of(after(DESK, PEN))) < 0
    two = Needs("mug", "cabinet", number=2)
    held = Belief.of(after(CLOSED, OPENED, DESK, ("go to cabinet 2", "You arrive at cabinet 2. The cabinet 2 is open. "
                                                                     "In it, you see nothing.")))
    held = dataclasses.replace(held, inventory=frozenset({"mug 5"}))
    assert two.progress(held) == DELIVERED + 6  # not the cabinet where the other one is
    assert two.progress(dataclasses.replace(held, location="cabinet 1")) == DELIVERED + 7


def test_progress_of_the_expert_ends_at_the_top_in_real_games(games_root: Path) -> None:
    """The engine's own criterion: exactly the won states have the whole progress."""
    env, compared = AlfworldEnv(), 0
    for game in list_games("train", str(games_root)):
        start = env.reset(game)
        state, expert = State(start.task, start.text), Expert(task_params(game), game.task_type, start.text)
        needs = Needs.of(start.task)
        for _ in range(60):
            result = env.step(action := expert.act())
            expert.observe(action, result.obs.text)
            state = state.after(action, result.obs.text)
            whole = needs.progress(Belief.of(state)) == DELIVERED * needs.number
            assert whole == result.success, (action, state.task)
            compared += 1
            if result.success:
                break
        else:
            raise AssertionError(game.game_id)
    assert compared > 30


def test_a_thousand_made_up_tasks_and_beliefs_have_a_progress() -> None:
    draw = random.Random(0)
    words = [*object_types()[:20], *list(place_types())[:20], *"put a hot two in under desklamp Ω 1".split()]
    nowhere = ("go to shelf 99", "You arrive at shelf 99.")
    assert Needs.of(START.task).progress(Belief.of(after(CLOSED, OPENED, TAKE, OVEN, HEAT, nowhere))) == 7
    for _ in range(1000):
        needs = Needs.of(" ".join(draw.choices(words, k=draw.randint(0, 9))))
        steps = draw.choices([DESK, CLOSED, OPENED, EMPTY, TAKE, SHUT, OVEN, HEAT, SHELF, PUT, nowhere],
                             k=draw.randint(0, 8))
        if needs is not None:
            assert -1 <= needs.progress(Belief.of(after(*steps))) <= 2 * DELIVERED


# --- what an outcome is worth


def test_the_worth_of_outcomes_by_hand() -> None:
    gain = Gain(after(DESK), {})
    assert gain.worth((CLOSED, OPENED)) == 1  # the mug is found
    assert gain.worth((CLOSED, EMPTY)) == NEW and gain.worth((SHELF,)) == NEW
    assert gain.worth((CLOSED,)) == gain.worth((("look", "You are facing the desk 1."),)) == 0
    assert gain.worth((("go to desk 1", "Nothing happens."),)) == 0
    assert gain.worth((PEN,)) == -1
    assert gain.expected([(CLOSED, OPENED), (CLOSED, EMPTY), (CLOSED,), (CLOSED,)]) == (1 + NEW) / 4
    # Walking back to what was seen brings nothing, whatever is predicted to be there now.
    back = ("go to desk 1", "You arrive at desk 1. On the desk 1, you see a mug 7, and a pen 1.")
    assert Gain(after(DESK, SHELF), {}).worth((back,)) == 0
    assert Gain(after(CLOSED, OPENED, TAKE, OVEN, HEAT), {}).worth((SHELF,)) == 1
    put = ("move mug 2 to cabinet 1", "You move the mug 2 to the cabinet 1.")
    assert Gain(after(CLOSED, OPENED, TAKE), {}).worth((put,)) == -1


def test_a_loop_is_worth_nothing_the_second_time() -> None:
    pick, drop = (("take pen 1 from desk 1", "You pick up the pen 1 from the desk 1."),
                  ("move pen 1 to shelf 1", "You move the pen 1 to the shelf 1."))
    task = "boil some water"  # nothing is needed: only newness counts
    assert Gain(after(DESK, task=task), {}).worth((pick,)) == NEW
    assert Gain(after(DESK, pick, SHELF, task=task), {}).worth((drop,)) == NEW
    back = ("take pen 1 from shelf 1", "You pick up the pen 1 from the shelf 1.")
    assert Gain(after(DESK, pick, SHELF, drop, task=task), {}).worth((back,)) == 0


def test_scienceworlds_observations_are_new_once() -> None:
    gain = Gain(State("boil water", "This room is called the hallway."), {})
    assert gain.worth((("look", "This room is called the hallway."),)) == 0
    assert gain.worth((("wait", "You decide to wait."),)) == NEW
    assert gain.worth((("fly", "No known action matches that input."),)) == 0


def test_beliefs_count() -> None:
    outcomes = [(CLOSED, OPENED), (CLOSED, OPENED), (CLOSED, EMPTY), (CLOSED,)]
    assert frequencies("go to cabinet 1", outcomes) == (
        "Of 4 predicted answers to go to cabinet 1: mug 2, nothing 1, "
        "You arrive at cabinet 1. The cabinet 1 is closed 1.")


def test_a_thermometer_makes_no_receptacles() -> None:
    seen = "This room is called the kitchen. In it, you see: a thermometer, reading a temperature of 10 degrees."
    state = State("boil water", seen)
    assert Gain(state, {}, env="scienceworld").worth((("open door", "The door is now open."),)) == NEW


@pytest.mark.parametrize("task, condition", [
    ("place a heated mug in the cabinet", "hot"), ("put a chilled apple in fridge", "cool"),
    ("put a washed plate in cabinet", "clean"), ("put some sliced apple in fridge", None)])
def test_a_task_is_understood_whole_or_not_at_all(task: str, condition: str | None) -> None:
    needs = Needs.of(task)
    assert (needs.condition if needs else None) == condition


def test_what_gathers_information() -> None:
    state = after(DESK, CLOSED)
    assert [action for action in ("go to desk 1", "go to cabinet 1", "open cabinet 1", "go to shelf 1", "look",
                                  "go to attic 1", "take pen 1 from desk 1") if gathers_information(state, action)] == [
        "go to cabinet 1", "open cabinet 1", "go to shelf 1"]


def test_a_later_proposal_must_be_clearly_better() -> None:
    assert preferred({"a": 0.5, "b": 0.5 + MARGIN, "c": 0.5}) == "a"
    assert preferred({"a": 0.0, "b": 0.5, "c": 1.0}) == "c" and preferred({"a": -1.0, "b": 0.0}) == "b"


# --- memory


def trial(*steps: tuple[str, str]) -> EarlierTrial:
    return EarlierTrial(after(*steps), tuple(seen == "Nothing happens." for _, seen in steps), False)


def test_memory_is_the_first_visit_of_the_earliest_trial() -> None:
    moved = ("go to shelf 1", "You arrive at shelf 1. On the shelf 1, you see a mug 2.")
    memory = remembered((trial(DESK, CLOSED, OPENED, TAKE, SHELF, PUT, DESK, moved), trial(SHELF, CLOSED, EMPTY)))
    assert memory == {"desk 1": (DESK,), "cabinet 1": (CLOSED, OPENED, SHUT), "shelf 1": (SHELF,)}
    assert unseen(memory, after(SHELF)) == {place: memory[place] for place in ("desk 1", "cabinet 1")}
    assert with_memory(after(SHELF), {"desk 1": (DESK,)}).history == (DESK, SHELF)
    many = {f"shelf {i}": (SHELF,) for i in range(40)}
    given = chosen(many, "shelf 3", random.Random(0))
    assert len(given) == 16 and list(given)[-1] == "shelf 3" and len(chosen(many, "desk 1", random.Random(0))) == 15


def test_memory_says_in_the_engine_what_a_new_episode_sees(games_root: Path) -> None:
    """The remembered steps are exactly what the game answers to them when it is played again."""
    env, draw, compared = AlfworldEnv(want_admissible=True), random.Random(3), 0
    for game in list_games("train", str(games_root))[:3]:
        seen = env.reset(game)
        state = State(seen.task, seen.text)
        for _ in range(60):
            action = draw.choice(seen.admissible)
            seen = env.step(action).obs
            state = state.after(action, seen.text)
        memory = remembered((EarlierTrial(state, (False,) * 60, False),))
        env.reset(game)
        for steps in memory.values():
            for action, said in steps:
                assert env.step(action).obs.text == said
                compared += 1
    assert compared > 30


# --- the method


class Answers:
    """A world model that knows its answers, and notes what it was asked."""

    def __init__(self, answers: dict[str, list[str]]) -> None:
        self.answers, self.asked = answers, []

    async def sample(self, state: State, action: str, n: int, seed: int, temperature: float = 1.0) -> list[str]:
        self.asked.append((state, action, n, temperature))
        with asking("world_model"):
            return [self.answers[action][i % len(self.answers[action])] for i in range(n)]


class Scripted:
    """A policy LM that is asked for choices (the first one in its order), or for texts (the next of a list)."""

    name, role, tokenizer, context_length = "scripted", "policy", None, None

    def __init__(self, order: Sequence[str] = (), texts: Sequence[str] = ()) -> None:
        self.order, self.texts, self.prompts, self.asked = list(order), list(texts), [], []

    async def generate(self, prompts: Sequence[str], params: GenParams) -> list[Generation]:
        self.prompts += prompts
        self.asked.append(params)
        if params.choices:
            text = min(params.choices, key=lambda choice: self.order.index(choice.strip()))
            return [Generation(text, 1, 1, 0, "stop", -1.0) for _ in prompts]
        return [Generation(self.texts.pop(0), 1, 1, 0, "stop", -1.0) for _ in prompts]


def view(state: State, admissible: Sequence[str] | None, past: Sequence[Decision] = (), **more) -> View:
    return View(Game("alfworld", "train", "g", "g", "x"), len(state.history), state,
                Observation(state.observation, state.task, tuple(admissible) if admissible else None), 5, tuple(past),
                (False,) * len(state.history), **more)


def decide(lm: Scripted, wm: Answers, seen: View, *, instruct: bool = False, **settings) -> Decision:
    policy = (Policy(lm, form=PromptFormat("instruct")) if instruct else Policy(lm, selection="constrained"))
    return asyncio.run(Implement(policy, wm, MethodSettings(**settings)).act(seen))


ADMISSIBLE = ("go to cabinet 1", "go to desk 1", "go to shelf 1", "look")
ANSWERS = {"go to cabinet 1": [CLOSED[1]], "open cabinet 1": [OPENED[1], EMPTY[1]], "go to desk 1": [DESK[1]],
           "go to shelf 1": [SHELF[1]], "look": ["You are in the middle of a room."]}


def test_by_gain_a_loop_gives_way_to_what_is_new_and_opening_belongs_to_going() -> None:
    wm = Answers(ANSWERS)
    decision = decide(Scripted(["go to desk 1", "look", "go to cabinet 1", "go to shelf 1"]), wm,
                      view(after(DESK, SHELF), ADMISSIBLE), implement_choice="gain", belief_samples=4,
                      implement_temperature=0.7)
    assert decision.action == "go to cabinet 1"
    assert decision.considered == (("go to desk 1", 0, 1), ("look", 0, 1), ("go to cabinet 1", (1 + NEW) / 2, 4))
    assert decision.imagined.steps == (CLOSED, OPENED) and decision.k == 2
    assert decision.reflection == "Of 4 predicted answers to go to cabinet 1: mug 2, nothing 2."
    assert [(action, n) for _, action, n, _ in wm.asked] == [
        ("go to desk 1", 1), ("look", 1), ("go to cabinet 1", 4), ("open cabinet 1", 4)]
    assert {temperature for *_, temperature in wm.asked} == {0.7}
    assert wm.asked[-1][0] == after(DESK, SHELF, CLOSED)


def test_by_gain_the_policy_proposes_at_its_temperature_with_the_seed_of_the_trial() -> None:
    asked = {}
    for temperature, seed in ((0.0, 5), (0.8, 5), (0.8, 6)):
        lm = Scripted(ADMISSIBLE)
        method = Implement(Policy(lm, selection="constrained", temperature=temperature), Answers(ANSWERS),
                           MethodSettings(implement_choice="gain"))
        asyncio.run(method.act(dataclasses.replace(view(START, ADMISSIBLE), seed=seed)))
        drawn = [params for params in lm.asked if params.choices]
        assert drawn and {params.temperature for params in drawn} == {temperature}
        asked[temperature, seed] = [params.seed for params in drawn]
    assert asked[0.8, 5] == asked[0.0, 5] and not set(asked[0.8, 5]) & set(asked[0.8, 6])


def test_by_gain_what_was_imagined_behind_the_last_action_is_proposed_first() -> None:
    first = decide(Scripted(ADMISSIBLE), Answers(ANSWERS), view(START, ADMISSIBLE), implement_choice="gain")
    assert first.action == "go to cabinet 1" and len(first.imagined.steps) == 2
    near = ("go to shelf 1", "go to desk 1", "open cabinet 1", "look")
    decision = decide(Scripted(near), Answers(ANSWERS), view(after(CLOSED), near, [first]), implement_choice="gain")
    assert decision.action == "open cabinet 1" and [a for a, *_ in decision.considered] == ["open cabinet 1", near[0]]
    other = (CLOSED[0], "You arrive at cabinet 1. The cabinet 1 is open. In it, you see nothing.")
    decision = decide(Scripted(near), Answers(ANSWERS), view(after(other), near, [first]), implement_choice="gain")
    assert decision.action == near[0]


@pytest.mark.parametrize(("memory", "goes"), [("context", True), ("recall", True), ("none", False)])
def test_memory_proposes_the_way_to_what_is_needed_and_the_world_model_reads_it(memory: str, goes: bool) -> None:
    wm = Answers({**ANSWERS, "open cabinet 1": [OPENED[1]]})
    earlier = (trial(DESK, SHELF, CLOSED, OPENED),)
    order = ["go to shelf 1", "go to desk 1", "look", "go to cabinet 1"]
    decision = decide(Scripted(order), wm, view(START, ADMISSIBLE, earlier=earlier), implement_choice="gain",
                      implement_memory=memory)
    assert decision.action == ("go to cabinet 1" if goes else "go to shelf 1")
    read = wm.asked[0][0].history
    assert read == (((*(DESK, SHELF), CLOSED, OPENED, SHUT)) if goes else ())


def test_recall_is_believed_more_than_a_world_model_that_forgets() -> None:
    forgets = Answers({**ANSWERS, "open cabinet 1": [EMPTY[1]]})
    earlier = (trial(CLOSED, OPENED),)
    values = {memory: dict((a, v) for a, v, _ in decide(
        Scripted(ADMISSIBLE), forgets, view(START, ADMISSIBLE, earlier=earlier), implement_choice="gain",
        implement_memory=memory).considered)["go to cabinet 1"] for memory in ("context", "recall")}
    assert values == {"context": -1, "recall": 1}


def test_without_imagination_the_policy_acts_on_what_is_remembered() -> None:
    lm = Scripted(ADMISSIBLE)
    decision = decide(lm, Answers({}), view(START, ADMISSIBLE, earlier=(trial(DESK),)), implement_imagination=False)
    assert decision.action == "go to cabinet 1" and decision.k == 0
    assert lm.prompts == [f"{after(DESK).render()}\nAction:"]


def reply(action: str, help: str) -> str:
    return f" I look for a mug.\nAction: {action}\nHelp: {help}\n"


def test_an_instruct_policy_asks_for_help_and_reads_frequencies() -> None:
    """Two actions are tried; the first is proposed again with a wish for help, which brings one more round."""
    lm = Scripted(texts=[reply("go to cabinet 1", "no"), "It may hold a mug (1 of 2).",
                         reply("go to cabinet 1", "yes"), reply("go to desk 1", "no"), "A pen.",
                         reply("go to cabinet 1", "no")])
    decision = decide(lm, Answers(ANSWERS), view(START, None), instruct=True, belief_samples=2, rounds=5)
    assert decision.action == "go to cabinet 1" and decision.thought == "I look for a mug." and not lm.texts
    assert [(a, n) for a, _, n in decision.considered] == [("go to cabinet 1", 2), ("go to desk 1", 2)]
    told = lm.prompts[1]
    assert f"\nIf: go to cabinet 1\nThen (1 of 2): {CLOSED[1]} {OPENED[1]}\nThen (1 of 2): " in told
    assert told.endswith("\nBelief:") and "150 words" in told and lm.prompts[0].endswith("\nPlan:")
    assert lm.prompts[-1].endswith("\nIf: go to cabinet 1\nBelief: It may hold a mug (1 of 2).\n"
                                   "If: go to desk 1\nBelief: A pen.\nPlan:")


@pytest.mark.parametrize(("server", "text", "chosen"), [(False, None, "look"), (True, "go to desk 1", "go to desk 1"),
                                                        (True, "fly", "go to cabinet 1")])
def test_after_the_last_round_one_of_the_imagined_actions_is_taken(server: bool, text: str, chosen: str) -> None:
    proposed = ["go to cabinet 1", "go to desk 1", "look"]
    texts = [part for action in proposed for part in (reply(action, "yes"), "so")] + [text] * server
    lm = Scripted(["look", "go to desk 1", "go to cabinet 1"], texts)
    policy = Policy(lm, form=PromptFormat("instruct"), score_answers=server)
    decision = asyncio.run(Implement(policy, Answers(ANSWERS), MethodSettings(rounds=3, belief_samples=2)).act(
        view(START, None)))
    assert decision.action == chosen and [a for a, *_ in decision.considered] == proposed


def test_rounds_go_on_only_while_nothing_is_worth_anything() -> None:
    admissible = tuple(f"take pen {i} from desk 1" for i in range(30)) + ("go to shelf 1",)
    answers = dict.fromkeys(admissible, ["Nothing happens."]) | {"go to shelf 1": [SHELF[1]]}
    decision = decide(Scripted(admissible), Answers(answers), view(after(DESK), admissible), implement_choice="gain")
    assert decision.action == "go to shelf 1" and len(decision.considered) == 31


@pytest.mark.parametrize("choice", ["policy", "gain"])
def test_the_same_seed_gives_the_same_decision(choice: str) -> None:
    made: Callable[[], Decision] = lambda: decide(  # noqa: E731
        Scripted(ADMISSIBLE, ["a"] * 20), Answers(ANSWERS), view(START, ADMISSIBLE), implement_choice=choice)
    assert made() == made()


def test_a_thousand_mutated_predictions_have_a_worth() -> None:
    """World models write nonsense; whatever they say is worth something from -1 to 1."""
    draw, steps = random.Random(2), [DESK, CLOSED, OPENED, TAKE, OVEN, HEAT, SHELF, PUT]
    for _ in range(1000):
        task = draw.choice([START.task, "find two mug and put them in cabinet", "look at mug under the desklamp", "x"])
        done = steps[:draw.randint(0, len(steps))]
        gain = Gain(after(*done, task=task), remembered((trial(*steps),)), draw.random() < 0.5)
        action, said = draw.choice([*steps, ("look", "You are facing the desk 1."), ("", "")])
        cut = draw.randint(0, len(said))
        words = draw.choice(["mug 9", " desk 77", "\n", "On the sofa 3, you see a mug 3.", "is open. In it", "Ω"])
        said = said[:cut] + words + said[cut:] if draw.random() < 0.7 else said[cut:]
        assert gain.worth(((action, said),)) in (-1, 0, NEW, 1)
        assert frequencies(action, [((action, said),)]).startswith("Of 1 predicted")
