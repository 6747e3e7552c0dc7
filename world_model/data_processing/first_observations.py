"""What ScienceWorld shows first, for dialogues that begin with the task alone.

ETO's do: its agents weren't shown the room that they started in, while an episode here begins with it.  Their ids,
``NUMBER_VARIATION``, name the game; the simulator's task has to be the dialogue's, or the game is another one.
"""

from __future__ import annotations

import re

from itp.envs.scienceworld.env import ScienceworldEnv
from itp.envs.scienceworld.games import parse_pairs, splits
from itp.errors import UserError
from itp.games import Game

TASKS = dict(enumerate((
    "boil", "change-the-state-of-matter-of", "freeze", "melt", "measure-melting-point-known-substance",
    "measure-melting-point-unknown-substance", "use-thermometer", "power-component",
    "power-component-renewable-vs-nonrenewable-energy", "test-conductivity", "test-conductivity-of-unknown-substances",
    "find-animal", "find-living-thing", "find-non-living-thing", "find-plant", "grow-fruit", "grow-plant",
    "chemistry-mix", "chemistry-mix-paint-secondary-color", "chemistry-mix-paint-tertiary-color",
    "lifespan-longest-lived", "lifespan-longest-lived-then-shortest-lived", "lifespan-shortest-lived",
    "identify-life-stages-1", "identify-life-stages-2")))
"""ETO's numbers of the tasks, as its repository lists them."""


class FirstObservations:
    """Asks one simulator, started when it is first needed."""

    def __init__(self) -> None:
        self.env = ScienceworldEnv()
        self._known = splits()

    def find(self, name: str, task: str) -> str:
        """The first observation of the game that a dialogue's id names, if its task is ``task``; else nothing."""
        found = re.search(r"(?:^|\D)(\d+)_(\d+)$", name)
        if found is None or int(found[1]) not in TASKS:
            return ""
        try:
            (kind, variation), = parse_pairs(f"{TASKS[int(found[1])]}:{found[2]}", self._known)
        except UserError:  # no such variation
            return ""
        game = Game("scienceworld", "train", f"{kind}/{variation}", f"{kind}/{variation}/easy", kind)
        seen = self.env.reset(game)
        return seen.text if seen.task == task else ""

    def close(self) -> None:
        self.env.close()
