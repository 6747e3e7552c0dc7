r"""What the episodes of result folders tell about their rooms, as IMPLEMENT's files of conditions.

    python -m foresight_eval.extract_conditions --results runs/eval/implement --out_dir runs/conditions

``OUT_DIR`` then holds ``object_lists.json`` and ``failed_actions.json`` (:mod:`itp.text.conditions`), whose keys are
the ids of the games.  All trials of one game, of all folders, are of one room.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from foresight_eval.results import earlier_trial, read_config, read_trials
from itp.config import flag, parse_settings
from itp.errors import UserError
from itp.files import check_output_folder
from itp.program import run_main
from itp.text.alfworld_phrases import receptacles
from itp.text.conditions import FAILED_ACTIONS, OBJECT_LISTS, Conditions, write_conditions


@dataclass
class ExtractSettings:
    results: str = flag(help="result folder of an evaluation on ALFWorld; several, separated by commas")
    out_dir: str = flag(help=f"folder for {OBJECT_LISTS} and {FAILED_ACTIONS}")


def main() -> None:
    settings = parse_settings(ExtractSettings, prog="python -m foresight_eval.extract_conditions", description=__doc__)
    check_output_folder(settings.out_dir)
    rooms: dict[str, Conditions] = {}
    for folder in map(Path, settings.results.split(",")):
        read_config(folder)  # refuses what isn't a result folder
        for record in itertools.chain.from_iterable(read_trials(folder).values()):
            if not record["conversations"]:
                continue  # an episode of no steps, of a version that didn't write its first observation
            trial = earlier_trial(record, folder)
            if receptacles(trial.state.first):
                game = record["meta"]["game_id"]
                rooms[game] = rooms.get(game, Conditions()) + Conditions.of(trial.state, trial.invalid)
    if not rooms:
        raise UserError(f"{settings.results}: holds no episode of ALFWorld")
    write_conditions(settings.out_dir, rooms)
    print(f"{len(rooms)} games, {sum(len(room.object_lists) for room in rooms.values())} object lists, "
          f"{sum(len(room.failed) for room in rooms.values())} failed actions: {settings.out_dir}")


if __name__ == "__main__":
    run_main(main)
