"""Imagination (eq. 2): K steps of policy and world model, alternately, from the real state.

â_{t+i} ~ π_θ(·|ŝ_{t+i}),  ŝ_{t+i+1} ~ M_φ(·|ŝ_{t+i}, â_{t+i}),  i = 0..K−1.

Departure: the authors' release prompts once for "the next K steps".  No model is trained on that prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from itp.agent.world_model import Dynamics
from itp.seeding import derive_seed
from itp.text.prompts import foresight_text
from itp.text.state import State


class Proposer(Protocol):
    """What imagines actions: :class:`itp.agent.policy.Policy`."""

    async def propose(self, state: State, seed: int) -> str:
        """â ~ π_θ(·|ŝ), decoded freely: nobody knows what an imagined state admits."""


@dataclass(frozen=True)
class ImaginedTrajectory:
    """τ̂: (action, observation) pairs, oldest first, from the state where it started."""

    start: State
    steps: tuple[tuple[str, str], ...] = ()

    @property
    def end(self) -> State:
        """The last imagined state ŝ_{t+K}."""
        state = self.start
        for action, observation in self.steps:
            state = state.after(action, observation)
        return state

    def text(self, keep: str = "full") -> str:
        """The trajectory as a policy reads it: every step, or with ``keep`` "last_obs" the last observation."""
        return foresight_text(self.steps, keep)

    def then(self, action: str, observation: str) -> ImaginedTrajectory:
        """One step longer."""
        return ImaginedTrajectory(self.start, (*self.steps, (action, observation)))


async def imagine(policy: Proposer, world_model: Dynamics, state: State, k: int, seed: int,
                  first: str = "") -> ImaginedTrajectory:
    """Imagine ``k`` steps from ``state``.  The trajectory for a smaller k is this one's beginning.

    ``first``: the first imagined action, where it isn't the policy's to choose.
    """
    trajectory = ImaginedTrajectory(state)
    for i in range(k):
        action = first if first and i == 0 else await policy.propose(trajectory.end, derive_seed(seed, "imagine", i))
        trajectory = await extend(world_model, trajectory, action)
    return trajectory


async def extend(world_model: Dynamics, trajectory: ImaginedTrajectory, action: str) -> ImaginedTrajectory:
    """One more step: ŝ' ~ M_φ(·|ŝ, ``action``) from where ``trajectory`` ends."""
    observation, = await world_model.step([trajectory.end], [action])
    return trajectory.then(action, observation)
