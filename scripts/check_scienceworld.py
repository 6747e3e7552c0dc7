"""Plays the same episodes with ScienceWorld's package and with our adapter, and compares everything.

    python scripts/check_scienceworld.py --episodes 30 --steps 12

A third of the episodes acts at random among the valid actions, wrong focus included (``negative_score``), a third
has few moves (``out_of_moves``), and a third follows the simulator's gold path (``complete``), where its task is a
short one; one random action in ten is nonsense.  Each engine runs in a JVM of its own, both with equal hash codes,
without which the simulator's text differs from one run to the next.  Ends with the times of a step in this run: the
package's step() lists all valid actions, ours doesn't.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from itp.config import flag, parse_settings
from itp.envs.scienceworld.env import JAVA_OPTIONS, ScienceworldEnv, find_jar, find_java
from itp.envs.scienceworld.games import ScienceworldFlags, list_games
from itp.errors import UserError
from itp.games import Game
from itp.program import run_main
from itp.seeding import derive_seed

NONSENSE = ("", "fly", "open", "focus on nothing", "go to the moon", "7")
KINDS = ("random", "few moves", "gold")
PLENTY, FEW, SHORT = 400, 3, 30


@dataclass
class CheckSettings:
    episodes: int = flag(30, help="episodes to play, one of each task after the other")
    steps: int = flag(12, help="steps of an episode that doesn't follow the gold path")
    seed: int = flag(0, help="what variations and random actions are drawn from")


class Package:
    """The package's own environment, started with our Java and options."""

    def __init__(self) -> None:
        os.environ["JAVA_TOOL_OPTIONS"] = " ".join(JAVA_OPTIONS)
        os.environ["PATH"] += os.pathsep + os.path.dirname(find_java())
        from scienceworld import ScienceWorldEnv

        self.env = ScienceWorldEnv("", find_jar())
        del os.environ["JAVA_TOOL_OPTIONS"]

    def reset(self, game: Game, limit: int) -> dict[str, Any]:
        task, variation, simplification = game.path.split("/")
        self.env.load(task, int(variation), simplification)
        self.env.envStepLimit = limit
        text, info = self.env.reset()
        return {"text": text.strip(), "task": info["taskDesc"].partition("Description:")[2].split()}

    def step(self, action: str) -> tuple[dict[str, Any], list[str]]:
        text, _, done, info = self.env.step(action)
        return {"text": text.strip(), "score": info["score"], "done": done, "moves": info["moves"]}, info["valid"]


def play_both(package: Package, ours: ScienceworldEnv, game: Game, kind: str, steps: int, rng: random.Random,
              seconds: dict[str, list[float]]) -> tuple[int, str]:
    """Play one episode on both in step.  Returns (steps, how it ended)."""
    ours.env_step_limit = FEW if kind == "few moves" else PLENTY
    ours.expert = "gold" if kind == "gold" else ""
    seen = ours.reset(game)
    same(game, "reset", package.reset(game, ours.env_step_limit), {"text": seen.text, "task": seen.task.split()})
    valid = ["look around"]
    for t in range(PLENTY if kind == "gold" else steps):
        action = seen.expert_action or (rng.choice(NONSENSE) if rng.random() < 0.1 else rng.choice(valid))
        start = time.perf_counter()
        theirs, valid = package.step(action)
        middle = time.perf_counter()
        result = ours.step(action)
        seen = result.obs
        seconds["package"].append(middle - start)
        seconds["ours"].append(time.perf_counter() - middle)
        same(game, f"step {t}, {action!r}", theirs, {
            "text": seen.text, "score": result.info["raw_score"], "done": result.done,
            "moves": result.info["moves"]})
        if result.done:
            return t + 1, result.info["ending"]
        valid = sorted(set(valid) - {"reset task"}) or ["look around"]
    return t + 1, ""


def same(game: Game, where: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    if theirs != ours:
        raise UserError(f"{game.path}, {where}: the package gives {theirs} and the adapter {ours}")


def main() -> None:
    settings = parse_settings(CheckSettings, prog="python scripts/check_scienceworld.py", description=__doc__)
    by_task: dict[str, list[Game]] = {}
    for game in list_games("train", ScienceworldFlags(tasks="all")):
        by_task.setdefault(game.task_type, []).append(game)
    package, ours = Package(), ScienceworldEnv()
    seconds: dict[str, list[float]] = {"package": [], "ours": []}
    endings: Counter[str] = Counter()
    for number in range(settings.episodes):
        rng = random.Random(derive_seed(settings.seed, number))
        game, kind = rng.choice(list(by_task.values())[number % len(by_task)]), KINDS[number % len(KINDS)]
        if kind == "gold" and game.max_steps > SHORT:
            kind = "random"
        steps, ending = play_both(package, ours, game, kind, settings.steps, rng, seconds)
        endings[ending or "step limit"] += 1
        print(f"{number + 1}/{settings.episodes} {game.game_id}, {kind}: {steps} steps equal, {ending or 'not ended'}",
              flush=True)
    ours.close()
    package.env.close()
    means = {name: 1e3 * statistics.mean(times) for name, times in seconds.items()}
    print(f"{settings.episodes} episodes, {len(seconds['ours'])} steps: observations, scores, moves and ends equal "
          f"({', '.join(f'{n} {ending}' for ending, n in sorted(endings.items()))})")
    print(f"step: package {means['package']:.1f} ms, ours {means['ours']:.1f} ms, "
          f"{means['package'] / means['ours']:.1f} times faster (medians "
          f"{1e3 * statistics.median(seconds['package']):.1f} and {1e3 * statistics.median(seconds['ours']):.1f})")


if __name__ == "__main__":
    run_main(main)
