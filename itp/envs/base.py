"""The contract between an agent and a text environment.

An environment plays one game at a time.  Games, observations and step results are picklable, because the engines run in
processes of their own (:mod:`itp.envs.pool`): the ALFWorld engine isn't thread-safe.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from itp.games import Game


class EnvDied(Exception):
    """The engine or its process has died, and the episode is lost.  ``reset`` starts another engine."""


@dataclass(frozen=True)
class Observation:
    """The agent's view of the game.  ``admissible`` is None unless the environment was made to list it.

    ``expert_action`` is the next action of the environment's own expert, where the environment was made with one.  It
    is for recording data only: agents don't read it.
    """

    text: str
    task: str
    admissible: tuple[str, ...] | None = None
    expert_action: str = ""


@dataclass(frozen=True)
class StepResult:
    """One transition of the engine.

    ``terminated``: the engine says the episode is over.  ``truncated``: the engine ran out of moves.
    ``score`` is in [0, 100].  ``success`` is the environment's own criterion (ALFWorld's ``won``, ScienceWorld's score
    of 100), which is different from the end of the episode.  ``invalid``: the engine didn't take the action ("Nothing
    happens.").  ``info["ending"]``: the reason why the engine ended the episode, where an episode without success can
    have several.
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
        """Whether the episode is over, for either reason."""
        return self.terminated or self.truncated


class TextEnv(Protocol):
    """One running engine."""

    want_admissible: bool
    """Fill ``Observation.admissible``.  Some engines take long to list it."""

    def reset(self, game: Game) -> Observation:
        """Start ``game`` from its beginning.  It may be another game than before."""

    def step(self, action: str) -> StepResult:
        """Execute ``action`` as it is written.  The engine itself answers an invalid action."""

    def close(self) -> None:
        """Release the engine.  Safe to call twice."""
