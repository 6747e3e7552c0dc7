"""WALL-E: a world model that learned rules correct vetoes actions (Zhou et al., 2410.07484; WALL-E 2.0, 2504.15785).

The agent proposes an action, the world model predicts its outcome, and where that is a failure another one is proposed,
until a proposal passes (model-predictive control without a value function).  The world model is a language model with
symbolic rules on top (:class:`itp.agent.ruled_world_model.RuledWorldModel`), which ``python -m world_model.rules``
learns from the transitions that it predicts wrongly.

Hyper-parameters: ``walle_rules``, the rules; ``rounds`` of proposals at most, the first of which is what the policy
would do, and every other one has ``candidates`` samples.  Where none passes the first is executed.  ``walle_critic``:
of the proposals that pass the first is executed (``proposal``); or all rounds have ``candidates`` samples, and the one
whose ``max_k`` imagined steps the policy likes best is executed (``judge``: :mod:`itp.methods.mpc`).

Departures: a veto isn't explained to the policy, because small models can't read feedback: it samples another action.
Rules are induced by counting and not by a language model (:mod:`world_model.rule_induction`), and they are checked data
instead of generated code.  The scene graph of WALL-E 2.0 is the symbolic state of :mod:`itp.text.belief`, its action
rules and its knowledge graph are the conditions of the rules.
"""

from __future__ import annotations

from itp.agent.imagination import ImaginedTrajectory
from itp.agent.policy import Choice, Policy
from itp.agent.ruled_world_model import RuledWorldModel
from itp.agent.world_model import Dynamics
from itp.methods.base import Decision, View, decide
from itp.methods.mpc import Mpc
from itp.methods.settings import MethodSettings
from itp.seeding import derive_seed
from itp.text.alfworld_phrases import NOTHING_HAPPENS
from itp.text.rules import read_rules


class Walle(Mpc):
    name = "walle"

    def __init__(self, policy: Policy, world_model: Dynamics | None, settings: MethodSettings) -> None:
        rules = read_rules(settings.walle_rules) if settings.walle_rules else ()
        super().__init__(policy, world_model and RuledWorldModel(world_model, rules), settings)

    async def act(self, view: View) -> Decision:
        outcomes: dict[str, str] = {}
        proposed: list[Choice] = []
        passed: list[Choice] = []
        for i in range(self.settings.rounds):
            proposed += await self._propose(view, i)
            passed = await self._passing(view, proposed, outcomes)
            if passed:
                break
        if len(passed) > 1 and self.settings.walle_critic == "judge":
            return await self.best(view, passed)
        chosen = (passed or proposed)[0]
        return decide(chosen, k=1, imagined=ImaginedTrajectory(view.state, ((chosen.action, outcomes[chosen.action]),)),
                      considered=tuple((action, float(said != NOTHING_HAPPENS), 1)
                                       for action, said in outcomes.items()))

    async def _propose(self, view: View, i: int) -> list[Choice]:
        """The proposals of round ``i``: first what the policy would do, unless a critic is to compare several."""
        state, admissible = view.state, view.observation.admissible
        if i == 0 and self.settings.walle_critic == "proposal":
            return [await self.policy.act(state, admissible, derive_seed(view.seed, "act"))]
        return await self.policy.candidates(state, admissible, self.settings.candidates,
                                            derive_seed(view.seed, "propose", i))

    async def _passing(self, view: View, choices: list[Choice], outcomes: dict[str, str]) -> list[Choice]:
        """Those of ``choices`` that aren't predicted to fail.  What is predicted for each goes into ``outcomes``."""
        new = list(dict.fromkeys(choice.action for choice in choices if choice.action not in outcomes))
        outcomes.update(zip(new, await self.world_model.step([view.state] * len(new), new), strict=True))
        return [choice for choice in choices if outcomes[choice.action] != NOTHING_HAPPENS]
