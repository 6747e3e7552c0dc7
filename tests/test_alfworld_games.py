"""Generated games: what they hold, that ALFWorld's own code takes them, and that they can be made again."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from itp.envs.alfworld.games import ALFWORLD_TASK_TYPES, list_games
from itp.envs.alfworld.generate import GameBatch, GenerateSettings, generate, make_batch, plan_batches, sample_games
from itp.envs.alfworld.worlds import CAPACITY, Thing, World, alternative_goals, make_game, write_problem
from itp.errors import UserError
from itp.games import SPLITS


def settings(out: Path, **changes) -> GenerateSettings:
    return GenerateSettings(**{"out_dir": str(out), "train": 6, "seen": 1, "unseen": 2, "seed": 3, **changes})


def digests(root: Path) -> dict[str, str]:
    files = sorted((root / "json_2.1.1").rglob("*.*"))
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data")
    assert generate(settings(out))["made"] == 9
    return out


@pytest.fixture(scope="module")
def drawn():
    """144 games that no engine has seen."""
    batches = plan_batches(GenerateSettings(out_dir="", train=72, seen=36, unseen=36, seed=1))
    return [(batch, next(sample_games(batch, Counter()))) for batch in batches]


# What is written


def test_alfworld_itself_collects_them(root):
    from alfworld.agents.environment.alfred_tw_env import AlfredTWEnv

    for split, count in zip(SPLITS, (6, 1, 2)):
        ours = [game.path for game in list_games(split, root)]
        folder = str(root / "json_2.1.1" / split)
        config = {"env": {"goal_desc_human_anns_prob": 0, "task_types": [1, 2, 3, 4, 5, 6]},
                  "dataset": {"data_path": folder, "num_train_games": 0}}
        assert sorted(AlfredTWEnv(config, train_eval="train").game_files) == sorted(ours)
        assert len(ours) == count
    assert sorted(game.task_type for game in list_games("train", root)) == sorted(ALFWORLD_TASK_TYPES)


def test_walkthrough_wins_in_the_unmodified_engine(root):
    from itp.envs.alfworld.env import AlfworldEnv

    env = AlfworldEnv(fast=False)
    for game in list_games("valid_unseen", root)[:1]:
        assert env.reset(game).text.startswith("You are in the middle of a room.")
        walkthrough = json.loads(Path(game.path).read_text())["walkthrough"]
        won = [env.step(action).success for action in walkthrough]
        assert won == [False] * (len(walkthrough) - 1) + [True]
    env.close()


def test_alfworlds_own_expert_can_play_them(root):
    from itp.envs.alfworld.env import AlfworldEnv

    env = AlfworldEnv(expert="handcoded")
    won = 0
    for game in list_games("train", root):
        observation = env.reset(game)
        for _ in range(60):
            result = env.step(observation.expert_action)
            observation = result.obs
            if result.success:
                won += 1
                break
    env.close()
    assert won >= 3  # it is known to fail in about one game of seven


def test_task_sentence_and_parameters_agree_with_the_folder(root):
    for split in SPLITS:
        for game in list_games(split, root):
            task_type, target, movable, place, scene = Path(game.path).parent.parent.name.split("-")
            traj = json.loads(Path(game.path).with_name("traj_data.json").read_text())
            params = traj["pddl_params"]
            assert (task_type, target, movable) == (traj["task_type"], params["object_target"], "None")
            assert place == params["toggle_target" if task_type == "look_at_obj_in_light" else "parent_target"]
            assert int(scene) == traj["scene"]["scene_num"]
            grammar = json.loads(Path(game.path).read_text())["grammar"]
            sentence = re.search(r"Your task is to: (.*)\.\"", grammar)[1]
            assert {target.lower(), place.lower()} <= set(sentence.split())
            assert sentence == traj["turk_annotations"]["anns"][0]["task_desc"]


# What is drawn


def test_objects_lie_where_such_things_may_lie(drawn):
    from alfworld.gen import constants

    for _, game in drawn:
        kind_of = {thing.id: thing.kind for thing in game.world.receptacles}
        assert len({thing.place for thing in game.world.receptacles} | {game.world.start}) == len(kind_of) + 1
        load = Counter(thing.place for thing in game.world.objects)
        assert all(count <= CAPACITY.get(kind_of[place], 3) for place, count in load.items())
        for thing in game.world.objects:
            place = kind_of[thing.place]
            if thing.kind in ("DeskLamp", "FloorLamp"):
                assert place not in constants.OPENABLE_CLASS_LIST
            else:
                assert thing.kind in constants.VAL_RECEPTACLE_OBJECTS[place]


def test_missions_are_not_done_at_the_start_and_can_be_done(drawn):
    tools = {"pick_heat_then_place_in_recep": "Microwave", "pick_cool_then_place_in_recep": "Fridge",
             "pick_clean_then_place_in_recep": "SinkBasin"}
    for _, game in drawn:
        for each in (game, *alternative_goals(game, 3, seed=0)):
            init, goal = write_problem(each.world, each.goal).split("(:goal")
            typed = dict(re.findall(r"\(receptacleType (\S+) (\S+)Type\)", init))
            kinds = dict(re.findall(r"\(objectType (\S+) (\S+)Type\)", init))
            lies_in = {(kinds[o], typed[r]) for o, r in re.findall(r"\(inReceptacle (\S+) (\S+)\)", init)}
            target, parent = each.goal.target, each.goal.parent
            assert (target, parent) not in lies_in
            assert Counter(kinds.values())[target] >= 1 + (each.goal.task_type == "pick_two_obj_and_place")
            assert f"{target}Type" in goal
            if parent:
                assert f"(canContain {parent}Type {target}Type)" in init and f"{parent}Type" in goal
            if tool := tools.get(each.goal.task_type):
                assert tool in typed.values() and parent != tool
            if each.goal.lamp:
                assert each.goal.lamp in kinds.values() and f"{each.goal.lamp}Type" in goal


def test_other_missions_differ_in_the_goal_alone(drawn):
    compared = 0
    for _, game in drawn:
        others = alternative_goals(game, 4, seed=7)
        problems = [write_problem(each.world, each.goal).split("(:goal") for each in (game, *others)]
        assert len({init for init, _ in problems}) == 1
        assert len({goal for _, goal in problems}) == len(problems)
        compared += len(others)
    assert compared > 3 * len(drawn)  # most worlds have four to offer


def test_a_world_poses_its_missions_of_every_type_early(drawn):
    for _, game in drawn:
        types = [other.goal.task_type for other in game.others()]
        for task_type in set(types):
            half = types[:len(types) // 2].count(task_type)
            assert abs(half - types.count(task_type) / 2) <= 1, types


def test_splits_share_no_world_and_unseen_no_room(drawn):
    rooms = {split: {game.world.scene for batch, game in drawn if batch.split == split} for split in SPLITS}
    assert not (rooms["train"] | rooms["valid_seen"]) & rooms["valid_unseen"]
    assert all(scene % 100 <= 6 and scene % 100 >= 1 for scene in rooms["valid_unseen"])
    for batch, game in drawn:
        if batch.split != "valid_unseen":
            assert (game.world.fingerprint() % 4 == 0) == (batch.split == "valid_seen")


def test_fingerprint_is_of_the_placement_not_of_the_coordinates():
    shelf, desk = Thing("Shelf|1", "Shelf", "loc|1"), Thing("Desk|1", "Desk", "loc|2")
    on_shelf, elsewhere = Thing("Pen|+1", "Pen", "Shelf|1"), Thing("Pen|+2", "Pen", "Shelf|1")
    pens, same, other = (World(1, "loc|0", (shelf, desk), objects) for objects in
                         [(on_shelf,), (elsewhere,), (Thing("Pen|+1", "Pen", "Desk|1"),)])
    assert pens.fingerprint() == same.fingerprint() != other.fingerprint()


def test_draws_do_not_depend_on_the_process():
    code = ("import hashlib; from itp.envs.alfworld.worlds import make_game, write_problem\n"
            "games = [make_game(s, 'pick_and_place_simple', s) for s in (7, 215, 322, 410)]\n"
            "text = ''.join(write_problem(g.world, g.goal) + g.sentence for g in games)\n"
            "print(hashlib.sha256(text.encode()).hexdigest())")
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           env={"PYTHONHASHSEED": seed, "PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path))})
            for seed in ("1", "2")]
    assert runs[0].stdout == runs[1].stdout != ""


def test_a_room_without_the_tool_has_no_such_mission():
    assert make_game(310, "pick_heat_then_place_in_recep", 0) is None


def test_task_types_take_turns_and_missions_share_worlds():
    batches = plan_batches(GenerateSettings(out_dir="", train=20, seen=7, unseen=0, missions=2))
    numbers = {split: sorted(n for b in batches if b.split == split for n in b.numbers) for split in SPLITS}
    assert numbers == {"train": list(range(20)), "valid_seen": list(range(7)), "valid_unseen": []}
    assert all(ALFWORLD_TASK_TYPES[n % 6] == batch.task_type for batch in batches for n in batch.numbers)
    assert [b.numbers for b in batches if b.split == "train"][:2] == [(0, 6), (1, 7)]


# Making them again


def test_rerun_makes_only_what_is_missing_and_the_same(root):
    before = digests(root)
    assert generate(settings(root))["made"] == 0
    games = list_games("train", root)
    Path(games[0].path).unlink()
    Path(games[1].path).with_name("traj_data.json").write_text('{"task_ty')
    assert generate(settings(root))["made"] == 2
    assert digests(root) == before


def test_two_processes_write_the_same_bytes(root, tmp_path):
    assert generate(settings(tmp_path, train=2, seen=1, unseen=0, processes=2))["made"] == 3
    again, before = digests(tmp_path), digests(root)
    assert again.items() <= before.items()
    assert len(again) == 6


def test_other_games_are_refused(root, tmp_path):
    with pytest.raises(UserError, match="seed: 3 there, 4 now"):
        generate(settings(root, seed=4))
    (tmp_path / "json_2.1.1" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="didn't make"):
        generate(settings(tmp_path, override=True))


def test_override_starts_anew(tmp_path):
    none = dict(train=0, seen=0, unseen=0)
    generate(settings(tmp_path, **none))
    (tmp_path / "json_2.1.1" / "train" / "old").mkdir(parents=True)
    generate(settings(tmp_path, seed=4, override=True, **none))
    assert not (tmp_path / "json_2.1.1" / "train" / "old").exists()
    assert json.loads((tmp_path / "config.json").read_text())["config"]["seed"] == 4


def test_two_missions_in_one_world_are_games_of_their_own(tmp_path):
    made = make_batch(GameBatch(5, "train", "look_at_obj_in_light", (1, 7), str(tmp_path)))
    assert made.written == 2
    assert [Path(trial).name for trial in made.trials] == ["trial_000001", "trial_000007"]
    problems = [json.loads((Path(trial) / "game.tw-pddl").read_text())["pddl_problem"] for trial in made.trials]
    (one, goal), (other, other_goal) = (problem.split("(:goal") for problem in problems)
    assert one == other and goal != other_goal
    assert make_batch(GameBatch(5, "train", "look_at_obj_in_light", (1, 7), str(tmp_path))).written == 0
