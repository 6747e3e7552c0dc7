"""The one schema of trajectory data, and its JSON / JSONL files.

A transition is one step of an episode.  ``state`` is the rendered state (:mod:`itp.text.state`),
``next_state`` is what the environment answered: the new observation's text.  The state after is
``parse(state).after(action, next_state)``, so nothing is written twice and a world model predicts only
what it can't know: p_φ(s'|s, a) of the paper with s' = s ⊕ (a, o').
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itp.errors import UserError
from itp.files import read_rows, write_atomic


@dataclass(frozen=True)
class Transition:
    """(s_t, a_t, s_{t+1}) and where it comes from.

    ``expert_action``: the action to imitate.  It differs from ``action`` if another action was executed (exploration).
    Empty: nothing to imitate (a random walk, a turn marked so).  A file without this field imitates ``action``.
    ``reward``: the engine's; ``done``: the episode ended here; ``source``: who acted.
    ``image``: the file of a picture of what was seen, empty for none.  A file of rows names it from the folder that
    it is in itself.
    """

    episode_id: str
    step: int
    state: str
    action: str
    next_state: str
    expert_action: str = ""
    reward: float = 0.0
    done: bool = False
    success: bool = False
    task_type: str = ""
    source: str = ""
    image: str = ""


REQUIRED = ("state", "action", "next_state")
"""World-model data needs these fields; an expert file also needs ``episode_id`` and ``step``."""
_TYPES = {"step": int, "reward": (int, float), "done": bool, "success": bool}
_FIELDS = {f.name for f in dataclasses.fields(Transition)}


def write_transitions(path: str | Path, transitions: Iterable[Transition]) -> int:
    """Write a JSONL file, whole or not at all.  Returns the number of rows."""
    rows = [json.dumps(_row(t), ensure_ascii=False) for t in transitions]
    write_atomic(path, "".join(row + "\n" for row in rows))
    return len(rows)


def _row(transition: Transition) -> dict[str, Any]:
    row = dataclasses.asdict(transition)
    return {name: value for name, value in row.items() if name != "image" or value}


def read_transitions(path: str | Path, *, required: tuple[str, ...] = REQUIRED) -> list[Transition]:
    """Read a JSON list or a JSONL file.  Unknown fields are dropped, missing ones named with their line.

    Raises UserError: no such file, not JSON, an empty file, a row without a field or of a wrong type.
    """
    return [transition for _, transition in locate_transitions(path, required=required)]


def locate_transitions(path: str | Path, *, required: tuple[str, ...] = REQUIRED,
                       skipped: list[str] | None = None) -> list[tuple[str, Transition]]:
    """The same with (where, transition).  Given a list ``skipped``, what is wrong with a row goes in there."""
    located = []
    for where, row in read_rows(path, skipped):
        try:
            transition = to_transition(row, where, required)
            if transition.image:
                file = (Path(path).parent / transition.image).resolve()
                transition = dataclasses.replace(transition, image=str(file))
            located.append((where, transition))
        except UserError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
    if not located:
        raise UserError(f"{path}: holds no transitions; give a JSON or JSONL file of rows with {', '.join(required)}")
    return located


def to_transition(row: Any, where: str, required: tuple[str, ...]) -> Transition:
    """A row as a transition.  Raises UserError naming the field that is missing or of a wrong type."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a row of named fields; each must have {', '.join(required)}")
    if row.get("episode_id", "") is None:  # null is none, as tables are exported, and not an episode of its own
        row = {name: value for name, value in row.items() if name != "episode_id"}
    for name in required:
        if name not in row:
            raise UserError(f"{where}: field {name!r} is missing; each row must have {', '.join(required)}")
    values = {"episode_id": "", "step": 0, **{k: v for k, v in row.items() if k in _FIELDS}}
    values["episode_id"] = str(values["episode_id"])
    for name, value in values.items():
        kind = _TYPES.get(name, str)
        if not isinstance(value, kind) or isinstance(value, bool) and kind is not bool:
            raise UserError(f"{where}: field {name!r} is {value!r}, which is of the wrong type")
    return Transition(**{"expert_action": values["action"], **values})
