r"""State text: the s_t of the paper, in the form that every program writes and reads.

A state is the task, the first observation, and all actions and observations since::

    Task: put a clean plate in fridge.
    Observation: You are in the middle of a room. ...
    Action: go to countertop 1
    Observation: On the countertop 1, you see a plate 2.

It only grows at its end, so s_{t+1} starts with s_t.  A KV cache makes use of this, and one training sequence holds all
states of an episode.  When history must be cut (``last``), the oldest steps are cut first, and a line tells how many.
The task and the first observation always stay.

Rendering is exactly invertible: ``parse(render(s)) == s``.  A line break inside a value is written as a line break and
two spaces, so that no part of a value looks like the start of another value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property

TASK, OBSERVATION, ACTION = "Task: ", "Observation: ", "Action: "
_NEXT_PART = re.compile(r"\n(?!  )")
"""The line break before the next value; those inside a value are indented."""
_OMITTED = re.compile(r"\[(\d+) earlier steps omitted\]")


@dataclass(frozen=True)
class State:
    """s_t.  ``history`` holds (action, observation) pairs, oldest first; ``omitted`` pairs were cut before them."""

    task: str
    first: str
    history: tuple[tuple[str, str], ...] = ()
    omitted: int = 0

    @property
    def observation(self) -> str:
        """The current observation."""
        return self.history[-1][1] if self.history else self.first

    def after(self, action: str, observation: str) -> State:
        """s_{t+1}: the state after ``action`` and its answer ``observation``."""
        return replace(self, history=(*self.history, (action, observation)))

    def last(self, steps: int) -> State:
        """The same state with at most ``steps`` steps of history (0: all of it)."""
        if steps < 0:  # a setting that nobody resolved (itp.model_card)
            raise ValueError(f"a state's last {steps} steps")
        cut = max(0, len(self.history) - steps) if steps else 0
        return replace(self, history=self.history[cut:], omitted=self.omitted + cut) if cut else self

    def render(self) -> str:
        """The state as text; :func:`parse` is its exact inverse."""
        return self._rendered

    @cached_property  # a state is rendered several times in a step
    def _rendered(self) -> str:
        lines = [TASK + indent(self.task), OBSERVATION + indent(self.first)]
        if self.omitted:
            lines.append(f"[{self.omitted} earlier steps omitted]")
        for action, observation in self.history:
            lines += [ACTION + indent(action), OBSERVATION + indent(observation)]
        return "\n".join(lines)


def indent(value: str) -> str:
    """``value`` in the form that it has inside a rendered state: its later lines are indented."""
    return value.replace("\n", "\n  ")


def dedent(text: str) -> str:
    """The inverse of :func:`indent`."""
    return text.replace("\n  ", "\n")


def parse(text: str) -> State:
    """The state that renders as ``text``.  Raises ValueError with the line that doesn't fit."""
    lines = _NEXT_PART.split(text)
    if len(lines) < 2:
        raise ValueError("a state has at least a task and an observation")
    task, first, rest = _value(lines, 0, TASK), _value(lines, 1, OBSERVATION), 2
    omitted = 0
    if len(lines) > 2 and (match := _OMITTED.fullmatch(lines[2])):
        omitted, rest = int(match[1]), 3
    if (len(lines) - rest) % 2:
        raise ValueError(f"an action without an observation at the end: {lines[-1]!r}")
    history = tuple((_value(lines, i, ACTION), _value(lines, i + 1, OBSERVATION)) for i in range(rest, len(lines), 2))
    return State(task, first, history, omitted)


def is_value(text: str, label: str) -> bool:
    """Whether :func:`parse_value` takes the text."""
    return text.startswith(label) and not _NEXT_PART.search(text)


def parse_value(text: str, label: str) -> str:
    """The value that ``label + indent(value)`` is the text of.  Raises ValueError."""
    lines = _NEXT_PART.split(text)
    if len(lines) > 1:
        raise ValueError(f"{lines[1][:60]!r} after a whole value")
    return _value(lines, 0, label)


def _value(lines: list[str], index: int, label: str) -> str:
    if not lines[index].startswith(label):
        raise ValueError(f"expected {label!r}, found {lines[index][:60]!r}")
    return dedent(lines[index][len(label):])
