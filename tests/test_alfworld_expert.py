"""The teacher: its choices on hand-written observations, and its beliefs against the real engine."""

from __future__ import annotations

import random

import pytest

from itp.envs.alfworld.expert import Expert

ROOM = ("You are in the middle of a room. Looking quickly around you, you see a cabinet 1, a coffeemachine 1, "
        "a countertop 2, a countertop 1, a drawer 1, a fridge 1, a microwave 1, and a sinkbasin 1.")


def expert(task_type: str, target: str, parent: str = "", lamp: str = "", room: str = ROOM) -> Expert:
    return Expert({"object_target": target, "parent_target": parent, "toggle_target": lamp}, task_type, room)


def follow(teacher: Expert, *turns: tuple[str, str]) -> None:
    """The teacher must choose each action; it is then told the answer."""
    for action, observation in turns:
        assert teacher.act() == action
        teacher.observe(action, observation)


def tell(teacher: Expert, *turns: tuple[str, str]) -> None:
    """Somebody else acts."""
    for action, observation in turns:
        teacher.observe(action, observation)


def test_search_goes_from_plausible_and_open_to_closed_to_implausible():
    teacher = expert("pick_cool_then_place_in_recep", "Mug", "CoffeeMachine")
    follow(
        teacher,
        ("go to countertop 2", "You arrive at countertop 2. On the countertop 2, you see a spoon 1."),
        ("go to countertop 1", "You arrive at countertop 1. On the countertop 1, you see nothing."),
        ("go to sinkbasin 1", "You arrive at sinkbasin 1. On the sinkbasin 1, you see a fork 1, and a knife 1."),
        ("go to cabinet 1", "You arrive at cabinet 1. The cabinet 1 is closed."),
        ("open cabinet 1", "You open the cabinet 1. The cabinet 1 is open. In it, you see nothing."),
        ("go to fridge 1", "You arrive at fridge 1. The fridge 1 is closed."),
        ("open fridge 1", "You open the fridge 1. The fridge 1 is open. In it, you see a egg 1."),
        ("go to microwave 1", "You arrive at microwave 1. The microwave 1 is closed."),
        ("open microwave 1", "You open the microwave 1. The microwave 1 is open. In it, you see nothing."),
        ("go to coffeemachine 1", "You arrive at coffeemachine 1. On the coffeemachine 1, you see nothing."),
        # A mug isn't kept in a drawer, so it is the last place to look.
        ("go to drawer 1", "You arrive at drawer 1. The drawer 1 is closed."),
        ("open drawer 1", "You open the drawer 1. The drawer 1 is open. In it, you see a mug 1."),
        ("take mug 1 from drawer 1", "You pick up the mug 1 from the drawer 1."),
        ("go to fridge 1", "You arrive at fridge 1. The fridge 1 is open. In it, you see a egg 1."),
        ("cool mug 1 with fridge 1", "You cool the mug 1 using the fridge 1."),
        ("go to coffeemachine 1", "You arrive at coffeemachine 1. On the coffeemachine 1, you see nothing."),
    )
    assert not teacher.finished
    follow(teacher, ("move mug 1 to coffeemachine 1", "You move the mug 1 to the coffeemachine 1."))
    assert teacher.finished


def test_what_others_do_is_remembered_and_undone():
    teacher = expert("pick_heat_then_place_in_recep", "Egg", "CounterTop")
    tell(
        teacher,
        ("go to fridge 1", "You arrive at fridge 1. The fridge 1 is closed."),
        ("open fridge 1", "You open the fridge 1. The fridge 1 is open. In it, you see a egg 1, and a lettuce 1."),
        ("take lettuce 1 from fridge 1", "You pick up the lettuce 1 from the fridge 1."),
    )
    follow(teacher, ("move lettuce 1 to fridge 1", "You move the lettuce 1 to the fridge 1."))
    tell(teacher, ("close fridge 1", "You close the fridge 1."))
    follow(
        teacher,
        ("open fridge 1", "You open the fridge 1. The fridge 1 is open. In it, you see a egg 1, and a lettuce 1."),
        ("take egg 1 from fridge 1", "You pick up the egg 1 from the fridge 1."),
        ("go to microwave 1", "You arrive at microwave 1. The microwave 1 is closed."),
        ("heat egg 1 with microwave 1", "You heat the egg 1 using the microwave 1."),
    )
    assert teacher.act() == "go to countertop 2"
    tell(
        teacher,
        ("go to fridge 1", "You arrive at fridge 1. The fridge 1 is open. In it, you see a lettuce 1."),
        ("cool egg 1 with fridge 1", "You cool the egg 1 using the fridge 1."),
    )
    assert teacher.act() == "go to microwave 1"  # it isn't hot any more


def test_two_objects_come_to_the_same_place():
    teacher = expert("pick_two_obj_and_place", "Spoon", "Drawer",
                     room="Looking quickly around you, you see a countertop 1, a drawer 2, and a drawer 1.")
    follow(
        teacher,
        ("go to countertop 1", "You arrive at countertop 1. On the countertop 1, you see a spoon 2, and a spoon 1."),
        ("take spoon 1 from countertop 1", "You pick up the spoon 1 from the countertop 1."),
    )
    tell(
        teacher,
        ("go to drawer 1", "You arrive at drawer 1. The drawer 1 is closed."),
        ("open drawer 1", "You open the drawer 1. The drawer 1 is open. In it, you see nothing."),
    )
    follow(
        teacher,
        ("move spoon 1 to drawer 1", "You move the spoon 1 to the drawer 1."),
        ("go to countertop 1", "You arrive at countertop 1. On the countertop 1, you see a spoon 2."),
        ("take spoon 2 from countertop 1", "You pick up the spoon 2 from the countertop 1."),
        ("go to drawer 1", "You arrive at drawer 1. The drawer 1 is open. In it, you see a spoon 1."),
        ("move spoon 2 to drawer 1", "You move the spoon 2 to the drawer 1."),
    )
    assert teacher.finished


def test_lamp_that_was_seen_is_used_and_a_burning_one_suffices():
    room = "Looking quickly around you, you see a bed 1, a desk 1, and a shelf 1."
    teacher = expert("look_at_obj_in_light", "Book", "", "DeskLamp", room)
    follow(teacher, ("go to bed 1", "You arrive at bed 1. On the bed 1, you see nothing."),
           ("go to desk 1", "You arrive at desk 1. On the desk 1, you see a desklamp 1."))
    follow(teacher, ("go to shelf 1", "You arrive at shelf 1. On the shelf 1, you see a book 1."),
           ("take book 1 from shelf 1", "You pick up the book 1 from the shelf 1."),
           ("go to desk 1", "You arrive at desk 1. On the desk 1, you see a desklamp 1."),
           ("use desklamp 1", "You turn on the desklamp 1."))
    assert teacher.finished
    tell(teacher, ("go to bed 1", "You arrive at bed 1. On the bed 1, you see nothing."))
    assert not teacher.finished
    assert teacher.act() == "go to desk 1"


def test_a_refused_choice_is_not_repeated():
    teacher = expert("pick_and_place_simple", "Egg", "SinkBasin")
    seen = "You arrive at countertop 1. On the countertop 1, you see a egg 2, and a egg 1."
    tell(teacher, ("go to countertop 1", seen))
    follow(
        teacher,
        ("take egg 1 from countertop 1", "Nothing happens."),
        ("take egg 2 from countertop 1", "Nothing happens."),
    )
    assert teacher.act() == "go to countertop 2"
    tell(teacher, ("go to fridge 1", "Nothing happens."))  # somebody else's mistake says nothing about the fridge
    assert teacher.at == "countertop 1"


@pytest.fixture(scope="module")
def games(tmp_path_factory):
    """One game of each task type in a small room, none of them chosen for being solvable."""
    from itp.envs.alfworld.generate import eligible_scenes
    from itp.envs.alfworld.worlds import make_game, write_game
    from itp.envs.alfworld.games import ALFWORLD_TASK_TYPES
    from itp.games import Game

    root, made = tmp_path_factory.mktemp("games"), []
    for task_type in ALFWORLD_TASK_TYPES:
        drawn = [make_game(scene, task_type, seed=0) for scene in eligible_scenes("train", task_type)]
        game = min(filter(None, drawn), key=lambda game: len(game.world.receptacles) * len(game.world.objects))
        path = write_game(game, root / game.folder / "trial_0", [])
        made.append((Game("alfworld", "train", task_type, str(path), task_type), game.pddl_params()))
    return made


@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_real_engine_agrees_with_what_the_expert_believes(games, noise):
    from itp.envs.alfworld.env import AlfworldEnv

    env, rng = AlfworldEnv(want_admissible=True), random.Random(1)
    for game, params in games:
        observation = env.reset(game)
        teacher = Expert(params, game.task_type, observation.text)
        for _ in range(200 if noise else 50):
            action = teacher.act()
            assert action in observation.admissible
            if rng.random() < noise:
                action = rng.choice(observation.admissible)
            result = env.step(action)
            observation = result.obs
            teacher.observe(action, observation.text)
            assert teacher.finished == result.success
            if result.success:
                break
        assert result.success, game.game_id
    env.close()
