"""Statler (Yoneda et al., 2023; 2306.17840): the state of the world is kept as text, which one call writes and one
reads.

At each step the world-state writer gives the state after the last command, from the state before it, the command
and its answer.  The world-state reader chooses the action from the task, the last observation and that state.  So its
prompt doesn't grow with the episode.  ``--statler_writer`` says who writes:

- lm: the policy LM, prompted for one line of JSON.  It needs an instruct model: no training here teaches this prompt.
- belief: the observations, by ALFWorld's rules (:class:`itp.text.belief.Belief`).  A small policy can't write the
  state, and this shows what reading it is worth.  No call is spent.

Both write the form of :meth:`~itp.text.belief.Belief.to_json`.  Departures: the paper's reader answers a whole
request with code and its writer tracks what that code does, while here there is one command a step, and the writer
sees what the game answered; no in-context examples; a tuned policy reads the state as a line behind the observation,
which it wasn't trained on.  The state is the decision's ``reflection`` in the result file.
"""

from __future__ import annotations

from dataclasses import replace

from itp.methods.base import Decision, PolicyMethod, View, decide
from itp.seeding import derive_seed
from itp.text.belief import Belief
from itp.text.prompts import belief_text
from itp.text.state import State, indent

LABEL = "World state"


class Statler(PolicyMethod):
    name = "statler"

    async def act(self, view: View) -> Decision:
        kept = await self.write(view)
        choice = await self.policy.act(now(view.state), view.observation.admissible, derive_seed(view.seed, "act"),
                                       notes=f"\n{LABEL}: {indent(kept)}")
        return decide(choice, reflection=kept, memory=kept)

    async def write(self, view: View) -> str:
        """The state of the world in ``view``, in one line."""
        if self.settings.statler_writer == "belief":
            return belief_text(Belief.of(view.state).to_json())
        state, written = view.state, view.past[-1].memory if view.past else ""
        # Without decisions of its own (in a server, or where an episode begins later) the state is written from the
        # beginning on, with a call for each step.
        for t in range(len(state.history) if view.past else 0, len(state.history) + 1):
            seen, before = replace(state, history=state.history[:t]), ""
            if t:
                before = f"\n{LABEL} before: {indent(written)}\nLast command: {indent(state.history[t - 1][0])}"
            written = await self.policy.reflect(now(seen), before, derive_seed(view.seed, "write"), LABEL)
        return written


def now(state: State) -> State:
    """The task and what was seen last, without history."""
    return State(state.task, state.observation)
