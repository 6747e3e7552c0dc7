"""ALFWorld's words: the types of its objects and places, and the type of object that a task is about."""

from __future__ import annotations

import functools


@functools.cache
def object_types() -> tuple[str, ...]:
    """The types of objects that are no receptacles of a room, in the engine's order."""
    from alfworld.gen import constants

    return tuple(sorted({name.lower() for name in constants.OBJECTS}
                        - {name.lower() for name in constants.STATIC_RECEPTACLES}))


@functools.cache
def place_types() -> dict[str, bool]:
    """The types of receptacles, and whether they can be closed."""
    from alfworld.gen import constants

    return {name.lower(): name in constants.OPENABLE_CLASS_LIST for name in constants.VAL_RECEPTACLE_OBJECTS}


def openable_types() -> frozenset[str]:
    """The types of receptacles that can be closed."""
    return frozenset(name for name, opens in place_types().items() if opens)


def task_object(task: str) -> str:
    """The type of object that a task is about, which it names first; empty where it names none."""
    return next((word for word in task.replace(".", " ").split() if word in object_types()), "")
