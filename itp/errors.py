"""Errors that concern the user rather than the programmer."""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can mend.  Its message is one line: what, where, what to do."""


class PromptTooLong(UserError):
    """A prompt that the model's context doesn't hold, even without its history.  It ends its episode and no other."""


class UnplayableGame(UserError):
    """A game that can't be loaded or played, because a file of it is broken.  The other games are played."""
