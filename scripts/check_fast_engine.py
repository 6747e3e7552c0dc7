"""Plays the same games on TextWorld's own engine and on ours (itp.envs.alfworld.fast_engine) and compares everything.

    python scripts/check_fast_engine.py --data data --split train --games 50 --steps 50

Each game is played twice (the second reset is that of a known world), with random admissible actions and some
invalid ones, and everything that the environment returns must be equal.  --expert also compares what alfworld's
expert says, that is, the facts that it looks at (handcoded) or the plans (planner).  Ends with the times of both
engines in this run.  Slow: TextWorld's own engine takes 50 to 500 ms a step.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from itp.config import flag, parse_settings
from itp.envs.alfworld.env import AlfworldEnv
from itp.envs.alfworld.games import list_games
from itp.envs.base import Observation
from itp.errors import UserError
from itp.games import Game
from itp.program import run_main

INVALID = ("", "fly", "take nothing from nowhere", "go to countertop 99", "put pen 1 in/on desk 99", "LOOK")


@dataclass
class CheckSettings:
    data: str = flag(help="folder that holds json_2.1.1")
    split: str = flag("train", help="train, valid_seen or valid_unseen")
    games: int = flag(50, help="games to play, spread over the split")
    steps: int = flag(50, help="steps of each of the two plays of a game")
    seed: int = flag(0, help="what the random actions are drawn from")
    expert: str = flag("", help="compare this expert's actions too", choices=("", "handcoded", "planner"))


class Stopwatch:
    """Seconds by name of what was timed."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def __call__(self, name: str, do: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        result = do(*args)
        self.seconds[name].append(time.perf_counter() - start)
        return result

    def report(self, what: str) -> str:
        own, fast = (self.seconds[f"{engine} {what}"] for engine in ("own", "fast"))
        return (f"{what:22s} own {1e3 * statistics.mean(own):9.2f} ms, fast {1e3 * statistics.mean(fast):7.2f} ms "
                f"(medians {1e3 * statistics.median(own):.2f}, {1e3 * statistics.median(fast):.2f}): "
                f"{statistics.mean(own) / statistics.mean(fast):.0f} times faster (n = {len(own)})")


def play_both(engines: dict[str, AlfworldEnv], game: Game, steps: int, rng: random.Random, timed: Stopwatch,
              reset_name: str) -> int:
    """Play one episode on both engines in step.  Returns the number of steps compared."""
    observations = {name: timed(f"{name} {reset_name}", env.reset, game) for name, env in engines.items()}
    same(game, "reset", observations)
    seen: Observation = observations["own"]
    for step in range(steps):
        action = rng.choice(INVALID) if rng.random() < 0.1 else rng.choice(seen.admissible)
        results = {name: timed(f"{name} step", env.step, action) for name, env in engines.items()}
        same(game, f"step {step}, {action!r}", results)
        seen = results["own"].obs
    return steps


def same(game: Game, where: str, answers: dict[str, Any]) -> None:
    if answers["own"] != answers["fast"]:
        raise UserError(f"{game.path}, {where}: the engines differ: {answers['own']} and {answers['fast']}")


def main() -> None:
    settings = parse_settings(CheckSettings, prog="python scripts/check_fast_engine.py", description=__doc__)
    games = list_games(settings.split, settings.data)
    games = random.Random(settings.seed).sample(games, min(settings.games, len(games)))
    engines = {name: AlfworldEnv(want_admissible=True, fast=name == "fast", expert=settings.expert)
               for name in ("own", "fast")}
    timed, compared = Stopwatch(), 0
    for number, game in enumerate(games, start=1):
        rng = random.Random(f"{settings.seed} {game.game_id}")
        for reset_name in ("reset of a new world", "reset of a known world"):
            compared += play_both(engines, game, settings.steps, rng, timed, reset_name)
        print(f"{number}/{len(games)} {game.game_id}: equal", flush=True)
    print(f"{len(games)} games, {compared} steps: everything equal")
    for what in ("step", "reset of a new world", "reset of a known world"):
        print(timed.report(what))


if __name__ == "__main__":
    run_main(main)
