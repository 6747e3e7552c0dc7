"""Any method with perfect imagination: it imagines in a copy of the game that it plays (``--wm_backend engine``)."""

from __future__ import annotations

from itp.agent.engine_world_model import EngineWorldModel
from itp.agent.policy import Policy
from itp.methods.base import Decision, EarlierTrial, PolicyMethod, View
from itp.methods.settings import MethodSettings


class PerfectImagination:
    """A method of ``kind`` whose world model is, at each step, the engine in that step's state.

    A world model is the same for all episodes, and the engine isn't: only the view knows the game and its whole
    history.  So a method is made for each step, which keeps nothing between steps.
    """

    def __init__(self, kind: type[PolicyMethod], policy: Policy, engine: EngineWorldModel,
                 settings: MethodSettings) -> None:
        self.kind, self.policy, self.engine, self.settings = kind, policy, engine, settings
        self.name, self.want_admissible = kind.name, kind(policy, None, settings).want_admissible

    async def act(self, view: View) -> Decision:
        return await self.kind(self.policy, self.engine.at(view.game, view.state), self.settings).act(view)

    async def look_back(self, trial: EarlierTrial, seed: int) -> str:
        return await self.kind(self.policy, None, self.settings).look_back(trial, seed)
