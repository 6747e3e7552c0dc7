"""Reflexion (Shinn et al., 2023; 2303.11366): a failed trial leaves a verbal reflection for the next ones.

The policy acts alone.  Its prompt has its reflections on the last ``MEMORY`` failed trials of the game, oldest first.
After a failed trial it reads the whole episode and writes one line.  The memory of 3 is the paper's for ALFWorld, which
plays up to 12 trials of 134 games.  The first trial is that of ``sft``.

Departures: the actor is the policy alone, where the paper's is ReAct with in-context examples; a trial ends at the
step limit and not when an action repeats; the policy reflects on one trial and doesn't read its earlier reflections.
Success is the engine's.  A policy trained here reads the reflections as it reads those on imagined steps.
"""

from __future__ import annotations

from itp.methods.base import Decision, EarlierTrial, PolicyMethod, View, decide
from itp.seeding import derive_seed
from itp.text.prompts import reflection_text

MEMORY = 3


class Reflexion(PolicyMethod):
    name = "reflexion"

    async def act(self, view: View) -> Decision:
        said = [trial.note for trial in view.earlier if trial.note]
        choice = await self.policy.act(view.state, view.observation.admissible, derive_seed(view.seed, "act"),
                                       notes=notes(said))
        return decide(choice)

    async def look_back(self, trial: EarlierTrial, seed: int) -> str:
        return "" if trial.success else await self.policy.look_back(trial.state, seed)


def notes(said: list[str]) -> str:
    """The latest reflections, oldest first, as lines of a prompt."""
    return "".join(map(reflection_text, said[-MEMORY:]))
