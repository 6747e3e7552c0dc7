"""The methods, one file each, written as if for one episode.

To add one: write a file here with a class that has ``name``, ``want_admissible`` and
``async act(view) -> Decision``, name it in :func:`build`, and what it needs in :mod:`foresight_eval.methods.settings`.
"""

from __future__ import annotations

from foresight_eval.methods.beam import Rafa, Tot
from foresight_eval.methods.compute_matched import KCandidates, MultiAttempt, SelfRefine
from foresight_eval.methods.direct import Sft
from foresight_eval.methods.foresight import Foresight
from foresight_eval.methods.implement import Implement
from foresight_eval.methods.mcts import Mcts
from foresight_eval.methods.mpc import Mpc
from foresight_eval.methods.prompting import Cot, React
from foresight_eval.methods.rap import Rap
from foresight_eval.methods.settings import MethodSettings
from itp.policy.agent import Policy
from itp.policy.method import Method
from itp.world_model import WorldModel


def build(name: str, policy: Policy, world_model: WorldModel | None, settings: MethodSettings) -> Method:
    """The method called ``name``."""
    alone = {"sft": Sft, "react": React, "cot": Cot}
    told = {"self_refine": SelfRefine, "multi_attempt": MultiAttempt, "k_candidates": KCandidates}
    imagining = {"foresight": Foresight, "rap": Rap, "mcts": Mcts, "tot": Tot, "mpc": Mpc, "rafa": Rafa,
                 "implement": Implement}
    if name in alone:
        return alone[name](policy)
    return told[name](policy, settings) if name in told else imagining[name](policy, world_model, settings)
