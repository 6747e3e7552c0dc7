"""The methods, one file each, written as if for one episode.

To add one: write a file here with a class that has ``name``, ``want_admissible`` and
``async act(view) -> Decision``, and name it in :func:`build`.
"""

from __future__ import annotations

from foresight_eval.methods.direct import Sft
from foresight_eval.methods.foresight import Foresight
from foresight_eval.methods.prompting import Cot, React
from foresight_eval.methods.settings import MethodSettings
from itp.policy.agent import Policy
from itp.policy.method import Method
from itp.world_model import WorldModel

NEED_WORLD_MODEL = ("foresight",)


def build(name: str, policy: Policy, world_model: WorldModel | None, settings: MethodSettings) -> Method:
    """The method called ``name``."""
    if name == "foresight":
        return Foresight(policy, world_model, settings)
    return {"sft": Sft, "react": React, "cot": Cot}[name](policy)
