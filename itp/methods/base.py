"""What a method of acting is: it sees one step of one episode and decides on an action."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from itp.agent.imagination import ImaginedTrajectory
from itp.agent.policy import Choice, Policy
from itp.agent.world_model import Dynamics
from itp.envs.base import Observation
from itp.games import Game
from itp.lm.base import Trace
from itp.methods.settings import MethodSettings
from itp.text.state import State


@dataclass(frozen=True)
class EarlierTrial:
    """An earlier episode of the same game, which was played to its end.

    ``state``: the state after its last step, with the whole history.  ``invalid``: which actions of it the engine
    didn't take.  ``note``: what the method said about it (:meth:`PolicyMethod.look_back`); empty where it said nothing.
    """

    state: State
    invalid: tuple[bool, ...]
    success: bool
    note: str = ""


@dataclass(frozen=True)
class View:
    """What a method sees of its episode at step t.

    ``past``: its own decisions so far; ``invalid``: which of them the engine didn't take.  ``seed`` is this
    step's own.  ``earlier``: the earlier trials of this game, in order.
    """

    game: Game
    step: int
    state: State
    observation: Observation
    seed: int
    past: tuple[Decision, ...] = ()
    invalid: tuple[bool, ...] = ()
    earlier: tuple[EarlierTrial, ...] = ()


@dataclass(frozen=True)
class Revision:
    """A second choice after imagination: the action ``draft`` before it, and the ``action`` chosen after it.

    ``margin``: log π_θ(action|s, τ̂) − log π_θ(draft|s, τ̂) in nats, 0 where both are the same.  ``taken``: whether
    ``action`` was executed in place of the draft.
    """

    draft: str
    action: str
    margin: float
    taken: bool


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
    """V_θ(s_t), where the policy has a value head and it was read."""
    reflection: str = ""
    thought: str = ""
    raw: str = ""
    parsed: bool = True
    logprob: float | None = None
    expert_action: str = ""
    """What the expert would do, where an expert is asked and something else is executed."""
    considered: tuple[tuple[str, float, int], ...] = ()
    """(action, its value, how often it was tried in imagination) of every action that was compared."""
    revision: Revision | None = None
    """The second choice, where the method makes one."""
    memory: Any = None
    """What a method wants to find again in ``View.past``; not for the result file."""
    prompt: str = ""
    """The prompt that the action answers; not for the result file."""
    heads_prompt: str = ""
    """The prompt at whose end the heads were read; not for the result file."""
    trace: Trace | None = None
    """How the action was sampled, where it is to be learned from; not for the result file."""


def decide(choice: Choice, **more: Any) -> Decision:
    """The decision for ``choice``.  ``more``: other fields of Decision."""
    return Decision(choice.action, thought=choice.thought, raw=choice.raw, parsed=choice.parsed,
                    logprob=choice.logprob, prompt=choice.prompt, trace=choice.trace, **more)


class Method(Protocol):
    """One way to act."""

    name: str
    want_admissible: bool
    """Does it look at the admissible actions?"""

    async def act(self, view: View) -> Decision:
        """Decide on one action."""

    async def look_back(self, trial: EarlierTrial, seed: int) -> str:
        """A note on an ended trial of a game, for ``View.earlier`` of the next one; empty for none.

        Asked between two trials, so methods that only play games once need none.
        """


class PolicyMethod:
    """The base of all methods with a policy; those that imagine also have a world model."""

    name: str

    def __init__(self, policy: Policy, world_model: Dynamics | None, settings: MethodSettings) -> None:
        self.policy, self.world_model, self.settings = policy, world_model, settings

    @property
    def want_admissible(self) -> bool:
        """Whether the policy chooses among the admissible actions instead of writing freely."""
        return self.policy.selection != "generate"

    async def look_back(self, trial: EarlierTrial, seed: int) -> str:
        """Most methods say nothing."""
        return ""
