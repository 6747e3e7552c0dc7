"""IMPLEMENT: model-based policy iteration at test time: propose, ask the world model, propose again.

The idea is policy iteration on a model (Howard, 1960), with language models for policy and model; no code of others was
followed.  In each of at most ``rounds`` rounds the policy proposes an action.  If the policy has proposed the action
before, it is executed.  Otherwise the world model samples ``belief_samples`` outcomes at temperature 1, and the policy
summarizes them in one line, its belief about that action.  Later proposals of this step see these lines.  The proposal
after the last round is executed without simulation.

The world model sees the last ``RECENT`` steps and the last ``FAILED`` actions before these that the engine didn't take,
so that it knows what doesn't work here.  Departure: the summary is the policy's ``Reflection`` on the distinct
outcomes, most frequent first, instead of a third model's.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from itp.agent.imagination import ImaginedTrajectory
from itp.methods.base import Decision, PolicyMethod, View, decide
from itp.seeding import derive_seed
from itp.text.prompts import foresight_text, proposal_text
from itp.text.state import State, indent

RECENT, FAILED = 15, 15


class Implement(PolicyMethod):
    name = "implement"

    async def act(self, view: View) -> Decision:
        beliefs: dict[str, str] = {}
        likeliest: dict[str, tuple[str, int]] = {}
        for i in range(self.settings.rounds + 1):
            notes = "".join(f"{foresight_text([(action, likeliest[action][0])])}\nReflection: {indent(belief)}"
                            for action, belief in beliefs.items())
            choice = await self.policy.act(view.state, view.observation.admissible, derive_seed(view.seed, "act", i),
                                           notes=notes)
            if choice.action in beliefs or i == self.settings.rounds:
                break
            outcomes = await self.world_model.sample(what_it_knows(view), choice.action, self.settings.belief_samples,
                                                     derive_seed(view.seed, "outcomes", i))
            counts = Counter(outcomes).most_common()
            likeliest[choice.action] = counts[0]
            seen = proposal_text(choice.action) + "".join(f"\nThen: {indent(outcome)}" for outcome, _ in counts)
            beliefs[choice.action] = await self.policy.reflect(view.state, seen, derive_seed(view.seed, "belief", i))
        imagined = ImaginedTrajectory(view.state)
        if choice.action in likeliest:
            imagined = imagined.then(choice.action, likeliest[choice.action][0])
        return decide(choice, k=len(imagined.steps), imagined=imagined, reflection=beliefs.get(choice.action, ""),
                      considered=tuple((action, n / self.settings.belief_samples, self.settings.belief_samples)
                                       for action, (_, n) in likeliest.items()))


def what_it_knows(view: View) -> State:
    """s_t with the last ``RECENT`` steps, and of those before only the last ``FAILED`` that failed."""
    history = view.state.history
    old = max(0, len(history) - RECENT)
    failed = [i for i in range(old) if view.invalid[i]][-FAILED:]
    return replace(view.state, history=(*(history[i] for i in failed), *history[old:]),
                   omitted=view.state.omitted + old - len(failed))
