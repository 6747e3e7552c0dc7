"""Makes new ALFWorld games from the room layouts that the ``alfworld`` package ships: no download.

    python -m itp.envs.alfworld_games --out data --train 600 --seen 60 --unseen 60 --seed 0

writes the published layout (see :mod:`itp.games`), playable by the unmodified engine and its experts::

    OUT/json_2.1.1/{train,valid_seen,valid_unseen}/<task>-<object>-None-<receptacle or lamp>-<scene>/trial_<n>/
        game.tw-pddl    domain, grammar with the task sentence, problem, walkthrough
        traj_data.json  the mission's parameters

:mod:`itp.envs.alfworld_worlds` draws the games.  Each is then played by the real engine: it must load, not
be won at its start, and be solved by :class:`~itp.envs.alfworld_expert.Expert` within 50 steps, or else
the next draw takes its place.  The draws depend on seed, split, task type and attempt alone: the files
are the same byte for byte whatever the number of processes, starting again makes only what is missing,
and larger counts add games to the ones that are there.

train and valid_unseen have ALFWorld's own rooms; valid_seen shares the rooms of train but never the
placement of the objects in one: a world's fingerprint says which of the two it may serve.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from itp.config import flag, parse_settings
from itp.envs.alfworld_expert import Expert
from itp.envs.alfworld_worlds import GeneratedGame, make_game, other_missions, write_game
from itp.games import ALFWORLD_TASK_TYPES, SPLITS, Game
from itp.runtime import UserError, claim_output, derive_seed, progress_bar, read_json, run_main

if TYPE_CHECKING:
    from itp.envs.alfworld import AlfworldEnv

log = logging.getLogger(__name__)

GENERATOR = "itp.envs.alfworld_games"
MAX_STEPS = 50
MAX_ATTEMPTS = 2000
SEEN_SHARE = 4
"""One world in this many may serve valid_seen; the others may serve train."""


@dataclass
class Settings:
    out: str = flag(help="folder to hold json_2.1.1/{train,valid_seen,valid_unseen}")
    train: int = flag(600, at_least=0, help="games in train")
    seen: int = flag(60, at_least=0, help="games in valid_seen: the rooms of train, other placements of objects")
    unseen: int = flag(60, at_least=0, help="games in valid_unseen: rooms that train never has")
    seed: int = flag(0, help="what to draw the games from")
    missions: int = flag(1, at_least=1, help="games of train that share a world, with different goals")
    processes: int = flag(1, at_least=1, help="engines at a time")
    override: bool = flag(False, help="delete the games that another configuration has made there")


@dataclass(frozen=True)
class Batch:
    """The games to be made in one world: of one split and task type; ``numbers`` are those of the split."""

    seed: int
    split: str
    task_type: str
    numbers: tuple[int, ...]
    root: str


@dataclass(frozen=True)
class Made:
    """What became of a batch: its games written anew, the trials that it stands for, the rejected draws."""

    written: int
    trials: tuple[str, ...]
    rejected: Counter[str]


def plan_batches(settings: Settings) -> list[Batch]:
    """All worlds to be made.  Game number i of a split has the (i mod 6)th task type."""
    counts = {"train": settings.train, "valid_seen": settings.seen, "valid_unseen": settings.unseen}
    batches = []
    for split in SPLITS:
        size = settings.missions if split == "train" else 1
        for type_index, task_type in enumerate(ALFWORLD_TASK_TYPES):
            numbers = range(type_index, counts[split], len(ALFWORLD_TASK_TYPES))
            batches += [Batch(settings.seed, split, task_type, tuple(numbers[i:i + size]), settings.out)
                        for i in range(0, len(numbers), size)]
    return sorted(batches, key=lambda batch: (SPLITS.index(batch.split), batch.numbers))


def eligible_scenes(split: str, task_type: str) -> list[int]:
    """The floor plans of a split in which ALFWorld poses such a task."""
    from alfworld.gen import constants

    scenes = constants.TEST_SCENE_NUMBERS if split == "valid_unseen" else constants.TRAIN_SCENE_NUMBERS
    rooms = constants.GOALS_VALID[task_type]
    return [scene for scene in scenes if any(scene in constants.SCENE_TYPE[room] for room in rooms)]


def draw_games(batch: Batch, rejected: Counter[str]) -> Iterator[GeneratedGame]:
    """Candidates for a batch, world after world; why draws came to nothing is counted in ``rejected``."""
    scenes = eligible_scenes(batch.split, batch.task_type)
    for attempt in range(MAX_ATTEMPTS):
        seed = derive_seed(batch.seed, batch.split, batch.task_type, batch.numbers[0], attempt)
        game = make_game(random.Random(seed).choice(scenes), batch.task_type, seed)
        if game is None:
            rejected["no such mission in the room"] += 1
        elif batch.split != "valid_unseen" and _serves(game) != batch.split:
            rejected["world of the other seen split"] += 1
        else:
            yield from [game, *other_missions(game, len(batch.numbers) - 1, seed)]
    raise RuntimeError(f"no playable game in {MAX_ATTEMPTS} draws for {batch}")


def _serves(game: GeneratedGame) -> str:
    return "valid_seen" if game.world.fingerprint() % SEEN_SHARE == 0 else "train"


def solve(env: AlfworldEnv, game: Game, task_params: dict[str, object]) -> list[str] | str:
    """The expert's actions that win ``game``, or why it isn't to be kept."""
    expert = Expert(task_params, game.task_type, env.reset(game).text)
    actions: list[str] = []
    while len(actions) < MAX_STEPS:
        action = expert.act()
        result = env.step(action)
        actions.append(action)
        if result.success:
            # The engine only says so after a step, and no mission takes less than two.
            return actions if len(actions) > 1 else "won at its start"
        expert.observe(action, result.obs.text)
    return f"not solved in {MAX_STEPS} steps"


def make_batch(batch: Batch) -> Made:
    """Draw, check and write the games of a batch; those that are there already are left alone."""
    from itp.envs.alfworld import AlfworldEnv

    rejected: Counter[str] = Counter()
    split_folder = Path(batch.root) / "json_2.1.1" / batch.split
    trials, written = [], 0
    env = AlfworldEnv()
    with tempfile.TemporaryDirectory() as scratch:
        for game in draw_games(batch, rejected):
            name = f"trial_{batch.numbers[len(trials)]:06d}"
            draft = write_game(game, Path(scratch) / game.folder / name, [])
            playable = Game("alfworld", batch.split, name, str(draft), batch.task_type)
            walkthrough = solve(env, playable, game.pddl_params())
            if isinstance(walkthrough, str):
                rejected[walkthrough] += 1
                continue
            folder = split_folder / game.folder / name
            if not is_complete(folder):
                write_game(game, folder, walkthrough)
                written += 1
            trials.append(str(folder))
            if len(trials) == len(batch.numbers):
                break
    env.close()
    return Made(written, tuple(trials), rejected)


def is_complete(trial: Path) -> bool:
    """Both files of a game are there and can be read."""
    try:
        game = json.loads((trial / "game.tw-pddl").read_text(encoding="utf-8"))
        json.loads((trial / "traj_data.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return bool(game.get("solvable")) and bool(game.get("walkthrough"))


def missing(batches: list[Batch], root: Path) -> list[Batch]:
    """The batches of which a game isn't there."""
    there = {
        split: {trial.name for trial in (root / "json_2.1.1" / split).glob("*/trial_*") if is_complete(trial)}
        for split in SPLITS
    }
    return [batch for batch in batches if any(f"trial_{n:06d}" not in there[batch.split] for n in batch.numbers)]


def claim(settings: Settings) -> None:
    """Refuse a folder that holds other games; record what these are made from."""
    root = Path(settings.out)
    games, record = root / "json_2.1.1", root / "config.json"
    made_here = record.exists() and read_json(record).get("config", {}).get("generator") == GENERATOR
    if (games.exists() or record.exists()) and not made_here:
        raise UserError(f"{root} holds what this program didn't make; choose another --out")
    if settings.override:
        shutil.rmtree(games, ignore_errors=True)
    # The counts aren't part of it: more games may be added later.
    claim_output(root, {"generator": GENERATOR, "seed": settings.seed, "missions": settings.missions},
                 override=settings.override)


def generate(settings: Settings) -> Counter[str]:
    """Make what is missing; returns how many games were made and why draws were rejected."""
    claim(settings)
    batches = missing(plan_batches(settings), Path(settings.out))
    outcome: Counter[str] = Counter()
    with progress_bar(sum(len(batch.numbers) for batch in batches), "game") as progress:
        for made in _run(batches, min(settings.processes, len(batches))):
            outcome.update(made.rejected)
            outcome["made"] += made.written
            progress.update(len(made.trials))
    return outcome


def _run(batches: list[Batch], processes: int) -> Iterator[Made]:
    if processes <= 1:
        yield from map(make_batch, batches)
        return
    try:
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield from pool.map(make_batch, batches)
    except BrokenProcessPool as error:
        raise UserError("an engine's process died (out of memory?); start the same command again to go on, "
                        "perhaps with fewer --processes") from error


def main() -> None:
    settings = parse_settings(Settings, prog="python -m itp.envs.alfworld_games", description=__doc__)
    outcome = generate(settings)
    made = outcome.pop("made", 0)
    log.info("%s: %d games made, %d draws rejected %s", settings.out, made, outcome.total(), dict(outcome))


if __name__ == "__main__":
    run_main(main)
