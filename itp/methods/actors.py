"""Actors that need no language model: experts, random walks, and the mixture of two actors."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

from itp.envs.alfworld.expert import Expert
from itp.envs.alfworld.games import task_params
from itp.methods.base import Decision, Method, View
from itp.seeding import derive_seed


class ExpertActor:
    """Our expert.  It is shown the episode so far at every step, so that there is nothing to keep."""

    name, want_admissible = "expert", False

    async def act(self, view: View) -> Decision:
        expert = Expert(task_params(view.game), view.game.task_type, view.state.first)
        for action, observation in view.state.history:
            expert.observe(action, observation)
        return Decision(expert.act())


class EngineExpert:
    """The engine's own experts, as the environment reports them; ALFWorld's look around where they have no plan."""

    name, want_admissible = "engine expert", False

    async def act(self, view: View) -> Decision:
        return Decision(view.observation.expert_action or "look")


def random_action(view: View, draw: random.Random) -> str:
    """An admissible action.  In ScienceWorld its verb is drawn first, because of a thousand actions most connect
    something to something; and it isn't ``focus``, which ends the episode where it is wrong."""
    admissible = view.observation.admissible
    if view.game.env == "scienceworld":
        return verb_first(admissible, draw, without=("focus",))
    return draw.choice(admissible)


def verb_first(actions: Sequence[str], draw: random.Random, without: Sequence[str] = ()) -> str:
    """One of ``actions``, each verb as probable as any other."""
    verb = draw.choice(sorted({action.split(" ")[0] for action in actions}.difference(without)))
    return draw.choice([action for action in actions if action.split(" ")[0] == verb])


@dataclass(frozen=True)
class FirstThen:
    """``action`` at step ``step``, where its episode begins, and then another method: a branch of an episode."""

    action: str
    step: int
    then: Method

    @property
    def name(self) -> str:
        return self.then.name

    @property
    def want_admissible(self) -> bool:
        return self.then.want_admissible

    async def act(self, view: View) -> Decision:
        return Decision(self.action) if view.step == self.step else await self.then.act(view)


class RandomWalk:
    """Random actions for world-model data.

    Half of them change an object, not only the task's object (an expert changes no other).  Most of the rest visit a
    few places repeatedly, and some only look.  In ScienceWorld: see :func:`random_action`.
    """

    name, want_admissible = "random", True

    async def act(self, view: View) -> Decision:
        draw = random.Random(view.seed)
        if view.game.env == "scienceworld":
            return Decision(random_action(view, draw))
        admissible, looks = view.observation.admissible, {"look", "inventory", "examine"}
        changes = [action for action in admissible if action.split(" ")[0] not in {*looks, "go", "help"}]
        visits = [action for action in admissible if action.startswith("go to ")]
        visits.sort(key=lambda action: derive_seed(view.game.game_id, action))
        what = draw.random()
        if changes and what < 0.5:
            return Decision(verb_first(changes, draw))
        if visits and what < 0.9:
            return Decision(draw.choice(visits[:max(3, len(visits) // 3)]))
        return Decision(verb_first([action for action in admissible if action.split(" ")[0] in looks], draw))


class AnyAction:
    """Any admissible action."""

    name, want_admissible = "any", True

    async def act(self, view: View) -> Decision:
        return Decision(random_action(view, random.Random(view.seed)))


class NoisyActor:
    """Replaces a share of an actor's actions by those of another actor.

    ``noise``: the other actor.  ``shares``: an episode has one of these, by its game.  What the first actor would have
    done is the decision's ``expert_action``.
    """

    def __init__(self, actor: Method, noise: Method, shares: Sequence[float]) -> None:
        self.actor, self.noise, self.shares = actor, noise, shares
        self.name = actor.name
        self.want_admissible = actor.want_admissible or max(shares) > 0 and noise.want_admissible

    async def act(self, view: View) -> Decision:
        decision = await self.actor.act(view)
        share = self.shares[derive_seed("noise", view.game.game_id) % len(self.shares)]
        noisy = random.Random(derive_seed(view.seed, "noise")).random() < share
        executed = (await self.noise.act(view)).action if noisy else decision.action
        return dataclasses.replace(decision, action=executed, expert_action=decision.action)


class FailingActor:
    """Replaces a share of an actor's actions by some that were admissible earlier in the episode, and aren't now.

    So data have failures that a world model must foresee: taking what isn't there any more, opening what is far away.
    """

    def __init__(self, actor: Method, share: float) -> None:
        self.actor, self.share, self.name = actor, share, actor.name
        self.want_admissible = actor.want_admissible or share > 0

    async def act(self, view: View) -> Decision:
        decision = await self.actor.act(view)
        if not self.share:
            return decision
        now = frozenset(view.observation.admissible)
        seen = now | (view.past[-1].memory if view.past else now)
        draw = random.Random(derive_seed(view.seed, "failing"))
        if (gone := sorted(seen - now)) and draw.random() < self.share:
            decision = dataclasses.replace(decision, action=draw.choice(gone))
        return dataclasses.replace(decision, memory=seen)
