"""Random new ALFWorld games: a furnished room, a goal, and the PDDL problem that states both.

This module calls no engine.  It samples the goal first and then fills the room so that the goal makes sense: its object
lies outside the kind of receptacle that it must go to, and only in places where such objects may lie.  Rooms, abilities
and goals come from the ``alfworld`` package.  The program :mod:`itp.envs.alfworld.generate` checks these games with the
real engine and keeps the good ones.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from itp.envs.alfworld.expert import LAMP_STANDS, TOOLS
from itp.envs.alfworld.games import ALFWORLD_TASK_TYPES
from itp.files import write_atomic, write_json

# The furniture of a room is that of its layout.  The layouts' lists of openable things lack some receptacles that the
# rooms have; these are added, so many of each.
FIXTURES = {"StoveBurner": 4, "CoffeeMachine": 1, "Toaster": 1, "GarbageCan": 1, "Toilet": 1, "LaundryHamper": 1,
            "ToiletPaperHanger": 1, "TowelHolder": 1, "HandTowelHolder": 1}
# The relative probability of a kind of receptacle as an object's place, and the number of objects that it holds.
WEIGHT = {"DiningTable": 5, "CounterTop": 4, "CoffeeTable": 4, "SideTable": 4, "Desk": 4, "Dresser": 3, "Bed": 3,
          "Sofa": 3, "Shelf": 3, "ArmChair": 2, "SinkBasin": 2, "Toilet": 2, "StoveBurner": 2, "TVStand": 2}
CAPACITY = {"DiningTable": 10, "CounterTop": 10, "CoffeeTable": 7, "SideTable": 6, "Desk": 8, "Dresser": 8, "Bed": 5,
            "Fridge": 6, "SinkBasin": 5, "StoveBurner": 1, "CoffeeMachine": 1, "ToiletPaperHanger": 1,
            "TowelHolder": 1, "HandTowelHolder": 1}
OTHERS_PER_TYPE = {"look_at_obj_in_light": 12, "pick_heat_then_place_in_recep": 8, "pick_cool_then_place_in_recep": 8,
                   "pick_clean_then_place_in_recep": 6, "pick_and_place_simple": 4, "pick_two_obj_and_place": 6}
"""How many other goals of each task type a game's traj_data.json names.  Types that few rooms allow (they need a lamp
or a microwave) get more goals in these rooms, so that all rooms together have about as many goals of each type."""
COPIES = (0, 1, 1, 1, 2, 3)
TARGET_COPIES = (1, 1, 2, 3)
ABILITIES = {"Heatable": "heatable", "Coolable": "coolable", "Cleanable": "cleanable", "Sliceable": "sliceable"}
NEEDS = {"heat": "Heatable", "cool": "Coolable", "clean": "Cleanable"}
_ESCAPES = str.maketrans({"|": "_bar_", "+": "_plus_", "-": "_minus_", ".": "_dot_", ",": "_comma_"})


@dataclass(frozen=True)
class Thing:
    """A receptacle (``place``: its location) or an object (``place``: the id of its receptacle)."""

    id: str
    kind: str
    place: str


@dataclass(frozen=True)
class World:
    """A furnished room with its objects: all of a game except its goal."""

    scene: int
    start: str
    receptacles: tuple[Thing, ...]
    objects: tuple[Thing, ...] = ()

    @property
    def receptacle_kinds(self) -> list[str]:
        return sorted({thing.kind for thing in self.receptacles})

    @property
    def object_kinds(self) -> list[str]:
        return sorted({thing.kind for thing in self.objects})

    @functools.cached_property
    def kind_of(self) -> dict[str, str]:
        """The kind of each receptacle, by its id."""
        return {thing.id: thing.kind for thing in self.receptacles}

    def fingerprint(self) -> int:
        """A number that is equal for worlds with the same kinds of objects in the same receptacles."""
        content = (self.scene, sorted((thing.kind, thing.place) for thing in self.objects))
        return int.from_bytes(hashlib.sha256(repr(content).encode()).digest()[:8], "big")


@dataclass(frozen=True)
class Goal:
    """A game's goal: ``target`` must go to a ``parent`` (a kind of receptacle) or under a ``lamp``."""

    task_type: str
    target: str
    parent: str
    lamp: str


@dataclass(frozen=True)
class GeneratedGame:
    """A game before it is written.  ``sentence`` is the goal in words."""

    world: World
    goal: Goal
    sentence: str

    @property
    def folder(self) -> str:
        goal = self.goal
        return f"{goal.task_type}-{goal.target}-None-{goal.parent or goal.lamp}-{self.world.scene}"

    def pddl_params(self) -> dict[str, object]:
        return {"object_target": self.goal.target, "parent_target": self.goal.parent,
                "toggle_target": self.goal.lamp, "mrecep_target": "", "object_sliced": False}

    def traj_data(self, task_id: str) -> dict[str, object]:
        """The part of a published traj_data.json that a text game needs."""
        return {
            "task_id": task_id,
            "task_type": self.goal.task_type,
            "pddl_params": self.pddl_params(),
            "scene": {"scene_num": self.world.scene, "floor_plan": f"FloorPlan{self.world.scene}"},
            "template": {"task_desc": self.sentence},
            "turk_annotations": {"anns": [{"task_desc": self.sentence, "high_descs": []}]},
            "other_missions": [{"task_type": other.goal.task_type, "pddl_params": other.pddl_params(),
                                "task_desc": other.sentence} for other in self.others()],
        }

    def others(self) -> list[GeneratedGame]:
        """Other goals that are possible in this world, with every possible type spread evenly over the list."""
        by_type = [alternative_goals(self, OTHERS_PER_TYPE[task_type], self.world.fingerprint(), task_type)
                   for task_type in ALFWORLD_TASK_TYPES]
        placed = [((i + 0.5) / len(games), game) for games in by_type for i, game in enumerate(games)]
        return [game for _, game in sorted(placed, key=lambda entry: entry[0])]

    def game_data(self, walkthrough: list[str]) -> dict[str, object]:
        domain, grammar = _game_logic()
        return {"pddl_domain": domain, "grammar": grammar.replace("UNKNOWN GOAL", self.sentence),
                "pddl_problem": write_problem(self.world, self.goal), "solvable": True, "walkthrough": walkthrough}


# --- sampling a game


@functools.cache
def _game_logic() -> tuple[str, str]:
    from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH

    return Path(ALFRED_PDDL_PATH).read_text(), Path(ALFRED_TWL2_PATH).read_text()


@functools.cache
def load_room(scene: int) -> tuple[World, tuple[str, ...]]:
    """The room of floor plan ``scene`` without objects, and the kinds of objects that belong there."""
    import alfworld
    from alfworld.gen import constants

    layouts = Path(alfworld.__file__).parent / "gen" / "layouts"
    kinds = json.loads((layouts / f"FloorPlan{scene}-objects.json").read_text())
    points = json.loads((layouts / f"FloorPlan{scene}-openable.json").read_text())
    furniture = {name: _receptacle_kind(name) for name in points}
    for kind, count in FIXTURES.items():
        if kind in kinds and kind not in furniture.values():
            for number in range(count):
                furniture[f"{kind}|+00.00|+00.00|+{number:02d}.00"] = kind
    receptacles: list[Thing] = []
    taken: set[tuple[int, ...]] = set()
    for name, kind in sorted(furniture.items()):
        if kind not in constants.VAL_RECEPTACLE_OBJECTS:
            continue
        x, z, rotation, horizon = points.get(name, (0, 0, 0, 30))
        spot = (int(4 * x), int(4 * z), rotation // 90, horizon)
        while spot in taken:  # `go to` names all receptacles of a location, so each gets a location of its own
            spot = (spot[0], spot[1] + 1, *spot[2:])
        taken.add(spot)
        receptacles.append(Thing(name, kind, "loc|" + "|".join(map(str, spot))))
    start = f"loc|0|{min(spot[1] for spot in taken) - 4}|0|30"
    room = World(scene, start, tuple(receptacles))
    can_lie = set(_lamps()).union(*(constants.VAL_RECEPTACLE_OBJECTS[kind] for kind in room.receptacle_kinds))
    return room, tuple(sorted(can_lie.intersection(kinds)))


def _receptacle_kind(name: str) -> str:
    """``Sink|..|SinkBasin`` is a SinkBasin: the engine, too, names the part after the whole."""
    whole, *_, last = name.split("|")
    return f"{whole}Basin" if last.endswith("Basin") else whole


def _lamps() -> list[str]:
    from alfworld.gen import constants

    return sorted(constants.VAL_ACTION_OBJECTS["Toggleable"])


@functools.cache
def _homes(scene: int, kind: str) -> tuple[Thing, ...]:
    """The receptacles that may hold a ``kind`` of object."""
    from alfworld.gen import constants

    room, _ = load_room(scene)
    return tuple(thing for thing in room.receptacles if kind in constants.VAL_RECEPTACLE_OBJECTS[thing.kind])


def _possible_goals(room: World, objects: list[str], task_type: str) -> list[Goal]:
    """The goals of a type that ``objects`` (kinds) and the room's furniture allow, in a fixed order."""
    from alfworld.gen import constants

    verb, tool = TOOLS.get(task_type, ("", ""))
    lamps = [kind for kind in objects if kind in _lamps()]
    targets = [kind for kind in objects if kind not in lamps]
    if verb:
        if tool not in map(str.lower, room.receptacle_kinds):
            return []
        targets = [kind for kind in targets if kind in constants.VAL_ACTION_OBJECTS[NEEDS[verb]]]
    if task_type == "look_at_obj_in_light":
        return [Goal(task_type, target, "", lamp) for target in targets for lamp in lamps]
    return [Goal(task_type, target, parent, "")
            for target in targets
            for parent in sorted({thing.kind for thing in _homes(room.scene, target)})
            if parent.lower() != tool and any(thing.kind != parent for thing in _homes(room.scene, target))]


def _sample_goal(goals: list[Goal], rng: random.Random) -> Goal:
    """Uniform over the objects, then over the places, so that objects with many places aren't more frequent."""
    target = rng.choice(sorted({goal.target for goal in goals}))
    return rng.choice([goal for goal in goals if goal.target == target])


def _fill(room: World, kinds: tuple[str, ...], goal: Goal, rng: random.Random) -> World | None:
    """The room with objects, the goal's objects first; None where these have no place."""
    placed: list[Thing] = []
    load: Counter[str] = Counter()

    def put(kind: str, homes: Sequence[Thing]) -> bool:
        homes = [thing for thing in homes if load[thing.id] < CAPACITY.get(thing.kind, 3)]
        if not homes:
            return False
        home_kinds = sorted({thing.kind for thing in homes})
        home_kind = rng.choices(home_kinds, [WEIGHT.get(name, 1) for name in home_kinds])[0]
        home = rng.choice([thing for thing in homes if thing.kind == home_kind])
        load[home.id] += 1
        x, y, z = rng.uniform(-3, 3), rng.uniform(0, 2), rng.uniform(-3, 3)
        placed.append(Thing(f"{kind}|{x:+06.2f}|{y:+06.2f}|{z:+06.2f}", kind, home.id))
        return True

    wanted = 2 if goal.task_type == "pick_two_obj_and_place" else 1
    outside = [thing for thing in _homes(room.scene, goal.target) if thing.kind != goal.parent]
    copies = sum(put(goal.target, outside) for _ in range(max(wanted, rng.choice(TARGET_COPIES))))
    if copies < wanted:
        return None
    for kind in kinds:
        if kind in _lamps():
            stands = [thing for thing in room.receptacles if thing.kind.lower() in LAMP_STANDS]
            put(kind, stands or [thing for thing in room.receptacles if not _openable(thing.kind)])
        elif kind != goal.target:
            for _ in range(rng.choice(COPIES)):
                put(kind, _homes(room.scene, kind))
    if len({thing.id for thing in placed}) < len(placed):
        return None  # two objects have the same id
    return replace(room, objects=tuple(placed))


def make_game(scene: int, task_type: str, seed: int) -> GeneratedGame | None:
    """Sample a game of ``task_type`` in floor plan ``scene``; None where this sample gives no valid game."""
    rng = random.Random(seed)
    room, kinds = load_room(scene)
    goals = _possible_goals(room, list(kinds), task_type)
    if not goals:
        return None
    goal = _sample_goal(goals, rng)
    world = _fill(room, kinds, goal, rng)
    if world is None or (goal.lamp and goal.lamp not in world.object_kinds):
        return None
    return GeneratedGame(world, goal, _sentence(goal, rng))


def alternative_goals(game: GeneratedGame, n: int, seed: int, task_type: str = "") -> list[GeneratedGame]:
    """Up to ``n`` games in ``game``'s world with different goals, of ``task_type`` (default: of the same type)."""
    rng, world = random.Random(seed), game.world
    task_type = task_type or game.goal.task_type
    wanted = 2 if task_type == "pick_two_obj_and_place" else 1
    count = Counter(thing.kind for thing in world.objects)
    lies_in = {(thing.kind, world.kind_of[thing.place]) for thing in world.objects}
    left = [goal for goal in _possible_goals(world, world.object_kinds, task_type)
            if goal != game.goal and count[goal.target] >= wanted
            and (goal.target, goal.parent) not in lies_in]
    others = []
    while left and len(others) < n:
        goal = _sample_goal(left, rng)
        left.remove(goal)
        others.append(GeneratedGame(world, goal, _sentence(goal, rng)))
    return others


def _sentence(goal: Goal, rng: random.Random) -> str:
    from alfworld.gen.goal_library import gdict

    return rng.choice(gdict[goal.task_type]["templates"]).format(
        obj=goal.target.lower(), recep=goal.parent.lower(), toggle=goal.lamp.lower(), mrecep="")


def _openable(kind: str) -> bool:
    from alfworld.gen import constants

    return kind in constants.OPENABLE_CLASS_SET


# --- writing a game


def write_problem(world: World, goal: Goal) -> str:
    """The PDDL problem: the objects, their places, their abilities, and the goal."""
    from alfworld.gen import constants
    from alfworld.gen.goal_library import gdict

    objects, receptacles = world.object_kinds, world.receptacle_kinds
    locations = sorted({thing.place for thing in world.receptacles} | {world.start})
    declared = ["agent1 - agent"]
    declared += [f"{kind}Type - otype" for kind in objects] + [f"{kind}Type - rtype" for kind in receptacles]
    declared += [f"{_pddl(thing.id)} - object" for thing in world.objects]
    declared += [f"{_pddl(thing.id)} - receptacle" for thing in world.receptacles]
    declared += [f"{_pddl(location)} - location" for location in locations]
    facts = [f"atLocation agent1 {_pddl(world.start)}"]
    facts += [f"canContain {place}Type {kind}Type" for place in receptacles for kind in objects
              if kind in constants.VAL_RECEPTACLE_OBJECTS[place]]
    location_of = {thing.id: thing.place for thing in world.receptacles}
    for thing in world.receptacles:
        name = _pddl(thing.id)
        facts += [f"receptacleType {name} {thing.kind}Type", f"receptacleAtLocation {name} {_pddl(thing.place)}"]
        facts += [f"openable {name}"] if _openable(thing.kind) else []
    for thing in world.objects:
        name = _pddl(thing.id)
        facts += [f"objectType {name} {thing.kind}Type", f"inReceptacle {name} {_pddl(thing.place)}",
                  f"objectAtLocation {name} {_pddl(location_of[thing.place])}",
                  f"{'toggleable' if thing.kind in _lamps() else 'pickupable'} {name}"]
        facts += [f"{predicate} {name}" for ability, predicate in ABILITIES.items()
                  if thing.kind in constants.VAL_ACTION_OBJECTS[ability]]
    # The library's goals write `#` for the `-` of a typed variable, and close the problem's parenthesis.
    goal_pddl = gdict[goal.task_type]["pddl"].format(
        obj=goal.target, recep=goal.parent, toggle=goal.lamp, mrecep="").replace("#", "-")
    lines = ["(define (problem plan_trial)", "(:domain alfred)", "(:objects", *declared, ")",
             "(:init", *(f"({fact})" for fact in facts), ")", goal_pddl]
    return "\n".join(lines)


def _pddl(name: str) -> str:
    return name.translate(_ESCAPES)


def write_game(game: GeneratedGame, folder: Path, walkthrough: list[str]) -> Path:
    """Write ``folder``/traj_data.json, then game.tw-pddl; returns the latter, whose presence means that both exist."""
    write_json(folder / "traj_data.json", game.traj_data(folder.name))
    path = folder / "game.tw-pddl"
    write_atomic(path, json.dumps(game.game_data(walkthrough)))
    return path
