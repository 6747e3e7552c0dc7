"""ALFWorld's words: the types of its objects, and the type of object that a task is about."""

from __future__ import annotations

import functools


@functools.cache
def object_types() -> tuple[str, ...]:
    """The types of objects that are no receptacles of a room, in the engine's order."""
    from alfworld.gen import constants

    return tuple(sorted({name.lower() for name in constants.OBJECTS}
                        - {name.lower() for name in constants.STATIC_RECEPTACLES}))


def task_object(task: str) -> str:
    """The type of object that a task is about, which it names first; empty where it names none."""
    return next((word for word in task.replace(".", " ").split() if word in object_types()), "")
