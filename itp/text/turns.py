"""The turns of a dialogue, from a row of any of the formats that name them.

Two pairs of names are read::

    {"conversations": [{"from": "human" | "gpt", "value": ...}, ...]}
    {"messages": [{"role": "system" | "user" | "assistant", "content": ...}, ...]}

A gpt turn may say that it isn't to be learned: with a ``"weight"`` of null, 0 or less, or with AgentGym's ``"loss"`` of
false, null or 0.  A turn of any other weight is learned in full: fractions don't scale its loss.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

SPEAKERS = {"human": "human", "user": "human", "system": "system", "gpt": "gpt", "assistant": "gpt"}
_NUMBER = (bool, int, float, type(None))
_HALVES = "a turn that isn't valid Unicode text"
_HALF = re.compile("[\ud800-\udfff]")


class NotADialogue(ValueError):
    """Why a row isn't a dialogue: a short phrase, the same for all of its kind.  ``turn``: the number of the turn."""

    def __init__(self, reason: str, turn: int | None = None) -> None:
        super().__init__(reason)
        self.turn = turn

    @property
    def located(self) -> str:
        """The reason with the number of the turn."""
        return str(self) if self.turn is None else f"turn {self.turn}: {self}"


class Turn(NamedTuple):
    """``who``: human, system or gpt.  ``correction`` is learned in place of ``text``."""

    who: str
    text: str
    learned: bool = True
    correction: str | None = None


def read_turns(row: Any) -> list[Turn]:
    """The turns of a row.  Raises NotADialogue."""
    if not isinstance(row, dict):
        raise NotADialogue("not a row of named fields")
    name = next((name for name in ("conversations", "messages") if name in row), None)
    if name is None:
        raise NotADialogue("neither 'conversations' nor 'messages'")
    if not isinstance(row[name], list):
        raise NotADialogue(f"{name!r} isn't a list")
    who, what = ("from", "value") if name == "conversations" else ("role", "content")
    return [_turn(turn, who, what, number) for number, turn in enumerate(row[name])]


def _turn(turn: Any, who: str, what: str, number: int) -> Turn:
    if not isinstance(turn, dict) or not isinstance(text := turn.get(what), str):
        raise NotADialogue(f"a turn without a text {what!r}", number)
    if not isinstance(turn.get(who), str) or turn[who] not in SPEAKERS:
        raise NotADialogue(f"a turn whose {who!r} isn't one of {', '.join(SPEAKERS)}", number)
    if not is_text(text):
        raise NotADialogue(_HALVES, number)
    if len(turn) == 2:  # most turns, and a large file has a million
        return Turn(SPEAKERS[turn[who]], text)
    correction = turn.get("correction")
    if correction is not None and not isinstance(correction, str):
        raise NotADialogue("a turn whose 'correction' isn't a text", number)
    for name in ("loss", "weight"):
        if not isinstance(turn.get(name), _NUMBER):
            raise NotADialogue(f"a turn whose {name!r} is neither a number nor true, false or null", number)
    if correction and not is_text(correction):
        raise NotADialogue(_HALVES, number)
    return Turn(SPEAKERS[turn[who]], text, is_learned(turn), (correction or None) if has_loss(turn) else None)


def is_learned(turn: Mapping[str, Any]) -> bool:
    """Whether the text of a gpt turn is to be learned."""
    return has_loss(turn) and (turn.get("weight", 1) or 0) > 0


def has_loss(turn: Mapping[str, Any]) -> bool:
    """False for a turn of which nothing is to be learned, not even its correction."""
    return bool(turn.get("loss", True))


def is_text(value: str) -> bool:
    """JSON can hold halves of characters, which no file can."""
    return value.isascii() or not _HALF.search(value)
