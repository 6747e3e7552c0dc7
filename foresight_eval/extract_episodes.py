"""Training data from the episodes of result folders, so that a policy can learn from what a method found out.

    python -m foresight_eval --split train --method implement ... --output_path runs/round_1/play
    python -m foresight_eval.extract_episodes --results runs/round_1/play --out_dir runs/round_1/data

``OUT_DIR`` then holds ``transitions.jsonl`` (:mod:`itp.transitions`), with which a world model trains, and
``dialogues.json`` (:mod:`itp.text.dialogues`), with which a policy trains.  In an episode that was solved, the action
of each step is the one to imitate, except where the environment refused it.  In others nothing is to be imitated, and
they aren't among the dialogues.

Played by a method that is better than the policy alone, this is expert iteration (Anthony et al., 2017): planning
improves on the policy, and the policy learns from the plans that worked.  No expert is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foresight_eval.results import read_config, read_trials
from itp.config import flag, parse_settings
from itp.errors import UserError
from itp.files import check_output_folder, short_names, write_json
from itp.program import run_main, say_next
from itp.text.dialogues import episode_dialogue
from itp.text.state import parse
from itp.transitions import Transition, write_transitions


@dataclass
class EpisodesSettings:
    results: str = flag(help="result folder of an evaluation; several, separated by commas")
    out_dir: str = flag(help="folder for transitions.jsonl and dialogues.json")
    split: str = flag("train", help="split that the results must be of, so that no held-out game becomes training data")


def main() -> None:
    settings = parse_settings(EpisodesSettings, prog="python -m foresight_eval.extract_episodes", description=__doc__)
    check_output_folder(settings.out_dir)
    out = Path(settings.out_dir)
    episodes = list(_episodes([Path(folder) for folder in settings.results.split(",")], settings.split))
    solved = [episode for episode in episodes if episode[-1].success]
    if not solved:
        raise UserError(f"{settings.results}: none of {len(episodes)} episodes was solved, so there is nothing to "
                        "imitate; play more games, or with a better method")
    rows = write_transitions(out / "transitions.jsonl", (step for episode in episodes for step in episode))
    write_json(out / "dialogues.json", [episode_dialogue(episode) for episode in solved])
    print(f"{len(episodes)} episodes, {rows} transitions; {len(solved)} were solved and became dialogues: {out}")
    say_next(f"python -m itp.training.base_policy --train_json {out / 'dialogues.json'} --model_path DIR --out_dir DIR")


def _episodes(folders: list[Path], split: str) -> Iterator[list[Transition]]:
    """All episodes with at least one step, of every trial.  Raises UserError for a folder of another split.

    An id is the game's, and behind ``#`` the folder and the trial: so the episodes of a game belong together.
    """
    for folder, name in zip(folders, short_names(folders)):
        config = read_config(folder)
        if config["split"] != split:
            raise UserError(f"{folder}: played the split {config['split']}, not {split}; say --split "
                            f"{config['split']} if these games are to be learned from")
        for trials in read_trials(folder).values():
            for trial, record in enumerate(trials):
                if record["foresight_steps"]:
                    yield record_transitions(record, f"{record['meta']['game_id']}#{name}.{trial}", config["method"])


def record_transitions(record: dict[str, Any], episode_id: str, method: str) -> list[Transition]:
    """An episode's record in the schema of trajectory data."""
    meta, steps, state = record["meta"], record["foresight_steps"], parse(record["conversations"][0]["value"])
    transitions = []
    for t, step in enumerate(steps):
        imitate = step["action"] if meta["success"] and not step["invalid"] else ""
        transitions.append(Transition(episode_id, t, state.render(), step["action"], step["obs_next"], imitate,
                                      step["info"]["reward"], t == len(steps) - 1, meta["success"],
                                      meta["task_type"], method))
        state = state.after(step["action"], step["obs_next"])
    return transitions


if __name__ == "__main__":
    run_main(main)
