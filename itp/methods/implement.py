"""IMPLEMENT: model-based policy iteration at test time: propose, imagine, sum up, propose again.

After *Model-Based Imaginative Planning for Embodied Agents* (ACL 2026).  The idea is policy iteration on a model
(Howard, 1960), with language models for policy and model.  In each of at most ``rounds`` rounds the policy proposes an
action.  An action that is new to this step is imagined: the world model samples ``belief_samples`` outcomes where the
action gathers information, that is, goes to or opens a receptacle whose contents the episode hasn't seen, and one
outcome else.  Where the outcome of ``go to`` is a closed receptacle, opening it is imagined too, and both are one
outcome.  The outcomes are summed up as a belief.  There are two ways to choose (``implement_choice``):

policy  The policy reads the beliefs so far when it proposes.  It executes a proposal that it has imagined before,
        unless it asks for help: more actions to be tried.  After the last round it must choose among the imagined
        actions.  Instruct models write thought, action and help flag in one reply, and a neutral summary with
        frequencies as belief.  Models that were trained here know neither: they write the action, and a reflection as
        belief.
gain    Nobody reads.  Each round proposes an action that wasn't imagined yet: the likeliest where the policy is greedy,
        else one that is drawn at its temperature, so that the trials of a game differ.  The belief counts
        (:func:`itp.methods.gain.frequencies`).  The action with the highest expected gain is executed
        (:class:`itp.methods.gain.Gain`); a later proposal must be better by MARGIN.  Rounds end with an action whose
        gain is at least ENOUGH, and go on, up to PATIENCE times as many, while no gain is above MARGIN.  So this way
        needs no policy that can read imagined futures, and no training.

``implement_memory``: what earlier trials of the game showed (``View.earlier``) stands before the steps of the episode
in what the world model reads (:mod:`itp.methods.memory`).  With ``gain`` the policy reads them too for its first
proposal.  Before that the way to a place is proposed that is remembered to hold what the task needs next.  The world
model also sees the last RECENT steps, and the last FAILED actions before these that the engine didn't take.  The game
itself as world model (``--wm_backend engine``) needs no memory.

Departure: a text world model reads and writes text, as the other methods' does, and the symbolic state is computed from
it (docs/implement.md).  A world model on symbolic states (:mod:`itp.agent.state_model`) is given the state and, as
conditions, what earlier trials showed and what failed in them; what it predicts is put in the game's words.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace

from itp.agent.engine_world_model import EngineDynamics
from itp.agent.imagination import ImaginedTrajectory
from itp.agent.policy import Choice
from itp.agent.state_model import StateDynamics, StateModel
from itp.methods.base import Decision, PolicyMethod, View, decide
from itp.methods.gain import Gain, frequencies, gathers_information
from itp.methods.memory import Steps, chosen, remembered, unseen, with_memory
from itp.seeding import derive_seed
from itp.text.alfworld_phrases import IS_CLOSED
from itp.text.conditions import Conditions, target_of
from itp.text.prompts import proposal_text
from itp.text.state import State, indent

RECENT, FAILED = 15, 15
ENOUGH = 0.5
"""The expected gain with which no other action is tried: something new, or something needed, is to come of it."""


PATIENCE = 8
"""Times as many rounds as usual, while nothing that was imagined is worth anything: in a room that is mostly known, the
likeliest actions lead to where the episode has been."""
MARGIN = 0.25
"""The difference of expected gains that counts: between means of ten samples, smaller ones are mostly chance."""


class Implement(PolicyMethod):
    name = "implement"

    async def act(self, view: View) -> Decision:
        memory: dict[str, Steps] = {}
        if self.settings.implement_memory != "none" and not isinstance(self.world_model, EngineDynamics):
            memory = unseen(remembered(view.earlier), view.state)
        if not self.settings.implement_imagination:
            return decide(await self.policy.act(with_memory(view.state, memory), view.observation.admissible,
                                                derive_seed(view.seed, "act")))
        step = _Step(self, view, memory)
        return await (step.by_gain() if self.settings.implement_choice == "gain" else step.by_policy())


class _Step:
    """One decision.  ``outcomes``: those of every action that was imagined; ``beliefs``: their summaries."""

    def __init__(self, method: Implement, view: View, memory: Mapping[str, Steps]) -> None:
        self.policy, self.world_model, self.settings = method.policy, method.world_model, method.settings
        if isinstance(method.world_model, StateModel):
            earlier = view.earlier if self.settings.implement_memory != "none" else ()
            known = Conditions.of_all((trial.state, trial.invalid) for trial in earlier)
            self.world_model = method.world_model.told(known, view.seed)
        self.view, self.memory = view, memory
        self.outcomes: dict[str, list[Steps]] = {}
        self.beliefs: dict[str, str] = {}

    # --- the two ways to choose

    async def by_policy(self) -> Decision:
        choice = None
        for i in range(self.settings.rounds):
            choice, more = await self._propose(i)
            if choice.action not in self.outcomes:
                self.outcomes[choice.action] = await self._imagine(choice.action, i)
                self.beliefs[choice.action] = await self._sum_up(choice.action, i)
            elif not more:
                break
        else:
            choice = await self.policy.choose(self.view.state, list(self.outcomes), self._seed("choose"),
                                              notes=self._notes())
        return self._decision(choice, {action: Counter(outcomes).most_common(1)[0][1] / len(outcomes)
                                       for action, outcomes in self.outcomes.items()})

    async def by_gain(self) -> Decision:
        gain = Gain(self.view.state, self.memory, self.settings.implement_memory == "recall", self.view.game.env)
        choices: dict[str, Choice] = {}
        values: dict[str, float] = {}
        async for i, choice in self._likeliest(gain.remembered(self.memory)):
            choices[choice.action] = choice
            self.outcomes[choice.action] = await self._imagine(choice.action, i)
            self.beliefs[choice.action] = frequencies(choice.action, self.outcomes[choice.action])
            values[choice.action] = gain.expected(self.outcomes[choice.action])
            best = max(values.values())
            if i > 0 and best >= ENOUGH or len(values) >= self.settings.rounds and best > MARGIN:
                break
        return self._decision(choices[preferred(values)], values)

    def _decision(self, choice: Choice, values: Mapping[str, float]) -> Decision:
        steps = Counter(self.outcomes[choice.action]).most_common(1)[0][0]
        return decide(choice, k=len(steps), imagined=ImaginedTrajectory(self.view.state, steps),
                      reflection=self.beliefs[choice.action],
                      considered=tuple((action, value, len(self.outcomes[action])) for action, value in values.items()))

    # --- proposals

    @property
    def _plans(self) -> bool:
        """Whether the policy is one that can be told of help flags and neutral beliefs."""
        return self.policy.form.style == "instruct" and self.policy.selection == "generate"

    async def _propose(self, i: int) -> tuple[Choice, bool]:
        """A proposal, and whether help is wanted with it."""
        if self._plans:
            return await self.policy.plan(self.view.state, self._seed("act", i), notes=self._notes())
        choice = await self.policy.act(self.view.state, self.view.observation.admissible, self._seed("act", i),
                                       notes=self._notes())
        return choice, False

    async def _likeliest(self, remembered: Sequence[str]) -> AsyncIterator[tuple[int, Choice]]:
        """(round, proposal): different actions, at the policy's temperature where the admissible actions are known.

        A greedy policy proposes them by falling probability.  Before these, in round 0, come what was imagined behind
        the last action, where that came as imagined, and the first action that is ``remembered`` to bring something
        needed.
        """
        admissible = self.view.observation.admissible
        for action in dict.fromkeys([*self._goes_on(), *remembered[:1]]):
            if not admissible or action in admissible:
                yield 0, Choice(action, action)
        asked = [with_memory(self.view.state, self.memory), self.view.state] if self.memory else [self.view.state]
        if self.policy.selection == "generate" or not admissible:
            for one in asked:
                for choice in await self.policy.candidates(one, admissible, self.settings.rounds,
                                                           self._seed("propose", len(one.history))):
                    if choice.action not in self.outcomes:
                        yield len(self.outcomes) + 1, choice
            return
        for i in range(len(self.outcomes), PATIENCE * self.settings.rounds):
            if left := [action for action in admissible if action not in self.outcomes]:
                choice, = await self.policy.sample(asked[0], left, 1, self._seed("propose", i))
                yield i + 1, choice
            asked = asked[1:] or asked

    def _goes_on(self) -> list[str]:
        """The second of two imagined actions, of which the first was executed and answered as imagined."""
        past, state = self.view.past, self.view.state
        if not past or past[-1].imagined is None or len(past[-1].imagined.steps) < 2:
            return []
        first, (action, _) = past[-1].imagined.steps[:2]
        return [action] if first == state.history[-1] else []

    # --- imagination

    async def _imagine(self, action: str, i: int) -> list[Steps]:
        """Sampled outcomes of ``action``; opening what is closed belongs to going there."""
        known, temperature = self._known(action), self.settings.implement_temperature
        informs = self.view.game.env == "alfworld" and gathers_information(self.view.state, action)
        n = self.settings.belief_samples if informs else 1
        said = await self.world_model.sample(known, action, n, self._seed("outcomes", i), temperature)
        if not action.startswith("go to ") or n == 1:
            return [((action, one),) for one in said]
        outcomes: list[Steps] = []
        for number, (one, times) in enumerate(Counter(said).items()):
            then: list[Steps] = [()] * times
            if (shut := IS_CLOSED.search(one)) and shut[1] == target_of(action):
                opens = f"open {shut[1]}"
                then = [((opens, seen),) for seen in await self.world_model.sample(
                    known.after(action, one), opens, times, self._seed("opened", i, number), temperature)]
            outcomes += [((action, one), *more) for more in then]
        return outcomes

    def _known(self, action: str) -> State:
        """What the world model reads: the state, and what is remembered that matters for ``action``.

        One on symbolic states has its memory in the conditions, and computes its state from the whole history.
        """
        if isinstance(self.world_model, StateDynamics):
            return self.view.state
        if not self.memory:
            return what_it_knows(self.view)
        draw = random.Random(self._seed("memory", action))
        return with_memory(what_it_knows(self.view), chosen(self.memory, target_of(action), draw))

    async def _sum_up(self, action: str, i: int) -> str:
        """The policy's belief about an action: a neutral summary with frequencies, or a reflection."""
        counts = Counter(" ".join(said for _, said in steps) for steps in self.outcomes[action]).most_common()
        total = len(self.outcomes[action])
        seen = "".join(f"\nThen{f' ({n} of {total})' * self._plans}: {indent(said)}" for said, n in counts)
        label = "Belief" if self._plans else "Reflection"
        return await self.policy.reflect(self.view.state, proposal_text(action) + seen, self._seed("belief", i), label)

    def _notes(self) -> str:
        """The beliefs so far, as a policy reads them; a model that was trained here also sees the likeliest outcome."""
        notes = ""
        for action, belief in self.beliefs.items():
            likeliest = " ".join(said for _, said in Counter(self.outcomes[action]).most_common(1)[0][0])
            middle = "\nBelief: " if self._plans else f"\nThen: {indent(likeliest)}\nReflection: "
            notes += proposal_text(action) + middle + indent(belief)
        return notes

    def _seed(self, *names: object) -> int:
        return derive_seed(self.view.seed, *names)


def preferred(values: Mapping[str, float]) -> str:
    """The action to take: the first proposal, unless a later one is better by more than MARGIN, and so on."""
    best = next(iter(values))
    for action, value in values.items():
        if value > values[best] + MARGIN:
            best = action
    return best


def what_it_knows(view: View) -> State:
    """s_t with the last ``RECENT`` steps, and of those before only the last ``FAILED`` that failed."""
    history = view.state.history
    old = max(0, len(history) - RECENT)
    failed = [i for i in range(old) if view.invalid[i]][-FAILED:]
    return replace(view.state, history=(*(history[i] for i in failed), *history[old:]),
                   omitted=view.state.omitted + old - len(failed))
