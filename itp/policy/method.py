"""What a method of acting is: it sees one step of one episode and decides on an action."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from itp.envs.base import Observation
from itp.games import Game
from itp.imagination import ImaginedTrajectory
from itp.policy.agent import Choice, Policy
from itp.runtime import derive_seed
from itp.text.state import State


@dataclass(frozen=True)
class View:
    """What a method sees of its episode at step t.

    ``past``: its own decisions so far; ``invalid``: which of them the engine didn't take.  ``seed`` is this
    step's own.
    """

    game: Game
    step: int
    state: State
    observation: Observation
    seed: int
    past: tuple[Decision, ...] = ()
    invalid: tuple[bool, ...] = ()


@dataclass
class Decision:
    """What a method does, and why: as it goes into the result file."""

    action: str
    k: int = 0
    imagined: ImaginedTrajectory | None = None
    k_raw: str = ""
    k_logprobs: tuple[float, ...] = ()
    """log P_θ(K|s_t), where a K-head chose."""
    value: float | None = None
    """V_θ(s_t), where the policy has a value head and was asked."""
    reflection: str = ""
    thought: str = ""
    raw: str = ""
    parsed: bool = True
    logprob: float | None = None
    expert_action: str = ""
    """What the teacher would do, where a teacher is asked and something else is executed."""
    considered: tuple[tuple[str, float, int], ...] = ()
    """(action, its value, how often it was tried in the mind) of every action that was compared."""
    memory: Any = None
    """What a method wants to find again in ``View.past``; not for the result file."""


def decide(choice: Choice, **more: Any) -> Decision:
    """The decision for ``choice``.  ``more``: other fields of Decision."""
    return Decision(choice.action, thought=choice.thought, raw=choice.raw, parsed=choice.parsed,
                    logprob=choice.logprob, **more)


class Method(Protocol):
    """One way to act."""

    name: str
    want_admissible: bool
    """Does it look at the admissible actions?"""

    async def act(self, view: View) -> Decision:
        """Decide on one action."""


class Direct:
    """a_t ~ π_θ(·|s_t): no imagination (K = 0)."""

    name = "direct"

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.want_admissible = policy.selection != "generate"

    async def act(self, view: View) -> Decision:
        choice = await self.policy.act(view.state, view.observation.admissible, derive_seed(view.seed, "act"))
        return decide(choice)
