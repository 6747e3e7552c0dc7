"""Generate new ALFWorld games from the room layouts in the ``alfworld`` package, without a download.

    python -m itp.envs.alfworld_games --out data --train 600 --seen 60 --unseen 60 --seed 0
    python -m itp.envs.alfworld_games --out data --panel alfworld_made_unseen,alfworld_made_seen

The first makes games of a seed.  The second makes those of panels (:mod:`itp.envs.panel`), and verifies that they are
the very same.  Both write the published layout (see :mod:`itp.envs.alfworld.games`), playable by the unmodified engine
and its experts::

    OUT/json_2.1.1/{train,valid_seen,valid_unseen}/<task>-<object>-None-<receptacle or lamp>-<scene>/trial_<n>/
        game.tw-pddl    domain, grammar with the task sentence, problem, walkthrough
        traj_data.json  the goal's parameters

:mod:`itp.envs.alfworld.worlds` samples the games, and the real engine plays each one.  A game is kept if it loads,
isn't won at its start, and :class:`~itp.envs.alfworld.expert.Expert` solves it within 50 steps; otherwise the next
sample replaces it.  The samples depend on seed, split, task type and attempt alone.  So the files are byte-identical
for every number of processes, a restart makes only the missing games, and larger counts add games to the existing ones.

train and valid_unseen have ALFWorld's own rooms.  valid_seen shares the rooms of train, but never the placement of the
objects in a room: the fingerprint of a world decides between the two splits.
"""

from __future__ import annotations

import dataclasses
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
from itp.envs.alfworld.expert import Expert
from itp.envs.alfworld.games import ALFWORLD_TASK_TYPES
from itp.envs.alfworld.worlds import GeneratedGame, alternative_goals, make_game, write_game
from itp.envs.panel import GENERATOR, Panel, alfworld_games, read_panel_of
from itp.errors import UserError
from itp.files import check_output_folder, read_object
from itp.games import SPLITS, Game
from itp.program import progress_bar, run_main, say_next
from itp.run_dir import open_run_dir, recorded
from itp.seeding import derive_seed

if TYPE_CHECKING:
    from itp.envs.alfworld.env import AlfworldEnv

log = logging.getLogger(__name__)

MAX_STEPS = 50
MAX_ATTEMPTS = 2000
SEEN_SHARE = 4
"""One world in this many may serve valid_seen; the others may serve train."""


@dataclass
class GenerateSettings:
    out_dir: str = flag(help="folder to hold json_2.1.1/{train,valid_seen,valid_unseen}", affects_result=False,
                        aliases=("out",))
    train: int = flag(600, at_least=0, help="games in train", affects_result=False)
    seen: int = flag(60, at_least=0, help="games in valid_seen: the rooms of train, other placements of objects",
                     affects_result=False)
    unseen: int = flag(60, at_least=0, help="games in valid_unseen: rooms that train never has", affects_result=False)
    seed: int = flag(0, help="seed of the random games")
    missions: int = flag(1, at_least=1, help="games of train that share a world, with different goals")
    panel: str = flag("", help="make and verify the games of these panels, comma-separated, instead of --train, "
                               "--seen, --unseen and --seed", affects_result=False)
    processes: int = flag(1, at_least=1, help="engines at a time", affects_result=False)
    override: bool = flag(False, help="delete the games there that another configuration made",
                          affects_result=False)


@dataclass(frozen=True)
class GameBatch:
    """The games to make in one world: one split, one task type, and their ``numbers`` within the split."""

    seed: int
    split: str
    task_type: str
    numbers: tuple[int, ...]
    root: str


@dataclass(frozen=True)
class Made:
    """The outcome of a batch: the number of new games, the folders of all its games, and the rejected samples."""

    written: int
    trials: tuple[str, ...]
    rejected: Counter[str]


def plan_batches(settings: GenerateSettings) -> list[GameBatch]:
    """All batches, one per world.  Game number i of a split has the (i mod 6)th task type."""
    counts = {"train": settings.train, "valid_seen": settings.seen, "valid_unseen": settings.unseen}
    batches = []
    for split in SPLITS:
        size = settings.missions if split == "train" else 1
        for type_index, task_type in enumerate(ALFWORLD_TASK_TYPES):
            numbers = range(type_index, counts[split], len(ALFWORLD_TASK_TYPES))
            batches += [GameBatch(settings.seed, split, task_type, tuple(numbers[i:i + size]), settings.out_dir)
                        for i in range(0, len(numbers), size)]
    return sorted(batches, key=lambda batch: (SPLITS.index(batch.split), batch.numbers))


def eligible_scenes(split: str, task_type: str) -> list[int]:
    """The floor plans of a split in which ALFWorld poses tasks of this type."""
    from alfworld.gen import constants

    scenes = constants.TEST_SCENE_NUMBERS if split == "valid_unseen" else constants.TRAIN_SCENE_NUMBERS
    rooms = constants.GOALS_VALID[task_type]
    return [scene for scene in scenes if any(scene in constants.SCENE_TYPE[room] for room in rooms)]


def sample_games(batch: GameBatch, rejected: Counter[str]) -> Iterator[GeneratedGame]:
    """Candidates for a batch, world after world; ``rejected`` counts the failed samples by reason."""
    scenes = eligible_scenes(batch.split, batch.task_type)
    for attempt in range(MAX_ATTEMPTS):
        seed = derive_seed(batch.seed, batch.split, batch.task_type, batch.numbers[0], attempt)
        game = make_game(random.Random(seed).choice(scenes), batch.task_type, seed)
        if game is None:
            rejected["no such goal in the room"] += 1
        elif batch.split != "valid_unseen" and _serves(game) != batch.split:
            rejected["world of the other seen split"] += 1
        else:
            yield from [game, *alternative_goals(game, len(batch.numbers) - 1, seed)]
    raise RuntimeError(f"no playable game in {MAX_ATTEMPTS} samples for {batch}")


def _serves(game: GeneratedGame) -> str:
    return "valid_seen" if game.world.fingerprint() % SEEN_SHARE == 0 else "train"


def solve(env: AlfworldEnv, game: Game, task_params: dict[str, object]) -> list[str] | str:
    """The expert's actions that win ``game``, or the reason to reject the game."""
    expert = Expert(task_params, game.task_type, env.reset(game).text)
    actions: list[str] = []
    while len(actions) < MAX_STEPS:
        action = expert.act()
        result = env.step(action)
        actions.append(action)
        if result.success:
            # The engine reports success only after a step, and every goal takes at least two steps.
            return actions if len(actions) > 1 else "won at its start"
        expert.observe(action, result.obs.text)
    return f"not solved in {MAX_STEPS} steps"


def make_batch(batch: GameBatch) -> Made:
    """Sample, check and write the games of a batch; existing games stay as they are."""
    from itp.envs.alfworld.env import AlfworldEnv

    rejected: Counter[str] = Counter()
    split_folder = Path(batch.root) / "json_2.1.1" / batch.split
    trials, written = [], 0
    env = AlfworldEnv()
    with tempfile.TemporaryDirectory() as scratch:
        for game in sample_games(batch, rejected):
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
    """Whether both files of a game exist and can be read."""
    try:
        game = read_object(trial / "game.tw-pddl")
        read_object(trial / "traj_data.json")
    except UserError:
        return False
    return bool(game.get("solvable")) and bool(game.get("walkthrough"))


def missing(batches: list[GameBatch], root: Path) -> list[GameBatch]:
    """Batches with missing games."""
    there = {
        split: {trial.name for trial in (root / "json_2.1.1" / split).glob("*/trial_*") if is_complete(trial)}
        for split in SPLITS
    }
    return [batch for batch in batches if any(f"trial_{n:06d}" not in there[batch.split] for n in batch.numbers)]


def claim(settings: GenerateSettings) -> None:
    """Refuse a folder that holds other games; record the settings of these games."""
    root = Path(settings.out_dir)
    games, record = root / "json_2.1.1", root / "config.json"
    check_output_folder(root)
    made_here = record.exists() and recorded(root)["config"].get("generator") == GENERATOR
    if (games.exists() or record.exists()) and not made_here:
        raise UserError(f"{root} holds what this program didn't make; choose another --out")
    if settings.override:
        shutil.rmtree(games, ignore_errors=True)
    # The counts aren't part of it: more games may be added later.
    open_run_dir(root, settings, facts={"generator": GENERATOR}, override=settings.override)


def generate(settings: GenerateSettings) -> Counter[str]:
    """Make the missing games; returns the number of new games and of rejected samples by reason."""
    claim(settings)
    batches = missing(plan_batches(settings), Path(settings.out_dir))
    outcome: Counter[str] = Counter()
    with progress_bar(sum(len(batch.numbers) for batch in batches), "game") as progress:
        for made in _run(batches, min(settings.processes, len(batches))):
            outcome.update(made.rejected)
            outcome["made"] += made.written
            progress.update(len(made.trials))
    return outcome


def _run(batches: list[GameBatch], processes: int) -> Iterator[Made]:
    if processes <= 1:
        yield from map(make_batch, batches)
        return
    try:
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield from pool.map(make_batch, batches)
    except BrokenProcessPool as error:
        raise UserError("an engine's process died (out of memory?); start the same command again to go on, "
                        "perhaps with fewer --processes") from error


def generate_panels(settings: GenerateSettings) -> Counter[str]:
    """Make the missing games of ``settings.panel``, and verify them.  Raises UserError where one isn't the panel's."""
    outcome: Counter[str] = Counter()
    panels = [read_panel_of(name, "alfworld", "", "") for name in settings.panel.split(",") if name]
    for panel in panels:
        outcome.update(generate(settings_of(panel, settings)))
    for panel in panels:
        log.info("panel %s: all %d games are there, hash %s", panel.name,
                 len(alfworld_games(panel, settings.out_dir)), panel.hash)
    return outcome


def settings_of(panel: Panel, settings: GenerateSettings) -> GenerateSettings:
    """The settings that make the games of ``panel``.  Raises UserError for one of other games."""
    if panel.made is None:
        raise UserError(f"--panel {panel.name}: this program doesn't make its games")
    counts = dict.fromkeys(("train", "seen", "unseen"), 0) | {
        panel.split.removeprefix("valid_"): len(panel.entries)}
    return dataclasses.replace(settings, **counts, **panel.made)


def main() -> None:
    settings = parse_settings(GenerateSettings, prog="python -m itp.envs.alfworld_games", description=__doc__)
    outcome = generate_panels(settings) if settings.panel else generate(settings)
    made = outcome.pop("made", 0)
    log.info("%s: %d games made, %d samples rejected %s", settings.out_dir, made, outcome.total(), dict(outcome))
    say_next(f"python -m world_model.collect --env_data_root {settings.out_dir} --out_dir DIR")


if __name__ == "__main__":
    run_main(main)
