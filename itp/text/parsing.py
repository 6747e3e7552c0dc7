"""From a model's reply to the action that is executed.

No function here corrects an action.  An action that the environment doesn't know is executed too, so that the
environment's answer ("Nothing happens.") is counted.
"""

from __future__ import annotations

import re

THINK, THOUGHT = "<think>", "</think>"
"""The marks that thinking models put around their thoughts, before the answer."""
_ACTION_LINE = re.compile(r"^\s*Action:(.*)$", re.MULTILINE)


def parse_action(reply: str) -> str | None:
    """The action in a reply: the text behind its last ``Action:``, on the same line.

    A reply of one line without this label is the action itself.  Any other reply gives None.
    """
    labeled = _ACTION_LINE.findall(reply)
    if labeled:
        return clean_action(labeled[-1]) or None
    lines = [line for line in reply.splitlines() if line.strip()]
    return clean_action(lines[0]) or None if len(lines) == 1 else None


def clean_action(text: str) -> str:
    """An action without the quotes, the final full stop and the spaces that chat models add."""
    return " ".join(text.split()).strip("`'\"*. ")


def parse_thought(reply: str) -> str:
    """The text before the last ``Action:`` line, without its ``Thought:`` label."""
    matches = list(_ACTION_LINE.finditer(reply))
    thought = reply[:matches[-1].start()] if matches else ""
    return thought.strip().removeprefix("Thought:").strip()


def parse_horizon(reply: str, max_k: int) -> int | None:
    """The first whole number of a reply, at most ``max_k``; None where it has none."""
    match = re.search(r"\d+", reply)
    return min(int(match[0]), max_k) if match else None


def without_thinking(reply: str) -> str:
    """A reply without the thoughts before it; empty where the thoughts have no end."""
    return "" if THINK in reply and THOUGHT not in reply else reply.rsplit(THOUGHT, 1)[-1]
