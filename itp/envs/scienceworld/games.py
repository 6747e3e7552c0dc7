"""ScienceWorld's games: the simulator's own tasks, variations and splits.

The usual protocol has 24 of the 30 tasks, a step limit for each, and the simplification ``easy``.  The splits have
ALFWorld's names: train, dev = seen and test = unseen are the simulator's training, development and test variations.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itp.config import flag
from itp.envs.base import EnvDied
from itp.envs.scienceworld.env import JvmEngine, find_jar
from itp.errors import UserError
from itp.files import cache_folder, keep, read_cached, read_json, read_text
from itp.games import SPLITS, Game, resolve_split, spread

log = logging.getLogger(__name__)

STEP_LIMITS = {
    "boil": 100, "change-the-state-of-matter-of": 80, "freeze": 80, "melt": 80,
    "measure-melting-point-known-substance": 120, "use-thermometer": 30,
    "power-component": 20, "power-component-renewable-vs-nonrenewable-energy": 30,
    "test-conductivity": 30, "test-conductivity-of-unknown-substances": 30,
    "find-animal": 15, "find-living-thing": 15, "find-non-living-thing": 15, "find-plant": 15,
    "grow-fruit": 60, "grow-plant": 30,
    "chemistry-mix": 60, "chemistry-mix-paint-secondary-color": 15, "chemistry-mix-paint-tertiary-color": 30,
    "lifespan-longest-lived": 10, "lifespan-longest-lived-then-shortest-lived": 12, "lifespan-shortest-lived": 10,
    "identify-life-stages-1": 30, "identify-life-stages-2": 30,
}
"""The step limit of an episode for each of the usual protocol's 24 tasks."""
OTHER_STEP_LIMIT = 100
"""The package's own step limit, for the six tasks that the protocol leaves out."""


@dataclass
class ScienceworldFlags:
    """Flags that choose ScienceWorld games, also of programs that play both environments."""

    tasks: str = flag("", help="ScienceWorld: tasks, separated by commas, or all (empty: the usual 24)",
                      selects_games=True)
    variations: int = flag(0, help="ScienceWorld: variations of a task, spread evenly over the split (0: all)",
                           selects_games=True)
    pairs: str = flag("", help="ScienceWorld: play exactly these, task:variation,... or a file that holds them or a "
                               "JSON list of [task, variation]", holds="path", selects_games=True)
    simplification: str = flag("easy", help="ScienceWorld: its simplifications, such as openDoors,teleportAction",
                               selects_games=True)
    max_steps_override: int = flag(0, help="ScienceWorld: steps of an episode at most (0: the protocol's, by task)",
                                   selects_games=True)
    env_step_limit: int = flag(200, help="ScienceWorld: the simulator's own moves at most", selects_games=True)
    jar_path: str = flag("", help="ScienceWorld: the simulator (empty: $SCIENCEWORLD_JAR, else the package's own)",
                         holds="path")


def list_games(split: str, flags: ScienceworldFlags) -> list[Game]:
    """The games of a split in a fixed order: by task as the simulator lists them, then by variation."""
    split = resolve_split(split)
    known = splits(flags.jar_path)
    check_simplification(flags.simplification)
    if flags.pairs:
        given = list(parse_pairs(flags.pairs, known))
        chosen = list(dict.fromkeys(given))
        if repeated := len(given) - len(chosen):
            log.warning("%d of %d pairs are duplicates; each game is played once", repeated, len(given))
    else:
        chosen = [(task, variation) for task in choose_tasks(flags.tasks, known)
                  for variation in spread(known[task][split], flags.variations)]
    games = [
        Game("scienceworld", split, f"{task}/{variation}", f"{task}/{variation}/{flags.simplification}", task,
             max_steps=flags.max_steps_override or STEP_LIMITS.get(task, OTHER_STEP_LIMIT))
        for task, variation in chosen
    ]
    if not games:
        raise UserError(f"no ScienceWorld game in split {split!r} of {flags.tasks or 'the usual tasks'}")
    log.info("ScienceWorld, %s: %d games of %d tasks, simplification %r", "pairs" if flags.pairs else split, len(games),
             len({game.task_type for game in games}), flags.simplification)
    return games


def choose_tasks(text: str, known: dict[str, dict[str, list[int]]]) -> list[str]:
    """The tasks that ``--tasks`` names, in the simulator's order."""
    wanted = set(known) if text == "all" else set(text.split(",")) if text else set(STEP_LIMITS)
    if unknown := sorted(wanted - set(known)):
        raise UserError(f"--tasks {unknown[0]!r}: no such task; choose all, or some of {', '.join(known)}")
    return [task for task in known if task in wanted]


def check_simplification(text: str) -> None:
    """Raises UserError for an unknown name, which the simulator itself would ignore."""
    known = ("easy", "teleportAction", "openDoors", "openContainers", "selfWateringFlowerPots", "noElectricalAction")
    if unknown := [name for name in text.split(",") if name and name not in known]:
        raise UserError(f"--simplification {unknown[0]!r}: choose some of {', '.join(known)}")


def parse_pairs(text: str, known: dict[str, dict[str, list[int]]]) -> Iterator[tuple[str, int]]:
    """(task, variation) of ``--pairs``, which holds the list or names a file with it.  Raises UserError for a bad pair.

    The names in ETO's lists work too: ``task-6-lifespan-(longest-lived)`` is ``lifespan-longest-lived``.
    """
    is_file = os.path.isfile(text)
    where = f"--pairs {text}: " if is_file else "--pairs "
    for entry in _pairs_of_file(text) if is_file else text.split(","):
        name, _, variation = entry.strip().partition(":")
        task = name if name in known else re.sub(r"^task-\d+a?-|[()]", "", name)
        is_number = re.fullmatch(r"[0-9]{1,9}", variation) is not None
        if task not in known or not is_number or int(variation) >= sum(map(len, known[task].values())):
            raise UserError(f"{where}{entry!r}: not task:variation with a task and a variation that there is"
                            + ("; mend or remove it" if is_file else " (nor a file of such pairs)"))
        yield task, int(variation)


def _pairs_of_file(path: str) -> list[str]:
    """The entries of a file of pairs, each as task:variation.  Raises UserError."""
    content = read_text(path).strip()
    if not content.startswith(("[", "{", '"')):
        entries = [pair for entry in content.split() for pair in entry.split(",") if pair]
    else:
        listed = read_json(path, "give a whole JSON list of [task, variation]")
        if not isinstance(listed, list):
            raise UserError(f"--pairs {path}: not a list; give a JSON list of [task, variation]")
        entries = [_pair(entry, f"--pairs {path}: entry {i}") for i, entry in enumerate(listed)]
    if not entries:
        raise UserError(f"--pairs {path}: holds no pairs; give task:variation, or a JSON list of [task, variation]")
    return entries


def _pair(entry: Any, where: str) -> str:
    if isinstance(entry, str):
        return entry
    if isinstance(entry, list) and [type(part) for part in entry] in ([str, int], [str, str]):
        return f"{entry[0]}:{entry[1]}"
    raise UserError(f"{where} is {json.dumps(entry)[:60]}, not [task, variation]; mend or remove it")


def splits(jar_path: str = "") -> dict[str, dict[str, list[int]]]:
    """{task: {split: variations}} from the simulator, which is queried once; later from a file under $ITP_CACHE."""
    jar = Path(find_jar(jar_path))
    key = hashlib.sha256(jar.read_bytes()).hexdigest()[:16]
    cache = cache_folder("scienceworld")
    file = cache / f"{key}.json" if cache else None
    if (kept := _kept_splits(read_cached(file))) is not None:
        return kept
    found = _query_splits(str(jar))
    keep(file, json.dumps(found))
    return found


def _kept_splits(text: str | None) -> dict[str, dict[str, list[int]]] | None:
    """What the cache holds; None where it holds nothing or something else."""
    try:
        kept = json.loads(text or "null")
    except ValueError:
        return None
    whole = isinstance(kept, dict) and kept and all(
        isinstance(lists, dict) and lists.keys() == set(SPLITS) for lists in kept.values())
    return kept if whole else None


def _query_splits(jar: str) -> dict[str, dict[str, list[int]]]:
    log.info("asking ScienceWorld for its tasks and variations (once)")
    try:
        engine = JvmEngine(jar)
    except EnvDied as died:
        raise UserError(f"{died}; start the same command again") from died
    try:
        simulator, found = engine.simulator, {}
        for task in list(simulator.getTaskNames()):
            # The lists belong to the loaded task.
            simulator.load(task, 0, "", False)
            lists = (simulator.getVariationsTrain(), simulator.getVariationsDev(), simulator.getVariationsTest())
            # toString, because every element of a Java list would cost a request of its own
            found[task] = dict(zip(SPLITS,
                                   (json.loads(numbers.toString()) for numbers in lists), strict=True))
        return found
    finally:
        engine.close()
