"""Panels: fixed lists of games in a fixed order, by which results of different methods and machines are comparable.

    python -m foresight_eval --panel alfworld_made_unseen ...                        # play one
    python -m itp.envs.panel --env_data_root DATA --split unseen --out_json my.json  # write one, of any games

A panel is ``panels/NAME.json`` or any other file of that form.  It names each game and identifies it by a hash of what
defines the game: of an ALFWorld game the three texts that the engine reads, of a ScienceWorld game its task, variation
and simplification.  Paths, time stamps, the order of a folder and the expert's solution don't matter.  So a game is
found wherever it lies under the data root, and one with other content is refused.  Episodes take their seeds from the
panel's names.  A panel of generated games says with which settings :mod:`itp.envs.alfworld.generate` makes them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from itp.config import flag, parse_settings
from itp.envs.alfworld.games import GAME_FIELDS, list_games, read_game_file
from itp.envs.scienceworld.games import ScienceworldFlags, list_games as list_scienceworld
from itp.errors import UnplayableGame, UserError
from itp.files import Fields, check_output_file, checked_object, read_object, write_json
from itp.games import ENVIRONMENTS, SPLITS, Game, resolve_split
from itp.program import run_main
from itp.run_dir import RECORD, recorded

log = logging.getLogger(__name__)
SHIPPED = Path(__file__).resolve().parents[2] / "panels"
GENERATOR = "itp.envs.alfworld_games"
FIELDS: Fields = {"env": str, "split": str, "made": (dict, type(None)), "games": list}
ENTRY: Fields = {"id": str, "task_type": str, "hash": str}
MADE = ("seed", "missions")
"""The generator's settings that its games depend on, besides their number."""
MEND = "give a file that `python -m itp.envs.panel` wrote, whole"


@dataclass(frozen=True)
class Entry:
    """One game of a panel: its name there, its task type, and the hash of what defines it."""

    id: str
    task_type: str
    hash: str


@dataclass(frozen=True)
class Panel:
    """``made``: the settings with which the generator makes the games; None where it doesn't."""

    name: str
    env: str
    split: str
    made: dict[str, Any] | None
    entries: tuple[Entry, ...]

    @property
    def hash(self) -> str:
        """Of the games and their order, names included, since an episode's seeds follow from its game's name."""
        return short_hash([self.env, self.split, *([entry.id, entry.hash] for entry in self.entries)])


def short_hash(content: Any) -> str:
    """16 hexadecimal digits (64 bits) of the SHA-256 of ``content`` as JSON."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()[:16]


def game_hash(game: Game) -> str:
    """The hash of what defines a game.  Raises UnplayableGame where its file can't be read."""
    if game.env == "scienceworld":
        return short_hash([game.env, game.path])
    texts = read_game_file(Path(game.path))
    return short_hash([game.env, game.goal, *(texts[name] for name in GAME_FIELDS)])


def read_panel(name: str) -> Panel:
    """The panel called ``name`` in ``panels/``, or in the file ``name``.  Raises UserError."""
    path = Path(name) if Path(name).is_file() else SHIPPED / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.json"))) or "none"
        raise UserError(f"--panel {name}: no such file, nor a panel of this repository ({known})")
    said = read_object(path, FIELDS, MEND)
    if said["env"] not in ENVIRONMENTS or said["split"] not in SPLITS or not said["games"]:
        raise UserError(f"{path}: unknown env or split, or no games; {MEND}")
    if said["made"] is not None:
        checked_object(said["made"], f"{path}: made", dict.fromkeys(MADE, int), MEND)
    entries = tuple(Entry(**{field: entry[field] for field in ENTRY}) for i, each in enumerate(said["games"])
                    for entry in [checked_object(each, f"{path}: game {i}", ENTRY, MEND)])
    for field in ("id", "hash"):
        if len({getattr(entry, field) for entry in entries}) < len(entries):
            raise UserError(f"{path}: two games have the same {field}; {MEND}")
    return Panel(path.stem, said["env"], said["split"], said["made"], entries)


def read_panel_of(name: str, env: str, split: str, default: str) -> Panel:
    """The panel ``name`` for a program of ``env``.  Raises UserError where it is another environment's, or where
    ``split``, if it isn't the program's ``default``, is another one.
    """
    panel = read_panel(name)
    if panel.env != env:
        raise UserError(f"--panel {name}: its games are {panel.env}'s, and this program plays {env}")
    if split != default and resolve_split(split) != panel.split:
        raise UserError(f"--split {split}: --panel {name} is of {panel.split}; leave --split out")
    return panel


def alfworld_games(panel: Panel, root: str | Path) -> list[Game]:
    """The games of an ALFWorld panel in its order, wherever they lie among those of its split under ``root``.

    Raises UserError, which names the first, where games are missing or have other content.
    """
    there = _by_hash(list_games(panel.split, root)) if _has_games(panel, root) else {}
    absent = [entry.id for entry in panel.entries if entry.hash not in there]
    if absent:
        names = {game.game_id for game in there.values()}
        what = "has other content" if absent[0] in names else "is missing"
        raise UserError(f"--panel {panel.name}: {len(absent)} of its {len(panel.entries)} games aren't under {root} as "
                        f"the panel has them: {absent[0]} {what}; {_remedy(panel)}")
    return [dataclasses.replace(there[entry.hash], game_id=entry.id, task_type=entry.task_type)
            for entry in panel.entries]


def _has_games(panel: Panel, root: str | Path) -> bool:
    return any((Path(root) / folder / panel.split).is_dir() for folder in ("json_2.1.1", ""))


def _by_hash(games: Sequence[Game]) -> dict[str, Game]:
    found: dict[str, Game] = {}
    for game in games:
        try:
            found.setdefault(game_hash(game), game)
        except UnplayableGame as error:
            log.warning("%s", error)
    return found


def _remedy(panel: Panel) -> str:
    if panel.made is None:
        return "give --env_data_root the games that the panel was written of"
    return f"make them in an empty folder with `python -m {GENERATOR} --panel {panel.name} --out FOLDER`"


def scienceworld_games(panel: Panel, flags: ScienceworldFlags) -> list[Game]:
    """The games of a ScienceWorld panel in its order.  Raises UserError where ``flags`` select games, too, or where
    the simulator doesn't have them.
    """
    if given := [name for name in ("tasks", "variations", "pairs") if getattr(flags, name)]:
        raise UserError(f"--panel {panel.name} says which games are played; leave --{given[0]} out")
    chosen = dataclasses.replace(flags, pairs=",".join(entry.id.replace("/", ":") for entry in panel.entries))
    games = list_scienceworld(panel.split, chosen)
    hashes = [game_hash(game) for game in games]
    if other := [entry for entry, found in zip(panel.entries, hashes, strict=True) if entry.hash != found]:
        raise UserError(f"--panel {panel.name}: {other[0].id} is another game with --simplification "
                        f"{flags.simplification!r}; give the panel's, or write a panel of your own")
    return games


# ---------------------------------------------------------------- writing one


@dataclass
class PanelSettings(ScienceworldFlags):
    out_json: str = flag(help="file to write; its name is the panel's")
    env: str = flag("alfworld", help="environment", choices=ENVIRONMENTS)
    split: str = flag("unseen", help="split of the games")
    env_data_root: str = flag("eval_agent/data/alfworld", help="ALFWorld: folder that holds json_2.1.1")


def write_panel(settings: PanelSettings) -> Panel:
    """Write the panel of all games that ``settings`` select, in the order of an evaluation."""
    check_output_file(settings.out_json)
    science = settings.env == "scienceworld"
    games = list_scienceworld(settings.split, settings) if science else list_games(
        settings.split, settings.env_data_root)
    entries = tuple(Entry(game.game_id, game.task_type, game_hash(game)) for game in games)
    made = None if science else _how_made(Path(settings.env_data_root))
    panel = Panel(Path(settings.out_json).stem, settings.env, resolve_split(settings.split), made, entries)
    write_json(settings.out_json, {"env": panel.env, "split": panel.split, "made": panel.made,
                                   "games": [dataclasses.asdict(entry) for entry in panel.entries]})
    return panel


def _how_made(root: Path) -> dict[str, Any] | None:
    """The generator's settings, where it made the games in ``root``."""
    config = recorded(root)["config"] if (root / RECORD).is_file() else {}
    if config.get("generator") != GENERATOR:
        return None
    return {name: config[name] for name in MADE}


def main() -> None:
    settings = parse_settings(PanelSettings, prog="python -m itp.envs.panel", description=__doc__)
    panel = write_panel(settings)
    log.info("%s: panel %s of %d games, hash %s", settings.out_json, panel.name, len(panel.entries), panel.hash)


if __name__ == "__main__":
    run_main(main)
