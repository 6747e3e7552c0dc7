"""A method of the harness that decides on states which a client sends, many at a time.

The models are loaded once.  Each decision counts as a live episode while it is made, so that concurrent ones become
batches (:mod:`itp.lm.scheduler`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from itp.agent.policy import Policy
from itp.agent.world_model import WorldModel
from itp.envs.base import Observation
from itp.errors import PromptTooLong, UserError
from itp.games import Game
from itp.lm.base import LM, Usage, metered
from itp.lm.scheduler import BatchBarrier
from itp.methods.base import Decision, EarlierTrial, Method, View
from itp.methods.registry import METHODS
from itp.methods.settings import NEED_CRITIC, NEED_WORLD_MODEL, WRITE_THOUGHTS
from itp.plan import check_answers, check_scores, make_plan
from itp.serve.settings import ServeSettings
from itp.text.alfworld_phrases import NOTHING_HAPPENS
from itp.text.state import State


class ModelFailed(UserError):
    """A model behind another server gave no answer."""


@dataclass
class Planned:
    """A decision, and what it took: ``usage`` by model, ``seconds`` without the time in the queue."""

    method: str
    decision: Decision
    usage: dict[str, Usage] = field(default_factory=dict)
    seconds: float = 0.0


class Planner:
    """Made by :meth:`load` inside the event loop that it is used in."""

    def __init__(self, settings: ServeSettings, policy_lm: LM, wm_lm: LM | None, barrier: BatchBarrier) -> None:
        self.settings, self.policy_lm, self.wm_lm, self.barrier = settings, policy_lm, wm_lm, barrier
        self.decisions = 0
        self.critic: Policy | None = None
        self._seats = asyncio.Semaphore(settings.concurrency)
        self._methods: dict[tuple[str, str], Method] = {}

    @classmethod
    async def load(cls, settings: ServeSettings) -> Planner:
        """Load the models.  Raises UserError for what can't work, before that where possible."""
        plan, barrier = make_plan(settings), BatchBarrier()
        check_answers(plan)
        judged = plan
        if settings.critic_model and settings.method not in NEED_CRITIC:  # as for the world model below
            judged = make_plan(dataclasses.replace(settings, method="step_q", action_selection="generate"))
        policy = judged.load_policy(barrier, settings.policy_device or settings.device)
        world_model: WorldModel | None = None
        if settings.has_world_model:
            asks = plan if plan.uses_world_model else make_plan(dataclasses.replace(
                settings, method="foresight", disable_wm=0))  # for the requests that name another method
            world_model = asks.load_world_model(barrier, settings.wm_device or settings.device)
        planner = cls(settings, policy.lm, world_model.lm if world_model else None, barrier)
        planner.critic = policy.critic
        await planner.method(settings.method, settings.action_selection)
        return planner

    @property
    def remote(self) -> bool:
        """Whether a model is behind another server."""
        return not self.settings.policy_backend == self.settings.wm_backend == "local"

    @property
    def batches(self) -> list[int]:
        """The rows of each batch so far; none of models behind servers."""
        return [rows for lm in (self.policy_lm, self.wm_lm) for rows in getattr(lm, "batches", ())]

    async def method(self, name: str, selection: str) -> Method:
        """The method ``name`` on the loaded models.  Raises UserError where it can't work with them."""
        if name not in METHODS:
            raise UserError(f"method {name!r}: give one of {', '.join(METHODS)}")
        if (name, selection) not in self._methods:
            settings = self._settings_of(name, selection)
            if name in NEED_WORLD_MODEL and self.wm_lm is None and not settings.disable_wm:
                raise UserError(f"method {name} needs a world model, and this server has none")
            plan = make_plan(settings)
            check_answers(plan)
            if plan.policy_server is not None:
                await check_scores(settings, self.policy_lm)
            policy = plan.load_policy(self.barrier, lm=self.policy_lm, critic=self.critic)
            world_model = plan.load_world_model(self.barrier, lm=self.wm_lm) if plan.uses_world_model else None
            self._methods[name, selection] = plan.build_method(policy, world_model)
        return self._methods[name, selection]

    def _settings_of(self, name: str, selection: str) -> ServeSettings:
        """The server's settings for a method: how K is chosen is said for its own, which others may refuse."""
        settings = dataclasses.replace(self.settings, method=name, action_selection=selection)
        if name in WRITE_THOUGHTS:
            settings = dataclasses.replace(settings, action_selection="generate")
        if name != self.settings.method and name not in ("foresight", "revise"):
            settings = dataclasses.replace(settings, fixed_k=-1, k_policy="auto", disable_wm=0)
        return settings

    async def decide(self, state: State, admissible: Sequence[str] | None, seed: int, *, method: str = "",
                     selection: str = "", invalid: Sequence[bool] | None = None,
                     earlier: Sequence[EarlierTrial] = ()) -> Planned:
        """What ``method`` (by default the server's) does in ``state``, as it would in an evaluation.

        ``admissible``: the admissible actions, where actions are chosen among them.  ``seed``: the step's own.
        ``invalid``: which actions of the history the engine didn't take; by default those that nothing came of.
        ``earlier``: the earlier trials of the game.  A method that reads its own earlier decisions finds none.
        Raises UserError and PromptTooLong.
        """
        acts = await self.method(method or self.settings.method, selection or self.settings.action_selection)
        if acts.want_admissible and not admissible:
            raise UserError(f"method {acts.name} chooses among the admissible actions here: give admissible_actions")
        game = Game(self.settings.env, "", "", "", "")
        view = View(game, len(state.history), state, Observation(
            state.observation, state.task, tuple(admissible) if admissible else None), seed,
                    invalid=tuple(failed(state) if invalid is None else invalid), earlier=tuple(earlier))
        async with self._seats:
            self.barrier.add(live=1)
            try:
                with metered() as usage:
                    start = time.monotonic()
                    decision = await acts.act(view)
            except PromptTooLong:
                raise
            except UserError as error:
                raise (ModelFailed(str(error)) if self.remote else error) from error
            finally:
                self.barrier.add(live=-1)
        self.decisions += 1
        return Planned(acts.name, decision, usage, time.monotonic() - start)

    async def close(self) -> None:
        for lm in (self.policy_lm, self.wm_lm):
            if lm is not None:
                await lm.close()
        if self.critic is not None:
            await self.critic.close()


def failed(state: State) -> list[bool]:
    """Which actions of the history ALFWorld answered as one that it didn't take."""
    return [observation.strip() == NOTHING_HAPPENS for _, observation in state.history]


def answer(planned: Planned) -> dict[str, Any]:
    """The JSON that a client gets."""
    decision = planned.decision
    return {
        "method": planned.method, "action": decision.action, "k": decision.k,
        "imagined": [{"action": action, "observation": observation}
                     for action, observation in (decision.imagined.steps if decision.imagined else ())],
        "thought": decision.thought, "reflection": decision.reflection,
        "tokens": {role: {"calls": spent.calls, "prompt": spent.prompt_tokens, "generated": spent.completion_tokens}
                   for role, spent in sorted(planned.usage.items())},
        "seconds": round(planned.seconds, 4),
    }
