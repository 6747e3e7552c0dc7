"""Result files: one JSON a game, in the schema that users of the public release parse.

``{idx}.json`` is a game's first trial.  Where a game is played several times, ``{idx}.t1.json``, ``{idx}.t2.json``, ...
are the trials after it.  A file appears whole or not at all, so that one that exists is a finished episode.
:class:`Result` is a whole folder of them, as reports read it.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foresight_eval.record_check import PLAY_AGAIN, read_record
from foresight_eval.settings import AlfworldSettings, SciworldSettings
from itp.config import by_own_names, flags_that
from itp.envs.alfworld.games import ALFWORLD_TASK_TYPES, golden_steps
from itp.envs.panel import game_hash
from itp.errors import UserError
from itp.files import read_object, short_names, write_json
from itp.lm.base import Usage
from itp.methods.base import EarlierTrial
from itp.methods.settings import NEED_WORLD_MODEL
from itp.rollout import Episode, Step
from itp.run_dir import RECORD
from itp.text.state import ACTION, OBSERVATION, parse

BUCKETS = ("Pick", "Look", "Clean", "Heat", "Cool", "Pick2")
SAME_GAMES = ("policy_fingerprint", "action_selection", *dict.fromkeys(
    name for settings in (AlfworldSettings, SciworldSettings)
    for name in flags_that(settings, lambda about: about.selects_games)))
"""Settings by which two results are those of the same policy on the same games; not every program has all."""


_TRIAL_NAME = re.compile(r"[0-9]+(\.t[1-9][0-9]*)?")
NO_RESULTS = "not a result folder (no config.json of an evaluation); give what --out_dir named"


def bucket(task_type: str) -> str:
    """The column that a task type is counted in: ALFWorld's by the paper's names, ScienceWorld's tasks as they are."""
    if task_type not in ALFWORLD_TASK_TYPES:
        return task_type
    if task_type.startswith("pick_two_obj"):
        return "Pick2"
    for part, name in (("clean", "Clean"), ("heat", "Heat"), ("cool", "Cool")):
        if part in task_type:
            return name
    return "Look" if task_type.startswith("look") else "Pick"


def write_episode(folder: Path, index: int, episode: Episode) -> dict[str, Any]:
    """Write the file of a finished episode; returns what it holds."""
    record = episode_record(index, episode)
    write_json(trial_file(folder, index, episode.trial), record)
    return record


def forget_later_trials(folder: Path, index: int, trial: int) -> None:
    """Remove the files of a game's trials after ``trial``: they built on what is played again now."""
    for file in folder.glob(f"{index}.t*.json"):
        if _TRIAL_NAME.fullmatch(file.stem) and int(file.stem.partition(".t")[2]) > trial:
            file.unlink()


def write_note(folder: Path, index: int, trial: int, note: str, usage: dict[str, Usage]) -> None:
    """Add to an episode's file what the method said when it looked back on it."""
    file = trial_file(folder, index, trial)
    asked = {role: dataclasses.asdict(spent) for role, spent in sorted(usage.items())}
    write_json(file, read_record(file) | {"look_back": {"note": note, "usage": asked}})


def read_episodes(folder: Path) -> dict[int, dict[str, Any]]:
    """The first trials of a result folder, by index.  Raises UserError for a file that isn't the record of one."""
    return {index: trials[0] for index, trials in read_trials(folder).items()}


def read_trials(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """All trials of every game of a result folder, by index.  Raises UserError for a file that isn't one's record."""
    return {index: [read_record(file) for file in trial_files(folder, index)] for index in episode_files(folder)}


def trial_file(folder: Path, index: int, trial: int = 0) -> Path:
    """The file of a game's ``trial``-th episode, counted from 0."""
    return folder / (f"{index}.t{trial}.json" if trial else f"{index}.json")


def episode_files(folder: Path) -> dict[int, Path]:
    """The files of first trials, by index."""
    files = {int(file.stem): file for file in folder.glob("*.json") if file.stem.isdecimal()}
    return dict(sorted(files.items()))


def trial_files(folder: Path, index: int) -> list[Path]:
    """The files of a game's trials, in order, up to the first that is missing."""
    return list(itertools.takewhile(Path.exists, (trial_file(folder, index, t) for t in itertools.count())))


def all_trial_files(folder: Path) -> list[Path]:
    """Every file of an episode, in no order."""
    return [file for file in folder.glob("*.json") if _TRIAL_NAME.fullmatch(file.stem)]


def earlier_trial(record: dict[str, Any], where: object) -> EarlierTrial:
    """What a method is told of an ended trial.  Raises UserError, which begins with ``where``."""
    if not record["conversations"]:  # of a version that wrote no first observation where there was no step
        raise UserError(f"{where}: no first observation, which the next trial needs; {PLAY_AGAIN}")
    state = parse(record["conversations"][0]["value"])
    for step in record["foresight_steps"]:
        state = state.after(step["action"], step["obs_next"])
    return EarlierTrial(state, tuple(step["invalid"] for step in record["foresight_steps"]),
                        record["meta"]["success"], record.get("look_back", {}).get("note", ""))


@dataclass(frozen=True)
class Result:
    """A result folder: ``config`` it was made with, ``summary``, ``records`` of first trials by index.

    ``summary``: see :func:`foresight_eval.summary.summarize`.  ``later``: the other trials of a game, by index.
    Whatever isn't said to be of all trials is of the first.
    """

    name: str
    config: dict[str, Any]
    summary: dict[str, Any]
    records: dict[int, dict[str, Any]]
    later: dict[int, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)

    @property
    def trials(self) -> dict[int, list[dict[str, Any]]]:
        """All trials of every game, by index."""
        return {index: [record, *self.later.get(index, ())] for index, record in self.records.items()}

    @property
    def title(self) -> str:
        """The name that tables and figures show."""
        return self.name + self.mark

    @property
    def mark(self) -> str:
        """What is shown behind the name where the game itself was the world model; else nothing."""
        return f": {self.config['world_model']}" if self.config.get("world_model") else ""

    @property
    def panel(self) -> str:
        """The name and hash of the panel that was played; empty where the games are no panel's."""
        return " ".join(panel_of(self.config).values())

    @property
    def metas(self) -> list[dict[str, Any]]:
        """``meta`` of every game's record, in the order of the games."""
        return [record["meta"] for record in self.records.values()]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The steps of all records."""
        return [step for record in self.records.values() for step in record["foresight_steps"]]

    @property
    def outcomes(self) -> dict[tuple[str, str], bool]:
        """(split, game) -> was it solved."""
        return self.outcomes_within(1)

    def outcomes_within(self, k: int) -> dict[tuple[str, str], bool]:
        """(split, game) -> was it solved in any of its first ``k`` trials."""
        return {(trials[0]["meta"]["split"], trials[0]["meta"]["game_id"]):
                any(record["meta"]["success"] for record in trials[:k]) for trials in self.trials.values()}

    @property
    def setting(self) -> tuple[Any, ...]:
        """What two results must share for their costs to be compared: settings, and the games that were played."""
        return *(str(self.config.get(key)) for key in SAME_GAMES), frozenset(self.outcomes)

    @property
    def fixed_k(self) -> int | None:
        """The K that it was made to imagine at every step; None where it could choose, or where K isn't its cost."""
        method, fixed = self.config["method"], self.config["fixed_k"]
        if method == "sft" or method == "foresight" and self.config["disable_wm"]:
            return 0
        return fixed if method == "foresight" and fixed >= 0 else None

    @property
    def world_model(self) -> tuple[str, ...] | None:
        """What tells the world model that it asked from others; None where it asked none."""
        config = self.config
        if config["method"] not in NEED_WORLD_MODEL or self.fixed_k == 0:
            return None
        if config["method"] == "implement" and not config.get("implement_imagination", True):
            return None
        # The fingerprint is that of a model in our own process, and the others name one on a server.
        return tuple(str(config.get(key)) for key in ("wm_fingerprint", "wm_backend", "wm_api_base_url",
                                                      "wm_api_model"))


def by_fixed_k(results: Sequence[Result]) -> dict[tuple[Any, ...], dict[int, Result]]:
    """(setting, world model) -> K -> the result of that policy, on these games, with K fixed.

    A result without imagination belongs to the group of every world model.  Without such a group it belongs to none.
    """
    fixed = [result for result in results if result.fixed_k is not None]
    groups: dict[tuple[Any, ...], dict[int, Result]] = {}
    for result in fixed:
        if result.world_model is not None:
            groups.setdefault((result.setting, result.world_model), {}).setdefault(result.fixed_k, result)
    for result in fixed:
        for (setting, _), by_k in groups.items():
            if result.fixed_k == 0 and result.setting == setting:
                by_k.setdefault(0, result)
    return groups


def mean_k_by_golden_steps(result: Result) -> dict[int, list[float]]:
    """Length of the expert's solution -> the mean k of each episode that has one of that length."""
    by_length: dict[int, list[float]] = {}
    for record in result.records.values():
        # Recorded since there is a column for it; some games come without a solution.
        if (length := record["meta"].get("golden_steps")) and record["foresight_steps"]:
            ks = [step["k"] for step in record["foresight_steps"]]
            by_length.setdefault(length, []).append(sum(ks) / len(ks))
    return by_length


def panel_of(config: Mapping[str, Any]) -> dict[str, str]:
    """``name`` and ``hash`` of the panel that was played; empty where the games are no panel's."""
    found = config.get("panel_hash")
    return {"name": Path(config["panel"]).stem, "hash": found} if found else {}


def read_config(folder: Path) -> dict[str, Any]:
    """What an evaluation was made with, by the flags' own names.  Raises UserError where that isn't on record."""
    record = read_object(folder / RECORD) if (folder / RECORD).is_file() else {}
    if not isinstance(record.get("config"), dict) or "method" not in record["config"]:
        raise UserError(f"{folder}: {NO_RESULTS}")
    config = by_own_names(record["config"], AlfworldSettings, SciworldSettings)
    if missing := [name for name in ("fixed_k", "disable_wm", "max_k") if name not in config]:
        raise UserError(f"{folder}: {NO_RESULTS} ({RECORD} has no {', '.join(missing)})")
    return config


def read_results(folders: Sequence[Path]) -> list[Result]:
    """Result folders that have their ``summary.json``, by names that tell them apart.

    The summary's cost is that of ``cost.json``.
    """
    configs = [read_config(folder) for folder in folders]
    trials = [read_trials(folder) for folder in folders]
    return [Result(name, config, _summary(folder), {i: each[0] for i, each in played.items()},
                   {i: each[1:] for i, each in played.items() if len(each) > 1})
            for name, config, folder, played in zip(short_names(folders), configs, folders, trials, strict=True)]


def _summary(folder: Path) -> dict[str, Any]:
    return read_object(folder / "summary.json") | {"cost": read_object(folder / "cost.json")}


def episode_record(index: int, episode: Episode) -> dict[str, Any]:
    """What is written of an episode.  ``meta.error`` holds the game file, as in the public release."""
    game = episode.game
    return {
        "meta": {
            "steps": len(episode.steps),
            "reward": sum(step.reward for step in episode.steps),
            "score": episode.score,
            "finished": episode.reason not in ("step_limit", "prompt_too_long"),
            "success": episode.success,
            "terminate_reason": episode.reason,
            "error": game.path,
            "game_id": game.game_id,
            "split": game.split,
            "game_hash": game_hash(game),
            **({"trial": episode.trial} if episode.trial else {}),
            "task_type": game.task_type,
            "golden_steps": golden_steps(game),
            "restarts": episode.restarts,
            "invalid_actions": sum(step.invalid for step in episode.steps),
            "unparsed_actions": sum(not step.decision.parsed for step in episode.steps),
            **(_sciworld_meta(index, episode) if game.env == "scienceworld" else {}),
            "usage": {role: dataclasses.asdict(usage) for role, usage in sorted(episode.usage.items())},
        },
        "conversations": _conversations(episode),
        "foresight_steps": [_step_record(index, t, step) for t, step in enumerate(episode.steps)],
    }


def _sciworld_meta(index: int, episode: Episode) -> dict[str, Any]:
    """What users of the public release look for in a ScienceWorld result, and the best score on the way."""
    task, variation, simplification = episode.game.path.split("/")
    return {"episode_index": index, "task_id": task, "sub_task_name": task, "variation_idx": int(variation),
            "simplification": simplification,
            "raw_score": episode.steps[-1].info["raw_score"] if episode.steps else 0,
            "best_score": episode.steps[-1].info["best_score"] if episode.steps else 0}


def _conversations(episode: Episode) -> list[dict[str, str]]:
    first = episode.steps[0].state if episode.steps else episode.first
    turns = [{"from": "human", "value": first.render()}] if first else []
    for step in episode.steps:
        turns.append({"from": "gpt", "value": ACTION + step.decision.action})
        turns.append({"from": "human", "value": OBSERVATION + step.observation})
    return turns


def _step_record(index: int, t: int, step: Step) -> dict[str, Any]:
    decision = step.decision
    imagined = decision.imagined.steps if decision.imagined else ()
    return {
        "episode_id": index,
        "t": t,
        "k": decision.k,
        "k_raw_output": decision.k_raw,
        "k_logprobs": decision.k_logprobs,
        "value": decision.value,
        "foresight_text": decision.imagined.text() if decision.imagined else "",
        "wm_raw_output": [observation for _, observation in imagined],
        "imagined_actions": [action for action, _ in imagined],
        "reflection": decision.reflection,
        "thought": decision.thought,
        "action": decision.action,
        "policy_raw_output": decision.raw,
        "action_logprob": decision.logprob,
        "considered": [{"action": a, "value": value, "tries": n} for a, value, n in decision.considered],
        **({"revision": dataclasses.asdict(decision.revision)} if decision.revision else {}),
        "obs_next": step.observation,
        "done": step.done,
        "invalid": step.invalid,
        **({"score": step.score, "raw_score": step.info["raw_score"], "completed": step.info["completed"]}
           if "raw_score" in step.info else {}),
        "usage": {role: dataclasses.asdict(usage) for role, usage in sorted(step.usage.items())},
        "info": {"reward": step.reward, "score": step.score, "seconds": round(step.seconds, 4)},
    }
