"""The policy alone, but for its loops: no action is executed twice in the same state.

A control for methods that look ahead: what they gain where the policy goes in circles may be had without a world model.
ALFWorld's games answer the same action in the same state in the same way, so doing it again can bring nothing new.

The state is what the episode has shown (:class:`itp.text.belief.Belief`) in ALFWorld, and the last observation
elsewhere.  The likeliest other action is executed.  Of a policy that writes freely it is the first other one of
``candidates`` draws.  Where there is none, the likeliest is executed again.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from itp.methods.base import Decision, PolicyMethod, View, decide
from itp.seeding import derive_seed
from itp.text.belief import Belief
from itp.text.state import State


class NoRepeat(PolicyMethod):
    name = "no_repeat"

    async def act(self, view: View) -> Decision:
        *before, now = states(view.state, view.game.env)
        done = {action for state, (action, _) in zip(before, view.state.history, strict=True) if state == now}
        admissible = view.observation.admissible
        new = [action for action in admissible or () if action not in done]
        choice = await self.policy.act(view.state, new or admissible, derive_seed(view.seed, "act"))
        if choice.action in done:  # written freely, or there is no other
            drawn = await self.policy.candidates(view.state, admissible, self.settings.candidates,
                                                 derive_seed(view.seed, "other"))
            choice = next((other for other in drawn if other.action not in done), choice)
        return decide(choice)


def states(state: State, env: str) -> Iterator[Hashable]:
    """What is known in each state of an episode, from its first to ``state``."""
    if env != "alfworld":
        yield from (state.first, *(observation for _, observation in state.history))
        return
    belief = Belief.of(State(state.task, state.first))
    yield belief.facts()
    for action, observation in state.history:
        belief = belief.after(action, observation)
        yield belief.facts()
