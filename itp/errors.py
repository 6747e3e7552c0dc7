"""Errors that concern the user rather than the programmer."""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can mend.  Its message is one line: what, where, what to do."""


class PromptTooLong(UserError):
    """A prompt that the model's context doesn't hold, even without its history.  It ends its episode and no other."""


class UnplayableGame(UserError):
    """A game that can't be loaded or played, because a file of it is broken.  The other games are played."""


def first_line(error: Exception) -> str:
    """What a library's error says, in one line; its name where it says nothing."""
    said = str(error).strip().splitlines()
    return said[0][:300] if said else type(error).__name__
