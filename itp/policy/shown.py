"""What a policy is shown of the past and of the imagined future: one thing in training, acting and evaluation.

``foresight_format``: what of an imagined trajectory it reads (:data:`itp.text.prompts.FORESIGHT_FORMATS`).
``history_keep_steps``: how many of the last steps it reads (0: all).  Stage 1 writes both into its rows, stage 2 into
the model's card, and whoever uses the model finds them there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from itp.runtime import UserError, model_card
from itp.text.prompts import FORESIGHT_FORMATS

S = TypeVar("S")
FORMAT_CHOICES = ("auto", *FORESIGHT_FORMATS)
OPEN = {"foresight_format": "auto", "history_keep_steps": -1}
"""The flags' defaults: as the policy was trained."""
EVERYTHING = {"foresight_format": "full", "history_keep_steps": 0}
"""What is shown to a policy of which nothing is on record."""


def shown(settings: Any) -> dict[str, Any]:
    """The two settings, as they go on record."""
    return {name: getattr(settings, name) for name in OPEN}


def settle(settings: S, recorded: Mapping[str, Any], whose: str, unknown: Mapping[str, Any] = EVERYTHING) -> S:
    """``settings`` with what they leave open filled in from ``recorded``, where that is silent from ``unknown``.

    Raises UserError where they contradict the record, which is ``whose``.
    """
    for name, value in shown(settings).items():
        if value != OPEN[name] and recorded.get(name, value) != value:
            raise UserError(f"--{name} {value}, but {whose} was made with {recorded[name]}; leave the flag out")
    chosen = {name: recorded.get(name, unknown[name]) for name, value in shown(settings).items() if value == OPEN[name]}
    return dataclasses.replace(settings, **chosen)


def history_of(path: str) -> int:
    """How many of the last steps the policy at ``path`` was trained to read (0: all)."""
    return model_card(path).get("history_keep_steps", EVERYTHING["history_keep_steps"])


def show_as_trained(settings: S, path: str, unknown: Mapping[str, Any] = EVERYTHING) -> S:
    """:func:`settle` by the card of the policy at ``path``."""
    return settle(settings, model_card(path), path, unknown)
