"""What ScienceWorld's texts tell of rooms: the simulator's own words, and a walk in the simulator itself."""

from __future__ import annotations

import random

from itp.envs.registry import EnvFlags, engine_of, games_of
from itp.text.scienceworld_belief import RoomsSeen
from itp.text.state import State

HALL = ("This room is called the hallway. In it, you see: \n\tthe agent\n\ta substance called air\n\ta picture\n"
        "You also see:\n\tA door to the kitchen (that is open)\n\tA door to the living room (that is closed)")
KITCHEN = ("This room is called the kitchen. In it, you see: \n\tthe agent\n\ta chair. On the chair is: nothing.\n"
           "\ta oven, which is turned off. The oven door is closed. \n\tan apple\n\ta glass jar (containing salt)\n"
           "You also see:\n\tA door to the hallway (that is open)")


def test_rooms_doors_and_inventory_by_hand() -> None:
    state = State("t", HALL)
    assert RoomsSeen.of(state) == RoomsSeen("hallway", {"hallway": {"air", "picture"}},
                                            {"hallway": {"kitchen": True, "living room": False}})
    for action, observation in (("inventory", "In your inventory, you see:\n\ta red apple\n\tan orange"),
                                ("go to kitchen", "You move to the kitchen."),
                                ("go to attic", "No known action matches that input.")):
        state = state.after(action, observation)
    seen = RoomsSeen.of(state)
    assert seen.room == "kitchen" and set(seen.things) == {"hallway"} and seen.inventory == {"red apple", "orange"}
    seen = seen.after(KITCHEN)
    assert seen.things["kitchen"] == {"chair", "oven", "apple", "glass jar"}
    seen = seen.after("You move the glass jar to the inventory.")
    assert "glass jar" in seen.inventory and "glass jar" not in seen.things["kitchen"]
    assert seen.after("You move the orange to the hallway.").things["hallway"] == {"air", "picture", "orange"}
    assert seen.after("You move the orange to the hallway.").inventory == {"red apple", "glass jar"}
    assert seen.after("You teleport to the outside.").room == "outside"


def test_a_walk_is_always_in_the_room_that_the_simulator_says() -> None:
    flags = EnvFlags(env="scienceworld")
    env, draw, compared = engine_of(flags, want_admissible=False)(), random.Random(0), 0
    try:
        start = env.reset(games_of(flags, "train", "")[0])
        seen = RoomsSeen.of(State(start.task, start.text))
        for _ in range(25):
            rooms = sorted(seen.doors.get(seen.room, {"hallway": True}))
            for action in (draw.choice(["go to", "teleport to", "open door to"]) + f" {draw.choice(rooms)}",
                           "look around", "inventory"):
                text = env.step(action).obs.text
                if action == "look around":
                    assert text.split(" is called the ")[1].startswith(f"{seen.room}.")
                    compared += 1
                seen = seen.after(text)
                assert all(name in text for name in seen.inventory) or action != "inventory"
    finally:
        env.close()
    assert compared == 25 and len(seen.things) > 3
