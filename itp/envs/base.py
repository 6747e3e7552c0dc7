"""The contract between an agent and a text environment.

An environment plays one game at a time.  Everything in it is picklable, because the engines run in
processes of their own (:mod:`itp.envs.pool`): the ALFWorld engine is not thread-safe.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from itp.games import Game


class EnvDied(Exception):
    """The engine or its process is gone, and with it the episode; ``reset`` works again."""


@dataclass(frozen=True)
class Observation:
    """What the agent may see.  ``admissible`` is None unless the environment was asked for it.

    ``expert_action`` is for teachers only: what the environment's own expert would do next, where the
    environment was made with one.
    """

    text: str
    task: str
    inventory: str = ""
    admissible: tuple[str, ...] | None = None
    expert_action: str = ""


@dataclass(frozen=True)
class StepResult:
    """One transition of the engine.

    ``terminated``: the engine says the episode is over.  ``truncated``: the engine ran out of moves.
    ``score`` is in [0, 100] and ``success`` is the environment's own criterion (ALFWorld's ``won``,
    ScienceWorld's score of 100), never "the episode is over".  ``invalid`` says that the engine did
    not take the action ("Nothing happens.").  ``info["ending"]``: why the engine ended the episode, where it
    can end in several ways without success.
    """

    obs: Observation
    reward: float
    terminated: bool
    truncated: bool
    score: float
    success: bool
    invalid: bool
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return self.terminated or self.truncated


class TextEnv(Protocol):
    """One running engine."""

    want_admissible: bool
    """Fill ``Observation.admissible``.  Off unless asked for: some engines take long to list it."""

    def reset(self, game: Game) -> Observation:
        """Start ``game`` from its beginning; the game may be another one than before."""

    def step(self, action: str) -> StepResult:
        """Execute ``action`` as it is written: an invalid one is the engine's to answer."""

    def close(self) -> None:
        """Release the engine.  Safe to call twice."""
