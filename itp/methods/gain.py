"""What an imagined outcome is worth for the task, computed without a language model.

An outcome is judged by the symbolic state that it leads to (:mod:`itp.text.belief`), together with what is remembered
of the places that this episode hasn't seen:

needed   it comes closer to what the task's words need (:meth:`itp.envs.alfworld.needs.Needs.progress`): the object is
         seen, reached, held, in its condition, at its place
lost     it takes the episode further away from it
new      neither, and the state is one that the episode hasn't been in: contents seen for the first time, something
         taken, moved or changed.  Where the agent stands, and what is open, doesn't count, so walking about among
         known places brings nothing

Looking doesn't change what was seen: a prediction of other contents there isn't believed.
The expected gain of an action is the mean over its samples: 1 for an outcome that is needed, -1 for one that is lost,
NEW for one that is new, and else 0.  For tasks whose words aren't understood, and in ScienceWorld, an observation that
the episode hasn't had counts as new, unless it refuses the action.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from itp.envs.alfworld.needs import Needs
from itp.envs.scienceworld.env import INVALID
from itp.methods.memory import Steps, with_memory
from itp.text.alfworld_phrases import contents, kind, receptacles
from itp.text.belief import Belief
from itp.text.facts import Fact
from itp.text.state import State

NEW = 0.5
"""What a new state is worth that doesn't come closer to the task."""
_LOOKS = ("go", "open", "close", "look", "examine", "inventory")
"""Verbs of actions that move no object."""
_ALREADY = ("at", "open", "closed")
"""Predicates of facts that don't make a state new."""


class Gain:
    """The worth of outcomes in ``state``.  ``memory``: of places that the episode hasn't seen, as steps by place.

    ``recall``: an imagined look at a remembered place shows what is remembered, whatever the world model predicts.
    ``env``: the environment of the game.
    """

    def __init__(self, state: State, memory: Mapping[str, Steps], recall: bool = False, env: str = "alfworld") -> None:
        self.recall = recall
        self.symbolic = env == "alfworld" and bool(receptacles(state.first))
        self.needs = Needs.of(state.task) if self.symbolic else None
        self.heard = {state.first, *(observation for _, observation in state.history)}
        start = State(state.task, state.first)
        self.memory = Belief.of(with_memory(start, memory)).places if self.symbolic else {}
        self.belief = Belief.of(start)
        self.been = {self._key(self.belief)}
        for action, observation in state.history if self.symbolic else ():
            self.belief = self.belief.after(action, observation)
            self.been.add(self._key(self.belief))
        self.progress = self._progress(self.belief)

    def expected(self, outcomes: Sequence[Steps]) -> float:
        """The mean worth of sampled outcomes, each of one step or more."""
        return sum(map(self.worth, outcomes)) / len(outcomes)

    def worth(self, steps: Steps) -> float:
        """1, NEW, 0 or -1."""
        if not self.symbolic:
            said = steps[-1][1]
            return 0.0 if said in self.heard or said.startswith(INVALID) else NEW
        after = self.belief
        for action, observation in steps:
            after = self._after(after, action, observation)
        if (change := self._progress(after) - self.progress) != 0:
            return 1.0 if change > 0 else -1.0
        return 0.0 if self._key(after) in self.been else NEW

    def remembered(self, memory: Mapping[str, Steps]) -> list[str]:
        """The actions that go to places where ``memory`` has what the task needs next."""
        return [steps[0][0] for steps in memory.values() if self.worth(steps[:2]) == 1]

    def _after(self, before: Belief, action: str, observation: str) -> Belief:
        """The belief after a predicted answer.  Looking at a place doesn't change what was seen there."""
        after = before.after(action, observation)
        if action.split(" ")[0] not in _LOOKS:
            return after
        sure = self._whole(before) if self.recall else before
        known = {name: replace(place, objects=sure.places[name].objects) for name, place in after.places.items()
                 if place.visited and name in sure.places and sure.places[name].visited}
        return replace(after, places={**after.places, **known})

    def _progress(self, belief: Belief) -> int:
        return self.needs.progress(self._whole(belief)) if self.needs else 0

    def _whole(self, belief: Belief) -> Belief:
        """``belief`` with what is remembered of places that it hasn't seen."""
        places = {name: self.memory.get(name, place) if not place.visited else place
                  for name, place in belief.places.items()}
        return replace(belief, places=places)

    def _key(self, belief: Belief) -> frozenset[Fact]:
        return frozenset(fact for fact in self._whole(belief).facts() if fact[0] not in _ALREADY)


def frequencies(action: str, outcomes: Sequence[Steps]) -> str:
    """The belief about an action, by counting: how many of its outcomes show each type of object, or say what else."""
    counts: Counter[str] = Counter()
    for steps in outcomes:
        said = steps[-1][1]
        shown = {kind(thing) for _, things, _ in contents(said) for thing in things}
        counts.update(sorted(shown) or ["nothing" if contents(said) else said.rstrip(".")])
    told = ", ".join(f"{what} {n}" for what, n in counts.most_common())
    return f"Of {len(outcomes)} predicted answers to {action}: {told}."


def gathers_information(state: State, action: str) -> bool:
    """Whether ``action`` goes to, or opens, a receptacle whose contents the episode hasn't seen."""
    verb, _, rest = action.partition(" ")
    place = rest.removeprefix("to ") if verb == "go" else rest if verb == "open" else ""
    known = {shown.place for _, observation in state.history for shown in contents(observation)}
    return place in receptacles(state.first) and place not in known

