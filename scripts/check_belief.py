"""Compares the symbolic state (itp.text.belief) with the engine's own facts after every step of real episodes.

    python scripts/check_belief.py --data data --split train --games 100 --steps 60

Each game is played twice: by a random walk, and by the expert with random mistakes and invalid actions.  Whatever the
belief says must be a fact of the engine: where the agent is, what it holds, what is open or closed, everything that is
in or on each place whose contents were seen, and conditions.  A condition that an action of the episode brought about
must be in the belief.  Nothing may be claimed of places that no observation has shown, and the published form must be
read back as it was.  Ends with the number of facts compared.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from itp.config import flag, parse_settings
from itp.envs.alfworld.env import _IDLE_ENGINES, AlfworldEnv, _make_engine
from itp.envs.alfworld.expert import Expert
from itp.envs.alfworld.games import list_games, task_params
from itp.envs.base import Observation
from itp.errors import UserError
from itp.games import Game, spread
from itp.program import run_main
from itp.seeding import derive_seed
from itp.text.alfworld_phrases import contents
from itp.text.belief import Belief
from itp.text.state import State

INVALID = ("fly", "take nothing 1 from nowhere 1", "go to countertop 99", "open drawer 99", "heat mug 9 with fridge 1")
CONDITIONS = {"hot": "ishot", "cool": "iscool", "clean": "isclean", "lit": "istoggled"}


@dataclass
class CheckSettings:
    data: str = flag(help="folder that holds json_2.1.1")
    split: str = flag("train", help="train, valid_seen or valid_unseen")
    games: int = flag(100, at_least=1, help="games to play, spread over the split")
    steps: int = flag(60, at_least=1, help="steps of each of the two episodes of a game")
    seed: int = flag(0, help="what the random actions are sampled from")


class FactsEnv(AlfworldEnv):
    """AlfworldEnv with the engine's hidden facts of the current state, for checks only."""

    facts: list[Any]

    def reset(self, game: Game) -> Observation:
        if self._engine is None:  # the handcoded expert's engine lists facts; the expert itself isn't asked
            idle = _IDLE_ENGINES[self.fast, "handcoded"]
            self._engine = idle.pop() if idle else _make_engine(self.fast, "handcoded")
        return super().reset(game)

    def _note(self, state: Any, executed: str) -> None:
        super()._note(state, executed)
        self.facts = state["facts"]

    def close(self) -> None:
        if self._engine is not None:
            _IDLE_ENGINES[self.fast, "handcoded"].append(self._engine)
            self._engine = self._loaded = None


class Truth:
    """The engine's facts of one state, in the belief's words."""

    def __init__(self, facts: list[Any]) -> None:
        names: defaultdict[str, list[tuple[str, ...]]] = defaultdict(list)
        for fact in facts:
            names[fact.name].append(tuple(argument.name for argument in fact.arguments))
        here = {where for _, where in names["atlocation"]}
        self.at = {place for place, where in names["receptacleatlocation"] if where in here}
        self.held = {thing for _, thing in names["holds"]}
        self.openable, self.opened = ({place for place, in names[name]} for name in ("openable", "opened"))
        self.inside: defaultdict[str, set[str]] = defaultdict(set)
        for thing, place in names["inreceptacle"]:
            self.inside[place].add(thing)
        self.conditions = {(word, thing) for word, name in CONDITIONS.items() for thing, in names[name]}


def compare(belief: Belief, truth: Truth, start: Truth, shown: set[str], compared: Counter[str]) -> str:
    """What the belief gets wrong; empty where it is right.  ``shown``: places whose contents were shown so far."""
    if belief.location and belief.location not in truth.at:
        return f"at {belief.location}, not at {truth.at}"
    if belief.inventory != truth.held:
        return f"holds {set(belief.inventory)}, not {truth.held}"
    for name, place in belief.places.items():
        if place.visited != (name in shown) or not place.visited and place.objects:
            return f"{name}: {place}, and its contents were shown: {name in shown}"
        if place.open is not None and (name not in truth.openable or place.open != (name in truth.opened)):
            return f"{name}: open {place.open}, the engine's: {name in truth.opened}"
        if place.visited and place.objects != truth.inside[name]:
            return f"{name}: {sorted(place.objects)}, not {sorted(truth.inside[name])}"
        compared["places seen"] += place.visited
        compared["places unseen"] += not place.visited
        compared["objects"] += len(place.objects)
        compared["open or closed"] += place.open is not None
    claimed = {(word, thing) for thing, words in belief.conditions.items() for word in words}
    if wrong := claimed - truth.conditions or truth.conditions - start.conditions - claimed:
        return f"conditions {wrong}: believed {sorted(claimed)}, the engine's {sorted(truth.conditions)}"
    if Belief.from_json(belief.to_json()) != belief:
        return f"the published form is read back as another belief: {belief.to_json()}"
    compared.update(conditions=len(claimed), held=len(belief.inventory), steps=1)
    return ""


def play(env: FactsEnv, game: Game, steps: int, draw: random.Random, mistakes: float, compared: Counter[str]) -> None:
    """One episode of an expert of whose actions the share ``mistakes`` is replaced; 1: a random walk."""
    seen = env.reset(game)
    belief, start, shown = Belief.of(State(seen.task, seen.text)), Truth(env.facts), set[str]()
    expert = Expert(task_params(game), game.task_type, seen.text)
    for step in range(steps):
        action = expert.act() if not expert.finished else "look"
        if action == "look" or draw.random() < mistakes:
            action = draw.choice(INVALID) if draw.random() < 0.1 else draw.choice(seen.admissible)
        result = env.step(action)
        seen = result.obs
        expert.observe(action, seen.text)
        belief = belief.after(action, seen.text)
        shown |= {place for place, _, _ in contents(seen.text)}
        compared["invalid"] += result.invalid
        if wrong := compare(belief, Truth(env.facts), start, shown, compared):
            raise UserError(f"{game.path}, step {step}, {action!r} ({seen.text!r}): {wrong}")


def check(games: list[Game], steps: int, seed: int) -> Counter[str]:
    """Play ``games`` in both ways.  Raises UserError for the first difference."""
    env, compared = FactsEnv(want_admissible=True), Counter[str]()
    for game in games:
        for mistakes in (0.3, 1.0):
            play(env, game, steps, random.Random(derive_seed(seed, game.game_id, mistakes)), mistakes, compared)
    env.close()
    return compared


def main() -> None:
    settings = parse_settings(CheckSettings, prog="check_belief.py", description=__doc__)
    games = list(spread(list_games(settings.split, settings.data), settings.games))
    compared = check(games, settings.steps, settings.seed)
    print(f"{len(games)} games: " + ", ".join(f"{n} {what}" for what, n in compared.items()) + "; all equal")


if __name__ == "__main__":
    run_main(main)
