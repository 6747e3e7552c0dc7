"""The methods of ``--method`` by name.

To add one: write a file in this folder with a subclass of :class:`itp.methods.base.PolicyMethod` that has ``name`` and
``async act(view) -> Decision``, name the class here, and what it needs in :mod:`itp.methods.settings`.
"""

from __future__ import annotations

from itp.agent.engine_world_model import EngineWorldModel
from itp.agent.policy import Policy
from itp.agent.state_model import StateModel
from itp.agent.world_model import WorldModel
from itp.methods.base import Method, PolicyMethod
from itp.methods.armap import Armap
from itp.methods.beam import Rafa, Tot
from itp.methods.compute_matched import KCandidates, MultiAttempt, SelfRefine
from itp.methods.imagine_then_plan import ImagineThenPlan
from itp.methods.implement import Implement
from itp.methods.lats import Lats
from itp.methods.mcts import Mcts
from itp.methods.mpc import Mpc
from itp.methods.prompting import Cot, React
from itp.methods.no_repeat import NoRepeat
from itp.methods.perfect_imagination import PerfectImagination
from itp.methods.rap import Rap
from itp.methods.reflexion import Reflexion
from itp.methods.revise import Revise
from itp.methods.settings import MethodSettings
from itp.methods.sft import Sft
from itp.methods.statler import Statler
from itp.methods.step_q import StepQ
from itp.methods.walle import Walle
from itp.methods.wkm import Wkm

METHODS: dict[str, type[PolicyMethod]] = {each.name: each for each in (
    ImagineThenPlan, Rap, Mcts, Tot, Mpc, Rafa, Implement, Revise, Sft, NoRepeat, React, Cot, SelfRefine, MultiAttempt,
    KCandidates, Reflexion, Lats, Statler, Walle, StepQ, Armap, Wkm)}


def build(name: str, policy: Policy, world_model: WorldModel | StateModel | EngineWorldModel | None,
          settings: MethodSettings) -> Method:
    """The method called ``name``.  ``world_model``: None where it imagines nothing."""
    if isinstance(world_model, EngineWorldModel):
        return PerfectImagination(METHODS[name], policy, world_model, settings)
    return METHODS[name](policy, world_model, settings)
